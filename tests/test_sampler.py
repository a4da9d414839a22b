"""read/sampler.py: every sample exactly once, whatever the batch size, ranks and buckets; and resuming."""

import json
from collections import Counter

import numpy as np
import pytest

from latentprep import BucketBatchSampler
from latentprep.errors import UserError
from latentprep.read.counters import permute
from latentprep.read.position import Position


class Data:
    """What a sampler asks of a dataset: `counts` images in each bucket, laid out one bucket after the other."""

    def __init__(self, *counts, repeats=1):
        self.counts, self.repeats = counts, repeats
        self.buckets = [(4, 8, 8 + n) for n in range(len(counts))]
        self.num_images = sum(counts)

    def __len__(self):
        return self.num_images * self.repeats

    def sizes_of_buckets(self):
        return [count * self.repeats for count in self.counts]

    def counts_at_most(self):
        return [np.array(self.sizes_of_buckets())]

    def samples_before(self, epoch):
        return [size * epoch for size in self.sizes_of_buckets()]

    def describe_state(self):
        return {"cache": str(self.counts)}

    def samples_of_bucket(self, bucket, numbers):
        repeat, image = np.divmod(numbers.astype(np.int64), self.counts[bucket])
        return sum(self.counts[:bucket]) + image + repeat * self.num_images

    def set_epoch(self, epoch):
        self.epoch = epoch

    def bucket(self, index):
        return int(np.searchsorted(np.cumsum(self.counts), index % self.num_images, side="right"))


@pytest.mark.parametrize("counts", [(1,), (7,), (10, 3), (5, 1, 12), (33, 8, 8)])
@pytest.mark.parametrize("batch_size", [1, 2, 4, 100])
@pytest.mark.parametrize("repeats", [1, 3])
def test_every_sample_exactly_once_in_batches_of_one_bucket(counts, batch_size, repeats):
    data = Data(*counts, repeats=repeats)
    sampler = BucketBatchSampler(data, batch_size)
    for epoch in range(3):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert all(1 <= len(batch) <= batch_size for batch in batches)
        assert all(len({data.bucket(index) for index in batch}) == 1 for batch in batches)
        assert sorted(index for batch in batches for index in batch) == list(range(len(data)))


@pytest.mark.parametrize("counts", [(1,), (7, 40), (10, 3), (33, 8, 8)])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
@pytest.mark.parametrize("world_size", [2, 3, 8])
@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.filterwarnings("ignore:.*come again in an epoch", "ignore:drop_last=True leaves out")
def test_ranks_share_the_epoch_with_one_bucket_a_step(counts, batch_size, world_size, drop_last):
    data = Data(*counts)
    if drop_last and max(counts) < min(batch_size, len(data)) * world_size:
        with pytest.raises(
            UserError, match=r"^drop_last=True leaves no batch: no bucket has enough samples for a batch"
        ):
            BucketBatchSampler(data, batch_size, rank=0, world_size=world_size, drop_last=True)
        return
    ranks = [
        BucketBatchSampler(data, batch_size, rank=rank, world_size=world_size, drop_last=drop_last)
        for rank in range(world_size)
    ]
    steps = list(zip(*(list(sampler) for sampler in ranks), strict=True))  # all have as many steps
    assert len(steps) == len(ranks[0])
    for step in steps:
        assert len({data.bucket(index) for batch in step for index in batch}) == 1
        assert all(1 <= len(batch) <= batch_size for batch in step)
        assert max(map(len, step)) - min(map(len, step)) <= 1
    seen = Counter(index for step in steps for batch in step for index in batch)
    assert sum(seen.values()) - len(seen) == ranks[0].num_repeated
    assert len(seen) == len(data) - ranks[0].num_dropped
    if drop_last:
        assert ranks[0].num_repeated == 0
    else:
        assert ranks[0].num_dropped == 0
        if batch_size > 1 and min(counts) >= world_size:
            assert ranks[0].num_repeated == 0


def test_what_cannot_be_shared_out_is_said():
    with pytest.warns(UserWarning, match=r"1 samples come again in an epoch: buckets hold too few for 4 ranks"):
        sampler = BucketBatchSampler(Data(3, 8), 2, rank=0, world_size=4)
    assert sampler.num_repeated == 1
    with pytest.warns(UserWarning, match="7 samples come again"):
        ranks = [BucketBatchSampler(Data(1), 5, rank=rank, world_size=8) for rank in range(8)]
    assert [list(rank) for rank in ranks] == [[[0]]] * 8


def test_set_epoch_tells_the_dataset():
    data = Data(5)
    sampler = BucketBatchSampler(data, 2)
    sampler.set_epoch(3)
    assert data.epoch == 3
    assert sampler.sampler is sampler  # where Lightning looks for set_epoch


