"""Parts of a dataset: which rows a key, a pattern, or the content of an image chooses."""

from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase

import numpy as np

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.read.arguments import check_share
from latentprep.read.counters import SPLIT, fractions, mix
from latentprep.read.index import Index
from latentprep.read.shards import OpenGroup, OpenShards

Chosen = dict[int, np.ndarray]  # group -> rows [n], rising


def groups_of(index: Index, shards: OpenShards) -> Iterator[tuple[int, np.ndarray, OpenGroup]]:
    """Each group with samples, opened, and the rows of it that are samples."""
    for number, rows in index.rows():
        yield number, rows, shards[number]


def choose_keys(index: Index, shards: OpenShards, keys: str | Iterable[str]) -> Chosen:
    """The rows whose key fits a pattern such as "birds/*.png", or stands in a list. Raises UserError."""
    if isinstance(keys, str):
        pattern = keys
        chosen = {
            number: np.array([row for row in rows.tolist() if fnmatchcase(group.key[row], pattern)], np.int64)
            for number, rows, group in groups_of(index, shards)
        }
        if not any(len(rows) for rows in chosen.values()):
            raise UserError(f"keys={shortened(pattern)!r}: no image of the cache has such a key. (* is any text)")
        return chosen
    wanted = set(keys)
    chosen = {}
    for number, rows, group in groups_of(index, shards):
        names = [(row, group.key[row]) for row in rows.tolist()]
        chosen[number] = np.array([row for row, key in names if key in wanted], np.int64)
        wanted.difference_update(key for _, key in names)
    if wanted:
        raise UserError(f"keys: {len(wanted)} are not in the cache, such as {shortened(repr(min(wanted, key=str)))}.")
    if not any(len(rows) for rows in chosen.values()):
        raise UserError("keys: the list is empty, expected at least one.")
    return chosen


def choose_images(index: Index, shards: OpenShards, is_chosen: Callable[[str], object]) -> Chosen:
    """The rows for whose key a function gives true. Raises UserError if there are none."""
    chosen = {
        number: np.array([row for row in rows.tolist() if is_chosen(group.key[row])], np.int64)
        for number, rows, group in groups_of(index, shards)
    }
    if not any(len(rows) for rows in chosen.values()):
        raise UserError("keys: the function chose no image.")
    return chosen


def split_by_content(index: Index, shards: OpenShards, share: float, seed: int) -> tuple[Chosen, Chosen]:
    """The rest, and about this share of the images: each goes by its content alone. Raises UserError.

    So an image stays on its side whatever else comes into the cache or goes, and equal images are on the same.
    """
    check_share("share", share)
    rest, part = {}, {}
    for number, rows, group in groups_of(index, shards):
        is_part = fractions(mix(seed, SPLIT, group.digest[rows])) < share
        rest[number], part[number] = rows[~is_part], rows[is_part]
    for name, side in (("the rest", rest), ("the share", part)):
        if not any(len(rows) for rows in side.values()):
            raise UserError(
                f"split({share}): {name} would have none of {index.num_images:,} images. Take another share."
            )
    return rest, part
