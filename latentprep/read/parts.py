"""Parts of a dataset: which rows a key, a pattern, or the content of an image chooses."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.read.counters import SPLIT, fractions, hash_numbers
from latentprep.read.index import Index
from latentprep.read.shards import OpenGroup, OpenShards

Chosen = dict[int, np.ndarray]  # group -> rows [n], rising


def groups_of(index: Index, shards: OpenShards) -> Iterator[tuple[int, np.ndarray, OpenGroup]]:
    """Each group with samples, opened, and the rows of it that are samples."""
    for number, rows in index.rows():
        yield number, rows, shards[number]


def choose_keys(index: Index, shards: OpenShards, keys: str | Iterable[str] | Callable[[str], object] | None) -> Chosen:
    """The rows whose key fits a pattern such as "birds/*.png", is in a list, or makes a function return true.

    Raises UserError if no row is chosen, or if a key of the list is not in the dataset.
    """
    if isinstance(keys, str):
        pattern = keys
        message = f"keys={shortened(pattern)!r}: no image here has such a key. (* is any text, ? one character)"
        return _choose(index, shards, lambda key: fnmatchcase(key, pattern), message)
    if callable(keys):
        return _choose(index, shards, keys, "keys: the function chose no image.")
    wanted = set(list_keys(keys))
    chosen = _choose(index, shards, wanted.__contains__, None)
    left = wanted - {
        group.key[row] for number, rows, group in groups_of(index, shards) for row in chosen[number].tolist()
    }
    if left:
        raise UserError(f"keys: {len(left)} of {len(wanted)} are not here, such as {shortened(repr(min(left)))}.")
    return chosen


def choose_sets(index: Index, names: Sequence[str], wanted: str | Iterable[str]) -> Chosen:
    """The rows of one set or of several. Raises UserError if there is no such set, or none of its images is here."""
    chosen = list_keys([wanted] if isinstance(wanted, str) else wanted, "set", "the name of a set, or a list of them")
    if unknown := [name for name in chosen if name not in names]:
        there = ", ".join(map(shortened, names)) or "none: all its images are of one source"
        raise UserError(f"set={shortened(unknown[0])!r}: no such set. The cache has {there}.")
    numbers = [number for number, name in enumerate(names) if name in chosen]
    assert index.set_of_image is not None
    is_chosen = np.isin(index.set_of_image, numbers)
    if not is_chosen.any():
        raise UserError(f"set={', '.join(map(shortened, chosen))}: no image of it is here.")
    return {group: rows[own] for (group, rows), own in zip(index.rows(), index.split(is_chosen), strict=True)}


def list_keys(
    keys: Any, name: str = "keys", expected: str = "a pattern, a list of keys, or a function from a key to a bool"
) -> list[str]:
    """A list of keys. Raises UserError for anything else, and for one that is empty."""
    listed: list[Any] = list(keys) if isinstance(keys, Iterable) and not isinstance(keys, bytes) else [None]
    if not all(isinstance(key, str) for key in listed):
        raise UserError(f"{name}={keys!r:.60}: expected {expected}.")
    if not listed:
        raise UserError(f"{name}: the list is empty, expected at least one.")
    return listed


def _choose(index: Index, shards: OpenShards, fits: Callable[[str], object], message: str | None) -> Chosen:
    """The rows whose key fits; if there are none, a UserError with the message."""
    chosen = {
        number: np.array([row for row in rows.tolist() if fits(group.key[row])], np.int64)
        for number, rows, group in groups_of(index, shards)
    }
    if message is not None and not any(len(rows) for rows in chosen.values()):
        raise UserError(message)
    return chosen


def split_by_content(index: Index, shards: OpenShards, edge: float, seed: int) -> tuple[Chosen, Chosen]:
    """(rest, part): part has the images whose hash, as a number from 0 to 1, is below `edge`; rest has all others.

    Raises UserError if one side has no image.
    """
    rest, part = {}, {}
    for number, rows, group in groups_of(index, shards):
        is_part = fractions(hash_numbers(seed, SPLIT, group.digest[rows])) < edge
        rest[number], part[number] = rows[~is_part], rows[is_part]
    for name, side in (("the rest", rest), ("the share", part)):
        if not any(len(rows) for rows in side.values()):
            raise UserError(
                f"split: {name} would have none of {index.num_images:,} images. Take another share, or seed=."
            )
    return rest, part
