"""How many prompts are encoded and stored if images have the same captions: arithmetic, over shards as they are cut.

    python benchmarks/repeated_prompts.py                      # 100,000 images, FLUX.1 at 1024

For each way that captions may be: prompts that are encoded and stored if each shard has its own, and their bytes in
float16; against those of a run, where each prompt of several shards is in one cond file.
"""

import random
from collections import Counter
from collections.abc import Callable
from typing import Annotated

import typer
from results import Results, run

from latentprep.geometry import Geometry
from latentprep.prepare.models.families import FAMILIES
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.plan.plan import RowBytes, cut_rows
from latentprep.records import Item

WIDTHS = {"FLUX.1": (4096, 768), "Stable Diffusion 3": (4096, 2048), "SDXL": (2048, 1280)}  # of a token, and pooled
CHANNELS = {"FLUX.1": 16, "Stable Diffusion 3": 16, "SDXL": 4}


def bytes_of_prompt(name: str) -> int:
    """Bytes of a prompt's cond in 16 bits."""
    family = next(family for family in FAMILIES if family.name == name)
    width, pooled = WIDTHS[name]
    per_token = width + (3 if "text_ids" in family.names else 0)
    return 2 * (family.stored_tokens(family.num_tokens(None, 77), 77) * per_token + pooled)


def cut(count: int, name: str, resolution: int, shard_bytes: int) -> list[list[int]]:
    """Numbers of the images of each shard."""
    geometry = Geometry.from_options(resolution=str(resolution))
    place, draw, rows = make_place(geometry, 8), random.Random(0), []
    for n in range(count):
        size = (draw.randint(resolution, 2 * resolution), draw.randint(resolution, 2 * resolution))
        rows.append((Item(str(n), size, 1, 1), place(size)))
    rows.sort(key=lambda row: (row[1].bucket, row[0].key))
    row_bytes = RowBytes(2 * CHANNELS[name] * 2 + 2, bytes_of_prompt(name) + 512, 8)
    return [[int(item.key) for item, _ in unit] for unit in cut_rows(rows, row_bytes, shard_bytes)]


def main(
    results: Results,
    count: Annotated[int, typer.Option(help="Images.")] = 100_000,
    family: Annotated[str, typer.Option(help="One of " + ", ".join(WIDTHS) + ".")] = "FLUX.1",
    resolution: Annotated[int, typer.Option(help="Of the buckets, in pixels.")] = 1024,
    shard_megabytes: Annotated[int, typer.Option(help="Largest size of a shard file.")] = 256,
) -> None:
    draw, shards = random.Random(1), cut(count, family, resolution, shard_megabytes * 1_000_000)
    nbytes = bytes_of_prompt(family)
    results.table("the cache", {"shards": "", "cond of a prompt": "MB"}).add(family, len(shards), nbytes / 1e6)
    captions: dict[str, Callable[[int], int]] = {
        "every caption its own": lambda n: n,
        "one class prompt": lambda n: 0,
        "1,000 class captions": lambda n: draw.randrange(1000),
    }
    columns = {"if each shard has its own": "", "they take": "GB", "in a run": "", "these take": "GB"}
    table = results.table("prompts that are encoded and stored", columns)
    for name, caption_of in captions.items():
        caption = [caption_of(n) for n in range(count)]
        of_shard = [{caption[n] for n in shard} for shard in shards]
        stored = Counter(prompt for prompts in of_shard for prompt in prompts)
        own, shared = stored.total(), len(stored)
        table.add(name, own, own * nbytes / 1e9, shared, shared * nbytes / 1e9)


if __name__ == "__main__":
    run(main)
