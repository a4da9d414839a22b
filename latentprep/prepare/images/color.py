"""Pixels of any Pillow mode and colour profile -> 8-bit sRGB."""

import io
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

from latentprep.prepare.images.cicp import Cicp, apply_cicp, strips
from latentprep.prepare.images.pillow import DecodeError, decoding

PROFILE_SPACES = {"RGB": "RGB", "L": "GRAY", "CMYK": "CMYK", "LAB": "Lab"}  # mode -> colour space in an ICC header
SIXTEEN_BITS_AS_I = ("PPM", "PNG")  # formats that give their 16-bit grey as 32-bit integers, 0..65535


def to_srgb(image: Image.Image, profile: bytes | None, notes: list[str], cicp: Cicp | None = None) -> Image.Image:
    """The image as RGB in sRGB: by cICP if it is given, else by its ICC profile, with perceptual intent.

    16-bit grey is scaled to 8 bits (Pillow's convert clips it), and so are floats if they lie in 0..1. LAB without a
    profile is taken as D50, as in TIFF. A profile that cannot be used is noted and passed over.
    Raises DecodeError, also for floats and 32-bit integers of another range.
    """
    image = _to_8_bits(image, notes)
    if cicp is not None:
        with decoding():
            image = image.convert("RGB")
        return apply_cicp(image, cicp, notes)
    if profile:
        try:
            return _apply_profile(image, profile, notes)
        except DecodeError:
            notes.append("icc_unusable")
    if image.mode == "CMYK":
        notes.append("cmyk_without_profile")
    with decoding():
        if image.mode != "LAB":
            return image if image.mode == "RGB" else image.convert("RGB")
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        converted = ImageCms.profileToProfile(image, lab, srgb, outputMode="RGB")
    assert converted is not None
    return converted


def is_srgb(image: Image.Image) -> bool:
    """Whether the stored numbers of an RGB or grey image are sRGB: no profile, or in RGB a copy of sRGB's."""
    profile = image.info.get("icc_profile")
    return not profile or (image.mode == "RGB" and is_srgb_profile(profile))


@lru_cache(maxsize=16)  # photos of one camera have one
def is_srgb_profile(profile: bytes) -> bool:
    """Whether a profile leaves the colours of RGB images as they are. False for one that cannot be used."""
    try:
        with decoding():
            opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if opened.profile.xcolor_space.strip() != PROFILE_SPACES["RGB"]:
                return False
            return leaves_colors(ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), "RGB", "RGB"))
    except DecodeError:
        return False


def _to_8_bits(image: Image.Image, notes: list[str]) -> Image.Image:
    """Grey images of more than 8 bits as "L"; all others as they are."""
    if image.mode == "F":
        values = np.asarray(image)
        low, high = float(values.min()), float(values.max())
        if not (low >= 0 and high <= 1):  # also where there are NaNs
            raise DecodeError("unsupported_mode", f"float numbers from {low:g} to {high:g}, expected 0 to 1")
        notes.append("scaled_to_8_bits")
        return in_8_bits(values, lambda floats: floats * 255 + 0.5)
    if image.mode == "I" and image.format not in SIXTEEN_BITS_AS_I:
        lowest, highest = image.getextrema()
        raise DecodeError("unsupported_mode", f"32-bit integers from {lowest} to {highest}, which have no known range")
    if image.mode == "I" or image.mode.startswith("I;16"):
        notes.append("scaled_to_8_bits")
        return in_8_bits(np.asarray(image), lambda levels: (levels.astype(np.uint32) + 128) // 257)
    return image


def in_8_bits(values: np.ndarray, scale: Callable[[np.ndarray], np.ndarray]) -> Image.Image:
    """An array [H,W] as an "L" image; `scale` gives 0 to 255. By strips, so that a large image is copied but once."""
    scaled = np.empty(values.shape, np.uint8)
    for there, here in zip(strips(scaled), strips(values), strict=True):
        there[:] = scale(here).astype(np.uint8)
    return Image.fromarray(scaled)


def _apply_profile(image: Image.Image, profile: bytes, notes: list[str]) -> Image.Image:
    """The image in sRGB. Raises DecodeError for a profile that is damaged, or for another kind of image."""
    with decoding():
        opened = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        space = opened.profile.xcolor_space.strip()
        if image.mode not in PROFILE_SPACES or (image.mode == "L" and space == "RGB"):
            image = image.convert("RGB")  # palettes, and grey images with the profile of a screen
    if space != PROFILE_SPACES[image.mode]:
        raise DecodeError("unreadable", f"a profile for {space}, of an image that is {image.mode}")
    with decoding():
        transform = ImageCms.buildTransform(opened, ImageCms.createProfile("sRGB"), image.mode, "RGB")
    if image.mode == "RGB" and leaves_colors(transform):
        return image
    with decoding():
        converted = ImageCms.applyTransform(image, transform)
    assert converted is not None
    notes.append("icc_to_srgb")
    return converted


def leaves_colors(transform: ImageCms.ImageCmsTransform) -> bool:
    """Whether an RGB transform only rounds: then its profile is a copy of sRGB, and the pixels stay as they are.

    By the numbers and not by the name: there are linear profiles that call themselves sRGB.
    """
    levels = np.linspace(0, 255, 9).round().astype(np.uint8)
    probe = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
    seen = np.asarray(ImageCms.applyTransform(Image.fromarray(probe), transform))
    return int(np.abs(seen.astype(int) - probe).max()) <= 2
