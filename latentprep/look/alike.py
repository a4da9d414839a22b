"""Images that are nearly the same: their latents, averaged to a few numbers, lie close together. Pure arithmetic."""

import numpy as np

NEAR = 0.15  # standard deviations; two images by chance are about 1.4 apart, a JPEG of another size and quality 0.02
MOST_WORK = 1.5e11  # multiplications: about 5 seconds
BLOCK = 1024  # images that are compared with all others at once


def num_compared(num_images: int, size: int) -> int:
    """How many of the images are compared, each with each, if each is `size` numbers."""
    return min(num_images, int((MOST_WORK / max(1, size)) ** 0.5))


def find_near(averaged: np.ndarray, digests: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Pairs [P,2] that are nearly the same, the nearest first, and their distances [P]: each image with the nearest of
    those before it. Of images of equal content, digests [L,16], only the first counts.

    averaged [L,D]. Each of the D numbers is divided by its standard deviation over the images; a distance is the root
    mean square of D differences. Images with numbers that are not finite are left out.
    """
    _, first = np.unique(digests, axis=0, return_index=True)
    kept = np.sort(first)
    kept = kept[np.isfinite(averaged[kept]).all(axis=1)]
    if not len(kept):
        return np.zeros((0, 2), int), np.zeros(0)
    values = averaged[kept].astype(np.float32)
    spread = values.std(axis=0, dtype=np.float64)
    varies = spread > 1e-6
    values = ((values - values.mean(axis=0)) / np.where(varies, spread, 1))[:, varies].astype(np.float32)
    values /= max(1, int(varies.sum())) ** 0.5  # so that squared distances are means
    squares = np.square(values).sum(axis=1)
    pairs, found = [], []
    for start in range(0, len(values), BLOCK):
        block = slice(start, min(start + BLOCK, len(values)))
        apart = squares[block, None] + squares[None, : block.stop] - 2 * values[block] @ values[: block.stop].T
        apart[np.arange(block.stop)[None] >= np.arange(start, block.stop)[:, None]] = np.inf  # those before it alone
        nearest = apart.argmin(axis=1)
        distance = np.sqrt(np.maximum(apart[np.arange(len(nearest)), nearest], 0))
        near = np.flatnonzero(distance < NEAR)
        pairs.append(np.stack([nearest[near], start + near], axis=1))
        found.append(distance[near])
    numbers, away = np.concatenate(pairs), np.concatenate(found)
    order = np.argsort(away, kind="stable")
    return kept[numbers[order]], away[order]
