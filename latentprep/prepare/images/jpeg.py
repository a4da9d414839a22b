"""Damage in JPEGs, which libjpeg only warns of: it fills what is missing with grey, and Pillow says nothing.

A JPEG without damage is decoded here too.
"""

import re
from dataclasses import dataclass

import numpy as np
import simplejpeg

from latentprep.prepare.images.pillow import DecodeError, max_pixels
from latentprep.records import Size

MAGIC, END = b"\xff\xd8\xff", b"\xff\xd9"
MAX_SCANS = 100  # a progressive JPEG has about ten; each costs a pass over all pixels, and a few bytes make one
WHOLE_SCANS = 20  # that an image of --max-megapixels may have; smaller ones may have more, up to MAX_SCANS
MAX_SEGMENTS = 10_000  # each of them has up to 64 kB; depth maps and long XMP take some hundreds
NO_END = "Premature end of JPEG file"  # libjpeg's words for a file without an end marker

# Codes of markers, ITU-T T.81, table B.1
SOI, EOI, SOS, TEM = 0xD8, 0xD9, 0xDA, 0x01
RESTARTS = range(0xD0, 0xD8)
FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
PROGRESSIVE = (0xC2, 0xC6, 0xCA, 0xCE)
MARKER = re.compile(rb"\xff[^\x00\xff]")
AFTER_SCAN = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")  # in compressed data FF stands before 00 and restarts only


def check_jpeg(data: bytes) -> tuple[bytes, str]:
    """The JPEG with its end marker, and the first warning that decoding it gives; "" if there is none.

    A file that lacks nothing but its end marker gets it. Raises DecodeError if more is missing at its end, and for a
    JPEG of too many scans.
    """
    outline = read_outline(data)
    check_scans(outline)
    warning = find_warning(data)
    if not warning.startswith(NO_END):
        return data, warning
    warning = find_warning(data + END)
    if not warning and not outline.has_all_scans():
        warning = "no last scan"
    if warning:
        raise DecodeError("truncated", f"the JPEG ends before its pixels do ({warning})")
    return data + END, ""


def decode_sound(data: bytes, size: Size, divisor: int) -> np.ndarray | None:
    """[H,W,3] uint8: a JPEG of `size`, decoded at 1/`divisor` of its sides; None if decoding gives any warning.

    The pixels are Pillow's: no profile is applied, and grey becomes RGB. One pass over the data does what takes two
    with check_jpeg and Pillow.
    Raises DecodeError for a JPEG of too many scans or segments.
    """
    check_scans(read_outline(data))
    height, width = (-(-side // divisor) for side in size)
    try:
        if simplejpeg.decode_jpeg_header(data)[:2] != size:  # Pillow reads another: it may be any size
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            data, "RGB", min_height=height, min_width=width, min_factor=divisor, strict=True
        )
    except ValueError:
        return None
    return pixels if pixels.shape == (height, width, 3) else None


# Components of a scan, and what it sends of their 64 coefficients: the first, the last, the lowest bit (T.81, B.2.3).
Scan = tuple[tuple[int, ...], int, int, int]


@dataclass(frozen=True)
class Outline:
    """What a JPEG's headers say."""

    pixels: int
    components: tuple[int, ...]
    is_progressive: bool
    scans: tuple[Scan, ...]

    def has_all_scans(self) -> bool:
        """Whether every coefficient was sent down to its lowest bit. A file that was cut between two scans has no
        other sign of it.
        """
        sent = set()
        for components, first, last, low in self.scans:
            if low == 0 or not self.is_progressive:
                coefficients = range(first, last + 1) if self.is_progressive else range(64)
                sent |= {(component, n) for component in components for n in coefficients}
        return all((component, n) in sent for component in self.components for n in range(64))


def check_scans(outline: Outline) -> None:
    """Raise DecodeError for a JPEG of too many scans."""
    allowed = max(1, min(MAX_SCANS, WHOLE_SCANS * max_pixels() // max(1, outline.pixels)))
    if len(outline.scans) > allowed:
        for_so_many = "" if allowed == MAX_SCANS else f" for {outline.pixels:,} pixels"
        raise DecodeError(
            "too_large", f"a JPEG of {len(outline.scans):,} scans, expected at most {allowed:,}{for_so_many}"
        )


def read_outline(data: bytes) -> Outline:
    """The headers up to the end marker: what lies behind it (a phone's video) or within a segment is not looked at.

    Raises DecodeError for more segments than any JPEG has.
    """
    pixels, is_progressive = 0, False
    components: tuple[int, ...] = ()
    scans: list[Scan] = []
    here, pattern = len(MAGIC) - 1, MARKER
    for _ in range(MAX_SEGMENTS):
        found = pattern.search(data, here)
        if found is None or data[found.end() - 1] == EOI:
            return Outline(pixels, components, is_progressive, tuple(scans))
        code, here, pattern = data[found.end() - 1], found.end(), MARKER
        if code in (SOI, TEM) or code in RESTARTS:
            continue
        length = int.from_bytes(data[here : here + 2], "big")
        content = data[here + 2 : here + length]
        here += length
        if code in FRAMES and len(content) >= 6:
            pixels = int.from_bytes(content[1:3], "big") * int.from_bytes(content[3:5], "big")
            components, is_progressive = tuple(content[6 : 6 + 3 * content[5] : 3]), code in PROGRESSIVE
        elif code == SOS and content:
            pattern = AFTER_SCAN
            count = content[0]
            first, last, bits = (*content[1 + 2 * count : 4 + 2 * count], 0, 0, 0)[:3]
            scans.append((tuple(content[1 : 1 + 2 * count : 2]), first, last, bits & 15))
    raise DecodeError("too_large", f"a JPEG of more than {MAX_SEGMENTS:,} segments")


def find_warning(data: bytes) -> str:
    """The first warning or error of libjpeg-turbo, "" for none. An eighth of the size is decoded: all of the data is
    read for that, at under half the time of a whole decode.

    A JPEG of a kind that it does not support is not damaged: Pillow says later whether it can decode it.
    """
    try:
        _, _, colors, _ = simplejpeg.decode_jpeg_header(data)
        target = "CMYK" if colors in ("CMYK", "YCCK") else "GRAY"
        simplejpeg.decode_jpeg(data, target, min_height=1, min_width=1, min_factor=8, strict=True)
    except ValueError as error:
        words = " ".join(str(error).split())
        return "" if words.startswith("Unsupported") else words
    return ""
