"""BucketBatchSampler: which samples make a batch. LatentLoader: batches of a LatentDataset, epoch after epoch."""

import warnings
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from latentprep.errors import UserError
from latentprep.read.dataset import LatentBatch, LatentDataset

SHUFFLE_SAMPLES, SHUFFLE_BATCHES = 1, 2  # what a random stream is for


class BucketBatchSampler(Sampler[list[int]]):
    """Batches of one bucket; every sample exactly once in an epoch, all ranks together.

    Every rank gets the same bucket at the same step, and as many steps. What is left over in a bucket makes a short
    batch, or is left out with drop_last. `num_dropped` says how many samples an epoch leaves out: without drop_last
    only what cannot be shared out so that no rank goes without (fewer samples left than ranks).
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
        if batch_size < 1:
            raise UserError(f"batch_size={batch_size}: expected at least 1.")
        if not 0 <= rank < world_size:
            raise UserError(f"rank={rank}, world_size={world_size}: expected 0 <= rank < world_size.")
        self.data, self.batch_size, self.shuffle, self.drop_last = data, batch_size, shuffle, drop_last
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.epoch = 0
        self.start = 0  # the next epoch's first batch: more than 0 after load_state_dict
        counts = [len(data.rows_of_bucket(bucket)) * data.repeats for bucket in range(len(data.buckets))]
        # per step of an epoch in order: bucket, and the part of the bucket's samples that all ranks share
        self._steps = [(b, start, stop) for b, n in enumerate(counts) for start, stop in self._cut(n)]
        self.num_dropped = sum(counts) - sum(stop - start for _, start, stop in self._steps)
        if self.num_dropped and not drop_last:
            warnings.warn(
                f"{self.num_dropped} samples are left out of each epoch: too few in a bucket for {world_size} ranks",
                stacklevel=2,
            )

    def _cut(self, count: int) -> list[tuple[int, int]]:
        """Where to cut a bucket of so many samples into steps of at most batch_size on each rank."""
        whole = self.batch_size * self.world_size
        edges = list(range(0, count + 1, whole))
        left_over = count - edges[-1]
        if left_over >= self.world_size and not self.drop_last:
            edges.append(count)
        elif left_over and not self.drop_last and len(edges) > 1 and self.batch_size > 1:
            edges[-1:] = [(edges[-2] + count) // 2, count]  # too few for one each: share them with the step before
        return list(pairwise(edges))

    def __len__(self) -> int:
        return len(self._steps)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        start, self.start = self.start, 0
        steps = np.arange(len(self._steps))
        if self.shuffle:
            self._stream(SHUFFLE_BATCHES).shuffle(steps)
        order: dict[int, np.ndarray] = {}
        for step in steps[start:]:
            bucket, first, last = self._steps[step]
            if bucket not in order:
                order[bucket] = self._order(bucket)
            yield np.array_split(order[bucket][first:last], self.world_size)[self.rank].tolist()

    def _order(self, bucket: int) -> np.ndarray:
        """The samples of a bucket in this epoch's order: the same on every rank."""
        rows, size = self.data.rows_of_bucket(bucket), self.data.num_images
        samples = np.concatenate([rows + repeat * size for repeat in range(self.data.repeats)])
        if self.shuffle:
            self._stream(SHUFFLE_SAMPLES, bucket).shuffle(samples)
        return samples

    def _stream(self, *purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.seed % 2**64, self.epoch, *purpose])

    def state_dict(self, next_batch: int = 0) -> dict[str, Any]:
        """Where an epoch stands once `next_batch` of its batches were used."""
        same = {name: getattr(self, name) for name in ("seed", "batch_size", "world_size", "shuffle", "drop_last")}
        return {"epoch": self.epoch, "next_batch": next_batch, "num_samples": len(self.data), **same}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on in mid-epoch with the batches that remain. Raises UserError where they would be other batches."""
        mine = self.state_dict()
        for name in mine.keys() - {"epoch", "next_batch"}:
            if state.get(name) != mine[name]:
                raise UserError(
                    f"load_state_dict: saved with {name}={state.get(name)}, this sampler has {name}={mine[name]}."
                )
        self.epoch, self.start = state["epoch"], state["next_batch"]


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
        self.batch_size = min(batch_size, len(data))
        self.sampler = BucketBatchSampler(
            data, self.batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, rank=rank, world_size=world_size
        )
        self.gradient_step = min(gradient_step, len(data) // self.batch_size)
        self.dataloader: DataLoader[LatentBatch] = DataLoader(
            data, batch_sampler=self.sampler, collate_fn=LatentDataset.collate, **dataloader_options
        )
        self.epoch = 0
        self._used = 0  # batches of this epoch that the training loop was given
        self._resume_at = 0  # the batch that the next `for` starts with

    def __len__(self) -> int:
        return len(self.sampler)

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `for` gives, from its start."""
        self.epoch, self._used, self._resume_at = epoch, 0, 0

    def __iter__(self) -> Iterator[LatentBatch]:
        self.sampler.set_epoch(self.epoch)
        self.data.set_epoch(self.epoch)
        self._used = self.sampler.start = self._resume_at
        self._resume_at = 0
        for batch in self.dataloader:
            self._used += 1
            yield batch
        self.epoch, self._used = self.epoch + 1, 0

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, to be saved with a checkpoint; workers that read ahead do not count."""
        return {**self.sampler.state_dict(self._used), "epoch": self.epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken: the next `for` gives the batches that remained. Raises UserError."""
        self.sampler.load_state_dict(state)
        self.epoch, self._used, self._resume_at = state["epoch"], state["next_batch"], state["next_batch"]
