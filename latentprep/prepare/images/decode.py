"""Bytes of an image file -> upright sRGB pixels at their own size, and alpha; bytes of a mask -> its brightness."""

import io
from typing import TYPE_CHECKING

from PIL import Image, JpegImagePlugin

from latentprep.prepare.images.alpha import fill_background, split_alpha
from latentprep.prepare.images.cicp import read_cicp
from latentprep.prepare.images.color import is_srgb, to_srgb
from latentprep.prepare.images.jpeg import MAGIC as JPEG_MAGIC
from latentprep.prepare.images.jpeg import check_jpeg, decode_sound
from latentprep.prepare.images.pillow import (
    DecodeError,
    decoding,
    find_chunk,
    open_image,
    oriented_size,
    read_orientation,
)
from latentprep.prepare.images.png import check_rows, check_sums, scale_transparency
from latentprep.prepare.images.shrink import shrink, shrink_image
from latentprep.records import Item, Placement, Size

if TYPE_CHECKING:
    from latentprep.prepare.images.load import LoadOptions

TRANSPOSE = {  # EXIF orientation -> what undoes it (TIFF 6.0, tag 274)
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
DRAFT_MARGIN = 2  # a reduced JPEG still has this many times the pixels that are asked for, each way
ONE_PICTURE = ("MPO", "PSD", "HEIF", "ICO", "ICNS")  # their further frames are previews, depth maps and layers
ASPECT_TOLERANCE = 0.02  # between an image and its mask


def decode(
    data: bytes, item: Item, placement: Placement, options: "LoadOptions", notes: list[str]
) -> tuple[Image.Image, Image.Image | None]:
    """An image file as upright sRGB, and its alpha as "L" if it has transparency. Raises DecodeError.

    It has its own size; a JPEG that was decoded at reduced size, or shrunk by decode_plain, has that of its placement.
    """
    if options.draft and (found := decode_plain(data, item, placement, options, notes)) is not None:
        return found, None
    data = check_file(data, options.strict, notes)
    with open_image(io.BytesIO(data)) as image:
        size, (width, height), orientation = oriented_size(image), image.size, read_orientation(image)
        if size != item.size:
            raise DecodeError(
                "changed", f"was {item.size[1]}x{item.size[0]} when listed, now {size[1]}x{size[0]}: run again"
            )
        with decoding():
            is_animated = image.format not in ONE_PICTURE and getattr(image, "is_animated", False)
        if is_animated:
            if options.animated == "skip":
                raise DecodeError("animated", f"a {image.format} of several frames, and --animated skip")
            notes.append("first_frame")
        unturned = unturned_size(placement, orientation)
        with decoding():  # no seek(0): the first frame is open already, and Pillow counts the frames of a PSD from 1
            has_more_bits = keeps_high_byte(image)
            divisor = draft(image, unturned, options)
        load_checked(image, data)
        notes += ["high_byte"] if has_more_bits else []
        color, alpha = split_alpha(image)
        cicp = read_cicp(find_chunk(data, b"cICP")) if image.format == "PNG" else None
        rgb = to_srgb(color, image.info.get("icc_profile"), notes, cicp)
    if alpha is not None:
        rgb = fill_background(rgb, alpha, options.background, options.weights == "alpha", notes)
    if divisor > 1:  # before it is turned: the picture ends within the last row and column of a reduced JPEG
        notes.append("draft")
        rgb = resize(rgb, unturned, (height / divisor, width / divisor), options)
    if orientation in TRANSPOSE:
        notes.append("oriented")
        rgb = rgb.transpose(TRANSPOSE[orientation])
        alpha = alpha.transpose(TRANSPOSE[orientation]) if alpha is not None else None
    return rgb, alpha


def decode_plain(
    data: bytes, item: Item, placement: Placement, options: "LoadOptions", notes: list[str]
) -> Image.Image | None:
    """What decode gives for an undamaged JPEG that is sRGB already, without Pillow's copies; None for other files."""
    if not data.startswith(JPEG_MAGIC):
        return None
    try:
        with open_image(io.BytesIO(data)) as image:
            size, (width, height), orientation = oriented_size(image), image.size, read_orientation(image)
            if size != item.size or image.mode not in ("RGB", "L") or not is_srgb(image):
                return None
            unturned = unturned_size(placement, orientation)
            with decoding():
                divisor = draft(image, unturned, options)
        pixels = decode_sound(data, (height, width), divisor)
    except DecodeError:  # decode meets the error again, and reports it
        return None
    if pixels is None:
        return None
    notes += ["draft"] if divisor > 1 else []
    extent = (height / divisor, width / divisor)
    if options.by_torch and not placement.enlarges(size) and unturned != (height, width):
        # before it is turned; a reduced JPEG is resized before it is turned in the usual way too
        columns_first = orientation >= 5 and divisor == 1
        rgb = Image.fromarray(shrink(pixels, unturned, extent, columns_first))
    else:
        rgb = Image.fromarray(pixels)
        rgb = resize(rgb, unturned, extent, options) if divisor > 1 else rgb
    if orientation in TRANSPOSE:
        notes.append("oriented")
        rgb = rgb.transpose(TRANSPOSE[orientation])
    return rgb


def unturned_size(placement: Placement, orientation: int) -> Size:
    """The size that an image is resized to, as its file has it: before it is turned upright."""
    return placement.resized_size if orientation < 5 else placement.resized_size[::-1]


def resize(image: Image.Image, size: Size, extent: tuple[float, float], options: "LoadOptions") -> Image.Image:
    """The top left part of an RGB image, `extent` high and wide, at a size that is not larger."""
    if options.by_torch:
        return shrink_image(image, size, extent)
    return image.resize(size[::-1], options.filter, box=(0, 0, extent[1], extent[0]))


def check_file(data: bytes, strict: bool, notes: list[str]) -> bytes:
    """The bytes of an image file, a JPEG's with its end marker. Raises DecodeError for damage that can be told."""
    if data.startswith(JPEG_MAGIC):
        data, warning = check_jpeg(data)
        if warning and strict:
            raise DecodeError("damaged", warning)
        notes += ["damaged"] if warning else []
    return data


def load_checked(image: Image.Image, data: bytes) -> None:
    """Decode the pixels of an opened image. Raises DecodeError, also for a PNG that Pillow fills up with black."""
    if image.format == "PNG":
        check_sums(data)
    with decoding():
        image.load()
    if image.format == "PNG":
        check_rows(data, image)
        scale_transparency(data, image)


def keeps_high_byte(image: Image.Image) -> bool:
    """Whether an image that is not loaded has more than 8 bits a channel in its file, and 8 in Pillow."""
    raw_modes = [str(tile[3]) for tile in getattr(image, "tile", ())]
    has_16 = any(";16" in mode for mode in raw_modes) and not image.mode.startswith(("I", "F"))
    return has_16 or (image.format == "HEIF" and int(image.info.get("bit_depth") or 8) > 8)


def draft(image: Image.Image, size: Size, options: "LoadOptions") -> int:
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


def load_mask(data: bytes, size: Size, strict: bool, notes: list[str]) -> Image.Image:
    """A mask as an upright "L" image: its alpha if it has some, else its brightness. Raises DecodeError "bad_mask"."""
    try:
        open_image(io.BytesIO(data)).close()  # its size, before anything of it is decoded
        data = check_file(data, strict, notes)
        with open_image(io.BytesIO(data)) as image:
            found, orientation = oriented_size(image), read_orientation(image)
            if abs(found[0] * size[1] / (found[1] * size[0]) - 1) > ASPECT_TOLERANCE:
                shapes = f"is {found[1]}x{found[0]}, its image {size[1]}x{size[0]}"
                raise DecodeError("bad_mask", f"{shapes}: not the same shape")
            load_checked(image, data)
            color, alpha = split_alpha(image)
            mask = alpha if alpha is not None else to_srgb(color, None, []).convert("L")
    except DecodeError as error:
        raise DecodeError("bad_mask", error.detail) from error
    return mask.transpose(TRANSPOSE[orientation]) if orientation in TRANSPOSE else mask
