"""Which part of an image its bucket keeps: the middle, a random part, or the one with the most to see."""

import numpy as np
from PIL import Image, ImageFilter

from latentprep.prompts import counter
from latentprep.records import Box, Placement

MAP_SIDE = 128  # pixels of the longer side of a saliency map
BLUR = MAP_SIDE / 32  # radius in pixels of the map: what is smaller counts by its edges alone

Part = tuple[int, int]  # first and last offset, in pixels


def choose_crops(
    image: Image.Image, weight: Image.Image | None, placement: Placement, mode: str, count: int, seed: int, key: str
) -> tuple[Box, ...]:
    """`count` boxes of the bucket's size in the resized image.

    mode: "center"; "random", decided by (seed, key); or "focus", where the saliency map has its largest sum.
    Several boxes divide the axis along which a box can move farther: each box moves within its own part of it.
    """
    top, left, height, width = placement.crop
    down, right = placement.resized_size[0] - height, placement.resized_size[1] - width
    if mode == "center" or max(down, right) <= 0:
        return (placement.crop,) * count
    saliency = saliency_map(image, weight) if mode == "focus" else None
    boxes = []
    for k in range(count):
        tops = share_of(down, k, count) if down > right else (0, down)
        lefts = share_of(right, k, count) if right >= down else (0, right)
        if saliency is None:
            top, left = (draw(part, name, seed, key, k) for part, name in ((tops, "top"), (lefts, "left")))
        else:
            top = find_focus(saliency.sum(axis=1), placement.resized_size[0], height, tops)
            left = find_focus(saliency.sum(axis=0), placement.resized_size[1], width, lefts)
        boxes.append((top, left, height, width))
    return tuple(boxes)


def share_of(way: int, k: int, count: int) -> Part:
    """The k-th of `count` equal parts of the offsets 0 to `way`."""
    return k * way // count, (k + 1) * way // count


def draw(part: Part, name: str, seed: int, key: str, k: int) -> int:
    """An offset of a part that depends on nothing but what is given."""
    return part[0] + counter("crop", name, seed, key, k) % (part[1] - part[0] + 1)


def saliency_map(image: Image.Image, weight: Image.Image | None = None) -> np.ndarray:
    """[h,w] float64, at most MAP_SIDE pixels a side: how much there is to see at each place of an RGB image.

    The sum of two maps, each with a mean of 1: edges (how much brightness changes to the next pixel), and how far the
    blurred colour is from the mean colour of the image, after Achanta et al., "Frequency-tuned salient region
    detection", CVPR 2009. The sum is multiplied by the weight map, if there is one.
    """
    scale = MAP_SIDE / max(image.size)
    size = (max(2, round(image.width * scale)), max(2, round(image.height * scale)))
    small = image.resize(size, Image.Resampling.BOX)
    gray = np.asarray(small.convert("L"), np.float64)
    edges = np.abs(np.diff(gray, axis=0, append=gray[-1:])) + np.abs(np.diff(gray, axis=1, append=gray[:, -1:]))
    colors = np.asarray(small.convert("YCbCr"), np.float64)
    blurred = np.asarray(small.filter(ImageFilter.GaussianBlur(BLUR)).convert("YCbCr"), np.float64)
    contrast = np.sqrt(((blurred - colors.mean(axis=(0, 1))) ** 2).sum(axis=2))
    total = sum(part / part.mean() for part in (edges, contrast) if part.any())
    found: np.ndarray = np.broadcast_to(total, gray.shape)
    if weight is not None:
        found = found * (np.asarray(weight.resize(size, Image.Resampling.BOX), np.float64) / 255)
    return found


def find_focus(profile: np.ndarray, side: int, box: int, part: Part) -> int:
    """The offset in `part` at which a box of `box` pixels covers the largest sum of a profile of `side` pixels.

    profile [n] is the saliency along one axis. Of several equal offsets the middle one.
    """
    total = np.concatenate([[0.0], profile.cumsum()])
    edges = np.linspace(0, side, len(total))
    offsets = np.arange(part[0], part[1] + 1)
    inside = np.interp(offsets + box, edges, total) - np.interp(offsets, edges, total)
    best = offsets[inside >= inside.max() - 1e-9 * total[-1]]
    return int(best[len(best) // 2])
