"""How fast a source of a million files is listed and planned: for a new cache, and once more with nothing to do.

    python benchmarks/listing.py                       # 1,000,000 files
    python benchmarks/listing.py --count 100000
    python benchmarks/listing.py --captions            # each image has its caption in a .txt of its own

What is faked: the files are hard links to 300 small JPEGs of 300 sizes (a third with EXIF), and to 100 captions, in
folders of 1,000, and all of it is in memory. The cache that knows them all has latents of zeros, which no VAE has made;
its files are written by the project's own code. There is no cond.

Each run is a process of its own. It lists a folder of 1,000 first, so that what is imported counts neither as time nor
as memory; memory is the peak of the resident set, as the kernel counts it. The first run is `prepare`, which ends in a
plan; the second is all of `latentprep encode`. Time is that of the processor, since a machine may have other work.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from multiprocessing import get_context
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from encode import NoBar
from PIL import Image
from results import Results, run

from latentprep.cache.group import LatentGroup
from latentprep.cache.latents import Latents, write_latents
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.prepare.devices import quiet_libraries
from latentprep.prepare.encode import list_text_tasks
from latentprep.prepare.engine import run as run_tasks
from latentprep.prepare.finish import finish
from latentprep.prepare.outcome import collect
from latentprep.prepare.survey import Prepared, prepare
from latentprep.prepare.work.events import LatentsResult
from latentprep.prepare.work.rows import group_label
from latentprep.progress import Silent
from latentprep.records import Item, Placement, Size, Unit
from latentprep.runs import run_encode

SIZES, TEXTS, A_FOLDER = 300, 100, 1000
SHARD_BYTES = 1_000_000  # about 1,500 images a shard, as of Stable Diffusion 1.5 at 512 in 256 MB


def draw_tree(root: Path, count: int, captions: bool) -> None:
    """A folder of so many images, in folders of 1,000."""
    drawn = root.with_name(f"{root.name}-drawn")
    drawn.mkdir()
    random = np.random.default_rng(0)
    for n in range(SIZES):
        size = random.integers(64, 400, 2)
        exif = Image.Exif()
        if n % 3 == 0:
            exif[0x010F], exif[0x0112] = "a camera", 1 + n // 3 % 8
        pixels = random.integers(0, 256, (*size // 16, 3), np.uint8)
        Image.fromarray(pixels).resize(size.tolist()).save(drawn / f"{n}.jpg", exif=exif)
    for n in range(TEXTS):
        (drawn / f"{n}.txt").write_text(f"a house by lake {n}, seen from the east")
    for start in range(0, count, A_FOLDER):
        folder = root / f"{start // A_FOLDER:05}"
        folder.mkdir(parents=True)
        for n in range(start, min(count, start + A_FOLDER)):
            os.link(drawn / f"{n % SIZES}.jpg", folder / f"{n:07}.jpg")
            if captions:
                os.link(drawn / f"{n % TEXTS}.txt", folder / f"{n:07}.txt")


def options_of(images: Path, cache: Path) -> EncodeOptions:
    return EncodeOptions(
        images, str(cache), Geometry.from_options(resolution="64", bucket_step=8), TextOptions(include_cond=False),
        model="tiny", device="cpu", dtype="float32", store="mean", shard_bytes=SHARD_BYTES,
    )  # fmt: skip


@dataclass(frozen=True)
class Zeros:
    """A worker that gives latents of zeros, without an image having been decoded."""

    prepared: Prepared
    device: str = "cpu"

    def run(self, units: Iterable[Unit]) -> Iterator[LatentsResult]:
        storage, metadata = Storage(self.prepared.options.out), self.prepared.latents_worker().metadata
        for unit in units:
            pairs = zip(unit.items, unit.placements, strict=True)
            groups = [
                self.make_group(bucket, *zip(*own, strict=True))
                for bucket, own in groupby(pairs, key=lambda pair: pair[1].bucket)
            ]
            latents = Latents(groups, metadata)
            shard = Shard(unit.id, latents.table(), write_latents(storage, unit.id, latents))
            yield LatentsResult(unit.id, shard, (), num_encoded=len(unit.items))

    def make_group(self, bucket: Size, items: Sequence[Item], placements: Sequence[Placement]) -> LatentGroup:
        count, (height, width), factor = len(items), bucket, self.prepared.facts.factor
        return LatentGroup(
            group_label(bucket),
            latent_mean=torch.zeros(count, 1, self.prepared.facts.channels, height // factor, width // factor).half(),
            original_size=torch.tensor([item.size for item in items], dtype=torch.int32),
            resized_size=torch.tensor([[own.resized_size] for own in placements], dtype=torch.int32),
            crop=torch.tensor([[own.crop] for own in placements], dtype=torch.int32),
            flipped=torch.zeros(1, dtype=torch.uint8),
            digest=torch.zeros(count, 16, dtype=torch.uint8),
            key=[item.key for item in items],
            nbytes=torch.tensor([item.nbytes for item in items]),
            version=torch.tensor([item.version for item in items]),
        )


def write_cache(options: EncodeOptions) -> None:
    """A cache that has all images of a source."""
    prepared = prepare(options, Silent())
    latents = collect(Zeros(prepared).run(prepared.plan.units), NoBar(0, ""))
    texts = collect(
        run_tasks(prepared.text_worker(), list_text_tasks(prepared, latents.latents), prepared.where), NoBar(0, "")
    )
    finish(prepared, latents, texts, 0.0, 0.0)


def peak() -> int:
    """Bytes of this process's resident set at its largest."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


