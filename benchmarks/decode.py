"""How long decoding and resizing a large image takes on one core, against Pillow alone, and how far its pixels move.

    python benchmarks/decode.py

Ways run in turn, in one process, on the same files; compare the ratios. "exact" is `--no-draft`: Pillow decodes in full
and resizes with LANCZOS. "Pillow" is Pillow alone too; large JPEGs are decoded at a fraction, and damage in JPEGs is
looked for in a pass of its own. "now" is the default. "old torch" is the default if torch is older than 2.12 or the
processor has no AVX2: then torch has no fast LANCZOS. Times are of the processor, for an image from a file's bytes to
the pixels that the VAE sees. "as fast" is against "Pillow".

Differences are in levels of 0 to 255, and in standard deviations of the latents that `tiny` makes (root mean square);
of several files the largest counts. "exact" against "Pillow" is what decoding at a fraction changes, and "Pillow"
against "now" is torch's LANCZOS.

The files are photos of scikit-image. They are as a camera writes them: enlarged to the size, with a sensor's noise; a
JPEG of quality 92 with half the colour resolution. "sharp" is more than a camera sees: photos side by side, pixel by
pixel.
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import numpy as np
import torch
import typer
from PIL import Image, ImageOps
from results import Results, run

from latentprep.geometry import Geometry
from latentprep.options import ImageOptions
from latentprep.prepare.images import decode, load
from latentprep.prepare.images.load import LoadOptions, load_pixels
from latentprep.prepare.models.find import find_model
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.source.folder import Folder, file_at
from latentprep.prepare.source.listing import read_item
from latentprep.recipe import LatentsRecipe
from latentprep.records import Item, Pixels, Placement

PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "motorcycle_left.png", "hubble_deep_field.jpg")
TILE = (400, 300)  # of a photo that stands beside others: width, height
CASES = (((1600, 1200), 512), ((4000, 3000), 512), ((4000, 3000), 1024))  # width and height of files, resolution
WAYS = ("exact", "Pillow", "old torch", "now")
BETWEEN = (("now", "exact"), ("Pillow", "exact"), ("now", "Pillow"))


def open_photo(name: str) -> Image.Image:
    spec = find_spec("skimage")
    assert spec is not None
    assert spec.origin is not None
    return Image.open(Path(spec.origin).parent / "data" / name).convert("RGB")


def draw_noisy(name: str, size: tuple[int, int]) -> Image.Image:
    """A photo as a camera of this size (width, height) sees it."""
    image = ImageOps.fit(open_photo(name), size, Image.Resampling.LANCZOS)
    noise = np.random.default_rng(0).normal(0, 4, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def draw_sharp(size: tuple[int, int]) -> Image.Image:
    """Photos side by side, in a size (width, height)."""
    tiles = [open_photo(name).crop((0, 0, *TILE)) for name in PHOTOS]
    image = Image.new("RGB", size)
    across, down = -(-size[0] // TILE[0]), -(-size[1] // TILE[1])
    for n in range(across * down):
        image.paste(tiles[(5 * n + n // across) % len(tiles)], (n % across * TILE[0], n // across * TILE[1]))
    return image


def write_files(folder: Path, size: tuple[int, int], count: int) -> None:
    """`count` photos of a camera and a sharp one, each as a JPEG and as a PNG."""
    folder.mkdir()
    for name in (*PHOTOS[:count], "sharp"):
        image = draw_sharp(size) if name == "sharp" else draw_noisy(name, size)
        image.save(folder / f"{Path(name).stem}.jpg", quality=92, subsampling=2)
        image.save(folder / f"{Path(name).stem}.png", compress_level=1)


@contextmanager
def taking(way: str) -> Iterator[None]:
    """One of the ways."""
    with ExitStack() as stack:
        if way in ("Pillow", "old torch"):
            stack.enter_context(patch.object(load, "torch_has_lanczos", lambda: False))
        if way == "Pillow":
            stack.enter_context(patch.object(decode, "decode_plain", lambda *_: None))
        yield


def load_file(path: Path, geometry: Geometry, way: str) -> tuple[np.ndarray, float]:
    """Pixels [1,H,W,3] uint8 of a file, and the processor's seconds for it."""
    source = Folder(str(path.parent))
    item = read_item(file_at(path, path.name), source)
    assert isinstance(item, Item)
    placement = make_place(geometry, 8)(item.size)
    assert isinstance(placement, Placement)
    recipe = LatentsRecipe.of(
        vae="", geometry=geometry, images=ImageOptions(draft=way != "exact"), flip=False, dtype="", store="mean",
        store_dtype="",
    )  # fmt: skip
    with taking(way):
        options = LoadOptions.from_recipe(source, 8, None, recipe)
        started = time.process_time()
        found = load_pixels(item, placement, options)
        seconds = time.process_time() - started
    assert isinstance(found, Pixels)
    return found.pixels, seconds


