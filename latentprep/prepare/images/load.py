"""Bytes of an image file -> oriented, colour-managed, resized and cropped uint8 pixels, and the weight map."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, JpegImagePlugin

from latentprep.prepare.images.alpha import fill_background, split_alpha
from latentprep.prepare.images.color import UnknownRangeError, to_srgb
from latentprep.prepare.images.crops import choose_crops
from latentprep.prepare.images.masks import Masks
from latentprep.prepare.source import (
    DECODER_ERRORS,
    describe,
    formats,
    new_hash,
    oriented_size,
    read_orientation,
    too_large,
)
from latentprep.records import Box, Item, Pixels, Placement, Size, Skip

TRANSPOSE = {  # EXIF orientation -> what undoes it (TIFF 6.0, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC, JPEG_SCAN = b"\xff\xd8\xff", b"\xff\xda"
MAX_SCANS = 100  # a progressive JPEG has about ten; each costs a pass over all pixels, and a few bytes make one
LARGE_PIXELS = 32_000_000  # an image beyond this is decoded alone: it takes hundreds of MB
DRAFT_MARGIN = 2  # a reduced JPEG still has this many times the pixels that are asked for, each way
ONE_PICTURE = ("MPO", "PSD", "HEIF", "ICO", "ICNS")  # their further frames are previews, depth maps and layers
ASPECT_TOLERANCE = 0.02  # between an image and its mask


@dataclass(frozen=True)
class LoadOptions:
    """All that decides how image files become pixels, other than their placement."""

    folder: Path
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

    @classmethod
    def from_recipe(cls, folder: Path, factor: int, masks: Masks | None, recipe: dict[str, Any]) -> "LoadOptions":
        """The options that the latents part of a recipe says."""
        geometry, images = recipe["geometry"], recipe["images"]
        return cls(
            folder, factor, masks,
            filter=Image.Resampling[geometry["filter"].upper()],
            crop=geometry["crop"], crops=geometry["crops"], seed=geometry.get("crop_seed", 0),
            **images,
        )  # fmt: skip


def load_pixels(
    item: Item, placement: Placement, options: LoadOptions, crops: Sequence[Box] | None = None
) -> Pixels | Skip:
    """The pixels of an item as the VAE is to see them, or the Skip that says why not.

    `crops` are boxes that are known already: those of a row in a cache.
    """
    mask_path = options.masks.path_of(item.key) if options.masks is not None else None
    try:
        data = (options.folder / item.key).read_bytes()
        mask_data = mask_path.read_bytes() if mask_path is not None else b""
    except OSError as error:
        return item.skip("unreadable", describe(error))
    if len(data) + len(mask_data) != item.nbytes:
        return item.skip("changed", f"was {item.nbytes} bytes when listed, now {len(data) + len(mask_data)}: run again")
    notes: list[str] = []
    decoded = decode(data, item, placement, options, notes)
    if isinstance(decoded, Skip):
        return decoded
    rgb, alpha = decoded
    weight = alpha if options.weights == "alpha" else None
    if mask_path is not None:
        mask = load_mask(mask_data, item.size)
        if isinstance(mask, str):
            return item.skip("bad_mask", f"{mask_path}: {mask}")
        weight = mask
        notes.append("mask")
    if placement.enlarges(item.size):
        notes.append("enlarged")
    if rgb.size != placement.resized_size[::-1]:
        rgb = rgb.resize(placement.resized_size[::-1], options.filter)
    if crops is None:
        crops = choose_crops(rgb, weight, placement, options.crop, options.crops, options.seed, item.key)
    pixels = np.asarray(rgb)
    return Pixels(
        np.stack([cut(pixels, box, mode="edge") for box in crops]),
        place_weight(weight, placement.resized_size, crops, options.factor),
        tuple(crops),
        new_hash(data + mask_data).digest(),
        tuple(notes),
    )


def decode(
    data: bytes, item: Item, placement: Placement, options: LoadOptions, notes: list[str]
) -> tuple[Image.Image, Image.Image | None] | Skip:
    """An image file as upright sRGB, and its alpha as "L" where it has transparency; or the Skip that says why not.

    At its own size, but for a JPEG that was reduced: that has its placement's.
    """
    try:
        if data.startswith(PNG_MAGIC):
            Image.open(
                io.BytesIO(data), formats=("PNG",)
            ).verify()  # checksums: Pillow decodes a damaged PNG to black rows, silently
        if data.startswith(JPEG_MAGIC) and data.count(JPEG_SCAN) > MAX_SCANS:
            return item.skip("too_large", f"a JPEG of {data.count(JPEG_SCAN):,} scans, expected at most {MAX_SCANS}")
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            size, (width, height), orientation = oriented_size(image), image.size, read_orientation(image)
            if size != item.size:
                return item.skip(
                    "changed", f"was {item.size[1]}x{item.size[0]} when listed, now {size[1]}x{size[0]}: run again"
                )
            if image.format not in ONE_PICTURE and getattr(image, "is_animated", False):
                if options.animated == "skip":
                    return item.skip("animated", f"a {image.format} of several frames, and --animated skip")
                notes.append("first_frame")
            image.seek(0)
            lying = placement.resized_size if orientation < 5 else placement.resized_size[::-1]  # as the file has it
            divisor = draft(image, lying, options)
            image.load()
            color, alpha = split_alpha(image)
            rgb = to_srgb(color, image.info.get("icc_profile"), notes)
    except Image.DecompressionBombError as error:
        return item.skip("too_large", too_large(error))
    except UnknownRangeError as error:
        return item.skip("unsupported_mode", str(error))
    except DECODER_ERRORS as error:
        return item.skip("truncated" if "truncated" in str(error).lower() else "unreadable", describe(error))
    if alpha is not None:
        rgb = fill_background(rgb, alpha, options.background, options.weights == "alpha", notes)
    if divisor > 1:  # before it is turned: the picture ends within the last row and column of a reduced JPEG
        notes.append("draft")
        rgb = rgb.resize(lying[::-1], options.filter, box=(0, 0, width / divisor, height / divisor))
    if orientation in TRANSPOSE:
        notes.append("oriented")
        rgb = rgb.transpose(TRANSPOSE[orientation])
        alpha = alpha.transpose(TRANSPOSE[orientation]) if alpha is not None else None
    return rgb, alpha


def draft(image: Image.Image, size: Size, options: LoadOptions) -> int:
    """Have libjpeg decode a JPEG at a half, a quarter or an eighth of its sides; returns the divisor, 1 for none.

    Only where that leaves DRAFT_MARGIN times the size that is asked for. benchmarks/decode.py says what it gains and
    what it changes.
    """
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)
    if not (options.draft and is_jpeg) or options.filter == Image.Resampling.NEAREST:
        return 1
    full = image.width
    image.draft(None, (size[1] * DRAFT_MARGIN, size[0] * DRAFT_MARGIN))
    return next(divisor for divisor in (1, 2, 4, 8) if -(-full // divisor) == image.width)


def load_mask(data: bytes, size: Size) -> Image.Image | str:
    """A mask as an upright "L" image, or what is wrong with it: its alpha where it has some, else its brightness."""
    try:
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            found, orientation = oriented_size(image), read_orientation(image)
            image.load()
            color, alpha = split_alpha(image)
            mask = alpha if alpha is not None else to_srgb(color, None, []).convert("L")
    except DECODER_ERRORS as error:
        return describe(error)
    if abs(found[0] * size[1] / (found[1] * size[0]) - 1) > ASPECT_TOLERANCE:
        return f"is {found[1]}x{found[0]}, its image {size[1]}x{size[0]}: not the same shape"
    return mask.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else mask


def place_weight(alpha: Image.Image | None, size: Size, crops: Sequence[Box], factor: int) -> np.ndarray | None:
    """[K,H/f,W/f] float32: alpha in 0..1, area-averaged to latent resolution; padding weighs 0. None: all ones."""
    _, _, box_height, box_width = crops[0]
    height, width = size
    is_padded = box_height > height or box_width > width
    if alpha is None and not is_padded:
        return None
    if alpha is None:
        plane: np.ndarray = np.full((height, width), 255, np.uint8)
    else:
        # BOX averages areas when it shrinks, and has no overshoot as lanczos has
        same = alpha.size == (width, height)
        plane = np.asarray(alpha if same else alpha.resize((width, height), Image.Resampling.BOX))
    planes = np.stack([cut(plane, box, mode="constant") for box in crops]).astype(np.float32) / 255
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
