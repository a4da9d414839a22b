"""Samples of a cache -> cards of a sheet: each source image, what the VAE saw of it, and what its latents say."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image
from torch import Tensor

from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.prepare.devices import choose_device
from latentprep.prepare.latent_colors import fit_map, project
from latentprep.prepare.models.vae_decoder import open_decoder
from latentprep.prepare.preview_source import Reader, Shown, StoredRow, lies_outside, load_rows
from latentprep.prepare.recheck import find_vae, is_in_memory, sample_rows
from latentprep.records import Box, Sample, Size, is_flipped
from latentprep.sheet import Card, CropBox, Picture, fit, shrink

NUM_FITTED = 16  # images that a map from latents to colours is fitted to
EVEN = "weight 1"  # title of a weight map that is 1 throughout
BLANK = (110, 112, 118)  # in place of an image that cannot be shown


@dataclass(frozen=True, eq=False)
class Colors:
    """How latents become colours."""

    title: str  # over a picture
    says: str  # in the heading
    paint: Callable[[Tensor], np.ndarray]  # [C,h,w], unscaled => [H,W,3] uint8; raises UserError


def open_colors(
    storage: Storage,
    manifest: Manifest,
    reader: Reader | None,
    *,
    model: str | None,
    vae: str | None,
    device: str,
    seed: int,
) -> tuple[Colors, str]:
    """How latents become colours, and why not by the cache's own VAE ("": they do). Without it a linear map is fitted
    to images; without these the colours are false. No model is downloaded unless it was named.

    Raises UserError if a VAE was named, and is not the cache's.
    """
    chosen, _ = choose_device(device)
    try:
        if is_in_memory(manifest):
            raise UserError("the cache was made with a model in the memory of a program, which no file has.")
        found = find_vae(manifest, model, vae, may_download=bool(model or vae))
        name = vae or model or manifest.made_with.vae or manifest.made_with.model
        if (found.factor, found.latent_channels) != (manifest.latent.factor, manifest.latent.channels):
            raise UserError(f"{name}: makes latents of another shape than this cache has.")
        decoder = open_decoder(found, name, chosen)
        return Colors("decoded", f"decoded by the cache's own VAE, {name}", decoder.decode), ""
    except (UserError, OSError) as error:  # of a name that is too long, say
        if model or vae:
            raise
        why = f"not decoded by its VAE: {error}"
    numbers = {shard.id: n for n, shard in enumerate(manifest.shards)}
    places = [(numbers[entry.id], group, row) for entry, group, row in sample_rows(manifest, NUM_FITTED, seed)]
    fitted = fit_map(list_pairs(reader, load_rows(storage, manifest, places))) if reader is not None else None
    if fitted is not None:
        says = f"colours by a linear map of each latent, fitted to up to {NUM_FITTED} of the cache's images: no details"
        return Colors("linear map", says, fitted.paint), why
    says = "false colours: the three principal components of the latents, without an image to compare them with"
    rows = load_rows(storage, manifest, places)
    return Colors("false colours", says, project(row.group.latent_mean[0, 0] for row in rows).paint), why


def list_pairs(reader: Reader, rows: Iterable[StoredRow]) -> Iterator[tuple[Tensor, np.ndarray]]:
    """Latents of the first view with the pixels that they were made of; images that have changed are left out."""
    for row in rows:
        shown = reader.read(row, 0)
        if isinstance(shown, Shown) and not shown.is_changed:
            yield row.group.latent_mean[0, 0], shown.pixels


def make_cards(
    storage: Storage,
    manifest: Manifest,
    samples: Sequence[Sample],
    reader: Reader | None,
    colors: Colors,
    progress: Callable[[int], object],
) -> Iterator[Card]:
    """A card for each sample. One image is in memory at a time."""
    rows = load_rows(storage, manifest, [(sample.shard, sample.group, sample.row) for sample in samples])
    for sample, row in zip(samples, rows, strict=True):
        view, name = sample.view, manifest.latent.views[sample.view]
        shown = reader.read(row, view) if reader is not None else None
        pictures = [
            *show_source(row.group, view, name, shown),
            show_latents(row.group.latent_mean[0, view], colors, f"{colors.title}{words_of(name)}"),
            show_weight(row.group, view, name),
        ]
        for control, values in row.group.controls.items():
            pictures.append(show_latents(values[0, view], colors, f"{control.replace('_', ' ')}{words_of(name)}"))
        if is_flipped(name):  # the source is shown as it is
            pictures[1:] = [replace(own, is_marked=own.image is not None) for own in pictures[1:]]
        warnings = ["changed since it was encoded"] if isinstance(shown, Shown) and shown.is_changed else []
        more = f"  (and {len(row.captions) - 1} more)" if len(row.captions) > 1 else ""
        yield Card(row.key, (row.captions[0] if row.captions else "") + more, pictures, sample.note, warnings)
        progress(1)


def without_weight(cards: Sequence[Card]) -> Sequence[Card]:
    """The cards without weight maps, if every weight is 1."""
    is_even = all(picture.title == EVEN for card in cards for picture in card.pictures if is_weight(picture))
    if not is_even:
        return cards
    return [replace(card, pictures=[p for p in card.pictures if not is_weight(p)]) for card in cards]


def is_weight(picture: Picture) -> bool:
    return picture.title.startswith("weight")


def show_source(group: LatentGroup, view: int, name: str, shown: Shown | str | None) -> Iterator[Picture]:
    """The image with the box of its crop; and what the VAE saw of it, unless there is no source at all."""
    size, resized, box = group.geometry(0, view)
    title, crop = f"source {size[1]}x{size[0]}", crop_of(resized, box)
    if isinstance(shown, Shown):
        yield Picture(title, shown.whole, crop)
        trained = shrink(Image.fromarray(np.ascontiguousarray(shown.pixels)), (box[2], box[3]))
        yield Picture(f"as trained {box[3]}x{box[2]}{words_of(name)}", trained)
        return
    is_known = min(size) > 0 and crop is not None
    blank = Image.new("RGB", fit(size)[::-1], BLANK) if is_known else None
    yield Picture(title, blank, crop if is_known else None, shown or "no source")
    if shown is not None:
        yield Picture("as trained", None)


def crop_of(resized: Size, box: Box) -> CropBox | None:
    """A crop as shares of an image; None if it lies outside of it."""
    if min(*resized, *box[2:]) < 1 or lies_outside(box, resized):
        return None
    top, left, height, width = box
    return CropBox(top / resized[0], left / resized[1], (top + height) / resized[0], (left + width) / resized[1])


def words_of(view: str) -> str:
    """What a title says of a view."""
    crop = view.removesuffix("flipped").removesuffix("-").removeprefix("plain")
    return (f", {crop}" if crop else "") + (", mirrored" if is_flipped(view) else "")


def show_latents(latents: Tensor, colors: Colors, title: str) -> Picture:
    """Latents [C,h,w] in colours."""
    says = "" if bool(latents.isfinite().all()) else "its numbers are not finite"
    try:
        painted = colors.paint(latents.float())
    except UserError as error:
        return Picture(title, None, says=str(error))
    return Picture(title, shrink(Image.fromarray(painted), painted.shape[:2]), says=says)


def show_weight(group: LatentGroup, view: int, name: str) -> Picture:
    """The weight map: black weighs 0, white 1; nothing if all of it weighs 1."""
    if group.weight is None or bool((group.weight[0, view] == 1).all()):
        return Picture(EVEN, None)
    weight = group.weight[0, view].float().nan_to_num().clamp(0, 1).numpy()
    image = Image.fromarray((weight * 255).round().astype(np.uint8)).convert("RGB")
    title = f"weight, mean {weight.mean():.2f}" + ", mirrored" * is_flipped(name)
    return Picture(title, shrink(image, weight.shape))
