"""How fast a training loop reads: LatentLoader against the limit, an index_select from RAM.

    python benchmarks/read.py

Samples as of Stable Diffusion 1.5 at 512x512 (mean, std and cond in float16: 184 kB each), random order, one process,
warm files. Both contenders run in turn on the same samples; compare the ratios.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer

from latentprep import LatentDataset, LatentLoader
from latentprep.cache.manifest import Manifest, commit
from latentprep.cache.shard import LatentGroup, ShardEntry, Text, TextGroup, write_latents, write_text, write_uncond
from latentprep.cache.storage import Storage

SHAPE = (4, 64, 64)


def write_cache(folder: Path, num_shards: int, rows: int) -> None:
    """A cache of random numbers in the real format, a prompt of its own for each sample."""
    storage = Storage(folder)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    entries = []
    for n in range(num_shards):
        sizes = torch.full((rows, 2), 512, dtype=torch.int32)
        crop = torch.tensor([0, 0, 512, 512], dtype=torch.int32).repeat(rows, 1, 1)
        latents = LatentGroup(
            label="h512w512",
            latent_mean=noise(rows, 1, *SHAPE),
            latent_std=noise(rows, 1, *SHAPE).abs(),
            weight=None,
            original_size=sizes,
            resized_size=sizes[:, None].clone(),
            crop=crop,
            flipped=torch.zeros(1, dtype=torch.uint8),
            digest=torch.randint(0, 256, (rows, 16), dtype=torch.uint8, generator=generator),
        )
        names = [f"{n}/{row}.jpg" for row in range(rows)]
        prompt_of = np.arange(rows, dtype=np.int32)[:, None]
        group = TextGroup(
            "h512w512", names, [[name] for name in names], prompt_of, np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        )
        text = Text([group], names, {"prompt_embeds": noise(rows, 77, 768)})
        stamps = write_latents(storage, f"u{n}", [latents], {}), write_text(storage, f"u{n}", "t", text, {})
        entries.append(ShardEntry(f"u{n}", "t", (("h512w512", rows, SHAPE),), *stamps))
    uncond = write_uncond(storage, {"prompt_embeds": noise(1, 77, 768)}, {})
    latents_recipe = {
        "vae": "", "geometry": {}, "views": ["plain"], "dtype": "float32", "store": "mean+std",
        "store_dtype": "float16",
    }  # fmt: skip
    recipe = {"latents": latents_recipe, "text": {}, "libraries": {}}
    latent = {"scaling_factor": 0.18215, "shift_factor": 0.0, "factor": 8, "channels": 4, "views": ["plain"]}
    commit(storage, Manifest(recipe, latent, {"model": ""}, entries, uncond_file=uncond), [])


def main(
    num_shards: Annotated[int, typer.Option(help="Shards of the cache.")] = 4,
    rows: Annotated[int, typer.Option(help="Samples in each.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 32,
    rounds: Annotated[int, typer.Option(help="Counted epochs of each contender.")] = 5,
) -> None:
    count = num_shards * rows
    with tempfile.TemporaryDirectory() as folder:
        write_cache(Path(folder), num_shards, rows)
        generator = torch.Generator().manual_seed(0)
        ram = [torch.randn(count, *shape, generator=generator).half() for shape in (SHAPE, SHAPE, (77, 768))]

        def limit() -> None:
            for chosen in torch.randperm(count).split(batch_size):
                for tensor in ram:
                    tensor.index_select(0, chosen)

        def read(method: str, draw: bool) -> Callable[[], None]:
            loader = LatentLoader(LatentDataset(folder, latent_sampling_method=method), batch_size)

            def epoch() -> None:
                for batch in loader:
                    if draw:
                        _ = batch.latent_sample

            return epoch

        contenders = {
            "index_select from RAM: the limit": limit,
            "LatentLoader, deterministic: mean and cond": read("deterministic", draw=False),
            "LatentLoader, random: mean, std and cond": read("random", draw=False),
            "LatentLoader, random, and the draw on the CPU": read("random", draw=True),
        }
        times: dict[str, list[float]] = {name: [] for name in contenders}
        for n in range(rounds + 1):
            for name, epoch in contenders.items():
                started = time.perf_counter()
                epoch()
                if n:
                    times[name].append(time.perf_counter() - started)
    print(f"{count} samples of 184 kB, batch {batch_size}, one process, torch {torch.__version__}")
    print(f"{'':48} {'samples/s':>10} {'of limit':>9}")
    base = statistics.median(times["index_select from RAM: the limit"])
    for name, values in times.items():
        seconds = statistics.median(values)
        print(f"{name:48} {count / seconds:10,.0f} {base / seconds:9.0%}")


if __name__ == "__main__":
    typer.run(main)
