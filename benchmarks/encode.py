"""How fast images are encoded: the VAE alone in each layout and batch size, and the whole of `latentprep encode`.

    python benchmarks/encode.py                 # SD 1.5's VAE architecture at 256x256, random weights
    python benchmarks/encode.py --side 512

All contenders of a table run in turn, in one process, on the same pixels; compare the ratios.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from PIL import Image

from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.prepare.devices import quiet_libraries
from latentprep.prepare.encode import encode
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.survey import prepare


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


def measure_vae(side: int, rounds: int, folder: Path) -> None:
    """Seconds an image, of SD 1.5's encoder (34 M parameters)."""
    save_vae(folder)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pixels = np.random.default_rng(0).integers(0, 256, (4, side, side, 3), np.uint8)
    ours = VaeEncoder(open_vae(folder), device, torch.float32)
    plain = AutoencoderKL.from_pretrained(folder).eval().to(device)
    images = torch.from_numpy((pixels[:1] / 127.5 - 1).astype(np.float32)).permute(0, 3, 1, 2).contiguous().to(device)

    def reference() -> torch.Tensor:
        with torch.inference_mode():
            return plain.encode(images).latent_dist.mean

    contenders: dict[str, Callable[[], object]] = {
        "AutoencoderKL.encode, one image at a time (NCHW)": reference,
        "latentprep, batch 1 (channels_last)": lambda: ours.encode(pixels[:1]),
        "latentprep, batch 4 (channels_last)": lambda: ours.encode(pixels),
    }
    seconds = median_seconds(contenders, rounds)
    print(f"\nVAE encode, SD 1.5's architecture, {side}x{side}, float32 on {device}")
    print(f"{'':52} {'ms/image':>9} {'speed':>7}")
    base = seconds["AutoencoderKL.encode, one image at a time (NCHW)"]
    for name, value in seconds.items():
        per_image = value / (4 if "batch 4" in name else 1)
        print(f"{name:52} {per_image * 1000:9.0f} {base / per_image:6.2f}x")


def measure_whole(count: int, folder: Path) -> None:
    """Images/s of `encode` with `tiny`, and where the loop waited: what decoding and writing cost beside a fast VAE."""
    (folder / "images").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for n in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8))
        coarse.resize((1600, 1200), Image.Resampling.BICUBIC).save(folder / "images" / f"{n:04}.jpg", quality=92)
    options = EncodeOptions(
        folder / "images", str(folder / "cache"), Geometry.from_options(resolution="256"), TextOptions(), model="tiny"
    )
    outcome = encode(prepare(options, lambda line: None), NoBar)
    total = sum(outcome.waits.values())
    waits = ", ".join(f"{stage} {seconds / total:.0%}" for stage, seconds in outcome.waits.items())
    print(f"\nlatentprep encode, {count} JPEG files of 1600x1200, tiny, --resolution 256")
    print(f"{outcome.num_encoded / outcome.encode_seconds:.1f} images/s; of what its two passes wait for: {waits}")


def main(
    side: Annotated[int, typer.Option(help="Side of the images for the VAE, in pixels.")] = 256,
    rounds: Annotated[int, typer.Option(help="Counted runs of each contender.")] = 5,
    count: Annotated[int, typer.Option(help="Images for the whole run.")] = 100,
) -> None:
    quiet_libraries()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    with tempfile.TemporaryDirectory() as folder:
        measure_vae(side, rounds, Path(folder) / "vae")
        measure_whole(count, Path(folder) / "run")


if __name__ == "__main__":
    typer.run(main)