def test_it_knows_itself_how_far_it_is():
    """As torchdata's StatefulDataLoader asks it: without being told how many batches were used."""
    sampler = BucketBatchSampler(Data(20, 9), 4, seed=3)
    sampler.set_epoch(1)
    whole = list(sampler)
    assert sampler.state_dict()["next_batch"] == 0
    sampler.set_epoch(1)
    batches = iter(sampler)
    first = [next(batches) for _ in range(3)]
    other = BucketBatchSampler(Data(20, 9), 4, seed=3)
    other.load_state_dict(sampler.state_dict())
    assert first + list(other) == whole
    sampler.set_epoch(2)
    assert list(other) == list(sampler)  # and then the next epoch


def test_drop_last_leaves_out_leftovers_only_and_says_so():
    with pytest.warns(UserWarning, match=r"^drop_last=True leaves out 5 of 13 samples an epoch: they fill no"):
        sampler = BucketBatchSampler(Data(10, 3), 4, drop_last=True)
    assert [len(batch) for batch in sampler] == [4, 4]
    assert sampler.num_dropped == 5


@pytest.mark.parametrize("count", [1, 2, 3, 10, 99, 100, 101, 5000, 10_007])
def test_permute_is_a_permutation(count):
    for key in range(3):
        found = permute(np.arange(count), count, 5, key)
        assert sorted(found.tolist()) == list(range(count))
    parts = [permute(part, count, 5, 0) for part in np.array_split(np.arange(count), 3)]
    assert np.array_equal(np.concatenate(parts), permute(np.arange(count), count, 5, 0))


def test_permute_puts_everything_everywhere_equally_often():
    count, keys = 12, 12_000
    places = np.stack([permute(np.arange(count), count, 1, key) for key in range(keys)])
    for column in range(count):
        often = np.bincount(places[:, column], minlength=count)
        assert ((often - keys / count) ** 2 / (keys / count)).sum() < 35  # chi-square, 11 degrees of freedom: p = 2e-4
    neighbours = np.abs(np.diff(permute(np.arange(100_000), 100_000, 3)))
    assert abs(neighbours.mean() - 100_000 / 3) < 500


@pytest.mark.parametrize("counts", [(40,), (10, 3)])
def test_large_buckets_give_every_sample_exactly_once_too(counts, monkeypatch):
    monkeypatch.setattr("latentprep.read.order.LARGE", 5)
    data = Data(*counts)
    orders = []
    for epoch in range(2):
        sampler = BucketBatchSampler(data, 4)
        sampler.set_epoch(epoch)
        orders.append([index for batch in sampler for index in batch])
        assert sorted(orders[-1]) == list(range(len(data)))
    assert orders[0] != orders[1]


def test_order_follows_from_seed_and_epoch():
    data = Data(50, 50)

    def order(seed, epoch):
        sampler = BucketBatchSampler(data, 4, seed=seed)
        sampler.set_epoch(epoch)
        return list(sampler)

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)
    assert order(0, 1) != order(1, 0)
    plain = BucketBatchSampler(data, 4, shuffle=False)
    assert [index for batch in plain for index in batch] == list(range(100))


@pytest.mark.parametrize("stop", [0, 1, 7, 25])
def test_sampler_goes_on_in_mid_epoch(stop):
    data = Data(60, 40)
    sampler = BucketBatchSampler(data, 4, seed=9)
    sampler.set_epoch(2)
    whole = list(sampler)
    sampler.set_epoch(2)
    state = sampler.state_dict(next_batch=stop)
    other = BucketBatchSampler(data, 4, seed=9)
    other.load_state_dict(state)
    assert list(other) == whole[stop:]


WAYS = [(1, 1), (4, 1), (1, 4), (2, 2), (3, 3), (100, 2)]  # batch size, number of ranks


