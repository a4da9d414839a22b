"""Latents -> colours without their VAE: each latent pixel alone, by a linear map."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from torch import Tensor

MAX_CHANNELS = 256  # of a latent that are looked at; VAEs known here have up to 128
MAX_PIXELS = 4096  # latent pixels of an image that a map is fitted to
SPREAD = 3  # standard deviations, either way, that become black and white
# of the three largest components: brightness, blueness, redness (ITU-R BT.601, with less colour)
COMPONENTS = np.array([[1.0, 1.0, 1.0], [0.0, -0.17, 0.89], [0.70, -0.36, 0.0]])


@dataclass(frozen=True, eq=False)
class LinearMap:
    """From C channels, and a 1 behind them, to colours."""

    matrix: np.ndarray  # [C+1,3] float64, to colours in 0..1

    def paint(self, latents: Tensor) -> np.ndarray:
        """latents [C,h,w], unscaled => [h,w,3] uint8."""
        found = with_one(rows_of(latents)) @ self.matrix
        colors: np.ndarray = (np.nan_to_num(found).clip(0, 1) * 255).round().astype(np.uint8)
        return colors.reshape(*latents.shape[1:], 3)


def rows_of(latents: Tensor) -> np.ndarray:
    """[C,h,w] => [h*w,C] float64, of at most MAX_CHANNELS."""
    found: np.ndarray = latents[:MAX_CHANNELS].double().flatten(1).T.numpy()
    return found


def with_one(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values, np.ones((len(values), 1))], axis=1)


def fit_map(pairs: Iterable[tuple[Tensor, np.ndarray]]) -> LinearMap | None:
    """The map with the smallest squared error: latents [C,h,w] and their images, pixels [H,W,3] uint8.

    Images are averaged to the size of their latents. None if there are no pairs.
    """
    values, colors = [], []
    for latents, pixels in pairs:
        height, width = latents.shape[1:]
        shape = (height, pixels.shape[0] // height, width, pixels.shape[1] // width, 3)
        averaged = pixels.reshape(shape).mean(axis=(1, 3)) / 255
        own = rows_of(latents)
        kept = thin(len(own)) & np.isfinite(own).all(axis=1)
        values.append(own[kept])
        colors.append(averaged.reshape(-1, 3)[kept])
    if not sum(map(len, values)):
        return None
    return LinearMap(np.linalg.lstsq(with_one(np.concatenate(values)), np.concatenate(colors), rcond=None)[0])


def project(latents: Iterable[Tensor]) -> LinearMap:
    """False colours: the three directions in which latents [C,h,w] vary most, as brightness and two hues.

    At least one latent.
    """
    found = np.concatenate(list(finite_rows(latents)))
    found = found if len(found) else np.zeros((1, found.shape[1]))
    mean = found.mean(axis=0)
    variances, directions = np.linalg.eigh(np.cov(found.T, bias=True).reshape(len(mean), len(mean)))
    order = np.argsort(-variances)[:3]
    sign = np.where(directions[np.abs(directions).argmax(axis=0), range(len(mean))] < 0, -1, 1)  # eigh leaves it open
    scale = sign[order] / (2 * SPREAD * np.sqrt(np.maximum(variances[order], 1e-12)))
    weights = (directions[:, order] * scale) @ COMPONENTS[: len(order)]
    return LinearMap(np.concatenate([weights, 0.5 - mean[None] @ weights]))


def finite_rows(latents: Iterable[Tensor]) -> Iterator[np.ndarray]:
    for own in map(rows_of, latents):
        kept = own[thin(len(own))]
        yield kept[np.isfinite(kept).all(axis=1)]


def thin(count: int) -> np.ndarray:
    """Which of so many pixels count, evenly spread: at most MAX_PIXELS."""
    return np.arange(count) % -(-count // MAX_PIXELS) == 0
