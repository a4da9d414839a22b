"""Which images are measured: some of a source, or pictures that are drawn."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from latentprep.options import TextOptions
from latentprep.prepare.find_images import Images
from latentprep.prepare.source.captions import add_captions
from latentprep.prepare.source.door import File, Source
from latentprep.prepare.source.listing import EXCLUDED, Patterns, is_image, is_plain, list_images
from latentprep.prepare.source.sources import open_source
from latentprep.progress import LateBar, Progress
from latentprep.records import Size, Skip
from latentprep.speeds import choose_evenly

MOST = 32  # images
DRAWN: tuple[tuple[Size, int], ...] = (((1200, 1600), 8), ((3000, 4000), 2))  # size, and how many
CAPTIONS = (
    "a ginger cat asleep on a windowsill in the morning sun, soft light, shallow depth of field",
    "1girl, solo, long hair, red scarf, looking at viewer, snow, night, city lights, best quality",
    "A wide photograph of a mountain lake at dawn. Mist lies on the water, and pines stand along the far shore. A "
    "small wooden boat is tied to a jetty in the foreground, and the first sunlight touches the peaks.",
    "portrait of an old fisherman, oil painting",
)


@dataclass(frozen=True)
class Sample(Source):
    """A source of which only some images are there, evenly chosen by a seed; its other files all are."""

    source: Source
    seed: int

    @property
    def where(self) -> str:  # type: ignore[override]
        return self.source.where

    @property
    def sidecars(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.source.sidecars

    def list(self) -> Iterator[File | Skip]:
        find_pattern = Patterns(EXCLUDED).find
        images: list[File] = []
        for found in self.source.list():
            if isinstance(found, File) and is_image(found.key) and is_plain(found.key):
                if find_pattern(found.key) is None:
                    images.append(found._replace(open=None))  # it can be opened until the next is listed
            else:
                yield found
        images.sort(key=lambda file: file.key)
        for number in choose_evenly(len(images), MOST, self.seed):
            yield images[number]

    def read(self, key: str, limit: int) -> bytes:
        return self.source.read(key, limit)

    def locate(self, key: str) -> str:
        return self.source.locate(key)

    def is_there(self) -> bool:
        return self.source.is_there()


def sample_images(where: Path, text: TextOptions, seed: int, progress: Progress) -> Images:
    """At most MOST images of a source, with their captions. Raises UserError."""
    with LateBar(progress, None, "list", "file") as bar:
        listing = list_images(Sample(open_source(where), seed), count=bar.update)
    return Images(listing.source, None, (), add_captions(listing, text), listing.skips, ())


def draw_pictures(folder: Path, seed: int) -> None:
    """JPEGs of DRAWN with captions beside them: about as many bytes for a pixel as photos have, 0.3 to 0.4."""
    number = 0
    for size, count in DRAWN:
        whole = draw_picture(size, seed)
        for n in range(count):
            turned = whole[:: 1 - 2 * (n & 1), :: 1 - (n & 2)]  # four ways to hold one picture
            Image.fromarray(np.roll(turned, n * 64, axis=1)).save(folder / f"{number:02}.jpg", quality=92)
            (folder / f"{number:02}.txt").write_text(CAPTIONS[number % len(CAPTIONS)] + "\n", encoding="utf-8")
            number += 1


def draw_picture(size: Size, seed: int) -> np.ndarray:
    """[H,W,3] uint8: noise of all scales as photos have it, each octave as strong, and a sensor's own."""
    random = np.random.default_rng(seed)
    plane: np.ndarray = np.full((*size, 3), 128, np.float32)
    cells = 4
    while cells <= max(size) // 2:
        small = random.normal(0, 13, (max(2, cells * size[0] // size[1]), cells)).astype(np.float32)
        octave = Image.fromarray(small).resize(size[::-1], Image.Resampling.BICUBIC)
        plane += np.asarray(octave)[..., None]
        cells *= 2
    colors = Image.fromarray(random.integers(80, 176, (6, 8, 3), np.uint8)).resize(size[::-1], Image.Resampling.BICUBIC)
    plane += np.asarray(colors, np.float32) - 128
    plane += random.normal(0, 3, size).astype(np.float32)[..., None]
    return plane.clip(0, 255).astype(np.uint8)
