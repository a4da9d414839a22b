"""Bytes of an image file -> oriented, colour-managed, resized and cropped uint8 pixels, and the weight map."""

import io
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms

from latentprep.prepare.source import (
    DECODER_ERRORS,
    describe,
    formats,
    new_hash,
    oriented_size,
    read_orientation,
    too_large,
)
from latentprep.records import Item, Pixels, Placement, Size, Skip

TRANSPOSE = {  # EXIF orientation -> what undoes it (TIFF 6.0, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
INSIDE_ICC = ("RGB", "L", "CMYK", "LAB")  # modes that a profile can be applied to
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
JPEG_MAGIC, JPEG_SCAN = b"\xff\xd8\xff", b"\xff\xda"
MAX_SCANS = 100  # a progressive JPEG has about ten; each costs a pass over all pixels, and a few bytes make one
LARGE_PIXELS = 32_000_000  # an image beyond this is decoded alone: it takes hundreds of MB


def load_pixels(folder: Path, item: Item, placement: Placement, filter_name: str, factor: int) -> Pixels | Skip:
    """The pixels of an item as the VAE is to see them, or the Skip that says why not."""
    try:
        data = (folder / item.key).read_bytes()
    except OSError as error:
        return item.skip("unreadable", describe(error))
    if len(data) != item.nbytes:
        return item.skip("changed", f"was {item.nbytes} bytes when listed, now {len(data)}: run again")
    try:
        if data.startswith(PNG_MAGIC):
            Image.open(
                io.BytesIO(data), formats=("PNG",)
            ).verify()  # checksums: Pillow decodes a damaged PNG to black rows, silently
        if data.startswith(JPEG_MAGIC) and data.count(JPEG_SCAN) > MAX_SCANS:
            return item.skip("too_large", f"a JPEG of {data.count(JPEG_SCAN):,} scans, expected at most {MAX_SCANS}")
        with Image.open(io.BytesIO(data), formats=formats()) as image:
            size, orientation = oriented_size(image), read_orientation(image)
            if size != item.size:
                return item.skip(
                    "changed", f"was {item.size[1]}x{item.size[0]} when listed, now {size[1]}x{size[0]}: run again"
                )
            notes = ["first_frame"] if getattr(image, "is_animated", False) else []
            image.seek(0)
            image.load()
            if orientation in TRANSPOSE:
                notes.append("oriented")
            color, alpha = split_alpha(image)
            rgb = to_srgb(color, image.info.get("icc_profile"), notes)
    except Image.DecompressionBombError as error:
        return item.skip("too_large", too_large(error))
    except DECODER_ERRORS as error:
        return item.skip("truncated" if "truncated" in str(error).lower() else "unreadable", describe(error))
    if rgb is None:
        return item.skip("unsupported_mode", f"Pillow mode {color.mode}")
    if orientation in TRANSPOSE:
        rgb = rgb.transpose(TRANSPOSE[orientation])
        alpha = alpha.transpose(TRANSPOSE[orientation]) if alpha is not None else None
    if placement.enlarges(size):
        notes.append("enlarged")
    pixels = place_pixels(rgb, placement, Image.Resampling[filter_name.upper()])
    weight = place_weight(alpha, size, placement, factor)
    return Pixels(pixels, weight, new_hash(data).digest(), tuple(notes))


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The image without its transparency, and that as an "L" image; None where every pixel is opaque.

    Transparency is an alpha band, or a transparent colour (palette, grey and RGB images keep it in `info`).
    The colour below it is kept as it is stored.
    """
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image, None
    rgba = image.convert("RGBA")
    alpha = rgba.getchannel("A")
    color = rgba.convert("RGB")
    if image.mode in ("L", "LA", "La"):
        color = image.convert("L")  # stays grey, for a grey ICC profile
    return color, None if alpha.getextrema() == (255, 255) else alpha


def to_srgb(image: Image.Image, profile: bytes | None, notes: list[str]) -> Image.Image | None:
    """The image as RGB in sRGB; an embedded ICC profile is honoured. None for modes whose range is not known.

    16-bit grey is scaled to 8 bits (Pillow's convert would clip it). A broken profile is noted and passed over.
    """
    if image.mode.startswith("I;16"):
        image = Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    elif image.mode in ("I", "F"):
        return None
    if profile and image.mode not in INSIDE_ICC:
        image = image.convert("RGB")
    if profile and image.mode in INSIDE_ICC:
        try:
            transform = ImageCms.buildTransform(io.BytesIO(profile), ImageCms.createProfile("sRGB"), image.mode, "RGB")
            if image.mode != "RGB" or not leaves_colors(transform):
                converted = ImageCms.applyTransform(image, transform)
                notes.append("icc_to_srgb")
                return converted
        except (ImageCms.PyCMSError, OSError, ValueError):
            notes.append("icc_unusable")
    return image.convert("RGB")


def leaves_colors(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether an RGB transform only rounds: then its profile is a copy of sRGB, and the pixels stay as they are.

    By the numbers and not by the name: there are linear profiles that call themselves sRGB.
    """
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    seen = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform))
    return int(np.abs(seen.astype(int) - probe).max()) <= 2


def place_pixels(image: Image.Image, placement: Placement, resampling: Image.Resampling) -> np.ndarray:
    """[H,W,3] uint8: resized and cut to the placement. Padding repeats the border, so that it adds no edge."""
    height, width = placement.resized_size
    if image.size != (width, height):
        image = image.resize((width, height), resampling)
    pixels = np.asarray(image)
    return np.ascontiguousarray(_cut(pixels, placement, mode="edge"))


def place_weight(alpha: Image.Image | None, size: Size, placement: Placement, factor: int) -> np.ndarray | None:
    """[H/f,W/f] float32: alpha in 0..1, area-averaged to latent resolution; padding weighs 0. None: all ones."""
    _, _, box_height, box_width = placement.crop
    height, width = placement.resized_size
    is_padded = box_height > height or box_width > width
    if alpha is None and not is_padded:
        return None
    if alpha is None:
        plane: np.ndarray = np.full((height, width), 255, np.uint8)
    else:
        # BOX averages areas when it shrinks, and has no overshoot as lanczos has
        plane = np.asarray(alpha if size == (height, width) else alpha.resize((width, height), Image.Resampling.BOX))
    plane = _cut(plane, placement, mode="constant").astype(np.float32) / 255
    return plane.reshape(box_height // factor, factor, box_width // factor, factor).mean(axis=(1, 3))


def _cut(array: np.ndarray, placement: Placement, mode: str) -> np.ndarray:
    """The crop box of an array [H,W,...]; np.pad's `mode` fills what lies outside."""
    top, left, height, width = placement.crop
    down, right = top + height - array.shape[0], left + width - array.shape[1]
    margins = [(max(0, -top), max(0, down)), (max(0, -left), max(0, right))] + [(0, 0)] * (array.ndim - 2)
    if any(side for pair in margins for side in pair):
        array = np.pad(array, margins, mode=mode)  # type: ignore[call-overload]
    top, left = max(0, top), max(0, left)
    return array[top : top + height, left : left + width]
