"""read/index.py: every sample is one row of one group, dead rows are none, and buckets hold what is of their shape."""

import numpy as np
import pytest

from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp
from latentprep.read.index import Index

TALL, WIDE, EMPTY = (4, 8, 6), (4, 6, 8), (4, 7, 7)


def shard(*groups, dead=()):
    """A shard of groups (rows, shape); `dead` are rows, numbered through its groups."""
    named = tuple((f"g{n}", rows, shape) for n, (rows, shape) in enumerate(groups))
    return Shard("u", named, Stamp(100, ""), "t", Stamp(1, ""), tuple(dead))


SHARDS = [
    shard((3, TALL), (2, WIDE)),
    shard((4, WIDE), dead=[0, 3]),
    shard((1, TALL), (2, EMPTY), (5, TALL), dead=[0, 1, 2, 5]),
    shard((2, TALL)),
]
# (group, row in it) of every image, and its shape: as it must be, written down by hand
ROWS = [
    *[(0, n, TALL) for n in range(3)], *[(1, n, WIDE) for n in range(2)],
    (2, 1, WIDE), (2, 2, WIDE),
    (5, 0, TALL), (5, 1, TALL), (5, 3, TALL), (5, 4, TALL),
    (6, 0, TALL), (6, 1, TALL),
]  # fmt: skip


def place(index, samples):
    groups, rows = index.find(np.array(samples))
    return list(zip(groups.tolist(), rows.tolist(), strict=True))


@pytest.mark.parametrize("repeats", [1, 3])
def test_every_sample_is_its_row(repeats):
    index = Index(SHARDS, repeats)
    assert index.num_images == len(ROWS)
    assert len(index) == len(ROWS) * repeats
    wanted = [(group, row) for group, row, _ in ROWS] * repeats
    assert place(index, range(len(index))) == wanted
    mixed = np.random.default_rng(0).permutation(len(index)).tolist()
    assert place(index, mixed) == [wanted[n] for n in mixed]
    assert place(index, [-1, -len(index)]) == [wanted[-1], wanted[0]]


@pytest.mark.parametrize("repeats", [1, 3])
def test_a_bucket_holds_the_samples_of_its_shape_image_after_image_repeat_after_repeat(repeats):
    index = Index(SHARDS, repeats)
    assert index.buckets == [WIDE, TALL]  # the empty one is none
    for number, shape in enumerate(index.buckets):
        images = [n for n, row in enumerate(ROWS) if row[2] == shape]
        assert index.sizes_of_buckets()[number] == len(images) * repeats
        wanted = [n + repeat * len(ROWS) for repeat in range(repeats) for n in images]
        assert index.samples_of_bucket(number, np.arange(len(wanted))).tolist() == wanted


@pytest.mark.parametrize("sample", [13, -14, 2**40])
def test_what_is_no_sample_is_an_index_error(sample):
    with pytest.raises(IndexError, match=f"index {sample} of a dataset of 13"):
        Index(SHARDS).find(np.array([0, sample]))


def test_no_shards_are_no_samples():
    index = Index([])
    assert (len(index), index.buckets) == (0, [])
