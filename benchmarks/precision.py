"""What each way to encode and to store costs in precision: `--dtype`, `--tiling`, `--compile`, `--store-dtype`.

    python benchmarks/precision.py            # `tiny` on three photos; SD 1.5's architecture with random weights
    python benchmarks/precision.py --quick    # `tiny` on one small photo, nothing compiled

The reference is diffusers' `AutoencoderKL` in float32 on the CPU, in its own memory layout, image by image. `tiny` sees
three photos that it never saw in its training, SD 1.5's architecture has random weights. "mean" is the root mean square
of the error in standard deviations of the latent, "std" that of the relative error. "decoded" is the PSNR of the
decoded mean against the decoded mean of the reference. "photo" is how much nearer the reference is to the photo itself.

std is stored as it is. What fewer bits of it would cost stands in the last table: the error of a sample in standard
deviations of the latent, and what would be saved of an SD 1.5 sample at 512. That is no reason for another kind of
tensor.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import AutoencoderKL
from encode import save_vae
from PIL import Image
from results import Results, run
from torch import Tensor

from latentprep.prepare.devices import quiet_libraries
from latentprep.prepare.models.find import find_model
from latentprep.prepare.models.vae_encoder import LEVELS, VaeEncoder
from latentprep.prepare.models.vae_folder import VaeFolder, open_vae

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png")  # scikit-image's; held out by examples/train_tiny.py
SAMPLE_BYTES = 2 * 4 * 64 * 64 * 2 + 77 * 768 * 2  # SD 1.5 at 512: mean, std and cond in float16


@dataclass(frozen=True, eq=False)
class Latent:
    """Posterior of one image: [1,C,h,w] float32 each."""

    mean: Tensor
    std: Tensor


def open_photos(side: int | None, count: int) -> list[np.ndarray]:
    """[H,W,3] uint8: the photos, resized to side x side; None: at their own size, cut to multiples of 8."""
    spec = find_spec("skimage")
    if spec is None or spec.origin is None:
        raise SystemExit("scikit-image, which has the photos, is not installed: pip install scikit-image")
    photos = []
    for name in PHOTOS[:count]:
        photo = Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")
        if side is None:
            photo = photo.crop((0, 0, photo.width // 8 * 8, photo.height // 8 * 8))
        else:
            photo = photo.resize((side, side), Image.Resampling.LANCZOS)
        photos.append(np.array(photo))
    return photos


def to_images(photo: np.ndarray) -> Tensor:
    """[1,3,H,W] float32 in [-1,1], in the layout that torch has by default."""
    return LEVELS[torch.from_numpy(photo).int()].permute(2, 0, 1)[None].contiguous()


def rms(values: Tensor) -> float:
    return float(values.double().square().mean().sqrt())


def decibels(error: float, peak: float) -> float:
    return 20 * math.log10(peak / error) if error else math.inf


Mode = Callable[[int], Latent]  # of the photo with that number


def make_modes(
    folder: VaeFolder, photos: list[np.ndarray], exact: list[Latent], tile: int, compiles: bool
) -> dict[str, Mode]:
    """What the options of `latentprep encode` do, by the name of their row; a VAE is loaded when its row is run."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    def encoded(
        dtype: torch.dtype = torch.float32, *, batch: int = 1, tiling: int | None = None, compiled: bool = False
    ) -> Mode:
        vae = cache(lambda: VaeEncoder(folder, device, dtype, tiling=tiling, compile=compiled))

        def encode(n: int) -> Latent:
            turned = [photos[n], photos[n][::-1], photos[n][:, ::-1], photos[n][::-1, ::-1]]  # of the same size
            posterior = vae().encode(np.stack(turned[:batch]))
            assert not vae().num_retried  # else the row would be float32's
            return Latent(posterior.mean[:1], posterior.std[:1])

        return encode

    def stored(dtype: torch.dtype) -> Mode:
        return lambda n: Latent(exact[n].mean.to(dtype).float(), exact[n].std.to(dtype).float())

    return {
        "float32, on a CPU the default": encoded(),
        "float32, in a batch of 4": encoded(batch=4),
        **({"`--compile`": encoded(compiled=True)} if compiles else {}),
        "`--dtype float16`": encoded(torch.float16),
        "`--dtype bfloat16`": encoded(torch.bfloat16),
        f"`--tiling {tile}`": encoded(tiling=tile),
        "`--store-dtype float16`, the default": stored(torch.float16),
        "`--store-dtype bfloat16`": stored(torch.bfloat16),
    }


