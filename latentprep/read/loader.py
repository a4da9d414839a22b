"""LatentLoader: batches of a LatentDataset, epoch after epoch, and where the training loop stands."""

from collections.abc import Iterator, Sequence
from os import PathLike
from typing import Any, Generic

from torch.utils.data import ConcatDataset, DataLoader, Subset

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.read.accelerate import end_is_known
from latentprep.read.arguments import check_int
from latentprep.read.batch import CondT, LatentBatch, WeightT
from latentprep.read.dataset import LatentDataset
from latentprep.read.mix import LatentMix
from latentprep.read.position import Position
from latentprep.read.sampler import BucketBatchSampler


class LatentLoader(Generic[CondT, WeightT]):
    """Batches of a LatentDataset, or of several in a list; each `for` that runs to its end is one epoch.

    A list is a LatentMix, which has more to say: proportions, images that several datasets have.

    batch_size is clamped to the size of the data, and gradient_step to its batches, as the ancestor clamped them.
    rank and world_size are torch.distributed's if it is initialized, else torchrun's RANK and WORLD_SIZE; they are
    looked up when an epoch begins. `Accelerator.prepare` and Lightning leave a LatentLoader as it is: it shares out the
    epoch itself, and only batch.to(device) is left to do. num_workers, pin_memory and further keywords go to torch's
    DataLoader.
    """

    end_of_dataloader = False  # whether the loop has the last batch of an epoch: accelerate's GradientState asks
    remainder = -1  # what accelerate would cut off gathered metrics: nothing, since no batch is filled up

    def __init__(
        self,
        data: LatentDataset[CondT, WeightT] | LatentMix[CondT, WeightT] | Sequence[LatentDataset[CondT, WeightT]],
        batch_size: int = 1,
        *,
        gradient_step: int = 1,
        shuffle: bool = True,
        drop_last: bool = False,
        seed: int = 0,
        rank: int | None = None,
        world_size: int | None = None,
        **dataloader_options: Any,
    ) -> None:
        if isinstance(data, list | tuple):
            data = LatentMix(data)
        if not isinstance(data, LatentDataset | LatentMix):
            raise UserError(f"LatentLoader: got a {type(data).__name__}, expected a LatentDataset{hint(data)}.")
        self.data = data
        self.sampler = BucketBatchSampler(
            data, batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, rank=rank, world_size=world_size
        )
        self.batch_size = self.sampler.samples_per_batch
        self.gradient_step = min(check_int("gradient_step", gradient_step, 1), len(data) // self.batch_size)
        self.dataloader: DataLoader[LatentBatch[CondT, WeightT]] = DataLoader(
            data, batch_sampler=self.sampler, collate_fn=LatentDataset.collate, **dataloader_options
        )
        self._next = self._begun = Position()  # where the next `for` begins, and where the last one did
        self._used = 0  # batches that the training loop was given of its stretch of the epoch

    def __len__(self) -> int:
        """Batches of a whole epoch, on this rank."""
        return len(self.sampler)

    def __repr__(self) -> str:
        workers = self.dataloader.num_workers
        by = f", by {counted(workers, 'worker')}" if workers else ""
        return f"LatentLoader({self.sampler.describe()}, epoch {self.epoch}{by},\n  {self.data!r})"

    @property
    def epoch(self) -> int:
        return self._next.epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `for` gives, from its start."""
        self._next = self._begun = Position(check_int("epoch", epoch, 0))
        self._used = 0

    def __iter__(self) -> Iterator[LatentBatch[CondT, WeightT]]:
        sampler, world_size = self.sampler, self.sampler.world_size
        begun = sampler.settle(self._next, world_size)
        self._begun = begun
        self._next = Position(begun.epoch)  # a loop that is left starts its epoch again
        _, used = begun.split(self.batch_size, world_size)
        self._used = used
        last = sampler.num_batches(begun, world_size)
        with end_is_known(self):
            for batch in self._read(begun, sampler.rank, world_size):
                used += 1
                self._used, self.end_of_dataloader = used, used == last
                if used == last:  # some loops count batches, and never ask whether there is one more
                    self._next = Position(begun.epoch + 1)
                self.data.give_cond_model(batch)
                yield batch
        self._begun, self._used = self._next, 0

    def _read(self, begun: Position, rank: int, world_size: int) -> Iterator[LatentBatch[CondT, WeightT]]:
        if self.dataloader.num_workers or self.dataloader.pin_memory:
            self.sampler.position = begun
            yield from self.dataloader
            return
        # without workers DataLoader would add a tenth to the time of a batch, and nothing else
        for batches in self.sampler.take(begun, range(rank, rank + 1), world_size):
            yield from self.data.read_many(batches, begun.epoch)

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, as JSON values to be saved with a checkpoint; workers that read ahead do not count.

        All ranks give the same. load_state_dict goes on with the samples that remain of the epoch, also with another
        batch size or on another number of ranks.
        """
        return self.sampler.describe_position(self._begun.after(self._used, self.batch_size, self.sampler.world_size))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken: the next `for` gives what remained of the epoch. Raises UserError."""
        self.sampler.load_state_dict(state)
        self._next = self._begun = self.sampler.settle(self.sampler.position, self.sampler.world_size)
        _, self._used = self._begun.split(self.batch_size, self.sampler.world_size)


def hint(data: object) -> str:
    """What to write in the place of something that is no LatentDataset."""
    if isinstance(data, str | PathLike):
        return f": LatentLoader(LatentDataset({str(data)!r:.200}), ...)"
    if isinstance(data, ConcatDataset):
        return ", or several in a list: LatentLoader([a, b], ...)"
    if isinstance(data, Subset):
        return ", or a part of one: data.select(...), data.split(0.05)"
    return ""
