"""Epoch: which samples make each batch of an epoch, on each rank. Arithmetic on numbers; no files, no state.

Seed and epoch decide the order of the samples of a bucket; batch size and number of ranks do not. Steps take samples
from the start of this order. So the position in an epoch is the number of samples taken from each bucket, and the epoch
can go on with another batch size, or on another number of ranks.

Shapes: [B] is one number for each bucket here; [S] one for each sample; [n] one for each step or batch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from latentprep.read.counters import permute
from latentprep.read.position import Stretch

SHUFFLE_SAMPLES, SHUFFLE_BATCHES = 1, 2  # what a random stream is for
LARGE = 2**22  # if a bucket has more samples, their order is computed when needed, and no table of it is kept
SAMPLES_AT_ONCE = 4096  # so many samples, about, are computed in one numpy call, so that Python's own time is small


class Samples(Protocol):
    """What an epoch asks of a dataset."""

    def __len__(self) -> int: ...
    def set_epoch(self, epoch: int) -> None: ...

    def counts_at_most(self) -> list[np.ndarray]:
        """[B]: the most samples of each bucket that an epoch takes; if epochs differ, one array for each kind."""

    def sizes_of_buckets(self) -> list[int]:
        """Samples that each bucket holds."""

    def samples_before(self, epoch: int) -> list[int]:
        """How many samples of each bucket the epochs before this one take together.

        This epoch takes samples_before(epoch + 1) - samples_before(epoch).
        """

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [S] of samples, by their numbers [S] in a bucket; a number beyond its size is a next repetition."""

    def describe_state(self) -> dict[str, Any]:
        """What a position in an epoch depends on, name -> JSON value."""


def count_samples(data: Samples, epoch: int) -> np.ndarray:
    """[B] int64: samples that an epoch takes of each bucket."""
    before, after = data.samples_before(epoch), data.samples_before(epoch + 1)
    return np.array([more - count for count, more in zip(before, after, strict=True)], np.int64)


@dataclass(frozen=True)
class Batches:
    """Several batches in a row: batch n is samples[edges[n] : edges[n + 1]]."""

    samples: np.ndarray  # [S] int64: indices into the dataset; those of an epoch ascend in each batch
    edges: np.ndarray  # [n+1] int64

    def __len__(self) -> int:
        return len(self.edges) - 1

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.split(self.samples, self.edges[1:-1]))


class EpochIndices(list[int]):
    """The indices of a batch, and the epoch that decides its draws."""

    def __init__(self, indices: list[int], epoch: int) -> None:
        super().__init__(indices)
        self.epoch = epoch

    def __reduce__(self) -> tuple[type, tuple[list[int], int]]:
        return EpochIndices, (list(self), self.epoch)