@torch.inference_mode()
def measure_modes(
    results: Results, title: str, folder: VaeFolder, photos: list[np.ndarray], *, compiles: bool, trained: bool
) -> list[Latent]:
    """The table of one VAE; returns the reference. Only of a trained one the photo itself says anything."""
    vae = AutoencoderKL.from_pretrained(folder.path).eval()  # the decoder too
    exact = []
    for photo in photos:
        posterior = vae.encode(to_images(photo)).latent_dist
        exact.append(Latent(posterior.mean.clone(), posterior.std.clone()))

    def decode(latents: list[Latent]) -> list[Tensor]:
        return [vae.decode(latent.mean).sample for latent in latents]

    def photo_psnr(decoded: list[Tensor]) -> list[float]:
        pairs = zip(decoded, photos, strict=True)
        return [decibels(rms(image.clamp(-1, 1) - to_images(photo)), 2) for image, photo in pairs]

    restored = decode(exact)
    if trained:
        table = results.table(f"{title}: photos, decoded again", {"PSNR": "dB"})
        for name, value in zip(PHOTOS, photo_psnr(restored), strict=False):
            table.add(name, value)
    tile = min(256, photos[0].shape[0] // 2)
    table = results.table(title, {"mean": "", "std": "", "decoded": "dB", **({"photo": "dB"} if trained else {})})
    for name, mode in make_modes(folder, photos, exact, tile, compiles).items():
        found = [mode(n) for n in range(len(photos))]
        pairs = list(zip(found, exact, strict=True))
        mean = math.hypot(*(rms(f.mean - e.mean) / float(e.mean.std()) for f, e in pairs)) / math.sqrt(len(pairs))
        std = math.hypot(*(rms((f.std - e.std) / e.std) for f, e in pairs)) / math.sqrt(len(pairs))
        decoded = decode(found)
        levels = [
            decibels(rms(image - wanted), float(wanted.max() - wanted.min()))
            for image, wanted in zip(decoded, restored, strict=True)
        ]
        lost = fmean(photo_psnr(restored)) - fmean(photo_psnr(decoded))
        table.add(name, mean, std, fmean(levels), *([round(lost, 4) + 0.0] if trained else []))
    return exact


def log_code(std: Tensor, dims: tuple[int, ...]) -> Tensor:
    """std [N,C,h*w] as 8 bits of its logarithm would give it back, between the least and the largest over `dims`."""
    logs = std.log()
    low, high = logs.amin(dims, keepdim=True), logs.amax(dims, keepdim=True)
    step = (high - low) / 255
    return (low + ((logs - low) / step).round() * step).exp()


# name -> bits a value, and what a reader gets back, of std [N,C,h*w]: N images of one shard
CODES: dict[str, tuple[float, Callable[[Tensor], Tensor]]] = {
    "float16, the default": (16, lambda std: std.half().float()),
    "bfloat16": (16, lambda std: std.bfloat16().float()),
    "8 bits of its logarithm, per channel": (8, lambda std: log_code(std, (0, 2))),
    "8 bits of its logarithm": (8, lambda std: log_code(std, (0, 1, 2))),
    "float8_e4m3": (8, lambda std: std.to(torch.float8_e4m3fn).float()),
    "one for each image and channel": (0, lambda std: std.square().mean(2, keepdim=True).sqrt().expand_as(std)),
    "none, `--store mean`": (0, torch.zeros_like),
}


def measure_std(results: Results, exact: list[Latent]) -> None:
    """What cheaper kinds of std would cost and save.

    A sample is mean + std * noise, so the difference of two with the same noise is (std' - std) * noise: its RMS over
    all noise is that of std' - std.
    """
    length = min(latent.std[0, 0].numel() for latent in exact)  # the same number of values of each photo
    std = torch.stack([latent.std[0].flatten(1)[:, :length] for latent in exact])
    spread = torch.stack([latent.mean.std() for latent in exact])[:, None, None]
    table = results.table("std in fewer bits", {"error of a sample": "", "bits": "", "saved of a sample": "%"})
    for name, (bits, code) in CODES.items():
        error = rms((code(std) - std) / spread)
        saved = (16 - bits) / 8 * 4 * 64 * 64 / SAMPLE_BYTES
        table.add(name, error, bits, 100 * saved)


def main(
    results: Results,
    side: Annotated[int, typer.Option(help="Side of the images for SD 1.5's architecture, in pixels.")] = 256,
    quick: Annotated[bool, typer.Option("--quick", help="Only tiny, on one small photo, nothing compiled.")] = False,
) -> None:
    quiet_libraries()
    tiny = open_vae(find_model("tiny"))
    photos = open_photos(128, 1) if quick else open_photos(None, len(PHOTOS))
    exact = measure_modes(results, "`tiny`", tiny, photos, compiles=not quick, trained=True)
    if not quick:
        with tempfile.TemporaryDirectory() as folder:
            save_vae(Path(folder))
            title, others = f"SD 1.5's architecture at {side}x{side}", open_photos(side, len(PHOTOS))
            measure_modes(results, title, open_vae(Path(folder)), others, compiles=True, trained=False)
    measure_std(results, exact)


if __name__ == "__main__":
    run(main)
