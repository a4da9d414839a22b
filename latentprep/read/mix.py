"""LatentMix: several datasets as one, each batch from one of them; arithmetic on numbers, done once."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import isfinite, lcm
from typing import Any, Generic, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.read.arguments import check_int
from latentprep.read.batch import CondT, LatentBatch, WeightT
from latentprep.read.counters import TURN, mix
from latentprep.read.dataset import LatentDataset
from latentprep.read.order import Batches, EpochIndices

SAME_IMAGES = ("each", "in turn")
MAX_DATASETS = 8  # whose images take turns: more would need tables of every order
PARTS = 10**9  # proportions are counted in such parts, so that no rounding adds up over the epochs


@dataclass(frozen=True, eq=False)
class Member(Generic[CondT, WeightT]):
    """What batches of a mix come from: a dataset, or a part of it that has its turn in some epochs."""

    data: LatentDataset[CondT, WeightT]
    number: int  # of the dataset
    phase: int = 0  # it has its turn in epochs that leave this remainder, divided by the number of phases
    indices: np.ndarray | None = None  # [n] int64: of a part, where its samples stand in the dataset


class LatentMix(Dataset[LatentBatch[CondT, WeightT]], Generic[CondT, WeightT]):
    """Several LatentDatasets in one loader: `LatentLoader([a, b])`, or a DataLoader with a BucketBatchSampler of it.

    A batch is from one dataset, and of one bucket; batch.member says which dataset, and batch.index counts in it. Each
    dataset has its own resolution, repeats, seed, sample_weight and so on.

    proportions: how much of an epoch is of each dataset, as numbers of any sum. The epoch is as long as all of the
        datasets together; of a small one images come several times, of a large one the following epochs have the rest.
        Without it an epoch has every sample of every dataset.
    same_images: "each": datasets have nothing to do with each other. "in turn": images that several of them have (with
        equal content, such as the same folder encoded at several resolutions) come once an epoch, each time from
        another dataset.

    Raises UserError.
    """

    def __init__(
        self,
        datasets: "Sequence[LatentDataset[CondT, WeightT]]",
        *,
        proportions: Sequence[float] | None = None,
        same_images: Literal["each", "in turn"] = "each",
    ) -> None:
        check_datasets(datasets)
        if same_images not in SAME_IMAGES:
            raise UserError(f"same_images={same_images!r}: expected one of {', '.join(SAME_IMAGES)}.")
        self.datasets = list(datasets)
        self.same_images, self.proportions = same_images, check_proportions(proportions, len(self.datasets))
        self._members = [Member(data, number) for number, data in enumerate(self.datasets)]
        self._phases = 1  # epochs until the datasets take the same turns again
        if same_images == "in turn":
            if self.proportions is not None:
                raise UserError("proportions: images that come in turn have none. Leave one of the two out.")
            self._members, self._phases = list_turns(self.datasets)
        lengths = [len(member.data) for member in self._members]
        self._starts = np.cumsum([0, *lengths])  # member m holds samples _starts[m] to _starts[m + 1]
        sizes = [member.data.sizes_of_buckets() for member in self._members]
        self._sizes = [size for own in sizes for size in own]
        self._member_of = [number for number, own in enumerate(sizes) for _ in own]  # of each bucket
        self._first_bucket = np.cumsum([0, *map(len, sizes)])
        self._length = sum(len(member.data) for member in self._members if member.phase == 0)
        self.set_epoch(0)

    def __len__(self) -> int:
        """Samples of an epoch; with proportions, about so many."""
        return self._length

    def __repr__(self) -> str:
        how = f", proportions {self.proportions}" if self.proportions is not None else ""
        how += ", the same images in turn" if self.same_images == "in turn" else ""
        inner = "".join(f"\n  {data!r}" for data in self.datasets)
        return f"LatentMix({counted(len(self), 'sample')} of {counted(len(self.datasets), 'dataset')}{how}:{inner})"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that flips and random draws depend on; LatentLoader sets it."""
        self.epoch = check_int("epoch", epoch, 0)
        for data in self.datasets:
            data.set_epoch(epoch)

    def sizes_of_buckets(self) -> list[int]:
        """Samples that each bucket of each member holds."""
        return self._sizes

    def samples_before(self, epoch: int) -> list[int]:
        """Samples of each bucket that all epochs before have taken."""
        found = []
        for number, size in zip(self._member_of, self._sizes, strict=True):
            member = self._members[number]
            if self.proportions is not None:
                own = self._length * self.proportions[member.number]  # of an epoch, in PARTS
                found.append(epoch * own * size // (len(member.data) * PARTS))
            else:
                found.append((epoch + self._phases - 1 - member.phase) // self._phases * size)
        return found

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [B] of samples given by their numbers in a bucket. Repetitions stand behind all datasets."""
        member = self._member_of[bucket]
        data = self._members[member].data
        samples = data.samples_of_bucket(bucket - int(self._first_bucket[member]), numbers)
        repeats, own = np.divmod(samples, len(data))
        found: np.ndarray = repeats * self._starts[-1] + self._starts[member] + own
        return found

    def describe_state(self) -> dict[str, Any]:
        """What a position in an epoch depends on, name -> JSON value."""
        states = [data.describe_state() for data in self.datasets]
        named = {f"{name} of dataset {n}": value for n, state in enumerate(states) for name, value in state.items()}
        proportions = None if self.proportions is None else list(self.proportions)
        return {"proportions": proportions, "same_images": self.same_images, **named}

    def __getitem__(self, index: int) -> LatentBatch[CondT, WeightT]:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> LatentBatch[CondT, WeightT]:
        """The batch of some samples of one dataset, as a BucketBatchSampler gives them."""
        epoch = indices.epoch if isinstance(indices, EpochIndices) else self.epoch
        (batch,) = self.read_many(Batches(np.asarray(indices, np.int64), np.array([0, len(indices)])), epoch)
        return batch

    def read_many(self, batches: Batches, epoch: int) -> Iterator[LatentBatch[CondT, WeightT]]:
        """Several batches of an epoch, each when it is asked for. Raises UserError for one that mixes datasets."""
        repeats, places = np.divmod(batches.samples, self._starts[-1])
        members = np.searchsorted(self._starts, places, side="right") - 1
        owners = members[batches.edges[:-1]]
        if not np.array_equal(np.repeat(owners, np.diff(batches.edges)), members):
            raise UserError(
                "a batch mixes samples of several datasets. Read with LatentLoader, or give DataLoader a "
                "BucketBatchSampler."
            )
        streams = {}
        for number in np.unique(owners).tolist():
            data, own = self._members[number].data, members == number
            samples = places[own] - self._starts[number] + repeats[own] * len(data)
            edges = np.concatenate([[0], np.cumsum(np.diff(batches.edges)[owners == number])])
            streams[number] = data.read_many(Batches(samples, edges), epoch)
        for owner in owners.tolist():
            batch, member = next(streams[owner]), self._members[owner]
            batch.member = member.number
            if member.indices is not None:
                batch.index = torch.from_numpy(member.indices[batch.index.numpy()])
            yield batch

    def give_cond_model(self, batch: LatentBatch) -> None:
        """Put the cond_model of its dataset into a batch that comes from another process."""
        self.datasets[batch.member].give_cond_model(batch)


def check_datasets(datasets: Any) -> None:
    """Raise UserError unless these are LatentDatasets, one or more."""
    if not isinstance(datasets, Sequence) or isinstance(datasets, str) or not datasets:
        raise UserError(f"LatentMix: got a {type(datasets).__name__}, expected a list of LatentDatasets.")
    for number, data in enumerate(datasets):
        if not isinstance(data, LatentDataset):
            raise UserError(f"LatentMix: [{number}] is a {type(data).__name__}, expected a LatentDataset.")


def check_proportions(proportions: Any, count: int) -> tuple[int, ...] | None:
    """Proportions in PARTS. Raises UserError unless they are numbers above 0, one for each dataset."""
    if proportions is None:
        return None
    numbers = list(proportions) if isinstance(proportions, Sequence) and not isinstance(proportions, str) else []
    are_good = all(type(n) in (int, float) and isfinite(n) and n > 0 for n in numbers)
    if len(numbers) != count or not are_good:
        raise UserError(f"proportions={proportions!r:.80}: expected {counted(count, 'number')} above 0.")
    return tuple(max(1, round(number / sum(numbers) * PARTS)) for number in numbers)


def list_turns(
    datasets: "Sequence[LatentDataset[CondT, WeightT]]",
) -> "tuple[list[Member[CondT, WeightT]], int]":
    """For each phase and dataset the part of it whose images have their turn there; and how many phases there are.

    An image that R datasets have starts with one of them, as its content says, and moves on by one each epoch.
    """
    if len(datasets) > MAX_DATASETS:
        raise UserError(f"same_images: {len(datasets)} datasets, expected at most {MAX_DATASETS} that take turns.")
    digests = [data.digests() for data in datasets]  # [n] uint64 of each
    everything, inverse = np.unique(np.concatenate(digests), return_inverse=True)
    places = np.split(inverse, np.cumsum([len(own) for own in digests])[:-1])
    has = np.zeros((len(everything), len(datasets)), bool)  # whether a dataset has an image
    for number, own in enumerate(places):
        has[own, number] = True
    count = has.sum(1)
    first = (mix(0, TURN, everything) % count.astype(np.uint64)).astype(np.int64)
    rank = np.cumsum(has, axis=1) - 1  # [images,R]: a dataset's number among those that have the image
    phases = lcm(*np.unique(count).tolist())
    members: list[Member[CondT, WeightT]] = []
    for phase in range(phases):
        turn = (first + phase) % count
        for number, (data, own) in enumerate(zip(datasets, places, strict=True)):
            is_turn = rank[own, number] == turn[own]
            if is_turn.any():
                part = data.choose(is_turn)
                images = np.flatnonzero(is_turn)
                repeats = np.arange(data.repeats)[:, None] * data.num_images
                members.append(Member(part, number, phase, (images + repeats).flatten()))
    return members, phases
