"""Transparency: an image -> its colour and its alpha; and which colour the VAE sees under transparent pixels."""

import numpy as np
from PIL import Image

from latentprep.prepare.images.pillow import decoding

WHITE = (255, 255, 255)


def split_alpha(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The image without its transparency, and that as an "L" image; None where every pixel is opaque.

    Transparency is an alpha band, or a transparent colour (palette, grey and RGB images keep it in `info`).
    The colour below it is as it is stored. Raises DecodeError.
    """
    if image.mode not in ("RGBA", "LA", "PA", "RGBa", "La") and "transparency" not in image.info:
        return image, None
    if image.mode.startswith("I"):  # 16-bit grey: Pillow's convert would clip it to 255
        is_seen = np.asarray(image) != image.info["transparency"]
        return image, None if is_seen.all() else Image.fromarray(is_seen.astype(np.uint8) * 255)
    with decoding():
        if image.mode == "La":
            image = image.convert("LA")  # Pillow turns premultiplied grey into nothing else
        rgba = image if image.mode == "RGBA" else image.convert("RGBA")
        alpha = rgba.getchannel("A")
        color = rgba.convert("RGB")
        if image.mode in ("L", "LA"):
            color = image.convert("L")  # stays grey, for a grey ICC profile
    return color, None if alpha.getextrema() == (255, 255) else alpha


def fill_background(
    rgb: Image.Image, alpha: Image.Image, background: str, alpha_is_weight: bool, notes: list[str]
) -> Image.Image:
    """What the VAE is to see of a transparent image.

    background "keep": the stored colour. "#rrggbb": the image laid over that colour. "auto": if alpha is the loss
    weight, the stored colour, but white for fully transparent pixels that hold no picture; else the image laid over
    white.
    """
    if background == "keep":
        return rgb
    if background == "auto" and alpha_is_weight:
        return _whiten(rgb, alpha, notes)
    notes.append("laid_over_background")
    color = WHITE if background == "auto" else tuple(bytes.fromhex(background[1:]))
    return Image.composite(rgb, Image.new("RGB", rgb.size, color), alpha)


def _whiten(rgb: Image.Image, alpha: Image.Image, notes: list[str]) -> Image.Image:
    """Fully transparent pixels in white, if all of them have one and the same colour.

    Then it is a filling (black mostly, or the transparent colour of a palette) and no part of a picture.
    """
    is_transparent = alpha.point(lambda level: 255 * (level == 0))
    colors = [count for count in rgb.histogram(is_transparent) if count]  # one for each band where all are the same
    if len(colors) != 3:
        return rgb
    notes.append("whitened")
    return Image.composite(Image.new("RGB", rgb.size, WHITE), rgb, is_transparent)
