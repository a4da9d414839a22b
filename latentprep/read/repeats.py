"""Repeats: which sample is which repetition of which image; each image may have a number of repeats of its own."""

from typing import NamedTuple

import numpy as np


class Level(NamedTuple):
    """Consecutive rounds that have the same images."""

    first_round: int
    first_sample: int
    images: np.ndarray | None  # [m], rising; None: all
    size: int  # images of a round


class Repeats:
    """The samples of n images, in rounds: round r, from 0, has every image with more than r repeats, in their order.

    A number past the last sample starts over, with further repetitions.
    """

    def __init__(self, num_images: int, counts: "np.ndarray | int") -> None:
        """counts: the number of repeats of each image [n], or one number for all images; 1 or more."""
        self.num_images, self._counts = num_images, counts
        self._levels: list[Level] = []
        rounds, samples = 0, 0
        for count in np.unique(counts).tolist():
            images = np.flatnonzero(counts >= count) if rounds and isinstance(counts, np.ndarray) else None
            size = num_images if images is None else len(images)
            self._levels.append(Level(rounds, samples, images, size))
            samples += (count - rounds) * size
            rounds = count
        self.num_samples = samples

    def __len__(self) -> int:
        return self.num_samples

    def split(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image of each sample [S], and which repetition of it the sample is: two [S] int64, both from 0."""
        if len(self._levels) == 1:
            repetitions, images = np.divmod(samples, self.num_images)
            return images, repetitions
        cycles, samples = np.divmod(samples, self.num_samples)
        images, repetitions = np.empty_like(samples), np.empty_like(samples)
        found = np.searchsorted([level.first_sample for level in self._levels], samples, side="right") - 1
        for number in np.unique(found).tolist():
            own, level = found == number, self._levels[number]
            rounds, places = np.divmod(samples[own] - level.first_sample, level.size)
            images[own] = places if level.images is None else level.images[places]
            repetitions[own] = level.first_round + rounds
        return images, repetitions + cycles * self._count(images)

    def join(self, images: np.ndarray, repetitions: np.ndarray) -> np.ndarray:
        """The samples [S] of images and their repetitions: what `split` takes apart."""
        if len(self._levels) == 1:
            samples: np.ndarray = repetitions * self.num_images + images
            return samples
        cycles, repetitions = np.divmod(repetitions, self._count(images))
        samples = cycles * self.num_samples
        found = np.searchsorted([level.first_round for level in self._levels], repetitions, side="right") - 1
        for number in np.unique(found).tolist():
            own, level = found == number, self._levels[number]
            places = images[own] if level.images is None else np.searchsorted(level.images, images[own])
            samples[own] += level.first_sample + (repetitions[own] - level.first_round) * level.size + places
        return samples

    def _count(self, images: np.ndarray) -> "np.ndarray | int":
        return self._counts[images] if isinstance(self._counts, np.ndarray) else self._counts
