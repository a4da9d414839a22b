"""Bytes of an image file -> oriented, colour-managed, resized and cropped uint8 pixels, and the weight map."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from latentprep.errors import UserError
from latentprep.human import human_bytes
from latentprep.prepare.images.crops import choose_crops
from latentprep.prepare.images.decode import decode, load_mask
from latentprep.prepare.images.pillow import DecodeError, describe, max_bytes
from latentprep.prepare.source.content import new_hash
from latentprep.prepare.source.door import NotRegularError, Source
from latentprep.prepare.source.masks import Masks
from latentprep.recipe import LatentsRecipe
from latentprep.records import Box, Item, Pixels, Placement, Size, Skip

LARGE_PIXELS = 32_000_000  # an image beyond this is decoded alone: it takes hundreds of MB
LARGE_BYTES = 128_000_000  # and so is a larger file, whatever its pixels


@dataclass(frozen=True)
class LoadOptions:
    """All that decides how image files become pixels, other than their placement."""

    source: Source
    factor: int  # pixels of a latent pixel, each way
    masks: Masks | None
    filter: Image.Resampling
    crop: str
    crops: int
    seed: int
    background: str
    weights: str
    animated: str
    draft: bool
    strict: bool  # damaged JPEGs are skips

    @classmethod
    def from_recipe(
        cls, source: Source, factor: int, masks: Masks | None, recipe: LatentsRecipe, strict: bool = False
    ) -> "LoadOptions":
        """The options that the latents part of a recipe says; `strict` is --strict-images, which decides no numbers."""
        geometry = recipe.geometry
        return cls(
            source, factor, masks, strict=strict,
            filter=Image.Resampling[geometry.filter.upper()],
            crop=geometry.crop, crops=geometry.crops, seed=geometry.crop_seed or 0,
            **vars(recipe.images),
        )  # fmt: skip


def is_large(item: Item) -> bool:
    """Whether decoding an item needs so much memory that it must be decoded alone."""
    return item.size[0] * item.size[1] > LARGE_PIXELS or item.nbytes > LARGE_BYTES


class ImageError(Exception):
    """Our own code failed on an image, which is named: a fault of this program, and no skip."""


def load_pixels(
    item: Item, placement: Placement, options: LoadOptions, crops: Sequence[Box] | None = None
) -> Pixels | Skip:
    """The pixels of an item as the VAE is to see them, or the Skip that says why not.

    `crops` are boxes that are known already: those of a row in a cache. Raises ImageError; UserError if the source is
    not there any more.
    """
    masks, limit = options.masks, max_bytes()
    mask = masks.find(item.key) if masks is not None else None
    mask_where = masks.locate(mask) if masks is not None and mask is not None else ""
    if mask is not None and mask.nbytes > limit:
        return item.skip("bad_mask", f"{mask_where}: {human_bytes(mask.nbytes)}, expected at most {human_bytes(limit)}")
    try:
        data = options.source.read(item.key, limit)
        mask_data = masks.source.read(mask.key, limit) if masks is not None and mask is not None else b""
    except NotRegularError as error:
        return item.skip("unreadable", str(error))
    except OSError as error:
        check_there(options)
        return item.skip("io_error", describe(error))
    except MemoryError as error:
        return item.skip("out_of_memory", describe(error))
    if len(data) + len(mask_data) != item.nbytes:
        return item.skip("changed", f"was {item.nbytes} bytes when listed, now {len(data) + len(mask_data)}: run again")
    try:
        return make_pixels(data, mask_data if mask is not None else None, item, placement, options, crops)
    except DecodeError as error:
        if error.reason == "not_an_image":  # it was one when it was listed
            return item.skip("unreadable", error.detail)
        where = f"{mask_where}: " if error.reason == "bad_mask" else ""
        return item.skip(error.reason, where + error.detail)
    except MemoryError as error:
        return item.skip("out_of_memory", describe(error))
    except Exception as error:  # whatever it is, it is to say which image it was
        raise ImageError(f"{item.key}: {describe(error)}") from error


def check_there(options: LoadOptions) -> None:
    """Raise UserError if the source, or that of the masks, is not there any more."""
    sources = {"SOURCE": options.source} | ({"--weights": options.masks.source} if options.masks is not None else {})
    for option, source in sources.items():
        if not source.is_there():
            raise UserError(
                f"{option} {source.where}: vanished while its images were read. What is encoded is kept: mount it "
                "again, and run the same command."
            ) from None


def make_pixels(
    data: bytes,
    mask_data: bytes | None,
    item: Item,
    placement: Placement,
    options: LoadOptions,
    crops: Sequence[Box] | None,
) -> Pixels:
    """The pixels of an image file and its mask. Raises DecodeError."""
    notes: list[str] = []
    rgb, alpha = decode(data, item, placement, options, notes)
    weight = alpha if options.weights == "alpha" else None
    if mask_data is not None:
        weight = load_mask(mask_data, item.size, options.strict, notes)
        notes.append("mask")
    size = placement.resized_size
    part: Box = (0, 0, *size)
    if not placement.enlarges(item.size):
        rgb = resize_part(rgb, size, part, options.filter)
    if crops is None:
        crops = choose_crops(rgb, weight, placement, options.crop, options.crops, options.seed, item.key)
    if placement.enlarges(item.size):  # no more than what is kept: a strip of 30000x1 would be 7,680,000x256
        notes.append("enlarged")
        part = kept_part(crops, size)
        rgb = resize_part(rgb, size, part, options.filter)
    boxes = [(top - part[0], left - part[1], height, width) for top, left, height, width in crops]
    pixels = np.asarray(rgb)
    return Pixels(
        np.stack([cut(pixels, box, mode="edge") for box in boxes]),
        place_weight(weight, size, part, boxes, options.factor),
        tuple(crops),
        new_hash(data + (mask_data or b"")).digest(),
        tuple(notes),
    )


def kept_part(crops: Sequence[Box], size: Size) -> Box:
    """The smallest box of an image of this size that holds all that lies in crops."""
    top, left = (max(0, min(box[n] for box in crops)) for n in (0, 1))
    bottom, right = (min(size[n], max(box[n] + box[n + 2] for box in crops)) for n in (0, 1))
    return top, left, bottom - top, right - left


def resize_part(image: Image.Image, size: Size, part: Box, resample: Image.Resampling) -> Image.Image:
    """A part of the image at `size`; what lies outside of it is not computed."""
    top, left, height, width = part
    if image.size == size[::-1] and part == (0, 0, *size):
        return image
    down, right = image.height / size[0], image.width / size[1]
    box = (left * right, top * down, min((left + width) * right, image.width), min((top + height) * down, image.height))
    return image.resize((width, height), resample, box=box)


def place_weight(
    alpha: Image.Image | None, size: Size, part: Box, boxes: Sequence[Box], factor: int
) -> np.ndarray | None:
    """[K,H/f,W/f] float32: alpha in 0..1, area-averaged to latent resolution; padding weighs 0. None: all ones.

    `boxes` lie in the `part` of the image at `size`.
    """
    _, _, box_height, box_width = boxes[0]
    is_padded = box_height > size[0] or box_width > size[1]
    if alpha is None and not is_padded:
        return None
    if alpha is None:
        plane: np.ndarray = np.full(part[2:], 255, np.uint8)
    else:
        # BOX averages areas when it shrinks, and has no overshoot as lanczos has
        plane = np.asarray(resize_part(alpha, size, part, Image.Resampling.BOX))
    planes = np.stack([cut(plane, box, mode="constant") for box in boxes]).astype(np.float32) / 255
    return planes.reshape(-1, box_height // factor, factor, box_width // factor, factor).mean(axis=(2, 4))


def cut(array: np.ndarray, box: Box, mode: str) -> np.ndarray:
    """The box of an array [H,W,...]; np.pad's `mode` fills what lies outside: "edge" repeats the border."""
    top, left, height, width = box
    down, right = top + height - array.shape[0], left + width - array.shape[1]
    margins = [(max(0, -top), max(0, down)), (max(0, -left), max(0, right))] + [(0, 0)] * (array.ndim - 2)
    if any(side for pair in margins for side in pair):
        array = np.pad(array, margins, mode=mode)  # type: ignore[call-overload]
    top, left = max(0, top), max(0, left)
    return array[top : top + height, left : left + width]
