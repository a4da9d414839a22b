"""Strings in tensors: one uint8 tensor of UTF-8 and one int64 tensor of offsets, since a safetensors header is capped.

Bytes that are not UTF-8 (file names need not be) pass through as lone surrogates, as Python's os.fsdecode has them.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import overload

import numpy as np
import torch

Tensors = dict[str, torch.Tensor]


def put_strings(tensors: Tensors, name: str, strings: Sequence[str]) -> None:
    """Add the two tensors of a ragged list of strings."""
    encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    tensors[name] = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
    tensors[f"{name}_offsets"] = torch.from_numpy(offsets)


class Strings(Sequence[str]):
    """The strings of a ragged tensor: each is decoded when it is asked for. Raises ValueError for bad offsets."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        data, offsets = tensors[name], tensors[f"{name}_offsets"]
        if data.dtype != torch.uint8 or data.ndim != 1:
            raise ValueError(f"{name} is {data.dtype} {list(data.shape)}, expected uint8 bytes")
        check_offsets(f"{name}_offsets", offsets, len(data))
        self.data, self.offsets = data.numpy(), offsets.numpy()
        # memoryviews: an access takes a tenth of numpy's time. require: offsets of a hostile file may be unaligned
        self._bytes, self._ends = self.data.data, np.require(self.offsets, requirements=["C", "A"]).data

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> list[str]: ...
    def __getitem__(self, row: int | slice) -> str | list[str]:
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        if row < 0:
            raise IndexError(f"string {row} of {len(self)}")
        return str(self._bytes[self._ends[row] : self._ends[row + 1]], "utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        data = self.data.tobytes()
        return (data[a:b].decode("utf-8", "surrogateescape") for a, b in pairwise(self.offsets.tolist()))


class StringLists(Sequence[list[str]]):
    """Rows of one or more strings: row n has the strings from rows[n] to rows[n + 1]. Raises ValueError."""

    def __init__(self, strings: Strings, name: str, rows: torch.Tensor) -> None:
        check_offsets(name, rows, len(strings))
        self.strings, self.ends = strings, rows.numpy()
        self._ends = np.require(self.ends, requirements=["C", "A"]).data

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> list[str]: ...
    @overload
    def __getitem__(self, row: slice) -> list[list[str]]: ...
    def __getitem__(self, row: int | slice) -> list[str] | list[list[str]]:
        if isinstance(row, slice):
            return [self[n] for n in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.strings[self._ends[row] : self._ends[row + 1]]


def join_lists(parts: Sequence[StringLists]) -> StringLists:
    """Rows of several lists as those of one, in memory of its own: no file stays open for them."""
    data = torch.from_numpy(np.concatenate([part.strings.data for part in parts]))
    tensors = {"": data, "_offsets": join_offsets([part.strings.offsets for part in parts])}
    return StringLists(Strings(tensors, ""), "_rows", join_offsets([part.ends for part in parts]))


def join_offsets(parts: Sequence[np.ndarray]) -> torch.Tensor:
    """Offsets that go on where those before them end."""
    lengths = np.concatenate([np.diff(part) for part in parts])
    return torch.from_numpy(np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)]))


def check_offsets(name: str, offsets: torch.Tensor, end: int) -> None:
    """Raise ValueError unless these are int64 offsets that rise from 0 to the end."""
    if offsets.dtype != torch.int64 or offsets.ndim != 1 or len(offsets) == 0:
        raise ValueError(f"{name} is {offsets.dtype} {list(offsets.shape)}, expected int64 offsets")
    found = offsets.numpy()
    if found[0] != 0 or found[-1] != end or (found[1:] < found[:-1]).any():
        raise ValueError(f"{name} does not rise from 0 to {end}")
