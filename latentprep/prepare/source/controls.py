"""Sources of control images -> items that have one of each. An edit starts from its control images."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from latentprep.cache.schema import CONTROLS
from latentprep.errors import UserError
from latentprep.prepare.source.listing import MAX_VERSION
from latentprep.prepare.source.partners import Partner, Partners, list_partners
from latentprep.records import Item, Skip


def list_controls(
    where: Path | str, missing: str = "expected a folder of images, and there is no such folder."
) -> Partners:
    """Every image of a source, as a control image of the target of the same stem. Raises UserError."""
    return list_partners(where, "--control", "control image", missing)


def add_controls(items: Sequence[Item], controls: Sequence[Partners]) -> tuple[list[Item], list[Skip]]:
    """The items that have a control image in each of the sources, and count them as a part of them; the rest as skips.

    Raises UserError if no item has one in some source.
    """
    for own in controls:
        if not any(own.find(item.key) is not None for item in items):
            raise UserError(
                f"--control {own.source.where}: none of its images has the path and stem of an image in SOURCE."
            )
    added = [add_own(item, controls) for item in items]
    return [own for own in added if isinstance(own, Item)], [own for own in added if isinstance(own, Skip)]


def add_own(item: Item, controls: Iterable[Partners]) -> Item | Skip:
    """An item with its control images, or the Skip that says which of them it lacks."""
    for name, own in zip(CONTROLS, controls, strict=False):
        control = own.find(item.key)
        if control is None:
            return item.skip("no_control", f"{name}: no image of its path and stem")
        if control.nbytes < 0:
            return item.skip("io_error", f"its control image {own.locate(control)}: {own.why_unreadable(control)}")
        item = replace(item, nbytes=item.nbytes + control.nbytes, version=join_versions(item.version, control))
    return item


def join_versions(version: int, control: Partner) -> int:
    """A version of an item and a control image of it that differs if either does, or if the two change places.

    The sum would not: whoever gives SOURCE and --control the wrong way round, and then the right way, has the same
    names and the same sums. Files of an archive may all have one time, so the bytes count too.
    """
    return (31 * version + 17 * control.version + control.nbytes) & MAX_VERSION
