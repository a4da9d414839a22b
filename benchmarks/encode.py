"""How fast images are encoded: the VAE alone in each layout and batch size, and the whole of `latentprep encode`.

    python benchmarks/encode.py                              # on a CPU
    python benchmarks/encode.py --side 512 --count 4000      # with a GPU

The VAE has SD 1.5's architecture and random weights, in float32 on a CPU and in float16 on CUDA. All contenders of a
table run in turn, in one process; compare the ratios. The VAE alone is compared with `AutoencoderKL.encode`, one image
at a time, in its own memory layout (NCHW). Whole runs start from JPEG files, some of the size that the VAE sees and
some of 1600x1200, and are compared with `AutoencoderKL.encode` in a loop on pixels that are on its device already.
The last columns divide the time of the device's thread: it waits for images that are decoded, it encodes, and it waits
for results that are written.
"""

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from drawn import draw
from results import Results, run

from latentprep.cache.schema import TORCH_DTYPES
from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.prepare.devices import choose_dtype, default_batch_size, quiet_libraries
from latentprep.prepare.encode import encode
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.outcome import Outcome
from latentprep.prepare.survey import prepare
from latentprep.progress import Silent

STAGES = ("decode", "encode", "write")


class NoBar:
    """A progress bar that shows nothing."""

    def __init__(self, total: int, stage: str) -> None:
        self.initial = 0

    def __enter__(self) -> "NoBar":
        return self

    def __exit__(self, *_: object) -> None: ...

    def set_postfix_str(self, text: str, refresh: bool = True) -> None: ...

    def update(self, count: int) -> None: ...


def median_seconds(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each contender, taken in turn after one round that is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(rounds + 1):
        for name, call in contenders.items():
            started = time.perf_counter()
            call()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if n:
                times[name].append(time.perf_counter() - started)
    return {name: statistics.median(values) for name, values in times.items()}


def save_vae(folder: Path) -> None:
    """A VAE of SD 1.5's architecture, with random weights that are always the same."""
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).save_pretrained(folder)


def measure_vae(results: Results, side: int, rounds: int, folder: Path) -> None:
    """Time of an image, of SD 1.5's encoder (34 M parameters)."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    dtype = TORCH_DTYPES[choose_dtype("auto", device.type)]
    ours = VaeEncoder(open_vae(folder), device, dtype)
    plain = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).eval().to(device)
    images = torch.from_numpy(pixels[:1] / 127.5 - 1).permute(0, 3, 1, 2).contiguous().to(device, dtype)

    def reference() -> torch.Tensor:
        with torch.inference_mode():
            return plain.encode(images).latent_dist.mean

    contenders: dict[str, Callable[[], object]] = {
        "`AutoencoderKL.encode`, one image at a time": reference,
        "latentprep, one image at a time": lambda: ours.encode(pixels[:1]),
        "latentprep, batches of 4": lambda: ours.encode(pixels),
    }
    seconds = median_seconds(contenders, rounds)
    table = results.table(f"the VAE alone at {side}x{side}", {"an image": "ms", "as fast": "times"})
    base = next(iter(seconds.values()))
    for name, value in seconds.items():
        per_image = value / (4 if "of 4" in name else 1)
        table.add(name, per_image * 1000, base / per_image)


def encode_bare(vae: AutoencoderKL, count: int, side: int, batch_size: int) -> float:
    """Images/s of AutoencoderKL.encode in a loop, whose pixels are on the device already."""
    shape = (batch_size, 3, side, side)
    images = torch.rand(shape, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(vae.device, vae.dtype)
    with torch.inference_mode():
        vae.encode(images).latent_dist.mean.cpu()  # warms up
        started = time.perf_counter()
        for _ in range(count // batch_size):
            distribution = vae.encode(images).latent_dist
            distribution.mean.cpu(), distribution.std.cpu()
    return count // batch_size * batch_size / (time.perf_counter() - started)


def encode_whole(images: Path, cache: Path, vae: Path, side: int, workers: int | None) -> Outcome:
    """A run of `latentprep encode`."""
    options = EncodeOptions(
        images, str(cache), Geometry.from_options(width=side, height=side), TextOptions(include_cond=False),
        model="tiny", vae=str(vae), workers=workers,
    )  # fmt: skip
    return encode(prepare(options, Silent()), NoBar)


def measure_whole(results: Results, count: int, side: int, rounds: int, workers: int | None, folder: Path) -> None:
    """Images/s of whole runs, against the VAE in a loop that has nothing to read, decode, check or write."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype, batch_size = choose_dtype("auto", device), default_batch_size(device, [(side, side)])
    vae = AutoencoderKL.from_pretrained(folder / "vae", torch_dtype=TORCH_DTYPES[dtype]).eval().to(device)
    columns = {"images at once": "", "rate": "images/s", "of the loop": "%", **dict.fromkeys(STAGES, "%")}
    table = results.table(f"whole runs to {side}x{side}", columns)
    for width, height in ((side, side), (1600, 1200)):
        images = folder / f"{width}x{height}"
        draw(images, count, (height, width))
        rates, ratios = [], []
        waits: Counter[str] = Counter()
        for n in range(rounds):
            bare = encode_bare(vae, count, side, batch_size)
            outcome = encode_whole(images, folder / f"cache{width}-{n}", folder / "vae", side, workers)
            rates.append(outcome.num_encoded / outcome.encode_seconds)
            ratios.append(rates[-1] / bare)
            waits.update(outcome.waits)
        shares = [100 * waits[stage] / waits.total() for stage in STAGES]
        pace, ratio = statistics.median(rates), statistics.median(ratios)
        table.add(f"files of {width}x{height}", batch_size, pace, 100 * ratio, *shares)


def main(
    results: Results,
    side: Annotated[int, typer.Option(help="Side of the images of whole runs, in pixels.")] = 256,
    vae_sides: Annotated[str, typer.Option(help="The same for the VAE alone, with commas between.")] = "256,512",
    rounds: Annotated[int, typer.Option(help="Counted runs of each contender.")] = 3,
    count: Annotated[int, typer.Option(help="Images of a whole run.")] = 48,
    runs: Annotated[int, typer.Option(help="Whole runs of each kind of files.")] = 2,
    workers: Annotated[int | None, typer.Option(help="Threads that decode; else as many as encode takes.")] = None,
) -> None:
    quiet_libraries()
    with tempfile.TemporaryDirectory() as folder:
        save_vae(Path(folder) / "vae")
        for each in vae_sides.split(","):
            measure_vae(results, int(each), rounds, Path(folder) / "vae")
        measure_whole(results, count, side, runs, workers, Path(folder))


if __name__ == "__main__":
    run(main)
