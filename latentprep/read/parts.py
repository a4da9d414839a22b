"""Parts of a dataset: which rows a key, a pattern, or the content of an image chooses."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.read.counters import SPLIT, fractions, mix
from latentprep.read.index import Index
from latentprep.read.shards import OpenGroup, OpenShards

Chosen = dict[int, np.ndarray]  # group -> rows [n], rising


def groups_of(index: Index, shards: OpenShards) -> Iterator[tuple[int, np.ndarray, OpenGroup]]:
    """Each group with samples, opened, and the rows of it that are samples."""
    for number, rows in index.rows():
        yield number, rows, shards[number]


def choose_keys(index: Index, shards: OpenShards, keys: str | Iterable[str] | Callable[[str], object]) -> Chosen:
    """The rows whose key fits a pattern such as "birds/*.png", stands in a list, or for which a function gives true.

    Raises UserError if there are none, or a key of the list is not there.
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


def list_keys(keys: Any) -> list[str]:
    """A list of keys. Raises UserError for anything else, and for one that is empty."""
    listed: list[Any] = list(keys) if isinstance(keys, Iterable) and not isinstance(keys, bytes) else [None]
    if not all(isinstance(key, str) for key in listed):
        raise UserError(f"keys={keys!r:.60}: expected a pattern, a list of keys, or a function from a key to a bool.")
    if not listed:
        raise UserError("keys: the list is empty, expected at least one.")
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
    """The rest, and the images whose hash, 0 to 1, is below the edge. Raises UserError if one side has none."""
    rest, part = {}, {}
    for number, rows, group in groups_of(index, shards):
        is_part = fractions(mix(seed, SPLIT, group.digest[rows])) < edge
        rest[number], part[number] = rows[~is_part], rows[is_part]
    for name, side in (("the rest", rest), ("the share", part)):
        if not any(len(rows) for rows in side.values()):
            raise UserError(
                f"split: {name} would have none of {index.num_images:,} images. Take another share, or seed=."
            )
    return rest, part
