"""Images for the benchmarks: noise on gradients, so that a JPEG takes a photo's time to decode."""

import os
from pathlib import Path

import numpy as np
from PIL import Image


def draw(folder: Path, count: int, size: tuple[int, int], suffix: str = ".jpg", different: int = 20) -> None:
    """A new folder of `count` images of a size (height, width). All but `different` are links, which cost no disk."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    rows, columns = np.mgrid[0 : size[0], 0 : size[1]]
    for n in range(count):
        path = folder / f"{n:05}{suffix}"
        if n < different:
            planes = [rows * random.uniform(0, 0.2) + columns * random.uniform(0, 0.2) for _ in range(3)]
            pixels = np.stack(planes, axis=2) + random.normal(0, 12, (*size, 3))
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        else:
            os.link(folder / f"{n % different:05}{suffix}", path)
