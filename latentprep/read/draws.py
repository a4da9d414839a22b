"""Draws: what chance decides of the samples of one batch."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from latentprep.read.counters import CROP, FLIP, NOISE, fractions, hash_numbers


@dataclass(frozen=True, eq=False)
class Draws:
    """The choices of B samples. They depend on seed, epoch and sample: on no batch, order or process."""

    seed: int
    epoch: int
    samples: np.ndarray  # [B] int64: indices into the dataset, 0 or more
    images: np.ndarray  # [B] int64
    repetitions: np.ndarray  # [B] int64: of its image, from 0

    def numbers(self, what: int) -> np.ndarray:
        """[B] uint64 for one purpose: a counter's name, such as counters.FLIP."""
        return hash_numbers(self.seed, what, self.epoch, self.samples)

    def happens(self, what: int, share: "float | np.ndarray") -> np.ndarray:
        """[B] bool: true with this probability; `share` is one number, or one for each sample [B]."""
        return fractions(self.numbers(what)) < share

    def pick(self, what: int, count: int, span: slice = slice(None)) -> np.ndarray:
        """[n] int64 from 0 to count - 1, for the n samples of `span`.

        The start is random for each image and epoch; the repetitions of an image then take the choices in turn.
        """
        start = (hash_numbers(self.seed, what, self.epoch, self.images[span]) % np.uint64(count)).astype(np.int64)
        picked: np.ndarray = (start + self.repetitions[span]) % count
        return picked

    def views(self, num_crops: int, num_mirrors: int, flip_p: "float | np.ndarray") -> np.ndarray:
        """[B] int64: the view of each sample. Views stand crop after crop, each as it is and then mirrored."""
        view = np.zeros(len(self.samples), np.int64)
        if num_crops > 1:
            view = self.pick(CROP, num_crops) * num_mirrors
        if num_mirrors > 1:
            view += self.happens(FLIP, flip_p)
        return view

    def noise_seeds(self) -> Tensor:
        """[B] int64 of 0 or more: where the noise of each sample starts, in this epoch."""
        return as_seeds(self.numbers(NOISE))


def noise_seeds_of(seed: int, digest: np.ndarray) -> Tensor:
    """[B] int64 of 0 or more: noise that follows from the content of images alone, `digest` [B] uint64.

    So it stays the same in every epoch, and while the cache grows.
    """
    return as_seeds(hash_numbers(seed, NOISE, 0, digest))


def as_seeds(numbers: np.ndarray) -> Tensor:
    return torch.from_numpy((numbers >> np.uint64(1)).astype(np.int64))
