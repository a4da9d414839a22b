"""PersonalizedDataLoader: batches of a PersonalizedBase, epoch after epoch, and where the loop stands."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.personalized.dataset import PersonalizedBase
from latentprep.personalized.entries import DatasetEntry
from latentprep.read.arguments import check_int
from latentprep.read.describe import show_shape
from latentprep.read.position import Position
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
        self.batches = BucketBatchSampler(dataset.data, batch_size, seed=dataset.seed)
        self._next = self._begun = Position()  # where the next `for` begins, and where the last one did
        self._used = 0  # batches that the last one was given of its stretch of the epoch
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=BatchLoader,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[BatchLoader]:  # type: ignore[override]
        batch_size, world_size = self.batches.samples_per_batch, self.batches.world_size
        begun = self.batches.position = self._begun = self.batches.settle(self._next, world_size)
        self._next = Position(begun.epoch + 1)
        _, used = begun.split(batch_size, world_size)
        self._used = used
        for batch in super().__iter__():
            used += 1
            if self._begun is begun:  # else another `for` has begun since: the state is that one's
                self._used = used
            yield batch

    def __repr__(self) -> str:
        return f"PersonalizedDataLoader({self.batches.describe()}, next epoch {self.epoch},\n  {self.dataset!r})"

    @property
    def epoch(self) -> int:
        """The epoch that the next `for` gives."""
        return self._next.epoch

    @property
    def next_batch(self) -> int:
        """The number in its epoch of the batch that the next `for` starts with: 0, or more after load_state_dict.

        For loops that count: `for j, batch in enumerate(loader, loader.next_batch)`.
        """
        return self._next.split(self.batches.samples_per_batch, self.batches.world_size)[1]

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, to be saved with a checkpoint."""
        batches = self.batches
        return batches.describe_position(self._begun.after(self._used, batches.samples_per_batch, batches.world_size))

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken. Takes over its seed, unless the dataset was given one. Raises UserError."""
        dataset: PersonalizedBase = self.dataset  # type: ignore[assignment]
        if not isinstance(state, dict):
            raise UserError(f"load_state_dict: got a {type(state).__name__}, expected what state_dict gave.")
        before = self.batches.seed
        if not dataset.is_seeded:
            self.batches.seed = dataset.data.seed = check_int("load_state_dict: seed", state.get("seed"))
        try:
            self.batches.load_state_dict(state)
        except UserError:
            self.batches.seed = dataset.data.seed = before
            raise
        dataset.seed = self.batches.seed
        self._next = self._begun = self.batches.settle(self.batches.position, self.batches.world_size)
        _, self._used = self._begun.split(self.batches.samples_per_batch, self.batches.world_size)
