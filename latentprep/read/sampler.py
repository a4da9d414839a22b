"""BucketBatchSampler: which samples make a batch, on which rank, and where an epoch stands."""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from torch.utils.data import Sampler

from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.read.accelerate import find_world_size, refuse_dispatch
from latentprep.read.arguments import check_epoch, check_flags, check_int
from latentprep.read.order import Epoch, EpochIndices, Samples, Steps
from latentprep.read.position import Position, Stretch
from latentprep.read.ranks import check_rank, find_rank


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of one bucket each. All ranks together get every sample exactly once an epoch, with two exceptions below.

    batch_size: the most samples of a batch, on each rank. rank, world_size: give both, or neither; then they are those
    of torch.distributed if it is initialized, else torchrun's RANK and WORLD_SIZE, looked up when an epoch begins.

    At each step all ranks get the same bucket, and all ranks have the same number of steps. The samples that are left
    over in a bucket make a short batch; drop_last leaves them out, with a warning. If too few are left for every rank,
    they share two steps with the last full batches. If that is not possible (the bucket has no full step, or
    batch_size=1), some samples come a second time in the epoch, with a warning, so that no rank waits for ever.
    `num_repeated` and `num_dropped` say how many samples an epoch has twice or leaves out.

    Each `for` loop is an epoch with its own order and noise, even if you leave it early. set_epoch chooses the next
    one. state_dict and load_state_dict go on in mid-epoch; batch size and number of ranks may then be others. If
    accelerate prepares a DataLoader with this sampler, each process gets its share. Memory: 4 bytes for each sample
    (none for buckets of more than 4 million samples), and 4 bytes for each step.

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
        self.position = Position()  # where the next `for` begins: one that has begun moves it to the next epoch
        # _at: the position after the batches that the last `for` gave. _begun: where that `for` began
        self._at = self._begun = self.position
        self._look_at(self._steps(self.world_size), self.world_size)

    @property
    def ranks(self) -> tuple[int, int]:
        """Rank and world size, as they are now. Raises UserError like find_rank."""
        return find_rank() if self._rank is None else self._rank

    @property
    def rank(self) -> int:
        return self.ranks[0]

    @property
    def world_size(self) -> int:
        return self.ranks[1]

    @property
    def num_dropped(self) -> int:
        """Samples that a whole epoch leaves out."""
        return self._steps(self.world_size).num_dropped

    @property
    def num_repeated(self) -> int:
        """How many samples a whole epoch has a second time."""
        return self._steps(self.world_size).num_repeated

    def _steps(self, world_size: int) -> Steps:
        """The steps of a whole epoch; if epochs differ, of one that has the most."""
        each = [Steps(n, self.samples_per_batch, world_size, self.drop_last) for n in self.data.counts_at_most()]
        return max(each, key=len)

    def _look_at(self, steps: Steps, world_size: int) -> None:
        """Warn of what the steps of an epoch leave out or repeat. Raises UserError if there are none."""
        by = f"{self.samples_per_batch}" + (f" on {world_size} ranks" if world_size > 1 else "")
        if not len(steps) and len(self.data):
            raise UserError(
                f"drop_last=True leaves no batch: no bucket has enough samples for a batch of {by}. "
                "Take a smaller batch_size, or drop_last=False."
            )
        if steps.num_dropped:
            self._warn(
                f"drop_last=True leaves out {steps.num_dropped:,} of {counted(len(self.data), 'sample')} an epoch: "
                f"they fill no batch of {by}."
            )
        if steps.num_repeated:
            self._warn(
                f"{steps.num_repeated} samples come again in an epoch: buckets hold too few for {world_size} ranks. "
                "drop_last=True leaves such samples out instead."
            )

    def _warn(self, message: str) -> None:
        """Show a warning, but each message only once."""
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
        """Batches of a whole epoch on this rank; if epochs of a LatentMix differ, of one that has the most."""
        world_size = find_world_size(sys._getframe(1))
        if world_size is not None:
            return len(self._steps(world_size)) * world_size
        return len(self._steps(self.world_size))

    @property
    def epoch(self) -> int:
        """The epoch that the next `for` gives."""
        return self.position.epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `for` gives: from its start, or from where load_state_dict has put it."""
        epoch = check_epoch("epoch", epoch)
        if epoch != self.epoch:
            self.position = self._at = Position(epoch)
        self.data.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[int]]:
        asking = sys._getframe(1)
        refuse_dispatch(asking)
        world_size = find_world_size(asking)
        if world_size is not None:  # accelerate takes every n-th batch
            return self._give(range(world_size), world_size)
        rank, world_size = self.ranks
        return self._give(range(rank, rank + 1), world_size)

    def _give(self, ranks: range, world_size: int) -> Iterator[list[int]]:
        """The batches of some ranks, step by step."""
        begun, epoch, start = self.begin(world_size)
        number = start * len(ranks)
        for batches in epoch.batches(start, ranks):
            for samples in batches:
                number += 1
                self.stand(begun, begun.after(-(-number // len(ranks)), self.samples_per_batch, world_size))
                yield EpochIndices(samples.tolist(), begun.epoch)
        self.stand(begun, Position(begun.epoch + 1))

    def begin(self, world_size: int) -> tuple[Position, Epoch, int]:
        """Begin a `for` loop: the position, the epoch's steps, and the number of the first step that was not taken.

        After this the next `for` is the next epoch, even if this one ends early. Raises UserError if there is no batch.
        """
        begun = self._at = self._begun = replace(self.position)  # an object of its own
        self.position = Position(begun.epoch + 1)
        before, start = begun.split(self.samples_per_batch, world_size)
        epoch = self._open_epoch(begun.epoch, before, world_size)
        if not before:
            self._look_at(epoch.steps, world_size)
        self.data.set_epoch(begun.epoch)
        return begun, epoch, start

    def skip_if_over(self) -> None:
        """Go to the next epoch if nothing is left of this one."""
        begun, world_size = self.position, self.world_size
        before, start = begun.split(self.samples_per_batch, world_size)
        if begun.stretches and start == len(self._open_epoch(begun.epoch, before, world_size)):
            self.position = self._at = Position(begun.epoch + 1)

    def stand(self, begun: Position, position: Position) -> None:
        """Note that the `for` that began at `begun` is at `position` now; state_dict returns this.

        If several `for` loops are running, only the one that began last is noted.
        """
        if self._begun is begun:
            self._at = position

    def _open_epoch(self, epoch: int, before: tuple[Stretch, ...], world_size: int) -> Epoch:
        return Epoch(
            self.data, seed=self.seed, epoch=epoch, shuffle=self.shuffle, drop_last=self.drop_last,
            batch_size=self.samples_per_batch, world_size=world_size, before=before,
        )  # fmt: skip

    def state_dict(self, next_batch: int | None = None) -> dict[str, Any]:
        """The position in an epoch, as JSON values: after all batches given out, or after `next_batch` batches.

        next_batch counts from the start of the epoch that the next `for` gives. If batch size or number of ranks has
        changed in mid-epoch, it counts from that change.
        """
        rank_and_size = self.samples_per_batch, self.world_size
        position = self._at
        if next_batch is not None:
            position = self.position.after(check_int("next_batch", next_batch, 0), *rank_and_size)
        return {**position.to_json(*rank_and_size), **self._describe()}

    def _describe(self) -> dict[str, Any]:
        """All that must be the same to go on in an epoch, name -> JSON value."""
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
                    f"load_state_dict: saved with {saved}, this sampler has {here}. The rest of the epoch would be "
                    f"other samples: give it the same, or go on with the next epoch: set_epoch({next_epoch(state)})."
                )
        position = Position.from_json(state)
        try:
            self._open_epoch(position.epoch, position.stretches, 1)
        except ValueError as error:
            raise UserError(f"load_state_dict: {error}.") from None
        self.data.set_epoch(position.epoch)
        self.position = self._at = position


def next_epoch(state: dict[str, Any]) -> object:
    """The epoch after that of a state, if it has one."""
    epoch = state.get("epoch")
    return epoch + 1 if type(epoch) is int else "N"
