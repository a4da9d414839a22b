"""What Pillow passes over in PNGs: wrong checksums, pixels that end too early, the scale of a transparent grey."""

import io
import struct
import zlib

from PIL import Image

from latentprep.prepare.images.pillow import PNG_MAGIC, DecodeError, decoding, list_chunks

CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # colour type -> numbers of a pixel (PNG, table 11.1)
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))  # Adam7
BLOCK = 1 << 20  # bytes that are inflated at once


def check_sums(data: bytes) -> None:
    """Raise DecodeError if a chunk does not fit its checksum: Pillow decodes such a PNG to black rows, silently."""
    with decoding():
        Image.open(io.BytesIO(data), formats=("PNG",)).verify()


def scale_transparency(data: bytes, image: Image.Image) -> None:
    """Give the transparent colour of a grey PNG of 2 or 4 bits in 8 bits, as Pillow gives its pixels."""
    bits, level = data[24], image.info.get("transparency")
    if image.mode == "L" and bits < 8 and isinstance(level, int):
        image.info["transparency"] = level * 255 // ((1 << bits) - 1)


def check_rows(data: bytes, image: Image.Image) -> None:
    """Raise DecodeError if a loaded PNG has fewer rows than its header says: Pillow leaves those black, silently.

    The pixels are inflated once more for that, but only if the last row is black or the PNG is interlaced.
    """
    last = image.crop((0, image.height - 1, image.width, image.height))
    is_interlaced = data[28] == 1
    if not is_interlaced and last.getbbox(alpha_only=False) is not None:
        return
    wanted = count_bytes(data)
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


def count_bytes(data: bytes) -> int:
    """Bytes of a PNG's pixels, with the filter byte of every row, before they were compressed."""
    width, height, bits, color, _, _, interlace = struct.unpack_from(">IIBBBBB", data, len(PNG_MAGIC) + 8)
    total = 0
    for left, top, right, down in PASSES if interlace else ((0, 0, 1, 1),):
        columns, rows = -(-(width - left) // right), -(-(height - top) // down)
        if columns > 0:
            total += rows * (1 + (columns * bits * CHANNELS[color] + 7) // 8)
    return total
