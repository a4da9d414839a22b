"""What Pillow passes over in PNGs: wrong checksums, pixels that end too early, the scale of a transparent grey."""

import io
import zlib

from PIL import Image

from latentprep.prepare.images.pillow import DecodeError, decoding, find_chunk, list_chunks

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> numbers of a pixel (PNG, table 11.1)
BLOCK = 1 << 20  # bytes that are inflated at once


def check_sums(data: bytes) -> None:
    """Raise DecodeError if a chunk does not fit its checksum: Pillow decodes such a PNG to black rows, silently."""
    with decoding():
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()


def read_depth(data: bytes) -> tuple[int, int, int]:
    """Bits of a number, colour type and interlace method; Pillow does not ask for IHDR to be the first chunk."""
    bits, color, _, _, interlace = ((find_chunk(data, b"IHDR") or b"") + bytes(13))[8:13]
    return bits, color, interlace


def scale_transparency(data: bytes, image: Image.Image) -> None:
    """Give the transparent colour of a PNG of 2, 4 or 16 bits in 8 bits, as Pillow gives its pixels."""
    (bits, _, _), level = read_depth(data), image.info.get("transparency")
    if image.mode == "L" and 0 < bits < 8 and isinstance(level, int):
        image.info["transparency"] = level * 255 // ((1 << bits) - 1)
    elif image.mode == "RGB" and bits == 16 and isinstance(level, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in level)


def check_rows(data: bytes, image: Image.Image) -> None:
    """Raise DecodeError if a loaded PNG has fewer rows than its header says: Pillow leaves those black, silently.

    The pixels are inflated once more for that, but only if the last row is black. (Pillow raises itself if the PNG is
    interlaced.)
    """
    bits, color, interlace = read_depth(data)
    last = image.crop((0, image.height - 1, image.width, image.height))
    if interlace or last.getbbox(alpha_only=False) is not None:
        return
    row = 1 + (image.width * bits * CHANNELS.get(color, 1) + 7) // 8  # bytes, with the filter
    wanted = image.height * row
    found = 0
    inflater, file = zlib.decompressobj(), io.BytesIO(data)
    for name, length in list_chunks(file):
        if name != b"IDAT":
            continue
        rest = file.read(length)
        while rest and found < wanted:
            with decoding():
                found += len(inflater.decompress(rest, BLOCK))
            rest = inflater.unconsumed_tail
    with decoding():
        found += len(inflater.flush(BLOCK)) if found < wanted else 0
    if found < wanted:
        raise DecodeError("truncated", f"the PNG ends before its pixels do ({found:,} bytes of {wanted:,})")
