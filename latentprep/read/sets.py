"""The sets of a cache: what each of its images has of its own, other than the place in an epoch."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentprep.cache.sets import SetFacts


class SetTable:
    """Values that samples get from their set.

    numbers [B]: the sets of samples; None: the cache has no sets. If all samples have the same, it is one float.
    """

    def __init__(self, sets: Sequence[SetFacts]) -> None:
        self.names = tuple(facts.name for facts in sets)
        self._weights = np.array([facts.sample_weight for facts in sets], np.float32)
        self._dropouts = np.array([facts.caption_dropout for facts in sets])
        self._may_flip = np.array([facts.flip for facts in sets], bool)

    def describe_state(self) -> list[list[Any]]:
        """What flips and prompts depend on, as JSON values."""
        facts = zip(self.names, self._dropouts.tolist(), self._may_flip.tolist(), strict=True)
        return [list(own) for own in facts]

    def weights(self, numbers: np.ndarray | None, factor: float) -> "float | np.ndarray":
        """[B] float32: how much the loss of each sample counts; factor: the dataset's own sample_weight."""
        if numbers is None or (self._weights == 1).all():
            return factor
        weights: np.ndarray = self._weights[numbers] * np.float32(factor)
        return weights

    def dropouts(self, numbers: np.ndarray | None, of_dataset: float | None) -> "float | np.ndarray":
        """[B]: how often the caption is left out, 0..1; of_dataset: the dataset's own, which counts first."""
        if numbers is None or of_dataset is not None or not self._dropouts.any():
            return of_dataset or 0.0
        dropouts: np.ndarray = self._dropouts[numbers]
        return dropouts

    def flips(self, numbers: np.ndarray | None, flip_p: float) -> "float | np.ndarray":
        """[B]: how often the mirrored view is taken, 0..1: flip_p, but 0 for a set with flip = false."""
        return flip_p if numbers is None or self._may_flip.all() else self._may_flip[numbers] * flip_p
