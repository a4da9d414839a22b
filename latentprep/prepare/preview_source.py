"""The images of a cache, one by one, as a preview shows them: whole, and as the VAE saw them."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from latentprep.cache.group import LatentGroup
from latentprep.cache.latents import Latents
from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.options import CAPTION_ENCODING, ImageSet, TextOptions
from latentprep.prepare.find_images import join_sources
from latentprep.prepare.images.decode import decode
from latentprep.prepare.images.load import LoadOptions, digest_of, place_image, read_files
from latentprep.prepare.images.pillow import DecodeError, describe, limit_pixels
from latentprep.prepare.recheck_source import Originals, check_num_controls, common_patch
from latentprep.prepare.source.controls import find_controls
from latentprep.prepare.source.masks import list_masks
from latentprep.prepare.source.sources import NoSourceError, open_source
from latentprep.records import Box, Item, Placement, Size, Skip
from latentprep.sheet import shrink

MAX_PIXELS = 180_000_000  # of an image, and of its bucket: the default of encode's --max-megapixels
Say = Callable[[str], None]
Place = tuple[int, int, int]  # shard, group, row


@dataclass(frozen=True, eq=False)
class StoredRow:
    """What a cache holds of one image, in memory."""

    key: str
    nbytes: int
    captions: Sequence[str]
    group: LatentGroup  # of this row alone


def load_rows(storage: Storage, manifest: Manifest, places: Iterable[Place]) -> Iterator[StoredRow]:
    """Rows of a cache by their places: shard, group and row. One is in memory at a time."""
    opened: tuple[int, Latents, Text] | None = None
    for n, number, row in places:
        if opened is None or opened[0] != n:
            entry = manifest.shards[n]
            opened = n, entry.open_latents(storage), entry.open_text(storage)
        _, latents, text = opened
        words, own = text.groups[number], latents.groups[number].take(np.array([row]))
        yield StoredRow(words.key[row], int(words.nbytes[row]), words.caption[row], own)


@dataclass(frozen=True, eq=False)
class Shown:
    """An image as it is now."""

    whole: Image.Image  # upright sRGB, shrunk for a sheet, in its own shape
    pixels: np.ndarray  # [H,W,3] uint8: the crop of a view, mirrored if the view is
    is_changed: bool  # whether its content is another than what was encoded


@dataclass(frozen=True, eq=False)
class Reader:
    """Reads images of a cache."""

    options: LoadOptions
    knows_partners: bool  # whether masks and control images are there, so that changes can be told

    def read(self, row: StoredRow, view: int) -> Shown | str:
        """The image of a row, and what the VAE saw of it in one of its views; or why it cannot be shown.

        Whatever is wrong with one image, the others are shown.
        """
        problem = check_geometry(row.group, view, self.options.factor)
        if problem:
            return problem
        try:
            return self._read(row, view)
        except (DecodeError, UserError) as error:
            return str(error)
        except Exception as error:  # a fault of ours in one image, or no memory for it, ends no sheet
            return describe(error)

    def _read(self, row: StoredRow, view: int) -> Shown | str:
        size, resized, box = row.group.geometry(0, view)
        placement = Placement((box[2], box[3]), resized, box)
        item = Item(row.key, size, row.nbytes, 0)
        files = read_files(item, self.options)
        if isinstance(files, Skip):
            return files.detail
        is_changed = self.knows_partners and digest_of(files) != bytes(row.group.digest[0].tolist())
        try:
            rgb, _ = decode(files.image.data, item, placement, self.options, [])
        except DecodeError as error:
            return f"changed since: {error}" if is_changed else str(error)
        whole = shrink(rgb, size)
        pixels = place_image(rgb, None, item, placement, self.options, [box]).pixels[0]
        return Shown(whole, pixels[:, ::-1] if row.group.flipped[view] else pixels, is_changed)


def check_geometry(group: LatentGroup, view: int, factor: int) -> str:
    """What is wrong with the numbers of a row, which a stranger may have written; "": nothing."""
    size, resized, box = group.geometry(0, view)
    bucket = [side * factor for side in group.latent_mean.shape[-2:]]
    if min(*size, *resized) < 1 or list(box[2:]) != bucket:
        return "its sizes in the cache fit no image"
    if lies_outside(box, resized):
        return "its crop in the cache lies outside of the image"
    if bucket[0] * bucket[1] > MAX_PIXELS:
        return f"its bucket has more than {MAX_PIXELS:,} pixels"
    return ""


def lies_outside(box: Box, resized: Size) -> bool:
    """Whether a box has no pixel of an image of this size."""
    return any(not -box[n + 2] < box[n] < resized[n] for n in (0, 1))


def open_reader(storage: Storage, manifest: Manifest, where: Path, sets: Sequence[ImageSet], say: Say) -> Reader:
    """A Reader of a cache's images by key. Only masks and control images are listed. `say` hears what is not there.

    Raises UserError if there is no source.
    """
    limit_pixels(MAX_PIXELS)
    made_with = manifest.made_with
    encoding = made_with.again.get("caption_encoding", CAPTION_ENCODING)  # of metadata files that name control images
    own = ImageSet(
        "", where, TextOptions(caption_encoding=str(encoding)),
        masks=Path(made_with.masks) if made_with.masks else None,
        controls=tuple(map(Path, made_with.control)), control_columns=made_with.control_columns,
    )  # fmt: skip
    sources: dict[str, Originals] = {}
    for part in sets or [own]:
        without = [*([Path(storage.path)] if storage.is_local else []), *part.partners]
        try:
            sources[part.name] = Originals(open_source(part.source, "--source", without=without), None, (), ())
        except NoSourceError as error:
            if not sets:
                raise
            say(f"set {part.name}: {error}")
    if not sources:
        raise NoSourceError(f"--source {where}: none of its {counted(len(sets), 'set')} is there.")
    try:
        there = [part for part in sets or [own] if part.name in sources]
        found = {part.name: add_partners(manifest, sources[part.name], part) for part in there}
    except UserError as error:
        say(f"whether images have changed is not known: {error}")
        found = sources
    joined = Originals(*join_sources(str(where), found), ()) if sets else found[""]
    options = LoadOptions.from_recipe(
        joined.source, manifest.latent.factor, joined.masks, manifest.recipe.latents, controls=joined.controls,
        patch=common_patch(manifest),
    )  # fmt: skip
    return Reader(options, found is not sources)


def add_partners(manifest: Manifest, own: Originals, part: ImageSet) -> Originals:
    """A source with its masks and control images. Raises UserError if some are not there."""
    if manifest.recipe.latents.images.weights == "masks" and not part.name and part.masks is None:
        raise UserError("the cache does not say where its masks were.")
    check_num_controls(manifest, part)
    masks = list_masks(part.masks, "masks", "no such folder.") if part.masks is not None else None
    part = replace(part, exclude=(*manifest.made_with.exclude, *part.exclude))
    return replace(own, masks=masks, controls=find_controls(part, "no such folder.").partners)
