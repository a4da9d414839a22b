"""Images of a cache -> small JPEGs for a page: of the image as it is now, else of what its latents say."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from itertools import islice

import numpy as np
from PIL import Image
from torch import Tensor

from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.prepare.devices import default_threads
from latentprep.prepare.images.decode import decode
from latentprep.prepare.images.pillow import max_bytes, open_image, oriented_size
from latentprep.prepare.latent_colors import LinearMap, fit_map
from latentprep.prepare.preview import NUM_FITTED, Colors
from latentprep.prepare.preview_source import Place, Reader, Shown, StoredRow, load_rows
from latentprep.records import Box, Item, Placement
from latentprep.sheet import fit, shrink

# longest side and quality of a JPEG, the best first: the first that fits is taken
QUALITIES = ((192, 85), (192, 70), (160, 60), (128, 55), (96, 50), (96, 30), (64, 30))
BLOCK = 16  # images that are read at once
MAX_DECODED = 2**26  # pixels that a VAE decodes for a page on a CPU: 256 images of 512x512, a few minutes
WEIGHT_PART = 4  # of the bytes of a thumbnail, a quarter may be its weights
AT_ONCE = 4  # threads at most: each may hold an image of 180 megapixels


@dataclass(frozen=True)
class Thumbnail:
    """A small picture of an image."""

    jpeg: bytes
    box: Box  # the part of the resized image that it shows: top, left, height, width
    origin: str  # what it was made of
    warning: str = ""  # why it was not made of the image, or what is to be said of that
    weight: bytes = b""  # a JPEG of its loss weights, black 0 and white 1, a pixel for each of a latent; b"": all are 1

    @property
    def width(self) -> int:
        """Of the JPEG, in pixels."""
        with Image.open(BytesIO(self.jpeg)) as opened:
            return opened.width


class Painter:
    """Latents -> colours. Once `max_decoded` pixels were decoded the rest goes by a linear map, fitted to these."""

    def __init__(self, open_colors: Callable[[], Colors], max_decoded: float) -> None:
        self.open_colors, self.left = open_colors, max_decoded
        self.colors: Colors | None = None
        self.pairs: list[tuple[Tensor, np.ndarray]] = []
        self.map: LinearMap | None = None

    def paint(self, latents: Tensor) -> tuple[np.ndarray, str]:
        """latents [C,h,w], unscaled => [H,W,3] uint8, and how it was made. Raises UserError."""
        if self.map is not None:
            return self.map.paint(latents), "linear map, fitted to decoded latents"
        if self.colors is None:
            self.colors = self.open_colors()
        painted = self.colors.paint(latents)
        if self.colors.title == "decoded":
            self.pairs += [(latents, painted)] if len(self.pairs) < NUM_FITTED else []
            self.left -= painted.shape[0] * painted.shape[1]
            self.map = fit_map(self.pairs) if self.left <= 0 else None
        return painted, self.colors.title


def make_thumbnails(
    storage: Storage,
    manifest: Manifest,
    places: Sequence[Place],
    reader: Reader | None,
    painter: Painter,
    limit: int,
    progress: Callable[[int], object],
) -> Iterator[Thumbnail | str]:
    """A thumbnail of the first view of each image, of at most `limit` bytes if that can be; or why there is none.

    As many images as BLOCK are in memory at once.
    """
    rows = load_rows(storage, manifest, places)
    with ThreadPoolExecutor(min(AT_ONCE, default_threads(1))) as threads:
        while block := list(islice(rows, BLOCK)):
            read = threads.map(lambda row: reader.read(row, 0) if reader is not None else None, block)
            for row, shown in zip(block, read, strict=True):
                yield make_thumbnail(row, shown, painter, limit)
                progress(1)


def make_thumbnail(row: StoredRow, shown: Shown | str | None, painter: Painter, limit: int) -> Thumbnail | str:
    _, resized, box = row.group.geometry(0, 0)
    weight = pack_weight(row.group, limit // WEIGHT_PART)
    limit -= len(weight)
    if isinstance(shown, Shown):
        changed = "changed since it was encoded" if shown.is_changed else ""
        return Thumbnail(pack(shown.whole, limit), (0, 0, *resized), "source image", changed, weight)
    latents = row.group.latent_mean[0, 0].float()
    try:
        painted, origin = painter.paint(latents)
    except UserError as error:
        return str(error)
    image = shrink(Image.fromarray(painted), painted.shape[:2])
    return Thumbnail(pack(image, limit), box, f"latents: {origin}", shown or "", weight)


def pack_weight(group: LatentGroup, limit: int) -> bytes:
    """The loss weights of a row in its first view as a grey JPEG; nothing if all are 1."""
    if group.weight is None or bool((group.weight[0, 0] == 1).all()):
        return b""
    grey = np.nan_to_num(group.weight[0, 0].float().numpy()).clip(0, 1) * 255
    return pack(Image.fromarray(grey.round().astype(np.uint8)), limit)


def read_whole(reader: Reader, keys: Iterable[str], limit: int) -> Iterator[bytes | None]:
    """JPEGs of images by their keys, whole; None for those that cannot be opened."""
    for key in keys:
        try:
            data = reader.options.source.read(key, max_bytes())
            with open_image(BytesIO(data)) as opened:
                size = oriented_size(opened)
            item = Item(key, size, len(data), 0)
            rgb, _ = decode(data, item, Placement(size, fit(size), (0, 0, *fit(size))), reader.options, [])
            yield pack(shrink(rgb, size), limit)
        except Exception:  # that it cannot be opened is why it was skipped; a fault of ours ends no page
            yield None


def pack(image: Image.Image, limit: int) -> bytes:
    """An RGB or grey image as JPEG, in the best of QUALITIES that takes at most `limit` bytes, or else the last."""
    for side, quality in QUALITIES:
        scale = min(1.0, side / max(image.size))
        size = max(1, round(image.width * scale)), max(1, round(image.height * scale))
        data = BytesIO()
        small = image if size == image.size else image.resize(size, Image.Resampling.LANCZOS)
        small.save(data, "JPEG", quality=quality, optimize=True)
        if data.tell() <= limit:
            break
    return data.getvalue()
