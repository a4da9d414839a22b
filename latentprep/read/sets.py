"""The sets of a cache: what a sample gets from its set, other than repeats (index.py)."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from latentprep.cache.sets import SetFacts


class SetTable:
    """Values that samples get from their set.

    The argument `numbers` [B] has the set of each sample, as a number; None: the cache has no sets. If the value is the
    same for all samples, a method returns one float instead of [B].
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
        """[B] float32: how much each sample's loss counts: its set's sample_weight times `factor`, the dataset's."""
        if numbers is None or (self._weights == 1).all():
            return factor
        weights: np.ndarray = self._weights[numbers] * np.float32(factor)
        return weights

    def dropouts(self, numbers: np.ndarray | None, of_dataset: float | None) -> "float | np.ndarray":
        """[B]: how often the caption is left out, 0..1. of_dataset, if given, is used for all instead."""
        if numbers is None or of_dataset is not None or not self._dropouts.any():
            return of_dataset or 0.0
        dropouts: np.ndarray = self._dropouts[numbers]
        return dropouts

    def flips(self, numbers: np.ndarray | None, flip_p: float) -> "float | np.ndarray":
        """[B]: how often the mirrored view is taken, 0..1: flip_p, but 0 for a set with flip = false."""
        return flip_p if numbers is None or self._may_flip.all() else self._may_flip[numbers] * flip_p
