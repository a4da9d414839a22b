"""The images that a cache is compared with: those of its source, or of its sets, as they are now."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import gcd
from pathlib import Path

from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.options import ImageSet, TextOptions
from latentprep.prepare.find_images import join_sources, leave_out, named
from latentprep.prepare.source.captions import add_captions
from latentprep.prepare.source.controls import find_controls
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.masks import list_masks
from latentprep.prepare.source.partners import Partners, in_order
from latentprep.prepare.source.sources import open_source
from latentprep.records import Skip


@dataclass(frozen=True)
class Originals:
    """What a cache came from."""

    source: Source
    masks: Partners | None
    controls: tuple[Partners, ...]
    keys: tuple[str, ...]  # of images, and of folders that cannot be listed
    captions: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # of images, if it is known how to find them
    bad_captions: tuple[Skip, ...] = ()  # those that cannot be read

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
    texts: Mapping[str, TextOptions] | None = None,
) -> Originals:
    """The images in `where` now, or those of the sets that it names.

    Without sets, `masks` and `controls` are where masks and control images are now. `texts`: how captions are found, by
    names of sets, and "" of a single source.

    Raises UserError if a source or its masks are not there, or if they are not those of this cache.
    """
    texts = texts or {}
    if not sets:
        names = [facts.name for facts in manifest.sets]
        if names and not any((where / name).exists() for name in names):
            some = ", ".join(map(shortened, names[:5]))
            raise UserError(f"--source {where}: holds none of the cache's sets ({some}). Give their .toml file.")
        made_with = manifest.made_with
        own = ImageSet(
            "", where, texts.get("", TextOptions()), made_with.exclude, find_masks(manifest, masks),
            controls or tuple(map(Path, made_with.control)), made_with.control_columns,
        )  # fmt: skip
        check_num_controls(manifest, own)
        return list_originals(storage, own, "--masks", with_captions="" in texts)
    if masks is not None:
        raise UserError(f"--masks {masks}: the sets of {where} say where their masks are. Leave it out.")
    if controls:
        raise UserError(
            f"--control {controls[0]}: the sets of {where} say where their control images are. Leave it out."
        )
    check_num_controls(manifest, sets[0])
    found = {}
    for part in sets:
        with named(part):
            exclude = (*manifest.made_with.exclude, *part.exclude)
            own = replace(part, exclude=exclude, text=texts.get(part.name, part.text))
            found[part.name] = list_originals(storage, own, with_captions=part.name in texts)
    return Originals(
        *join_sources(str(where), found),
        tuple(f"{name}/{key}" for name, own in found.items() for key in own.keys),
        {f"{name}/{key}": captions for name, own in found.items() for key, captions in own.captions.items()},
        tuple(replace(skip, key=f"{name}/{skip.key}") for name, own in found.items() for skip in own.bad_captions),
    )


def find_masks(manifest: Manifest, folder: Path | None) -> Path | None:
    """The folder of the masks that a cache's weights came from; None where they did not. Raises UserError."""
    if manifest.recipe.latents.images.weights != "masks":
        return None
    if folder is None and not manifest.made_with.masks:
        what = "the .toml file of its sets as --source" if manifest.sets else "the folder of this cache's masks"
        raise UserError(f"--masks: give {what}.")
    return folder or Path(manifest.made_with.masks or "")


def check_num_controls(manifest: Manifest, part: ImageSet) -> None:
    """Raise UserError unless a set has as many control images of each image as a cache."""
    wanted = manifest.recipe.latents.num_controls or 0
    if part.num_controls != wanted:
        what = "the .toml file of its sets as --source" if manifest.sets else "as many folders, in their order"
        columns = f" and {counted(len(part.control_columns), 'column')}" if part.control_columns else ""
        raise UserError(
            f"--control: got {counted(len(part.controls), 'folder')}{columns}, this cache has "
            f"{counted(wanted, 'control image')} of each image. Give {what if wanted else 'none'}."
        )


def common_patch(manifest: Manifest) -> int:
    """Latent pixels that all sides in a cache are multiples of.

    Native sizes that are cut to it come out as they did when they were cut to the denoiser's patch, which divides it.
    """
    return gcd(*(side for shard in manifest.shards for _, _, shape in shard.groups for side in shape[1:])) or 1


def list_originals(
    storage: Storage, part: ImageSet, option: str = "--weights", *, with_captions: bool = False
) -> Originals:
    missing = "no such folder. Give that of this cache's masks."
    masks = list_masks(part.masks, option, missing) if part.masks is not None else None
    without = [*([Path(storage.path)] if storage.is_local else []), *part.partners]
    source = open_source(part.source, without=without)
    controls = find_controls(part, "no such folder. Give that of this cache's control images.")
    listing = leave_out(list_images(source, part.exclude), controls)
    keys = (*(item.key for item in listing.items), *(skip.key for skip in listing.skips))
    found = Originals(listing.source, masks, controls.partners, keys)
    if not with_captions:
        return found
    captioned = add_captions(listing, part.text)
    captions = {item.key: item.captions for item in captioned.items}
    return replace(found, captions=captions, bad_captions=tuple(captioned.skips))
