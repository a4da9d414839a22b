"""LatentMix: several datasets as one; each batch is from one of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate
from math import ceil, floor, lcm
from typing import Any, Generic, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.read.arguments import check_index, check_indices, check_int
from latentprep.read.batch import CondT, LatentBatch, WeightT
from latentprep.read.counters import TURN, hash_numbers
from latentprep.read.dataset import LatentDataset, make_epoch
from latentprep.read.order import Batches, EpochIndices

SAME_IMAGES = ("each", "in turn")
# with same_images="in turn". The turns repeat after lcm(1, 2, 3, 4) = 12 epochs at most; each of these needs a part of
# every dataset in memory
MAX_DATASETS = 4


@dataclass(frozen=True, eq=False)
class Member(Generic[CondT, WeightT]):
    """A dataset that batches of a mix come from; with "in turn", its part for the epochs of one phase."""

    data: LatentDataset[CondT, WeightT]
    number: int  # of the dataset, in LatentMix.datasets
    phase: int = 0  # this member is read in the epochs with epoch % (number of phases) == phase
    indices: np.ndarray | None = None  # [n] int64: index in the dataset of each sample of the part; None: no part


class LatentMix(Dataset[LatentBatch[CondT, WeightT]], Generic[CondT, WeightT]):
    """Several LatentDatasets in one loader: `LatentLoader([a, b])`, or a DataLoader with a BucketBatchSampler of it.

    A batch is from one dataset and one bucket. batch.member is the number of the dataset, and batch.index has indices
    into that dataset. Each dataset keeps its own resolution, repeats, seed, sample_weight and so on.

    proportions: how much of an epoch comes from each dataset; the numbers may have any sum. An epoch has as many
        samples as all datasets together. It has images of a small dataset several times; a large dataset goes on in the
        next epochs. Without proportions an epoch has every sample of every dataset.
    same_images: "each": an image that is in two datasets comes from both. "in turn": an image that several datasets
        have (with equal content, such as one folder encoded at several resolutions) comes once an epoch, each time from
        another dataset. For this all files of all datasets are opened once. Not together with proportions.

    With either option, epochs may differ by some batches; the length of a loader is that of the longest epoch.

    Raises UserError for wrong arguments.
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
                raise UserError('proportions cannot be combined with same_images="in turn". Give one of them.')
            self._members, self._phases = list_turns(self.datasets)
        lengths = [len(member.data) for member in self._members]
        self._starts = np.cumsum([0, *lengths])  # member m holds samples _starts[m] to _starts[m + 1]
        sizes = [member.data.sizes_of_buckets() for member in self._members]
        self._sizes = [size for own in sizes for size in own]
        self._member_of = [number for number, own in enumerate(sizes) for _ in own]  # of each bucket
        self._first_bucket = np.cumsum([0, *map(len, sizes)])
        of_phases = [sum(len(m.data) for m in self._members if m.phase == phase) for phase in range(self._phases)]
        self._length = max(of_phases)
        self._rates = self._list_rates()
        self._offsets = [total % 1 for total in accumulate(self._rates, initial=Fraction(0))][: len(self._rates)]
        self._epoch = make_epoch()

    def _list_rates(self) -> list[Fraction]:
        """With proportions, how many samples of each bucket an epoch takes on average."""
        if self.proportions is None:
            return []
        whole = sum(map(Fraction, self.proportions))
        shares = [self._length * Fraction(own) / whole for own in self.proportions]
        lengths = [len(member.data) for member in self._members]
        return [
            shares[number] * size / lengths[number] for number, size in zip(self._member_of, self._sizes, strict=True)
        ]

    def __len__(self) -> int:
        """Samples of an epoch; with proportions about so many, with "in turn" the number of the longest epoch."""
        return self._length

    def __repr__(self) -> str:
        shown = "" if self.proportions is None else ":".join(f"{own:g}" for own in self.proportions)
        how = f", proportions {shown}" if shown else ""
        how += ", the same images in turn" if self.same_images == "in turn" else ""
        inner = "".join(f"\n  {data!r}" for data in self.datasets)
        return f"LatentMix({counted(len(self), 'sample')} of {counted(len(self.datasets), 'dataset')}{how}:{inner})"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that flips and random draws of plain indices depend on."""
        self._epoch.fill_(check_int("epoch", epoch, 0) % 2**63)
        for data in self.datasets:
            data.set_epoch(epoch)

    def sizes_of_buckets(self) -> list[int]:
        """Samples that each bucket of each member holds."""
        return self._sizes

    def samples_before(self, epoch: int) -> list[int]:
        """Samples of each bucket that all epochs before have taken."""
        if self.proportions is not None:  # offsets: buckets round up in different epochs, so no epoch is much shorter
            return [floor(epoch * rate + offset) for rate, offset in zip(self._rates, self._offsets, strict=True)]
        phases = (self._members[number].phase for number in self._member_of)
        turns = ((epoch + self._phases - 1 - phase) // self._phases for phase in phases)
        return [turn * size for turn, size in zip(turns, self._sizes, strict=True)]

    def counts_at_most(self) -> list[np.ndarray]:
        """Samples of each bucket that an epoch takes at most: one array for each phase."""
        if self.proportions is not None:
            return [np.array([ceil(rate) for rate in self._rates], np.int64)]
        phase_of = np.array([self._members[number].phase for number in self._member_of])
        return [np.where(phase_of == phase, self._sizes, 0).astype(np.int64) for phase in range(self._phases)]

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
        return self.__getitems__([check_index(index)])

    def __getitems__(self, indices: list[int]) -> LatentBatch[CondT, WeightT]:
        """The batch of samples of one dataset, as a BucketBatchSampler gives them. Raises IndexError, UserError."""
        samples = check_indices(indices)
        if isinstance(indices, EpochIndices):  # of an epoch, in which samples may come again: beyond all datasets
            epoch = indices.epoch
        else:
            epoch, total = int(self._epoch), int(self._starts[-1])
            outside = samples[(samples < -total) | (samples >= total)]
            if len(outside):
                raise IndexError(f"index {outside[0]} of datasets of {total}")
            samples %= total
        (batch,) = self.read_many(Batches(samples, np.array([0, len(samples)])), epoch)
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
    if not isinstance(datasets, Sequence) or isinstance(datasets, str):
        raise UserError(f"LatentMix: got a {type(datasets).__name__}, expected a list of LatentDatasets.")
    if not datasets:
        raise UserError("LatentMix: the list is empty, expected at least one LatentDataset.")
    for number, data in enumerate(datasets):
        if not isinstance(data, LatentDataset):
            raise UserError(f"LatentMix: [{number}] is a {type(data).__name__}, expected a LatentDataset.")
        if data.num_controls != datasets[0].num_controls:
            raise UserError(
                f"LatentMix: [{number}] has {counted(data.num_controls, 'control image')} of each image, [0] has "
                f"{datasets[0].num_controls}. Give datasets that have as many."
            )


def check_proportions(proportions: Any, count: int) -> tuple[float, ...] | None:
    """Proportions as floats. Raises UserError unless they are numbers above 0, one for each dataset."""
    if proportions is None:
        return None
    try:
        numbers = tuple(float(number) for number in proportions)
    except (TypeError, ValueError, OverflowError):
        numbers = ()
    if len(numbers) != count or not all(0 < number < float("inf") for number in numbers):
        raise UserError(f"proportions={proportions!r:.80}: expected {counted(count, 'number')} above 0.")
    return numbers


def list_turns(
    datasets: "Sequence[LatentDataset[CondT, WeightT]]",
) -> "tuple[list[Member[CondT, WeightT]], int]":
    """For each phase and dataset the part of it whose images have their turn there; and how many phases there are.

    If R datasets have an image, a hash of its content chooses the first of them; each epoch takes the next one.
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
    first = (hash_numbers(0, TURN, everything) % count.astype(np.uint64)).astype(np.int64)
    place = np.cumsum(has, axis=1) - 1  # [images,R]: a dataset's number among those that have the image
    phases = lcm(*np.unique(count).tolist())
    members: list[Member[CondT, WeightT]] = []
    for phase in range(phases):
        turn = (first + phase) % count
        for number, (data, own) in enumerate(zip(datasets, places, strict=True)):
            is_turn = place[own, number] == turn[own]
            if is_turn.any():
                part = data.choose(is_turn)
                images = np.flatnonzero(is_turn)
                members.append(Member(part, number, phase, part.samples_in(data, images)))
    return members, phases
