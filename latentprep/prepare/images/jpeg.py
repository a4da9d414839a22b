"""Damage in JPEGs, which libjpeg only warns of: it fills what is missing with grey, and Pillow says nothing."""

import simplejpeg

from latentprep.prepare.images.pillow import DecodeError

MAGIC, SCAN, END = b"\xff\xd8\xff", b"\xff\xda", b"\xff\xd9"
MAX_SCANS = 100  # a progressive JPEG has about ten; each costs a pass over all pixels, and a few bytes make one
NO_END = "Premature end of JPEG file"  # libjpeg's words for a file without an end marker


def check_jpeg(data: bytes) -> tuple[bytes, str]:
    """The JPEG with its end marker, and the first warning that decoding it gives; "" if there is none.

    A file that lacks nothing but its end marker gets it. Raises DecodeError if more is missing at its end, and for a
    JPEG of too many scans.
    """
    scans = data.count(SCAN)
    if scans > MAX_SCANS:
        raise DecodeError("too_large", f"a JPEG of {scans:,} scans, expected at most {MAX_SCANS}")
    warning = find_warning(data)
    if not warning.startswith(NO_END):
        return data, warning
    warning = find_warning(data + END)
    if warning:
        raise DecodeError("truncated", f"the JPEG ends before its pixels do ({warning})")
    return data + END, ""


def find_warning(data: bytes) -> str:
    """The first warning or error of libjpeg-turbo, "" for none. An eighth of the size is decoded: all of the data is
    read for that, at under half the time of a whole decode.

    What it does not support is no damage: Pillow says whether it can decode that.
    """
    try:
        _, _, colors, _ = simplejpeg.decode_jpeg_header(data)
        target = "CMYK" if colors in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, target, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        words = " ".join(str(error).split())
        return "" if words.startswith("Unsupported") else words
    return ""
