"""BucketBatchSampler: which samples make a batch, on which rank, and how far an epoch is."""

import sys
import warnings
from collections.abc import Iterator
from typing import Any

from torch.utils.data import Sampler

from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.read.accelerate import find_world_size, refuse_dispatch
from latentprep.read.arguments import check_flags, check_int
from latentprep.read.order import Batches, Epoch, EpochIndices, Samples, Steps, count_samples
from latentprep.read.position import Position, Stretch
from latentprep.read.ranks import find_rank


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of one bucket; every sample exactly once in an epoch, all ranks together.

    batch_size: samples of a batch at most, on each rank. rank, world_size: torch.distributed's if it is initialized,
    else torchrun's RANK and WORLD_SIZE, both looked up when an epoch begins; or say them.

    Every rank gets the same bucket at the same step, and as many steps. What is left over in a bucket makes a short
    batch, or is left out with drop_last, which is warned of. If too few are left to give every rank one, some of the
    bucket's samples come a second time in the epoch, so that no rank waits for the others for ever; that is warned of,
    and `num_repeated` says how many. `num_dropped` says how many an epoch leaves out.

    Each `for` that runs to its end is an epoch, of an order of its own. set_epoch says which is the next, and tells the
    dataset too, whose draws and flips depend on it. state_dict and load_state_dict go on in mid-epoch, also with
    another batch size or on another number of ranks. If accelerate prepares a DataLoader with this sampler, each
    process gets its share. Holds 4 bytes a sample, and none for buckets of millions.

    Raises UserError if drop_last would leave no batch at all.
    """

    def __init__(
        self,
        data: Samples,
        batch_size: int,
        *,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        if not hasattr(data, "samples_of_bucket"):
            raise UserError(f"BucketBatchSampler: got a {type(data).__name__}, expected a LatentDataset.")
        check_flags(shuffle=shuffle, drop_last=drop_last)
        self._rank = check_rank(rank, world_size)
        # not named batch_size: Lightning and accelerate would take it for a promise that all batches have that size
        self.samples_per_batch = min(check_int("batch_size", batch_size, 1), max(1, len(data)))
        self.data, self.shuffle, self.drop_last = data, shuffle, drop_last
        self.seed = check_int("seed", seed)
        self._warned: set[str] = set()
        self.position = (
            Position()
        )  # where the next `for` begins; one that has run to its end moves it to the next epoch
        self._begun = self.position  # where the last `for` began
        self._given = 0  # steps of its stretch that were given out so far
        self._look_at_steps(self.world_size)

    @property
    def rank(self) -> int:
        return find_rank()[0] if self._rank is None else self._rank[0]

    @property
    def world_size(self) -> int:
        return find_rank()[1] if self._rank is None else self._rank[1]

    @property
    def num_dropped(self) -> int:
        """Samples that a whole epoch leaves out."""
        return self._look_at_steps(self.world_size).num_dropped

    @property
    def num_repeated(self) -> int:
        """Samples that a whole epoch has a second time."""
        return self._look_at_steps(self.world_size).num_repeated

    def _look_at_steps(self, world_size: int) -> Steps:
        """The steps of a whole epoch; warns of what they leave out or repeat. Raises UserError if there are none."""
        counts = count_samples(self.data, self.epoch)
        steps = Steps(counts, self.samples_per_batch, world_size, self.drop_last)
        by = f"{self.samples_per_batch}" + (f" on {world_size} ranks" if world_size > 1 else "")
        if not len(steps) and counts.any():
            raise UserError(
                f"drop_last=True leaves no batch: no bucket has enough samples for a batch of {by}. "
                "Take a smaller batch_size, or drop_last=False."
            )
        if steps.num_dropped:
            self._warn(
                f"drop_last=True leaves out {steps.num_dropped:,} of {counted(int(counts.sum()), 'sample')} an epoch: "
                f"they fill no batch of {by}."
            )
        if steps.num_repeated:
            self._warn(
                f"{steps.num_repeated} samples come again in an epoch: buckets hold too few for {world_size} ranks. "
                "drop_last=True leaves such buckets out instead."
            )
        return steps

    def _warn(self, message: str) -> None:
        """Once for each thing that is to be said."""
        if message not in self._warned:
            self._warned.add(message)
            warnings.warn(message, stacklevel=4)

    def __repr__(self) -> str:
        return f"BucketBatchSampler({self.describe()}, epoch {self.epoch})"

    def describe(self) -> str:
        """Its batches in a few words: 12 batches of at most 4, shuffled, rank 0 of 2."""
        parts = [f"{counted(len(self), 'batch', 'es')} of at most {self.samples_per_batch}"]
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
        """Batches of a whole epoch on this rank."""
        world_size = find_world_size(sys._getframe(1))
        if world_size is not None:
            return len(self._look_at_steps(world_size)) * world_size
        return len(self._look_at_steps(self.world_size))

    @property
    def epoch(self) -> int:
        """The epoch that the next `for` gives."""
        return self.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `for` gives: from its start, or from where load_state_dict has put it."""
        epoch = check_int("epoch", epoch, 0)
        if epoch != self.epoch:
            self.position = Position(epoch)
        self.data.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        asking = sys._getframe(1)
        refuse_dispatch(asking)
        world_size = find_world_size(asking)
        if world_size is None:
            return self._give(range(self.rank, self.rank + 1), self.world_size)
        return self._give(range(world_size), world_size)

    def _give(self, ranks: range, world_size: int) -> Iterator[list[int]]:
        """The batches of some ranks, step by step."""
        begun = self._begun = self.position
        _, self._given = begun.split(self.samples_per_batch, world_size)
        number = self._given * len(ranks)
        for batches in self.take(begun, ranks, world_size):
            for samples in batches:
                number += 1
                self._given = -(-number // len(ranks))
                yield EpochIndices(samples.tolist(), begun.epoch)
        if self.position == begun:  # and nobody has said otherwise
            self.position = self._begun = Position(begun.epoch + 1)
            self._given = 0

    def take(self, position: Position, ranks: range, world_size: int) -> Iterator[Batches]:
        """What an epoch has left for some ranks, many batches at a time."""
        self._look_at_steps(world_size)
        before, start = position.split(self.samples_per_batch, world_size)
        epoch = self._open_epoch(position.epoch, before, world_size)
        self.data.set_epoch(position.epoch)
        yield from epoch.batches(start, ranks)

    def _open_epoch(
        self, epoch: int, before: tuple[Stretch, ...], world_size: int, batch_size: int | None = None
    ) -> Epoch:
        return Epoch(
            self.data, seed=self.seed, epoch=epoch, shuffle=self.shuffle, drop_last=self.drop_last,
            batch_size=batch_size or self.samples_per_batch, world_size=world_size, before=before,
        )  # fmt: skip

    def num_batches(self, position: Position, world_size: int) -> int:
        """Batches of an epoch's last stretch, if it goes on from there in this sampler's way."""
        before, _ = position.split(self.samples_per_batch, world_size)
        return len(self._open_epoch(position.epoch, before, world_size))

    def settle(self, position: Position, world_size: int) -> Position:
        """The position; the next epoch's start if nothing is left of this one."""
        _, start = position.split(self.samples_per_batch, world_size)
        is_over = position.stretches and start == self.num_batches(position, world_size)
        return Position(position.epoch + 1) if is_over else position

    def state_dict(self, next_batch: int | None = None) -> dict[str, Any]:
        """Where an epoch stands once `next_batch` of its batches were used, as JSON values; by default, all given out.

        If the epoch has gone on with another batch size or number of ranks, batches count from there.
        """
        if next_batch is not None:
            check_int("next_batch", next_batch, 0)
        elif self.position == self._begun:
            next_batch = self._given
        else:  # set_epoch or load_state_dict came since
            return self.describe_position(self.position)
        return self.describe_position(self.position.after(next_batch, self.samples_per_batch, self.world_size))

    def describe_position(self, position: Position) -> dict[str, Any]:
        """A position as state_dict gives it."""
        return {**position.to_json(self.samples_per_batch, self.world_size), **self._describe()}

    def _describe(self) -> dict[str, Any]:
        """What has to be the same where an epoch goes on."""
        same = {name: getattr(self, name) for name in ("seed", "shuffle", "drop_last")}
        return {"num_samples": len(self.data), **same, **self.data.describe_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in mid-epoch with the samples that remain. Raises UserError if they would be others."""
        if not isinstance(state, dict):
            raise UserError(f"load_state_dict: got a {type(state).__name__}, expected what state_dict gave.")
        for name, mine in self._describe().items():
            if state.get(name) != mine:
                saved, here = (f"{name}={shortened(str(value))}" for value in (state.get(name), mine))
                raise UserError(
                    f"load_state_dict: saved with {saved}, this sampler has {here}. "
                    "What remains of the epoch would be other samples: give it the same, or start a new epoch."
                )
        position = Position.from_json(state, self._count_steps)
        self.set_epoch(position.epoch)
        self.position = self._begun = position
        _, self._given = position.split(self.samples_per_batch, self.world_size)

    def _count_steps(self, position: Position, batch_size: int, world_size: int) -> int:
        return len(self._open_epoch(position.epoch, position.stretches, world_size, batch_size))


def check_rank(rank: int | None, world_size: int | None) -> tuple[int, int] | None:
    """Both as they are given; None: neither is. Raises UserError for ranks that there are not."""
    if rank is None and world_size is None:
        return None
    rank = rank if rank is None else check_int("rank", rank)
    world_size = world_size if world_size is None else check_int("world_size", world_size)
    if rank is None or world_size is None:
        raise UserError(f"rank={rank}, world_size={world_size}: give both, or neither.")
    if not 0 <= rank < world_size:
        raise UserError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size.")
    return rank, world_size
