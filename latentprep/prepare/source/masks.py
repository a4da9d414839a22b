"""A source of mask images -> which item has which mask. A mask says how much each pixel of its image weighs."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from latentprep.errors import UserError
from latentprep.prepare.source.listing import MAX_VERSION
from latentprep.prepare.source.partners import Partners, list_partners
from latentprep.records import Item, Skip


def list_masks(
    where: Path | str,
    option: str = "--weights",
    missing: str = "expected alpha, none or a folder of masks, and there is no such folder.",
) -> Partners:
    """Every image of a source, as the mask of the image of the same stem. Raises UserError."""
    return list_partners(where, option, "mask", missing)


def add_masks(items: Iterable[Item], masks: Partners) -> tuple[list[Item], list[Skip]]:
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
            skips.append(item.skip("io_error", f"its mask {masks.locate(mask)}: {masks.why_unreadable(mask)}"))
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
