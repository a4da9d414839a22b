"""The images that a cache is compared with: those of its source, or of its sets, as they are now."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.options import ImageSet, TextOptions
from latentprep.prepare.find_images import join_sources, named
from latentprep.prepare.source.controls import list_controls
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.masks import list_masks
from latentprep.prepare.source.partners import Partners, in_order
from latentprep.prepare.source.sources import open_source


@dataclass(frozen=True)
class Originals:
    """What a cache came from."""

    source: Source
    masks: Partners | None
    controls: tuple[Partners, ...]
    keys: tuple[str, ...]  # of images, and of folders that cannot be listed

    @property
    def partners(self) -> tuple[Partners, ...]:
        return in_order(self.masks, self.controls)


def find_originals(
    storage: Storage,
    manifest: Manifest,
    where: Path,
    masks: Path | None,
    controls: tuple[Path, ...] = (),
    sets: Sequence[ImageSet] = (),
) -> Originals:
    """The images in `where` now, or those of the sets that it names.

    Without sets, `masks` and `controls` are where masks and control images are now.

    Raises UserError if a source or its masks are not there, or if they are not those of this cache.
    """
    if not sets:
        names = [facts.name for facts in manifest.sets]
        if names and not any((where / name).exists() for name in names):
            some = ", ".join(map(shortened, names[:5]))
            raise UserError(f"--source {where}: holds none of the cache's sets ({some}). Give their .toml file.")
        folders = find_masks(manifest, masks), find_controls(manifest, controls)
        return list_originals(
            storage, ImageSet("", where, TextOptions(), manifest.made_with.exclude, *folders), "--masks"
        )
    if masks is not None:
        raise UserError(f"--masks {masks}: the sets of {where} say where their masks are. Leave it out.")
    if controls:
        raise UserError(
            f"--control {controls[0]}: the sets of {where} say where their control images are. Leave it out."
        )
    check_num_controls(manifest, sets[0].controls)
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


def find_controls(manifest: Manifest, folders: tuple[Path, ...]) -> tuple[Path, ...]:
    """The folders of the control images of a cache; `folders` are those that were typed. Raises UserError."""
    found = folders or tuple(map(Path, manifest.made_with.control))
    check_num_controls(manifest, found)
    return found


def check_num_controls(manifest: Manifest, folders: Sequence[Path]) -> None:
    """Raise UserError unless there are as many folders as a cache has control images of each image."""
    wanted = manifest.recipe.latents.num_controls or 0
    if len(folders) != wanted:
        what = "the .toml file of its sets as --source" if manifest.sets else "as many folders, in their order"
        raise UserError(
            f"--control: got {counted(len(folders), 'folder')}, this cache has {counted(wanted, 'control image')} of "
            f"each image. Give {what if wanted else 'none'}."
        )


def list_originals(storage: Storage, part: ImageSet, option: str = "--weights") -> Originals:
    missing = "no such folder. Give that of this cache's masks."
    masks = list_masks(part.masks, option, missing) if part.masks is not None else None
    controls = tuple(
        list_controls(folder, "no such folder. Give that of this cache's control images.") for folder in part.controls
    )
    without = [*([Path(storage.path)] if storage.is_local else []), *part.partners]
    listing = list_images(open_source(part.source, without=without), part.exclude)
    keys = (*(item.key for item in listing.items), *(skip.key for skip in listing.skips))
    return Originals(listing.source, masks, controls, keys)
