"""A source of mask images -> which item has which mask. A mask says how much each pixel of its image weighs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from latentprep.errors import UserError
from latentprep.prepare.images.pillow import is_image_name
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.listing import MAX_VERSION, stem
from latentprep.prepare.source.sources import NoSourceError, open_source
from latentprep.records import Item, Skip


@dataclass(frozen=True, slots=True)
class Mask:
    """A file of masks' source: key, bytes (-1: cannot be looked at) and version."""

    key: str
    nbytes: int
    version: int


@dataclass(frozen=True)
class Masks:
    """Masks by the stems of the images that they belong to."""

    source: Source
    by_stem: dict[str, Mask]  # key of an image without its suffix -> its mask

    def find(self, key: str) -> Mask | None:
        """The mask of an image; None where it has none."""
        return self.by_stem.get(stem(key))

    def locate(self, mask: Mask) -> str:
        """Where a mask is, for messages."""
        return self.source.locate(mask.key)


def list_masks(
    where: Path | str,
    option: str = "--weights",
    missing: str = "expected alpha, none or a folder of masks, and there is no such folder.",
) -> Masks:
    """Every image of a source, as the mask of the image of the same stem. Raises UserError."""
    try:
        source = open_source(where, option)
        found = {file.key: file for file in source.list()}
    except NoSourceError:
        raise UserError(f"{option} {where}: {missing}") from None
    except OSError as error:
        raise UserError(f"{option} {where}: cannot be listed ({error.strerror or error}). Make it readable.") from error
    by_stem: dict[str, Mask] = {}
    for key, file in sorted(found.items()):
        if isinstance(file, Skip):
            raise UserError(f"{option} {where}/{key}: cannot be listed ({file.detail}). Make it readable.")
        if (
            is_image_name(key)
            and (other := by_stem.setdefault(stem(key), Mask(key, file.nbytes, file.version))).key != key
        ):
            raise UserError(f"{option} {where}: {other.key} and {key} are two masks of one image. Remove one.")
    if not by_stem:
        raise UserError(f"{option} {where}: no masks in it. Expected images with the stems of those in SOURCE.")
    return Masks(source, by_stem)


def add_masks(items: Iterable[Item], masks: Masks) -> tuple[list[Item], list[Skip]]:
    """Items that count their mask as a part of them: bytes and versions are added, so that a new mask is a change.

    An item whose mask is a dead link, or cannot be looked at, is a skip. Raises UserError if no item has a mask.
    """
    found: list[Item] = []
    skips: list[Skip] = []
    num_masks = 0
    for item in items:
        mask = masks.find(item.key)
        num_masks += mask is not None
        if mask is not None and mask.nbytes < 0:
            skips.append(item.skip("io_error", f"its mask {masks.locate(mask)}: {why_unreadable(masks, mask)}"))
            continue
        if mask is not None:
            version = (item.version + mask.version) & MAX_VERSION
            item = replace(item, nbytes=item.nbytes + mask.nbytes, version=version)
        found.append(item)
    if not num_masks:
        raise UserError(
            f"--weights {masks.source.where}: none of its masks has the path and stem of an image in SOURCE."
        )
    return found, skips


def why_unreadable(masks: Masks, mask: Mask) -> str:
    """What reading a mask that could not be looked at says."""
    try:
        masks.source.read(mask.key, 0)
    except OSError as error:
        return error.strerror or str(error)
    return "it changed while it was listed"
