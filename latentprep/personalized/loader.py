"""PersonalizedDataLoader: batches of a PersonalizedBase, epoch after epoch, and where the loop stands."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.personalized.dataset import PersonalizedBase
from latentprep.personalized.entries import DatasetEntry, EpochIndices
from latentprep.read.arguments import check_int
from latentprep.read.describe import show_shape
from latentprep.read.sampler import BucketBatchSampler


class BatchLoader:
    """A batch, as the ancestor stacked it."""

    def __init__(self, data: list[DatasetEntry]) -> None:
        self.cond_text = [entry.cond_text for entry in data]
        self.cond = [entry.cond for entry in data]
        self.latent_sample = torch.stack([entry.latent_sample for entry in data])  # type: ignore[misc]  # [B,C,h,w]
        weights = [entry.weight for entry in data if entry.weight is not None]
        self.weight = torch.stack(weights) if len(weights) == len(data) else None  # [B,C,h,w]

    def __repr__(self) -> str:
        return (
            f"BatchLoader({counted(len(self.latent_sample), 'sample')} of {show_shape(self.latent_sample.shape[1:])})"
        )

    def pin_memory(self) -> "BatchLoader":
        self.latent_sample = self.latent_sample.pin_memory()
        if self.weight is not None:
            self.weight = self.weight.pin_memory()
        return self


class PersonalizedDataLoader(DataLoader[BatchLoader]):
    """Batches of images of one size; every sample once an epoch, in an order of its own. A `for` is an epoch.

    latent_sampling_method is kept for old calls: the dataset's is what counts. state_dict and load_state_dict go on in
    mid-epoch with the batches that remained, also in another process.
    """

    def __init__(
        self,
        dataset: PersonalizedBase,
        latent_sampling_method: str = "once",
        batch_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.epoch = 0  # of the next `for`
        self._running, self._used = 0, 0  # the epoch of the last `for`, and how many of its batches it was given
        self._resume_at = 0  # the batch that the next `for` starts with
        self.batches = PlannedBatches(dataset.data, batch_size, seed=dataset.seed)
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=BatchLoader,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[BatchLoader]:  # type: ignore[override]
        self._running, self._used = self.epoch, self._resume_at
        epoch, used = self._running, self._used
        self.epoch, self._resume_at = self.epoch + 1, 0
        self.batches.epoch, self.batches.start = epoch, used
        for batch in super().__iter__():
            used += 1
            if self._running == epoch:  # else another `for` has begun since: the state is that one's
                self._used = used
            yield batch

    def __repr__(self) -> str:
        return f"PersonalizedDataLoader({self.batches.describe()}, next epoch {self.epoch},\n  {self.dataset!r})"

    @property
    def next_batch(self) -> int:
        """The number in its epoch of the batch that the next `for` starts with: 0, or more after load_state_dict.

        For loops that count: `for j, batch in enumerate(loader, loader.next_batch)`.
        """
        return self._resume_at

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, to be saved with a checkpoint."""
        return {**self.batches.state_dict(self._used), "epoch": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken. Takes over its seed, unless the dataset was given one. Raises UserError."""
        dataset: PersonalizedBase = self.dataset  # type: ignore[assignment]
        if not isinstance(state, dict):
            raise UserError(f"load_state_dict: got a {type(state).__name__}, expected what state_dict gave.")
        before = self.batches.seed
        if not dataset.is_seeded:
            self.batches.seed = check_int("load_state_dict: seed", state.get("seed"))
        try:
            self.batches.load_state_dict(state)
        except UserError:
            self.batches.seed = before
            raise
        dataset.seed = dataset.data.seed = self.batches.seed
        is_over = state["next_batch"] == len(self.batches)
        self.epoch, self._resume_at = state["epoch"] + is_over, 0 if is_over else state["next_batch"]
        self._running, self._used = self.epoch, self._resume_at


class PlannedBatches(BucketBatchSampler):
    """A BucketBatchSampler whose batches carry their epoch, and leave the dataset's alone."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = check_int("epoch", epoch, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        for indices in super().__iter__():
            yield EpochIndices(indices, epoch)