def measure(few: Path, many: Path, is_again: bool) -> tuple[float, int]:
    """Seconds of the processor that a run over `many` files takes, and bytes of memory more than one over `few`."""
    call = encode_again if is_again else plan_first
    call(few)
    before, started = peak(), time.process_time()
    call(many)
    return time.process_time() - started, peak() - before


def plan_first(images: Path) -> None:
    prepare(options_of(images, images.with_name("none")), Silent())


def encode_again(images: Path) -> None:
    found = run_encode(options_of(images, images.with_name(f"{images.name}-cache")), Silent(), dry_run=False)
    assert found.num_encoded == found.num_retexted == 0, found.report


def in_process(few: Path, many: Path, is_again: bool) -> tuple[float, int]:
    """`measure`, in a process of its own."""
    with ProcessPoolExecutor(1, get_context("spawn")) as process:
        return process.submit(measure, few, many, is_again).result()


def main(
    results: Results,
    count: Annotated[int, typer.Option(help="Files of the source.")] = 1_000_000,
    captions: Annotated[bool, typer.Option("--captions", help="Each image has its caption in a .txt.")] = False,
    rounds: Annotated[int, typer.Option(help="Runs of each kind, of which the median counts.")] = 1,
) -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as temporary:
        few, many = Path(temporary) / "few", Path(temporary) / "many"
        for images, size in ((few, A_FOLDER), (many, count)):
            draw_tree(images, size, captions)
            write_cache(options_of(images, images.with_name(f"{images.name}-cache")))
        table = results.table(
            f"a folder of {count:,} images", {"files": "files/s", "memory a file": "bytes", "as fast": "times"}
        )
        runs = [[in_process(few, many, is_again) for is_again in (False, True)] for _ in range(rounds)]
        medians = [statistics.median(seconds for seconds, _ in own) for own in zip(*runs, strict=True)]
        peaks = [max(nbytes for _, nbytes in own) for own in zip(*runs, strict=True)]
        for what, seconds, nbytes in zip(("planned for a new cache", "nothing to do"), medians, peaks, strict=True):
            table.add(what, count / seconds, nbytes / count, medians[0] / seconds)


if __name__ == "__main__":
    run(main)