def run_ranks(data, way, state, num_steps=None, **options):
    """The samples that all ranks take of an epoch from a state on, or of its next few steps; and the state behind."""
    batch_size, world_size = way
    taken, states = [], []
    for rank in range(world_size):
        sampler = BucketBatchSampler(data, batch_size, rank=rank, world_size=world_size, seed=9, **options)
        if state is not None:
            sampler.load_state_dict(state)
        batches = iter(sampler)
        own = (
            list(batches) if num_steps is None else [batch for _, batch in zip(range(num_steps), batches, strict=False)]
        )
        taken += [index for batch in own for index in batch]
        states.append(sampler.state_dict())
    assert all(other == states[0] for other in states)  # any rank's will do
    return taken, json.loads(json.dumps(states[0]))


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("last", WAYS)
@pytest.mark.parametrize("first", WAYS)
@pytest.mark.filterwarnings("ignore:.*come again in an epoch")
def test_another_batch_size_and_number_of_ranks_goes_on_with_the_rest(first, last, shuffle):
    """Each sample once: what comes again are samples of a bucket that cannot give each rank one more."""
    data = Data(31, 24, 5)
    begun, state = run_ranks(data, first, None, 2, shuffle=shuffle)
    middle, state = run_ranks(data, (3, 2), state, 1, shuffle=shuffle)
    rest, after = run_ranks(data, last, state, shuffle=shuffle)
    seen = Counter([*begun, *middle, *rest])
    assert seen.keys() == set(range(len(data)))
    assert len({*begun, *middle}) == len(begun) + len(middle)
    again = sum(seen.values()) - len(data)
    assert again <= 3 * max(first[1] - 1, last[1] - 1, 1)
    if last[1] == first[1] == 1:
        assert again == 0
    assert (after["epoch"], after["next_batch"], after["before"]) == (1, 0, [])


def test_a_sample_is_not_repeated_where_all_ranks_can_have_one():
    data = Data(32, 24)
    begun, state = run_ranks(data, (2, 2), None, 4)
    for way in ((1, 4), (4, 1), (1, 2), (2, 4)):
        rest, _ = run_ranks(data, way, state)
        assert Counter([*begun, *rest]) == Counter(range(len(data)))


def test_an_epoch_of_several_stretches_goes_on_as_if_it_had_not_stopped():
    data = Data(60, 40)
    _, state = run_ranks(data, (2, 2), None, 3)
    whole, _ = run_ranks(data, (5, 1), state)
    begun, later = run_ranks(data, (5, 1), state, 4)
    rest, _ = run_ranks(data, (5, 1), later)
    assert begun + rest == whole
    assert later["before"] == [[2, 2, 3]]
    assert (later["batch_size"], later["world_size"], later["next_batch"]) == (5, 1, 4)
    assert BucketBatchSampler(data, 7, seed=9).state_dict() == {**later, **Position().to_json(7, 1)}


def test_an_epoch_that_is_over_gives_nothing_and_then_the_next():
    data = Data(20)
    _, state = run_ranks(data, (2, 2), None, 5)
    sampler = BucketBatchSampler(data, 3, seed=9)
    sampler.load_state_dict(state)
    assert list(sampler) == []
    assert sampler.epoch == 1
    assert sorted(index for batch in sampler for index in batch) == list(range(20))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"before": None}, "before=None: expected what state_dict gave"),
        ({"before": [[1, 1]]}, r"before has \[1, 1\], expected \[batch size, ranks, steps\]"),
        ({"before": [[1, 1, 99]]}, "next_batch=99: expected 0 to 60"),
        ({"before": [[0, 1, 1]]}, "batch_size=0: expected at least 1"),
        ({"world_size": "2"}, "world_size='2': expected a whole number"),
        ({"batch_size": 2**31, "next_batch": 2}, "next_batch=2: expected 0 to 1"),
        ({"batch_size": 2**31 + 1}, "batch_size=2147483649: expected at most 2147483648"),
        ({"epoch": 2**63}, "epoch=9223372036854775808: expected at most 9223372036854775807"),
        ({"before": [[1, 1, 1]] * 101}, "before=.*: expected what state_dict gave"),
    ],
)
def test_a_position_that_there_is_not_is_refused(change, message):
    sampler = BucketBatchSampler(Data(60), 4)
    with pytest.raises(UserError, match=f"^load_state_dict: {message}"):
        sampler.load_state_dict({**sampler.state_dict(), **change})
    assert sampler.state_dict()["next_batch"] == 0


@pytest.mark.parametrize("change", [{"seed": 1}, {"shuffle": False}, {"drop_last": True}])
def test_a_state_of_another_sampler_is_refused(change):
    state = BucketBatchSampler(Data(60), 4, seed=0).state_dict()
    options = {"batch_size": 4, "seed": 0, **change}
    with pytest.raises(UserError, match=rf"load_state_dict: saved with {next(iter(change))}="):
        BucketBatchSampler(Data(60), **options).load_state_dict(state)
    with pytest.raises(UserError, match=r"saved with num_samples=60, this sampler has num_samples=61"):
        BucketBatchSampler(Data(61), 4, seed=0).load_state_dict(state)


def test_wrong_arguments():
    with pytest.raises(UserError, match=r"batch_size=0: expected at least 1."):
        BucketBatchSampler(Data(3), 0)
    with pytest.raises(UserError, match=r"rank=2, world_size=2: expected 0 <= rank < world_size."):
        BucketBatchSampler(Data(3), 1, rank=2, world_size=2)
