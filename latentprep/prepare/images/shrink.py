"""LANCZOS by torch's vector code: Pillow's pixels to within two levels of 255, several times as fast.

On average they are 0.004 levels apart (benchmarks/decode.py): both round, and Pillow's weights have more bits.
"""

from functools import cache

import numpy as np
from PIL import Image

from latentprep.prepare.images.cicp import STRIP
from latentprep.records import Size

# Without AVX2 torch's code is slower than Pillow's.
CAPABILITIES = ("AVX2", "AVX512")


@cache
def torch_has_lanczos() -> bool:
    """Whether this torch has LANCZOS, as 2.12 and later do, and this processor what makes it fast."""
    import torch

    return hasattr(torch.ops.aten, "_upsample_lanczos2d_aa") and torch.backends.cpu.get_cpu_capability() in CAPABILITIES


def shrink(pixels: np.ndarray, size: Size, extent: tuple[float, float], columns_first: bool = False) -> np.ndarray:
    """An array [H,W,3] uint8 resized to [h,w,3] by LANCZOS; H and W may stay, but not become more.

    extent: (height, width) of the picture in the array, from its top left corner; a reduced JPEG may end within its
    last row and column.
    columns_first: as Pillow resizes a picture that was turned by 90 degrees before. Between the two passes numbers are
    rounded and cut off at 0 and 255, so their order changes the pixels, by 0.15 levels on average.
    """
    import torch

    if columns_first:
        pixels = shrink(pixels, (size[0], pixels.shape[1]), (extent[0], pixels.shape[1]))
        extent = size[0], extent[1]
    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    scales = [side / whole for side, whole in zip(size, extent, strict=True)]
    # what interpolate(mode="lanczos") calls, which takes a size or scales, and not both
    small = torch.ops.aten._upsample_lanczos2d_aa(planes, list(size), False, *scales)
    found: np.ndarray = small[0].permute(1, 2, 0).contiguous().numpy()
    return found


def shrink_image(image: Image.Image, size: Size, extent: tuple[float, float]) -> Image.Image:
    """The same of an RGB image.

    By strips, first each row, then each column: the strips stay in the processor's cache, and memory grows by little.
    """
    count = max(1, STRIP // image.width)
    narrow = np.empty((image.height, size[1], 3), np.uint8)
    for top in range(0, image.height, count):
        bottom = min(image.height, top + count)
        strip = np.array(image.crop((0, top, image.width, bottom)))  # a copy, since torch warns of what is read-only
        narrow[top:bottom] = shrink(strip, (bottom - top, size[1]), (bottom - top, extent[1]))
    return Image.fromarray(shrink(narrow, size, (extent[0], size[1])))