class Steps:
    """How the samples of all buckets are cut into steps, and the share of each rank in each of them.

    A full step takes batch_size samples of one bucket for each rank. The samples that are left make one short step. If
    they are fewer than the ranks, they and the last full step make two steps; if that is not possible, some samples
    come again. Each rank gets a sample in every step. With drop_last the rest is left out.
    """

    def __init__(self, counts: np.ndarray, batch_size: int, world_size: int, drop_last: bool) -> None:
        """counts [B] int64: samples of each bucket."""
        self.batch_size, self.world_size = batch_size, world_size
        step = batch_size * world_size
        whole, left = np.divmod(counts, step)
        is_left = (left > 0) & (not drop_last)
        # if fewer are left than there are ranks, the last full step and the rest become two steps. If there is no full
        # step, or if batch_size is 1, the first samples of the bucket's order come again
        is_few = is_left & (left < world_size)
        is_shared = is_few & (whole > 0) & (batch_size > 1)
        first = np.where(is_few, world_size, left * is_left)
        both = step + left
        self.num_whole = whole - is_shared  # [B]: steps that take batch_size for each rank
        # [B,2]: samples of each step after those
        self.tails = np.stack([np.where(is_shared, both - both // 2, first), np.where(is_shared, both // 2, 0)], axis=1)
        self.num_steps = self.num_whole + (self.tails > 0).sum(1)  # [B]
        taken = self.first(np.arange(len(counts)), self.num_steps)
        self.num_dropped = int(np.maximum(counts - taken, 0).sum())
        self.num_repeated = int(np.maximum(taken - counts, 0).sum())

    def __len__(self) -> int:
        return int(self.num_steps.sum())

    def first(self, bucket: np.ndarray, nth: np.ndarray) -> np.ndarray:
        """[S] int64: how many samples of its bucket are taken before its nth step."""
        whole, rest = np.minimum(nth, self.num_whole[bucket]), nth - self.num_whole[bucket]
        taken: np.ndarray = whole * self.batch_size * self.world_size
        return taken + np.where(rest > 0, self.tails[bucket, 0], 0) + np.where(rest > 1, self.tails[bucket, 1], 0)

    def cut(self, bucket: np.ndarray, nth: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[S], [S]: where a rank's part of the nth step of a bucket begins and ends, among the bucket's samples."""
        first = self.first(bucket, nth)
        # the first ranks get one more if it does not come out even
        share, more = np.divmod(self.first(bucket, nth + 1) - first, self.world_size)
        begin = first + rank * share + np.minimum(rank, more)
        return begin, begin + share + (rank < more)


class Epoch:
    """The steps of one epoch that are left after some stretches of it."""

    def __init__(
        self,
        data: Samples,
        *,
        seed: int,
        epoch: int,
        shuffle: bool,
        drop_last: bool,
        batch_size: int,
        world_size: int,
        before: tuple[Stretch, ...] = (),
    ) -> None:
        """Raises ValueError if a stretch has more steps than were left for it."""
        self._data = data
        self._sizes, self._before = data.sizes_of_buckets(), data.samples_before(epoch)
        self._counts = count_samples(data, epoch)
        self._seed, self._epoch, self._shuffle = seed % 2**64, epoch, shuffle
        self._orders: dict[tuple[int, int], np.ndarray] = {}  # bucket, pass -> its samples' numbers, shuffled
        self.taken = np.zeros(len(self._counts), np.int64)  # [B]: samples of each bucket that stretches before took
        for number, stretch in enumerate(before):
            steps = Steps(self._counts - self.taken, stretch.batch_size, stretch.world_size, drop_last)
            if stretch.num_steps > len(steps):
                raise ValueError(f"next_batch={stretch.num_steps}: expected 0 to {len(steps)}")
            taken = self.taken + steps.first(*count_steps(self._sequence(steps, number)[: stretch.num_steps], steps))
            self.taken = np.minimum(taken, self._counts)
        self.steps = Steps(self._counts - self.taken, batch_size, world_size, drop_last)
        self._number = len(before)

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def sequence(self) -> np.ndarray:
        """[steps]: the bucket of each step."""
        return self._sequence(self.steps, self._number)

    def batches(self, start: int, ranks: range) -> Iterator[Batches]:
        """From step `start` to the end: of each step the batches of these ranks, rank after rank."""
        bucket, nth = count_steps(self.sequence[:start], self.steps)
        done = np.zeros(len(self._counts), np.int64)  # [B]: steps of each bucket so far
        done[bucket] = nth
        at_once = max(1, SAMPLES_AT_ONCE // (self.steps.batch_size * len(ranks)))
        for begin in range(start, len(self), at_once):
            buckets = self.sequence[begin : begin + at_once].astype(np.int64)
            nth = done[buckets] + number_equals(buckets)
            done += np.bincount(buckets, minlength=len(done))
            yield self._take(np.repeat(buckets, len(ranks)), np.repeat(nth, len(ranks)), ranks)

    def _take(self, buckets: np.ndarray, nth: np.ndarray, ranks: range) -> Batches:
        begins, ends = self.steps.cut(buckets, nth, np.resize(np.asarray(ranks), len(buckets)))
        edges = np.concatenate([[0], np.cumsum(ends - begins)])
        batch_of = np.repeat(np.arange(len(buckets)), ends - begins)  # [S]
        places = np.arange(edges[-1]) - edges[batch_of] + begins[batch_of]
        samples = np.empty(len(places), np.int64)
        for bucket in np.unique(buckets).tolist():
            own = buckets[batch_of] == bucket
            samples[own] = self._data.samples_of_bucket(bucket, self._numbers(bucket, places[own]))
        # ascending: the order within a batch means nothing, and neighbours are read together
        return Batches(samples[np.lexsort((samples, batch_of))], edges)

    def _numbers(self, bucket: int, places: np.ndarray) -> np.ndarray:
        """[S] int64: numbers in the bucket of the samples at `places` [S]; place 0 is the first that was not taken yet.

        The order passes through the bucket again and again, and every pass is shuffled anew. An epoch begins where the
        last one ended. If an epoch reaches a sample a second time, its number is one bucket size larger: this means the
        next repetition of the sample.
        """
        size = self._sizes[bucket]
        first_pass, first = divmod(self._before[bucket], size)
        repeats, numbers = np.divmod((self.taken[bucket] + places) % self._counts[bucket] + first, size)
        if self._shuffle:
            for repeat in np.unique(repeats).tolist():
                own = repeats == repeat
                numbers[own] = self._shuffled(bucket, (first_pass + repeat) % 2**64, size, numbers[own])
        found: np.ndarray = numbers + repeats * size
        return found

    def _shuffled(self, bucket: int, number: int, size: int, places: np.ndarray) -> np.ndarray:
        """[S]: the samples' numbers at `places` [S] of a bucket's shuffled order; `number`: which pass through it."""
        if size > LARGE:  # in a table it would take seconds to shuffle, at the start of every epoch
            return permute(places, size, self._seed, number, SHUFFLE_SAMPLES, bucket)
        if (bucket, number) not in self._orders:
            order = np.arange(size, dtype=np.uint32)
            np.random.default_rng([self._seed, number, SHUFFLE_SAMPLES, bucket]).shuffle(order)
            self._orders[bucket, number] = order
        return self._orders[bucket, number][places]

    def _sequence(self, steps: Steps, number: int) -> np.ndarray:
        """The bucket of each step of a stretch, by the stretch's number."""
        sequence = np.repeat(np.arange(len(steps.num_steps), dtype=np.uint32), steps.num_steps)
        if self._shuffle:
            np.random.default_rng([self._seed, self._epoch, SHUFFLE_BATCHES, number]).shuffle(sequence)
        return sequence


def count_steps(sequence: np.ndarray, steps: Steps) -> tuple[np.ndarray, np.ndarray]:
    """All buckets [B], and how many steps of each a sequence has [B]."""
    return np.arange(len(steps.num_steps)), np.bincount(sequence, minlength=len(steps.num_steps))


def number_equals(values: np.ndarray) -> np.ndarray:
    """[n] int64: how many equal values stand before each."""
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    is_first = np.concatenate([[True], ordered[1:] != ordered[:-1]])
    places = np.arange(len(values))
    numbers = np.empty(len(values), np.int64)
    numbers[order] = places - np.maximum.accumulate(np.where(is_first, places, 0))
    return numbers
