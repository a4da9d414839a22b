"""The images that a cache is compared with: those of its source, or of its sets, as they are now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import ImageSet, TextOptions
from latentprep.prepare.find_images import join_sources, named
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.masks import Masks, list_masks
from latentprep.prepare.source.sources import open_source


@dataclass(frozen=True)
class Originals:
    """What a cache came from."""

    source: Source
    masks: Masks | None
    keys: tuple[str, ...]  # of images, and of folders that cannot be listed


def find_originals(
    storage: Storage, manifest: Manifest, where: Path, masks: Path | None, sets: Sequence[ImageSet] = ()
) -> Originals:
    """The images in `where` now, or those of the sets that it names; without sets, `masks` is where masks are now.

    Raises UserError if a source or its masks are not there, or if they are not those of this cache.
    """
    if not sets:
        names = [facts.name for facts in manifest.sets]
        if names and not any((where / name).exists() for name in names):
            some = ", ".join(map(shortened, names[:5]))
            raise UserError(f"--source {where}: holds none of the cache's sets ({some}). Give their .toml file.")
        folder = find_masks(manifest, masks)
        return list_originals(
            storage, ImageSet("", where, TextOptions(), manifest.made_with.exclude, folder), "--masks"
        )
    if masks is not None:
        raise UserError(f"--masks {masks}: the sets of {where} say where their masks are. Leave it out.")
    found = {}
    for part in sets:
        with named(part):
            exclude = (*manifest.made_with.exclude, *part.exclude)
            found[part.name] = list_originals(storage, replace(part, exclude=exclude))
    return Originals(
        *join_sources(str(where), found), tuple(f"{name}/{key}" for name, own in found.items() for key in own.keys)
    )


def find_masks(manifest: Manifest, folder: Path | None) -> Path | None:
    """The folder of the masks that a cache's weights came from; None where they did not. Raises UserError."""
    if manifest.recipe.latents.images.weights != "masks":
        return None
    if folder is None and not manifest.made_with.masks:
        what = "the .toml file of its sets as --source" if manifest.sets else "the folder of this cache's masks"
        raise UserError(f"--masks: give {what}.")
    return folder or Path(manifest.made_with.masks or "")


def list_originals(storage: Storage, part: ImageSet, option: str = "--weights") -> Originals:
    missing = "no such folder. Give that of this cache's masks."
    masks = list_masks(part.masks, option, missing) if part.masks is not None else None
    without = [Path(storage.path)] if storage.is_local else []
    without += [part.masks] if part.masks is not None else []
    listing = list_images(open_source(part.source, without=without), part.exclude)
    keys = (*(item.key for item in listing.items), *(skip.key for skip in listing.skips))
    return Originals(listing.source, masks, keys)
