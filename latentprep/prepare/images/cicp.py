"""PNG's cICP chunk: a colour space as four code points of ITU-T H.273 -> sRGB. It counts before an ICC profile."""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from PIL import Image

# Code points of H.273, table 2: red, green, blue and white in CIE xy.
PRIMARIES = {
    1: ((0.640, 0.330), (0.300, 0.600), (0.150, 0.060), (0.3127, 0.3290)),  # BT.709, sRGB
    9: ((0.708, 0.292), (0.170, 0.797), (0.131, 0.046), (0.3127, 0.3290)),  # BT.2020
    12: ((0.680, 0.320), (0.265, 0.690), (0.150, 0.060), (0.3127, 0.3290)),  # Display P3
}
# Table 3: 13 is sRGB's curve; 1, 6, 14 and 15 are BT.709's, which displays show as they show sRGB.
SRGB_CURVES = (1, 6, 13, 14, 15)
GAMMAS = {4: 2.2, 5: 2.8, 8: 1.0}
STEPS = 1 << 18  # of a table from linear light to sRGB: near black a step is an eightieth of a level
STRIP = 1 << 20  # pixels that are computed at once


class Cicp(NamedTuple):
    primaries: int
    transfer: int
    matrix: int  # 0: RGB, the only one that PNG allows
    full_range: int  # 1: 0..255


def read_cicp(chunk: bytes | None) -> Cicp | None:
    """The four code points of a chunk; None if there is no such chunk, or it has another length."""
    return Cicp(*chunk) if chunk is not None and len(chunk) == 4 else None


def apply_cicp(image: Image.Image, cicp: Cicp, notes: list[str]) -> Image.Image:
    """An RGB image in sRGB. A colour space that is not in the tables, such as HDR, is noted and taken as sRGB."""
    curve = GAMMAS.get(cicp.transfer, "srgb" if cicp.transfer in SRGB_CURVES else None)
    if cicp.primaries not in PRIMARIES or curve is None or cicp.matrix != 0 or cicp.full_range != 1:
        notes.append("cicp_unusable")
        return image
    if cicp.primaries == 1 and curve == "srgb":
        return image
    notes.append("cicp_to_srgb")
    levels = np.arange(256) / 255
    linear = (srgb_to_linear(levels) if isinstance(curve, str) else levels**curve).astype(np.float32)
    to_srgb = (np.linalg.inv(rgb_to_xyz(1)) @ rgb_to_xyz(cicp.primaries)).T.astype(np.float32)
    seen = (linear_to_srgb(np.arange(STEPS) / (STEPS - 1)) * 255 + 0.5).astype(np.uint8)
    pixels = np.array(image)
    for rows in strips(pixels):  # in place: three floats of a large image would take gigabytes
        here = np.clip(linear[rows] @ to_srgb, 0, 1) * (STEPS - 1) + 0.5
        rows[:] = seen[here.astype(np.int32)]
    return Image.fromarray(pixels)


def strips(pixels: np.ndarray) -> Iterator[np.ndarray]:
    """Views of an array [H,W,...], one below the other, each of about STRIP pixels."""
    count = max(1, STRIP // pixels.shape[1])
    for top in range(0, len(pixels), count):
        yield pixels[top : top + count]


def rgb_to_xyz(primaries: int) -> np.ndarray:
    """[3,3]: linear RGB -> CIE XYZ, white at Y = 1; the usual derivation (SMPTE RP 177)."""
    *colors, white = (np.array([x / y, 1, (1 - x - y) / y]) for x, y in PRIMARIES[primaries])
    columns = np.stack(colors, axis=1)
    found: np.ndarray = columns * np.linalg.solve(columns, white)
    return found


def srgb_to_linear(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 0..1."""
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(values: np.ndarray) -> np.ndarray:
    """IEC 61966-2-1, 0..1."""
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)
