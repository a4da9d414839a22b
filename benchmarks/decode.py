"""What decoding large JPEGs at a fraction of their size gains, and what it changes.

    python benchmarks/decode.py                 # photos of scikit-image, 3200 pixels wide, to 512 pixels

Both ways run in turn, in one process, on the same files; compare the ratio. The difference is between the pixels that
the VAE would see, in levels of 0..255 and as PSNR, and between the latents that `tiny` makes of them, as root mean
square in standard deviations of the latent.
"""

import statistics
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image

from latentprep.geometry import Geometry
from latentprep.options import ImageOptions
from latentprep.prepare.images.load import LoadOptions, load_pixels
from latentprep.prepare.models.find import find_model
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.source.folder import read_item
from latentprep.recipe import LatentsRecipe
from latentprep.records import Item, Pixels

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")


def write_photos(folder: Path, width: int) -> None:
    """JPEG files as a camera writes them: large, with a sensor's noise, quality 92, half the colour resolution."""
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    random = np.random.default_rng(0)
    for name in PHOTOS:
        image = Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")
        image = image.resize((width, round(width * image.height / image.width)), Image.Resampling.LANCZOS)
        noisy = np.asarray(image) + random.normal(0, 4, (image.height, image.width, 3))
        path = (folder / name).with_suffix(".jpg")
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(path, quality=92, subsampling=2)


def make_options(folder: Path, geometry: Geometry, draft: bool) -> LoadOptions:
    recipe = LatentsRecipe.of(
        vae="", geometry=geometry, images=ImageOptions(draft=draft), flip=False, dtype="", store="mean", store_dtype=""
    )
    return LoadOptions.from_recipe(folder, 8, None, recipe)


def main(
    width: Annotated[int, typer.Option(metavar="PIXELS", help="Width of the files.")] = 3200,
    resolution: Annotated[int, typer.Option(metavar="PIXELS", help="As of latentprep encode.")] = 512,
    rounds: Annotated[int, typer.Option(help="Timed rounds.")] = 5,
) -> None:
    geometry = Geometry.from_options(resolution=str(resolution))
    place = make_place(geometry, 8)
    vae = VaeEncoder(open_vae(find_model("tiny")), torch.device("cpu"), torch.float32)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_photos(folder, width)
        heads = f"{'file':>24} {'in full':>10} {'draft':>10} {'ratio':>6}"
        print(f"{heads} {'mean':>6} {'largest':>8} {'PSNR':>8} {'latent':>7}")
        ratios = []
        for path in sorted(folder.glob("*.jpg")):
            item = read_item(path, path.name)
            assert isinstance(item, Item)
            placement = place(item.size)
            seconds: dict[bool, list[float]] = {False: [], True: []}
            pixels = {}
            for _ in range(rounds):
                for draft in seconds:
                    options = make_options(folder, geometry, draft)
                    started = time.perf_counter()
                    found = load_pixels(item, placement, options)  # type: ignore[arg-type]
                    seconds[draft].append(time.perf_counter() - started)
                    assert isinstance(found, Pixels)
                    pixels[draft] = found.pixels
            full, draft_seconds = statistics.median(seconds[False]), statistics.median(seconds[True])
            error = np.abs(pixels[True].astype(int) - pixels[False])
            reduced, exact = (vae.encode(pixels[draft]).mean for draft in (True, False))
            latent = float((reduced - exact).square().mean().sqrt() / exact.std())
            psnr = 10 * np.log10(255**2 / np.square(error).mean())
            ratios.append(full / draft_seconds)
            print(
                f"{path.name:>24} {full * 1e3:>7.0f} ms {draft_seconds * 1e3:>7.0f} ms {ratios[-1]:>5.1f}x "
                f"{error.mean():>6.2f} {error.max():>8} {psnr:>5.1f} dB {latent:>7.4f}"
            )
        print(f"median: {statistics.median(ratios):.1f} times as fast")


if __name__ == "__main__":
    typer.run(main)
