"""LatentLoader: batches of a LatentDataset, epoch after epoch, and where the training loop stands."""

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader

from latentprep.human import counted
from latentprep.read.arguments import check_int
from latentprep.read.batch import LatentBatch
from latentprep.read.dataset import LatentDataset
from latentprep.read.sampler import BucketBatchSampler


class LatentLoader:
    """Batches of a LatentDataset; each `for batch in loader` that runs to its end is one epoch.

    batch_size is clamped to the size of the data, and gradient_step to its batches, as the ancestor clamped them.
    rank and world_size are torch.distributed's where that is initialized. num_workers, pin_memory and further keywords
    go to torch's DataLoader.
    """

    def __init__(
        self,
        data: LatentDataset,
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
        if rank is None or world_size is None:
            is_distributed = dist.is_available() and dist.is_initialized()
            rank, world_size = (dist.get_rank(), dist.get_world_size()) if is_distributed else (0, 1)
        self.data = data
        self.batch_size = min(check_int("batch_size", batch_size, 1), len(data))
        self.sampler = BucketBatchSampler(
            data, self.batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, rank=rank, world_size=world_size
        )
        self.gradient_step = min(check_int("gradient_step", gradient_step, 1), len(data) // self.batch_size)
        self.dataloader: DataLoader[LatentBatch] = DataLoader(
            data, batch_sampler=self.sampler, collate_fn=LatentDataset.collate, **dataloader_options
        )
        self.epoch = 0
        self._used = 0  # batches of this epoch that the training loop was given
        self._resume_at = 0  # the batch that the next `for` starts with

    def __len__(self) -> int:
        return len(self.sampler)

    def __repr__(self) -> str:
        workers = self.dataloader.num_workers
        by = f", by {counted(workers, 'worker')}" if workers else ""
        return f"LatentLoader({self.sampler.describe()}, epoch {self.epoch}{by},\n  {self.data!r})"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `for` gives, from its start."""
        self.epoch, self._used, self._resume_at = check_int("epoch", epoch, 0), 0, 0

    def __iter__(self) -> Iterator[LatentBatch]:
        if 0 < len(self) == self._used and not self._resume_at:
            self.epoch += 1  # some loops (Lightning's) count batches, and do not ask for one more than there are
        self.sampler.set_epoch(self.epoch)
        self._used = self.sampler.start = self._resume_at
        self._resume_at = 0
        # without workers DataLoader would add a tenth to the time of a batch, and nothing else
        is_plain = not (self.dataloader.num_workers or self.dataloader.pin_memory)
        batches = map(self.data.__getitems__, self.sampler) if is_plain else self.dataloader
        for batch in batches:
            self._used += 1
            if self.data.include_cond:
                batch.cond_model = self.data.cond_model
            yield batch
        self.epoch, self._used = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, to be saved with a checkpoint; workers that read ahead do not count."""
        return {**self.sampler.state_dict(self._used), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken: the next `for` gives the batches that remained. Raises UserError."""
        self.sampler.load_state_dict(state)
        self.epoch, self._used, self._resume_at = state["epoch"], state["next_batch"], state["next_batch"]
