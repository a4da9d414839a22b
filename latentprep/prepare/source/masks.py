"""A folder of mask images -> which item has which mask. A mask says how much each pixel of its image weighs."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from latentprep.errors import UserError
from latentprep.prepare.images.pillow import is_image_name
from latentprep.prepare.source.folder import stem, walk
from latentprep.records import Item, Skip


@dataclass(frozen=True)
class Masks:
    """Masks by the stems of the images that they belong to."""

    folder: Path
    by_stem: dict[str, str]  # key of an image without its suffix -> path of its mask, relative to the folder

    def path_of(self, key: str) -> Path | None:
        """The mask of an image; None where it has none."""
        name = self.by_stem.get(stem(key))
        return self.folder / name if name is not None else None


def list_masks(folder: Path, option: str = "--weights") -> Masks:
    """Every image under a folder, as the mask of the image of the same stem. Raises UserError."""
    if not folder.is_dir():
        raise UserError(f"{option} {folder}: expected alpha, none or a folder of masks, and there is no such folder.")
    by_stem: dict[str, str] = {}
    unlisted: list[Skip] = []
    paths = sorted(walk(folder, (), unlisted))
    if unlisted:
        raise UserError(
            f"{option} {folder / unlisted[0].key}: cannot be listed ({unlisted[0].detail}). Make it readable."
        )
    for path in paths:
        name = path.relative_to(folder).as_posix()
        if is_image_name(name) and (other := by_stem.setdefault(stem(name), name)) != name:
            raise UserError(f"{option} {folder}: {other} and {name} are two masks of one image. Remove one.")
    if not by_stem:
        raise UserError(f"{option} {folder}: no masks in it. Expected images with the stems of those in SOURCE.")
    return Masks(folder, by_stem)


def add_masks(items: Iterable[Item], masks: Masks) -> tuple[list[Item], list[Skip]]:
    """Items that count their mask as a part of them: sizes and times are added, so that a new mask is a change.

    An item whose mask is a dead link, or cannot be looked at, is a skip. Raises UserError if no item has a mask.
    """
    found: list[Item] = []
    skips: list[Skip] = []
    num_masks = 0
    for item in items:
        path = masks.path_of(item.key)
        if path is not None:
            num_masks += 1
            try:
                status = path.stat()
            except OSError as error:
                skips.append(item.skip("io_error", f"its mask {path}: {error.strerror}"))
                continue
            nbytes, version = item.nbytes + status.st_size, item.version + status.st_mtime_ns
            item = replace(item, nbytes=nbytes, version=version)
        found.append(item)
    if not num_masks:
        raise UserError(f"--weights {masks.folder}: none of its masks has the path and stem of an image in SOURCE.")
    return found, skips


def paths_of(key: str, folder: Path, masks: Masks | None) -> tuple[Path, Path | None]:
    """The files whose bytes an image is made of: its own, and its mask."""
    return folder / key, masks.path_of(key) if masks is not None else None
