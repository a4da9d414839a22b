"""How far the cond of two caches is from each other, for the prompts that both have."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch

from latentprep.cache.borrowed import CondFiles, TextCond
from latentprep.cache.cond import open_uncond
from latentprep.cache.distance import EXACT, difference_of, larger
from latentprep.cache.int8 import unpack_all
from latentprep.cache.names import uncond_name
from latentprep.cache.strings import Tensors
from latentprep.differences import Distances, distance_of
from latentprep.errors import UserError
from latentprep.look.catalog import Catalog, Problems, add_problem

NUM_OPEN = 4  # texts of each cache
NUM_NAMED = 5  # prompts whose cond has another shape
EMPTY = -1  # in the place of a shard: the empty prompt, which is in a file of its own
UNLIKE = -1.0  # in the place of a distance: the cond has other names or shapes


def measure_cond(
    one: Catalog,
    other: Catalog,
    pairs: np.ndarray,
    num_shared: int,
    problems: Problems,
    progress: Callable[[int], object],
) -> Distances:
    """Distances of the pairs [K,2] of prompts, of `num_shared` that both have, and of the empty prompt if it is a file.

    Of a prompt: the largest of its embeddings, each as difference_of says. Whatever else there is (masks, positions)
    is to be the same. `progress` hears of prompts.
    """
    without = [cache.name for cache in (one, other) if not cache.manifest.has_cond]
    if without:
        return Distances(num_shared, why_not=f"no cond in {' and '.join(without)}")
    spots = np.concatenate([one.prompt_spot[pairs[:, 0]], other.prompt_spot[pairs[:, 1]]], axis=1)
    spots = spots[np.lexsort(spots.T[[1, 3, 2, 0]])]  # shards of one, in them those of other: few are opened twice
    if one.manifest.uncond is not None and other.manifest.uncond is not None:
        spots = np.concatenate([spots, np.array([[EMPTY, 0, EMPTY, 0]], np.int32)])
    values, is_read = np.zeros(len(spots)), np.zeros(len(spots), bool)
    mine, theirs = Opened(one, problems), Opened(other, problems)
    for n in range(len(spots)):
        shard, number, shard_b, number_b = spots[n].tolist()
        fresh, stored = mine.rows(shard, number), theirs.rows(shard_b, number_b)
        if fresh is not None and stored is not None:
            values[n], is_read[n] = compare(fresh, stored), True
        if shard != EMPTY:
            progress(1)
    unlike, like = np.flatnonzero(is_read & (values == UNLIKE)), np.flatnonzero(is_read & (values != UNLIKE))

    def prompt_of(n: int) -> str:
        return mine.prompt(*spots[n, :2].tolist())

    return Distances(
        num_shared,
        num_compared=int((spots[like, 0] != EMPTY).sum()),
        num_unlike=len(unlike),
        unlike=tuple(map(prompt_of, unlike[:NUM_NAMED].tolist())),
        distances={"cond": distance_of(values[like], lambda n: prompt_of(int(like[n])))} if len(like) else {},
    )


def compare(one: Tensors, other: Tensors) -> float:
    """The distance of a prompt's cond [...] as it is stored; UNLIKE for other names or shapes, or other masks."""
    mine, theirs = unpack_all(one), unpack_all(other)
    if {name: value.shape for name, value in mine.items()} != {name: value.shape for name, value in theirs.items()}:
        return UNLIKE
    worst = 0.0
    for name, value in mine.items():
        if not name.endswith(EXACT):
            worst = larger(worst, difference_of(value, theirs[name]) if value.numel() else 0.0)
        elif not torch.equal(value, theirs[name]):
            return UNLIKE
    return worst


class Opened:
    """The cond of a cache, prompt by prompt; a few texts stay open. A damaged file becomes a problem."""

    def __init__(self, cache: Catalog, problems: Problems) -> None:
        self.cache, self.problems = cache, problems
        self.cond_files = CondFiles(cache.storage)
        self.open = lru_cache(NUM_OPEN)(self._open)

    def rows(self, shard: int, number: int) -> Tensors | None:
        """All cond of a prompt, name -> [...]; None if it cannot be read."""
        if shard == EMPTY:
            return self._open_empty()
        found = self.open(shard)
        return None if found is None else found.rows(number)

    def prompt(self, shard: int, number: int) -> str:
        """A prompt, whose cond could be read."""
        found = None if shard == EMPTY else self.open(shard)
        return "" if found is None else found.text.prompt[number]

    def _open(self, shard: int) -> TextCond | None:
        entry = self.cache.manifest.shards[shard]
        try:
            found = self.cond_files.of(entry.open_text(self.cache.storage))
        except UserError as error:
            add_problem(self.problems, self.cache.name, entry.text_name, str(error))
            return None
        if not found.kinds:
            add_problem(
                self.problems,
                self.cache.name,
                entry.text_name,
                f"{entry.text_name}: has no cond, and cache.json says that it has",
            )
            return None
        return found

    def _open_empty(self) -> Tensors | None:
        assert self.cache.manifest.uncond is not None
        uncond = self.cache.manifest.uncond.id
        try:
            _, found = open_uncond(self.cache.storage, uncond)
        except UserError as error:
            add_problem(self.problems, self.cache.name, uncond_name(uncond), str(error))
            return None
        return {name: value[0] for name, value in found.items()}
