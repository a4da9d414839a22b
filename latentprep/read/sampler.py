"""BucketBatchSampler: which samples make a batch, on which rank, and how far an epoch is."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch.utils.data import Sampler

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.read.arguments import check_int
from latentprep.read.counters import permute
from latentprep.read.dataset import LatentDataset

SHUFFLE_SAMPLES, SHUFFLE_BATCHES = 1, 2  # what a random stream is for
LARGE = 2**22  # samples of a bucket whose order is computed and not kept


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of one bucket; every sample exactly once in an epoch, all ranks together.

    Every rank gets the same bucket at the same step, and as many steps. What is left over in a bucket makes a short
    batch, or is left out with drop_last. Where too few are left to give every rank one, some of the bucket's samples
    come a second time in the epoch, so that no rank waits for the others for ever; that is warned of, and
    `num_repeated` says how many. `num_dropped` says how many an epoch leaves out.

    set_epoch decides the order, and tells the dataset too, whose draws and flips depend on it. state_dict and
    load_state_dict go on in mid-epoch. Holds 4 bytes a sample, and none for buckets of millions.
    """

    def __init__(
        self,
        data: LatentDataset,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        batch_size, seed = check_int("batch_size", batch_size, 1), check_int("seed", seed)
        rank, world_size = check_int("rank", rank), check_int("world_size", world_size)
        if not 0 <= rank < world_size:
            raise UserError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size.")
        self.data, self.batch_size, self.shuffle, self.drop_last = data, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self.start = 0  # the next epoch's first batch: more than 0 after load_state_dict
        self._given = 0  # batches of this epoch so far
        self._counts = [data.count_of_bucket(bucket) * data.repeats for bucket in range(len(data.buckets))]
        plans = [plan_bucket(count, batch_size, world_size, drop_last) for count in self._counts]
        self._plans = plans
        self._first_step = np.cumsum([0, *(plan.num_steps for plan in plans)])  # of each bucket, before the shuffle
        self.num_dropped = sum(max(0, n - plan.num_samples) for n, plan in zip(self._counts, plans, strict=True))
        self.num_repeated = sum(max(0, plan.num_samples - n) for n, plan in zip(self._counts, plans, strict=True))
        if self.num_repeated:
            warnings.warn(
                f"{self.num_repeated} samples come again in an epoch: buckets hold too few for {world_size} ranks. "
                "drop_last=True leaves such buckets out instead.",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return f"BucketBatchSampler({self.describe()}, epoch {self.epoch})"

    def describe(self) -> str:
        """Its batches in a few words: 12 batches of at most 4, shuffled, rank 0 of 2."""
        parts = [f"{len(self):,} batch{'' if len(self) == 1 else 'es'} of at most {self.batch_size}"]
        parts.append("shuffled" if self.shuffle else "in order")
        if self.num_dropped:
            parts.append(f"{counted(self.num_dropped, 'sample')} left out")
        if self.world_size > 1:
            parts.append(f"rank {self.rank} of {self.world_size}")
        return ", ".join(parts)

    @property
    def sampler(self) -> "BucketBatchSampler":
        """Itself: Lightning looks here for set_epoch."""
        return self

    def __len__(self) -> int:
        return int(self._first_step[-1])

    def set_epoch(self, epoch: int) -> None:
        self.epoch = check_int("epoch", epoch, 0)
        self.data.set_epoch(self.epoch)

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        epoch = self.epoch  # another loop over the same sampler may begin before this one ends
        steps = np.arange(len(self))
        if self.shuffle:
            self._stream(epoch, SHUFFLE_BATCHES).shuffle(steps)
        shuffled: dict[int, np.ndarray] = {}
        for number in range(start, len(steps)):
            bucket = int(np.searchsorted(self._first_step, steps[number], side="right")) - 1
            first, last = self._plans[bucket].cut(int(steps[number] - self._first_step[bucket]), self.rank)
            own = self._take(bucket, np.arange(first, last) % self._counts[bucket], epoch, shuffled)
            self._given = number + 1
            # sorted: the order within a batch means nothing, and neighbours are read together
            yield np.sort(self.data.samples_of_bucket(bucket, own)).tolist()
        self._given = 0

    def _take(self, bucket: int, places: np.ndarray, epoch: int, shuffled: dict[int, np.ndarray]) -> np.ndarray:
        """The samples of a bucket, by their numbers in it, at places of the epoch's order, which all ranks share."""
        count = self._counts[bucket]
        if not self.shuffle:
            return places
        if count > LARGE:  # in a table it would take seconds to shuffle, at the start of every epoch
            return permute(places, count, self.seed % 2**64, epoch, SHUFFLE_SAMPLES, bucket)
        if bucket not in shuffled:
            shuffled[bucket] = np.arange(count, dtype=np.uint32)
            self._stream(epoch, SHUFFLE_SAMPLES, bucket).shuffle(shuffled[bucket])
        return shuffled[bucket][places]

    def _stream(self, epoch: int, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, epoch, *purpose])

    def state_dict(self, next_batch: int | None = None) -> dict[str, Any]:
        """Where an epoch stands once `next_batch` of its batches were used; by default, of those given out so far."""
        same = {name: getattr(self, name) for name in ("seed", "batch_size", "world_size", "shuffle", "drop_last")}
        given = self._given if next_batch is None else next_batch
        return {"epoch": self.epoch, "next_batch": given, "num_samples": len(self.data), **same}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in mid-epoch with the batches that remain. Raises UserError where they would be other batches."""
        if not isinstance(state, dict):
            raise UserError(f"load_state_dict: got a {type(state).__name__}, expected what state_dict gave.")
        mine = self.state_dict()
        for name in mine.keys() - {"epoch", "next_batch"}:
            if state.get(name) != mine[name]:
                raise UserError(
                    f"load_state_dict: saved with {name}={state.get(name)}, this sampler has {name}={mine[name]}. "
                    "The batches that remain would be other ones: give it the same, or start a new epoch."
                )
        start = check_int("load_state_dict: next_batch", state.get("next_batch"), 0)
        if start > len(self):
            raise UserError(f"load_state_dict: next_batch={start}: expected 0 to {len(self)}.")
        self.set_epoch(check_int("load_state_dict: epoch", state.get("epoch"), 0))
        self.start = self._given = start


@dataclass(frozen=True)
class BucketPlan:
    """How the samples of one bucket, in some order, are cut into steps, and a step into a part for each rank.

    All steps but the last two take batch_size for each rank; `tail` says how many samples those two take.
    """

    batch_size: int
    world_size: int
    num_whole: int  # steps that take batch_size * world_size
    tail: tuple[int, ...]  # samples of each step after those

    @property
    def num_steps(self) -> int:
        return self.num_whole + len(self.tail)

    @property
    def num_samples(self) -> int:
        return self.num_whole * self.batch_size * self.world_size + sum(self.tail)

    def cut(self, step: int, rank: int) -> tuple[int, int]:
        """Where a rank's part of a step begins and ends."""
        if step < self.num_whole:
            first, count = step * self.batch_size * self.world_size, self.batch_size * self.world_size
        else:
            rest = step - self.num_whole
            first = self.num_whole * self.batch_size * self.world_size + sum(self.tail[:rest])
            count = self.tail[rest]
        # the first ranks get one more where it does not come out even
        share, more = divmod(count, self.world_size)
        begin = first + rank * share + min(rank, more)
        return begin, begin + share + (rank < more)


def plan_bucket(count: int, batch_size: int, world_size: int, drop_last: bool) -> BucketPlan:
    """Cut `count` samples into steps of at most batch_size for each rank, of which no rank goes without."""
    step = batch_size * world_size
    num_whole, left = divmod(count, step)
    if left == 0 or drop_last:
        return BucketPlan(batch_size, world_size, num_whole, ())
    if left >= world_size:
        return BucketPlan(batch_size, world_size, num_whole, (left,))
    if num_whole and batch_size > 1:  # too few for one each: share them with the step before
        both = step + left
        return BucketPlan(batch_size, world_size, num_whole - 1, (both - both // 2, both // 2))
    return BucketPlan(batch_size, world_size, num_whole, (world_size,))  # the first of the bucket come again