@dataclass(frozen=True)
class Difference:
    """Of the same file, read in two ways."""

    mean: float  # levels
    most: int
    latents: float  # standard deviations


Differences = dict[tuple[str, str], list[Difference]]


def measure(
    paths: list[Path], geometry: Geometry, rounds: int, vae: VaeEncoder, apart: Differences
) -> dict[str, float]:
    """Seconds of each way, on average over the files. Differences between ways go to `apart`."""
    times = dict.fromkeys(WAYS, 0.0)
    for path in paths:
        found = {way: [load_file(path, geometry, way)] for way in WAYS}
        for _ in range(rounds - 1):
            for way in WAYS:
                found[way].append(load_file(path, geometry, way))
        for way in WAYS:
            times[way] += min(seconds for _, seconds in found[way]) / len(paths)
        pixels = {way: found[way][0][0] for way in WAYS}
        latents = {way: vae.encode(own).mean for way, own in pixels.items()}
        for a, b in BETWEEN:
            error = np.abs(pixels[a].astype(int) - pixels[b])
            moved = float((latents[a] - latents[b]).square().mean().sqrt() / latents[b].std())
            apart[a, b].append(Difference(float(error.mean()), int(error.max()), moved))
    return times


def show_differences(results: Results, apart: Differences) -> None:
    columns = {"pixels on average": "of 255", "pixels at most": "of 255", "latents": ""}
    table = results.table("how far pixels and latents are moved", columns)
    for (a, b), found in apart.items():
        most = (max(values) for values in zip(*map(astuple, found), strict=True))
        table.add(f"{a}, against {b}", *most)


def main(
    results: Results,
    count: Annotated[int, typer.Option(help="Photos of a camera, beside the sharp one.")] = 3,
    rounds: Annotated[int, typer.Option(help="Timed rounds; the fastest counts.")] = 5,
) -> None:
    torch.set_num_threads(1)
    vae = VaeEncoder(open_vae(find_model("tiny")), torch.device("cpu"), torch.float32)
    columns = {**dict.fromkeys(WAYS, "ms"), **{f"{way}: as fast": "times" for way in WAYS[2:]}}
    table = results.table("processor time of an image", columns)
    apart: Differences = {pair: [] for pair in BETWEEN}
    with tempfile.TemporaryDirectory() as name:
        for size in dict.fromkeys(size for size, _ in CASES):
            write_files(Path(name) / str(size[0]), size, count)
        for size, resolution in CASES:
            geometry = Geometry.from_options(resolution=str(resolution))
            for suffix in (".jpg", ".png"):
                for kind in ("", ", sharp"):
                    paths = sorted((Path(name) / str(size[0])).glob(f"*{suffix}"))
                    paths = [path for path in paths if (path.stem == "sharp") == bool(kind)]
                    times = measure(paths, geometry, rounds, vae, apart)
                    what = f"{size[0]}x{size[1]} {suffix[1:].upper()} to {resolution}" + kind
                    faster = (times["Pillow"] / times[way] for way in WAYS[2:])
                    table.add(what, *(1e3 * seconds for seconds in times.values()), *faster)
    show_differences(results, apart)


if __name__ == "__main__":
    run(main)
