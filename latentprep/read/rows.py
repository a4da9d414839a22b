"""OpenRows: rows of many memory-mapped files, gathered with one call."""

import ctypes
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from latentprep.read.shards import OpenGroup

LOWEST, HIGHEST = 2**12, 2**57  # addresses that a process may have: above the first page, below what x86-64 can have

MAX_TABLE = 2**60  # numbers of a table: tensors count theirs in 63 bits


class Run(NamedTuple):
    """Consecutive samples of a batch that stand in one group."""

    group: "OpenGroup"
    images: np.ndarray  # [n] int64: their rows in what there is of every image
    views: np.ndarray  # [n] int64: their rows in what there is of every view
    span: slice  # where they are in the batch


class Addresses:
    """Where one field lies in memory: of each group the address of its first row and the size of a row.

    A size of 0 stands for a group that is not open, or whose rows do not lie one behind the other.
    """

    def __init__(self, num_groups: int) -> None:
        self.first = np.zeros(num_groups, np.int64)
        self.row_bytes = np.zeros(num_groups, np.int64)

    def put(self, group: int, tensor: Tensor | None) -> None:
        """Note the rows [N,...] of a group, or that they are no longer there."""
        if tensor is None or not tensor.is_contiguous() or not len(tensor):
            self.first[group] = self.row_bytes[group] = 0
        else:
            self.first[group], self.row_bytes[group] = tensor.data_ptr(), tensor[0].nbytes

    def find(self, groups: np.ndarray, rows: np.ndarray) -> np.ndarray | None:
        """The address of each row [n]; None if they are not of one size, or not all can be read in this way."""
        sizes = self.row_bytes[groups]
        size = int(sizes[0])
        if not size or (sizes != size).any():
            return None
        found: np.ndarray = self.first[groups] + rows * size
        span = int(found.max()) - int(found.min())
        return found if span * size < MAX_TABLE else None


@dataclass(frozen=True, eq=False)
class OpenRows:
    """Rows of samples, of which all groups are open."""

    opened: "dict[int, OpenGroup]"  # held, so that no file is unmapped meanwhile
    addresses: dict[str, Addresses]
    groups: np.ndarray  # [n] int64: the group of each sample
    images: np.ndarray  # [n] int64: its row in what there is of every image
    views: np.ndarray  # [n] int64: its row in what there is of every view

    def __len__(self) -> int:
        return len(self.groups)

    def part(self, span: slice) -> "OpenRows":
        return OpenRows(self.opened, self.addresses, self.groups[span], self.images[span], self.views[span])

    @property
    def first(self) -> "OpenGroup":
        """The group of the first sample."""
        return self.opened[int(self.groups[0])]

    @cached_property
    def runs(self) -> list[Run]:
        edges = [0, *(np.flatnonzero(self.groups[1:] != self.groups[:-1]) + 1).tolist(), len(self)]
        return [
            Run(self.opened[int(self.groups[a])], self.images[a:b], self.views[a:b], slice(a, b))
            for a, b in pairwise(edges)
        ]

    def take(self, name: str) -> Tensor | None:
        """[n,...]: a field of each sample; None if its groups do not all have it."""
        is_of_view = name in self.first.of_view
        rows = self.views if is_of_view else self.images
        found = self._take_by_address(name, rows, self.first.of_view.get(name, self.first.of_image.get(name)))
        if found is not None:
            return found
        parts = []
        for run in self.runs:
            tensor = (run.group.of_view if is_of_view else run.group.of_image).get(name)
            if tensor is None:
                return None
            parts.append((tensor, run.views if is_of_view else run.images))
        return gather(parts)

    def digests(self) -> np.ndarray:
        """[n] uint64: half of the content hash of each image."""
        found = self.take("digest")
        assert found is not None  # every open group has it
        half: np.ndarray = found.numpy().view(np.uint64)[:, 0]
        return half

    def take_cond(self, name: str, prompts: np.ndarray) -> Tensor:
        """[n,...]: dense cond of each sample's prompt, by its number in the shard [n]."""
        found = self._take_by_address(f"cond/{name}", prompts, self.first.cond[name])  # type: ignore[arg-type]
        if found is not None:
            return found
        return gather([(run.group.cond[name], prompts[run.span]) for run in self.runs])  # type: ignore[misc]

    def _take_by_address(self, name: str, rows: np.ndarray, like: Tensor | None) -> Tensor | None:
        known = self.addresses.get(name)
        addresses = known.find(self.groups, rows) if known is not None and like is not None else None
        if addresses is None or like is None:
            return None
        return read_memory(addresses, like.dtype, tuple(like.shape[1:]))


def gather(parts: list[tuple[Tensor, np.ndarray]]) -> Tensor:
    """[n,...]: rows of tensors, part after part."""
    return torch.cat([tensor.index_select(0, torch.from_numpy(rows.astype(np.int64))) for tensor, rows in parts])


def read_memory(addresses: np.ndarray, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """[n,*shape]: rows that lie at these addresses [n], which the caller knows to be mapped and to stay so.

    index_select reads any rows of one tensor with one call, however many threads it takes. So that all files are one
    tensor to it, they are rows of a table of all memory between them, of which each word begins a row; it touches
    nothing but the rows it is asked for.
    """
    count = 1
    for size in shape:
        count *= size
    nbytes = count * dtype.itemsize
    low, high = int(addresses.min()), int(addresses.max())
    word = 8
    while (nbytes | low | int(np.bitwise_or.reduce(addresses))) % word:  # files of a stranger's may lie anywhere
        word //= 2
    table = memory(word).as_strided(((high - low) // word + 1, nbytes // word), (1, 1), (low - LOWEST) // word)
    found = table.index_select(0, torch.from_numpy((addresses - low) // word))
    return found.view(dtype).view(len(addresses), *shape)


@cache
def memory(word: int) -> Tensor:
    """All memory that a process may have, as numbers of so many bytes. Most of it is not there: do not touch it."""
    kind = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}[word]
    return torch.frombuffer((ctypes.c_byte * (HIGHEST - LOWEST)).from_address(LOWEST), dtype=kind)
