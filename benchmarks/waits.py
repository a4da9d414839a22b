"""How long a device waits for the rest of `latentprep encode`: a stand-in for a fast GPU, and a VAE of no cost.

    python benchmarks/waits.py

Both devices are faked. The first takes a batch of 8 images of 512x512 in 25 ms, an H100's rate, and leaves the cores
alone meanwhile: what counts is the share of the time that it is busy. Its images are BMP files of 512x512. The second
takes no time: what counts is how many images come, against what the threads that decode give by themselves. Its images
are JPEG files of 1600x1200. Both write latents of the right shape. All runs are in one process.
"""

import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from drawn import draw
from results import Results, run

from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.prepare.devices import BatchLimit, quiet_libraries
from latentprep.prepare.images.load import load_pixels
from latentprep.prepare.models.vae_encoder import Posterior
from latentprep.prepare.survey import Prepared, prepare
from latentprep.prepare.work.events import Failure, Step
from latentprep.progress import Silent

SIDE, BATCH = 512, 8


class StandIn:
    """What encodes images as fast as a device of that speed would; it sleeps meanwhile."""

    num_retried = 0

    def __init__(self, seconds: float) -> None:
        self.seconds, self.busy, self.limit = seconds, 0.0, BatchLimit()
        self.first = self.last = 0.0  # when it began, and when it ended

    def start(self, pixels: Any) -> Posterior:
        """pixels [N,H,W,3] => mean and std [N,4,H/8,W/8] of zeros and ones."""
        begun = time.perf_counter()
        self.first = self.first or begun
        count, height, width, _ = pixels.shape
        time.sleep(self.seconds * count / BATCH)
        shape = (count, 4, height // 8, width // 8)
        posterior = Posterior(torch.zeros(shape), torch.ones(shape))
        self.last = time.perf_counter()
        self.busy += self.last - begun
        return posterior

    def finish(self, started: Posterior, pixels: Any) -> Posterior:
        return started


class Model:
    """A model that opens as a stand-in."""

    def __init__(self, encoder: StandIn) -> None:
        self.encoder = encoder

    def open(self, *_: Any, **__: Any) -> StandIn:
        return self.encoder


def plan(images: Path, cache: Path) -> Prepared:
    options = EncodeOptions(
        images, str(cache), Geometry.from_options(resolution=str(SIDE)), TextOptions(include_cond=False), model="tiny",
        batch_size=BATCH, store_dtype="float16",
    )  # fmt: skip
    return prepare(options, Silent())


def encode(prepared: Prepared, encoder: StandIn) -> float:
    """Seconds of the images' pass."""
    worker = replace(prepared.latents_worker(), vae=Model(encoder))
    started = time.perf_counter()
    for event in worker.run(prepared.plan.units):
        if isinstance(event, Failure):
            raise SystemExit(event.error)
        assert isinstance(event, Step) or event.num_found == 0
    return time.perf_counter() - started


def decode(prepared: Prepared) -> float:
    """Seconds that the threads take to decode all images, and nothing else."""
    options = prepared.load_options
    started = time.perf_counter()
    with ThreadPoolExecutor(prepared.threads) as pool:
        for _ in pool.map(lambda pair: load_pixels(*pair, options), prepared.plan.rows()):
            pass
    return time.perf_counter() - started


def folders(root: Path) -> Iterator[Path]:
    """A new folder for each cache."""
    for n in range(1_000_000):
        yield root / f"cache{n}"


def main(
    results: Results,
    count: Annotated[int, typer.Option(help="Images of each kind.")] = 600,
    rounds: Annotated[int, typer.Option(help="Runs of each.")] = 3,
) -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        caches = folders(root)
        draw(root / "bmp", count, (SIDE, SIDE), ".bmp")
        draw(root / "jpeg", count // 2, (1200, 1600), ".jpg")
        busy, rates, alone, together = [], [], [], []
        for _ in range(rounds):
            device = StandIn(0.025)
            encode(plan(root / "bmp", next(caches)), device)
            busy.append(device.busy / (device.last - device.first))
            rates.append(count / (device.last - device.first))
            alone.append(count // 2 / decode(plan(root / "jpeg", next(caches))))
            together.append(count // 2 / encode(plan(root / "jpeg", next(caches)), StandIn(0.0)))
    share, rate = statistics.median(busy), statistics.median(rates)
    results.table("a device of 25 ms", {"busy": "%", "rate": "images/s"}).add("BMP files", 100 * share, rate)
    ratio = statistics.median(one / other for one, other in zip(together, alone, strict=True))
    pace, limit = statistics.median(together), statistics.median(alone)
    columns = {"rate": "images/s", "decoding alone": "images/s", "of that": "%"}
    results.table("a device of no cost", columns).add("JPEG files", pace, limit, 100 * ratio)


if __name__ == "__main__":
    run(main)
