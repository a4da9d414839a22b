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
from latentprep.read.order import Batches, EpochIndices
from latentprep.read.position import Position
from latentprep.read.sampler import BucketBatchSampler


class LatentLoader(Generic[CondT, WeightT]):
    """Batches of a LatentDataset, or of several in a list. Each `for` loop is one epoch, even if you leave it early.

    A list becomes a LatentMix. Make a LatentMix yourself to set proportions, or to let equal images take turns.

    batch_size is at most the size of the data, and gradient_step at most len(data) // batch_size, as in
    stable-diffusion-webui. rank and world_size are torch.distributed's if it is initialized, else torchrun's RANK and
    WORLD_SIZE; they are looked up when an epoch begins. `Accelerator.prepare` and Lightning leave a LatentLoader as it
    is: the loader itself gives each rank its share of the epoch, and only batch.to(device) is left to do. num_workers,
    pin_memory and further keywords go to torch's DataLoader.

    Position and epoch are kept in its `sampler`: call set_epoch of the loader or of the sampler.
    Raises UserError for wrong arguments.
    """

    end_of_dataloader = False  # whether the loop has the last batch of an epoch: accelerate's GradientState asks
    remainder = -1  # what accelerate would cut off gathered metrics: nothing, since no batch is filled up
    collate_fn = staticmethod(LatentDataset.collate)  # with dataset and batch_sampler: what skip_first_batches takes

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
        for name in ("sampler", "batch_sampler", "collate_fn"):
            if name in dataloader_options:
                raise UserError(f"{name}: LatentLoader has its own. With another one, use torch's DataLoader.")
        self.data = data
        self.sampler = BucketBatchSampler(
            data, batch_size, shuffle=shuffle, drop_last=drop_last, seed=seed, rank=rank, world_size=world_size
        )
        self.batch_size = self.sampler.samples_per_batch
        self.gradient_step = min(check_int("gradient_step", gradient_step, 1), len(data) // self.batch_size)
        self._asked = Asked()
        self.dataloader: DataLoader[LatentBatch[CondT, WeightT]] = DataLoader(
            data, batch_sampler=self._asked, collate_fn=LatentDataset.collate, **dataloader_options
        )
        # without workers, pinned memory and other options, a DataLoader would only make each batch a tenth slower
        self._is_plain = not any(dataloader_options.values())

    @property
    def dataset(self) -> LatentDataset[CondT, WeightT] | LatentMix[CondT, WeightT]:
        """The data, as a DataLoader calls it."""
        return self.data

    @property
    def batch_sampler(self) -> BucketBatchSampler:
        """The sampler, as a DataLoader calls it."""
        return self.sampler

    def __getattr__(self, name: str) -> Any:
        """Attributes of the DataLoader, such as num_workers: accelerate's skip_first_batches reads them."""
        if name.startswith("_") or name == "dataloader":  # asked for by copy and pickle, before there is any
            raise AttributeError(name)
        return getattr(self.dataloader, name)

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank; if epochs of a LatentMix differ, of one that has the most."""
        return len(self.sampler)

    def __repr__(self) -> str:
        workers = self.dataloader.num_workers
        by = f", by {counted(workers, 'worker')}" if workers else ""
        return f"LatentLoader({self.sampler.describe()}, epoch {self.epoch}{by},\n  {self.data!r})"

    def __getitem__(self, index: object) -> None:
        """Refused: a loader is no dataset. Raises UserError."""
        raise UserError("a LatentLoader is no dataset: loop over it, or give a DataLoader the dataset itself.")

    @property
    def epoch(self) -> int:
        """The epoch that the next `for` gives."""
        return self.sampler.epoch

    def set_epoch(self, epoch: int) -> None:
        """The epoch that the next `for` gives: from its start, or from where load_state_dict has put it."""
        self.sampler.set_epoch(epoch)

    def __iter__(self) -> Iterator[LatentBatch[CondT, WeightT]]:
        sampler = self.sampler
        rank, world_size = sampler.ranks
        begun, epoch, used = sampler.begin(world_size)
        pieces = epoch.batches(used, range(rank, rank + 1))
        with end_is_known(self):
            for batch in self._read(pieces, begun.epoch):
                used += 1
                sampler.stand(begun, begun.after(used, self.batch_size, world_size))
                self.end_of_dataloader = used == len(epoch)
                self.data.give_cond_model(batch)
                yield batch
        sampler.stand(begun, Position(begun.epoch + 1))

    def _read(self, pieces: Iterator[Batches], epoch: int) -> Iterator[LatentBatch[CondT, WeightT]]:
        if self._is_plain:
            for batches in pieces:
                yield from self.data.read_many(batches, epoch)
            return
        self._asked.batches = (EpochIndices(samples.tolist(), epoch) for batches in pieces for samples in batches)
        yield from self.dataloader

    def state_dict(self) -> dict[str, Any]:
        """The position of the loop, as JSON values for a checkpoint. Batches that workers read ahead do not count.

        All ranks return the same. load_state_dict goes on with the rest of the epoch; batch size and number of ranks
        may then be others.
        """
        return self.sampler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken: the next `for` gives what remained of the epoch. Raises UserError.

        If nothing remained it gives nothing, and the `for` after it the next epoch.
        """
        self.sampler.load_state_dict(state)


class Asked:
    """The batch_sampler of the DataLoader. It can be given only once, so each epoch puts its batches in here."""

    batches: Iterator[list[int]] = iter(())

    def __iter__(self) -> Iterator[list[int]]:
        return self.batches


def hint(data: object) -> str:
    """Advice for an argument that is no LatentDataset."""
    if isinstance(data, str | PathLike):
        return f": LatentLoader(LatentDataset({str(data)!r:.200}), ...)"
    if isinstance(data, ConcatDataset):
        return ", or several in a list: LatentLoader([a, b], ...)"
    if isinstance(data, Subset):
        return ", or a part of one: data.select(...), data.split(0.05)"
    return ""
