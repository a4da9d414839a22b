"""PersonalizedDataLoader: batches of a PersonalizedBase, epoch after epoch, and where the loop stands."""

from typing import Any

import torch
from torch.utils.data import DataLoader

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.personalized.dataset import PersonalizedBase
from latentprep.personalized.entries import DatasetEntry
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
        # the ancestor's loops know of one process; its seed is another one in each
        self.batches = BucketBatchSampler(dataset.data, batch_size, seed=dataset.seed, rank=0, world_size=1)
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=BatchLoader,
            pin_memory=pin_memory,
        )

    def __repr__(self) -> str:
        return f"PersonalizedDataLoader({self.batches.describe()}, next epoch {self.epoch},\n  {self.dataset!r})"

    @property
    def epoch(self) -> int:
        """The epoch that the next `for` gives."""
        return self.batches.epoch

    @property
    def next_batch(self) -> int:
        """The number in its epoch of the batch that the next `for` starts with: 0, or more after load_state_dict.

        For loops that count: `for j, batch in enumerate(loader, loader.next_batch)`. With another batch size than
        before it counts from where that began.
        """
        return self.batches.position.split(self.batches.samples_per_batch, 1)[1]

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, to be saved with a checkpoint."""
        return self.batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken. Takes over its seed, unless the dataset was given one. Raises UserError.

        If nothing remained of the epoch, the next `for` is of the next one.
        """
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
        self.batches.skip_if_over()
