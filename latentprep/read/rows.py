"""OpenRows: rows of many memory-mapped files, gathered with one call."""

import ctypes
import math
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from latentprep.read.shards import OpenGroup

LOWEST, HIGHEST = 2**12, 2**57  # user addresses on 64-bit systems lie between these

MAX_TABLE = 2**60  # elements of the tensor in read_memory: torch counts the elements of a tensor in 63 bits


class Run(NamedTuple):
    """Consecutive samples of a batch that stand in one group."""

    group: "OpenGroup"
    image_rows: np.ndarray  # [n] int64: their row numbers in fields with one row for each image
    view_rows: np.ndarray  # [n] int64: their row numbers in fields with one row for each view of each image
    span: slice  # where they are in the batch


Kind = tuple[torch.dtype, tuple[int, ...]]  # dtype and shape of a row


class Addresses:
    """Where one field lies in memory: the first row's address in each open group, and the rows' dtype and shape."""

    def __init__(self, num_groups: int) -> None:
        self.first = np.zeros(num_groups, np.int64)
        self.kind = np.zeros(num_groups, np.int64)  # an index into `kinds`; 0: group not open, or rows not contiguous
        self.kinds: list[Kind | None] = [None]

    def put(self, group: int, tensor: Tensor | None) -> None:
        """Note the rows [N,...] of a group, or that they are no longer there."""
        self.first[group] = self.kind[group] = 0
        if tensor is None or tensor.device.type != "cpu" or not tensor.is_contiguous() or not tensor.numel():
            return
        kind = tensor.dtype, tuple(tensor.shape[1:])
        if kind not in self.kinds:
            self.kinds.append(kind)
        self.first[group], self.kind[group] = tensor.data_ptr(), self.kinds.index(kind)

    def of(self, groups: np.ndarray) -> "RowAddresses":
        """Those of the groups of some samples [n], as they are now."""
        return RowAddresses(self.first[groups], self.kind[groups], self.kinds)


class RowAddresses(NamedTuple):
    """For each sample [n]: the address of the first row of its group, and the rows' dtype and shape."""

    first: np.ndarray
    kind: np.ndarray
    kinds: list[Kind | None]

    def read(self, rows: np.ndarray, span: slice) -> Tensor | None:
        """[n,...]: the rows with the numbers `rows` [n], for the n samples of `span`.

        None if their dtypes or shapes differ, or if they cannot be read by address: then they are gathered otherwise.
        """
        kinds, first = self.kind[span], self.first[span]
        kind = self.kinds[int(kinds[0])]
        if kind is None or (kinds != kinds[0]).any():
            return None
        addresses = first + rows * (math.prod(kind[1]) * kind[0].itemsize)
        spread = int(addresses.max()) - int(addresses.min())
        return read_memory(addresses, *kind) if spread * math.prod(kind[1]) < MAX_TABLE else None


@dataclass(frozen=True, eq=False)
class OpenRows:
    """The rows of n samples whose groups are all open."""

    opened: "dict[int, OpenGroup]"  # held, so that no file is unmapped while its rows are read
    addresses: dict[str, RowAddresses]  # field -> addresses for all samples of the call that opened the groups
    span: slice  # which of those samples these n are
    groups: np.ndarray  # [n] int64: the group of each sample
    image_rows: np.ndarray  # [n] int64: its row number in fields with one row for each image
    view_rows: np.ndarray  # [n] int64: its row number in fields with one row for each view of each image

    def __len__(self) -> int:
        return len(self.groups)

    def part(self, span: slice) -> "OpenRows":
        """The rows of some of the samples; it holds their files alone."""
        groups = self.groups[span]
        opened = {number: self.opened[number] for number in np.unique(groups).tolist()}
        whole = slice(self.span.start + span.start, self.span.start + span.stop)
        return OpenRows(opened, self.addresses, whole, groups, self.image_rows[span], self.view_rows[span])

    @property
    def one(self) -> "OpenGroup":
        """The group of the first sample."""
        return self.opened[int(self.groups[0])]

    @cached_property
    def runs(self) -> list[Run]:
        edges = [0, *(np.flatnonzero(self.groups[1:] != self.groups[:-1]) + 1).tolist(), len(self)]
        return [
            Run(self.opened[int(self.groups[a])], self.image_rows[a:b], self.view_rows[a:b], slice(a, b))
            for a, b in pairwise(edges)
        ]

    def take(self, name: str) -> Tensor:
        """[n,...]: a field of each sample, that all groups have."""
        found = self.take_if_there(name)
        assert found is not None, name
        return found

    def take_if_there(self, name: str) -> Tensor | None:
        """[n,...]: a field of each sample; None if its groups do not all have it."""
        is_of_view = name in self.one.of_view
        known = self.addresses.get(name)
        if (
            known is not None
            and (found := known.read(self.view_rows if is_of_view else self.image_rows, self.span)) is not None
        ):
            return found
        parts = []
        for run in self.runs:
            tensor = (run.group.of_view if is_of_view else run.group.of_image).get(name)
            if tensor is None:
                return None
            parts.append((tensor, run.view_rows if is_of_view else run.image_rows))
        return gather(parts)

    def digests(self) -> np.ndarray:
        """[n] uint64: half of the content hash of each image."""
        half: np.ndarray = self.take("digest").numpy().view(np.uint64)[:, 0]
        return half

    def take_cond(self, name: str, prompts: np.ndarray) -> Tensor:
        """[n,...]: dense cond of each sample's prompt, by its number in the shard [n]."""
        known = self.addresses.get(f"cond/{name}")
        if known is not None and (found := known.read(prompts, self.span)) is not None:
            return found
        return torch.stack(self.list_cond(name, prompts))

    def list_cond(self, name: str, prompts: np.ndarray) -> list[Tensor]:
        """n tensors [...]: cond of each sample's prompt, wherever it stands."""
        conds = [(run.group.cond, prompts[run.span].tolist()) for run in self.runs]
        return [cond.row(name, prompt) for cond, own in conds if cond is not None for prompt in own]


def gather(parts: list[tuple[Tensor, np.ndarray]]) -> Tensor:
    """[n,...]: rows of tensors, part after part."""
    return torch.cat([tensor.index_select(0, torch.from_numpy(rows.astype(np.int64))) for tensor, rows in parts])


def read_memory(addresses: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """[n,*shape]: a copy of the rows at these addresses [n]. The caller must keep them mapped until this returns.

    index_select reads any rows of one tensor with one call and all threads. One call for each file takes three times as
    long (benchmarks/read.py, 40 kB a sample). So the memory of the process is treated as one tensor with overlapping
    rows, one of which starts at each word. Only the wanted rows are read.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    low, high = int(addresses.min()), int(addresses.max())
    word = 8
    while (nbytes | low | int(np.bitwise_or.reduce(addresses))) % word:  # a file that others wrote may be unaligned
        word //= 2
    rows = torch.from_numpy((addresses - low) // word)
    size, offset = ((high - low) // word + 1, nbytes // word), (low - LOWEST) // word
    # no variable may hold this tensor: a debugger that prints local variables would read unmapped memory and crash
    return memory(word).as_strided(size, (1, 1), offset).index_select(0, rows).view(dtype).view(len(addresses), *shape)


@cache
def memory(word: int) -> Tensor:
    """All user addresses, LOWEST to HIGHEST, as one tensor of integers of `word` bytes (1, 2, 4 or 8).

    Most of these addresses are not mapped: to read one of those ends the process.
    """
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[word]
    return torch.frombuffer((ctypes.c_byte * (HIGHEST - LOWEST)).from_address(LOWEST), dtype=kind)
