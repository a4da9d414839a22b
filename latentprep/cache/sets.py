"""Sets: images of one source with their own captions and weight. A cache may hold several; a key begins with one."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated, Any

import numpy as np
from msgspec import Meta

from latentprep.records import MAX_REPEATS, MAX_SET_NAME, SET_NAME, set_of

MAX_SETS = 2**16
Share = Annotated[float, Meta(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class SetFacts:
    """What a reader must know of a set. The keys of its images begin with its name and a slash."""

    name: Annotated[str, Meta(pattern=f"^{SET_NAME}$", max_length=MAX_SET_NAME)]
    repeats: Annotated[int, Meta(ge=1, le=MAX_REPEATS)] = 1  # how often each image stands in an epoch
    sample_weight: Annotated[float, Meta(ge=0, le=1e9)] = 1.0  # how much the loss of its images counts
    caption_dropout: Share = 0.0  # how often its captions are left out
    flip: bool = True  # whether its mirrored views may be taken


Runs = tuple[tuple[Annotated[int, Meta(ge=0, lt=MAX_SETS)], Annotated[int, Meta(ge=1)]], ...]  # number of a set, rows


def list_runs(keys: Iterable[str], sets: Sequence[SetFacts]) -> Runs:
    """The sets of some rows, in the order of the rows, as runs.

    A row whose set is gone counts as one of the first set; such rows are dead.
    """
    if not sets:
        return ()
    numbers = {facts.name: number for number, facts in enumerate(sets)}
    return to_runs(numbers.get(set_of(key), 0) for key in keys)


def take_runs(runs: Runs, rows: np.ndarray) -> Runs:
    """The runs of some of the rows [n], rising."""
    if not runs:
        return ()
    numbers = np.repeat([number for number, _ in runs], [count for _, count in runs])[rows]
    return to_runs(numbers.tolist())


def to_runs(numbers: Iterable[int]) -> Runs:
    return tuple((number, sum(1 for _ in run)) for number, run in groupby(numbers))


def recipe_of(recipe: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Any]:
    """A text recipe in JSON with only those sets that these rows belong to."""
    if "sets" not in recipe:
        return dict(recipe)
    names = set(map(set_of, keys))
    return {**recipe, "sets": {name: own for name, own in recipe["sets"].items() if name in names}}
