"""Cond of P prompts: one tensor if all have the same number of tokens, else a Ragged, with a length for each."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.strings import Tensors, check_offsets

# What a shorter row of a batch is filled up with: zeros, as by pipelines whose masks say what counts; or its last
# vector again, as in stable-diffusion-webui (modules/hypernetworks/hypernetwork.py).
ZEROS, REPEAT = FILLS = ("zeros", "repeat")


class Ragged:
    """Rows of different lengths, end to end in one tensor: row n is values[offsets[n] : offsets[n + 1]], [T,D...]."""

    def __init__(self, values: Tensor, offsets: np.ndarray) -> None:
        """values [sum of T,D...], offsets [P+1] int64."""
        self.values, self.offsets = values, offsets

    @classmethod
    def of(cls, rows: Sequence[Tensor]) -> "Ragged":
        """Of P tensors [T,D...], each with its own T."""
        return cls(torch.cat(list(rows)), np.cumsum([0, *map(len, rows)]).astype(np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> Tensor:
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    @property
    def dtype(self) -> torch.dtype:
        return self.values.dtype

    def to(self, dtype: torch.dtype) -> "Ragged":
        return Ragged(self.values.to(dtype), self.offsets)


Cond = Tensor | Ragged
Conds = dict[str, Cond]


def row_shape(cond: Cond) -> tuple[int | None, ...]:
    """The shape of one prompt's cond; None stands for a length that differs from prompt to prompt."""
    return (None, *cond.values.shape[1:]) if isinstance(cond, Ragged) else tuple(cond.shape[1:])


def show_shape(shape: Sequence[int | None]) -> str:
    """A row_shape for people; T stands for a length of its own."""
    return "[" + ", ".join("T" if size is None else str(size) for size in shape) + "]"


def values_of(cond: Cond) -> Tensor:
    """All numbers of cond, in one tensor."""
    return cond.values if isinstance(cond, Ragged) else cond


def stack_rows(rows: Sequence[Tensor], is_ragged: bool) -> Cond:
    return Ragged.of(rows) if is_ragged else torch.stack(list(rows))


def finite_rows(cond: Cond) -> Tensor:
    """[P] bool: whether all numbers of each row are finite, of cond or of any tensor [P,...]."""
    if isinstance(cond, Ragged):
        return torch.tensor([bool(cond[n].isfinite().all()) for n in range(len(cond))], dtype=torch.bool)
    return cond.isfinite().flatten(1).all(1)


def join_conds(parts: Sequence[Conds]) -> Conds:
    """Cond of the prompts of all parts, one after the other."""
    joined: Conds = {}
    for name in parts[0]:
        values = [part[name] for part in parts]
        if any(isinstance(value, Ragged) for value in values):
            joined[name] = Ragged.of([value[n] for value in values for n in range(len(value))])
        else:
            joined[name] = torch.cat([value for value in values if isinstance(value, Tensor)])
    return joined


def take_conds(conds: Conds, rows: Sequence[int] | np.ndarray) -> Conds:
    """Cond of some prompts, by their numbers, in that order."""
    numbers = list(map(int, rows))
    if numbers == list(range(len(next(iter(conds.values()), ())))):
        return conds  # all of them as they are: nothing is copied
    return {name: stack_rows([value[n] for n in numbers], isinstance(value, Ragged)) for name, value in conds.items()}


def pad(rows: Sequence[Tensor], fill: str, at_least: int = 1) -> tuple[Tensor, Tensor]:
    """Rows [T,D...] as one tensor [B,longest T,D...], and their lengths [B] int64; `fill` is one of FILLS.

    at_least: the smallest number of tokens of the result. A row without tokens is filled with zeros.
    """
    longest = max(at_least, *map(len, rows))

    def lengthen(row: Tensor) -> Tensor:
        if len(row) == longest:
            return row
        last = row[-1:] if fill == REPEAT and len(row) else row.new_zeros(1, *row.shape[1:])
        return torch.cat([row, last.expand(longest - len(row), *row.shape[1:])])

    return torch.stack([lengthen(row) for row in rows]), torch.tensor([len(row) for row in rows], device=rows[0].device)


def mask_of(lengths: Tensor, longest: int) -> Tensor:
    """[B,T] bool: which tokens of padded rows are their own, by their lengths [B]."""
    return torch.arange(longest, device=lengths.device)[None] < lengths[:, None]


def put_cond(tensors: Tensors, conds: Conds) -> None:
    """Add cond to the tensors of a file: cond/<name>, and cond/<name>_offsets if prompts differ in length."""
    for name, cond in conds.items():
        if isinstance(cond, Ragged):
            tensors[f"cond/{name}"] = cond.values.contiguous()
            tensors[f"cond/{name}_offsets"] = torch.from_numpy(cond.offsets)
        else:
            tensors[f"cond/{name}"] = cond.contiguous()


def take_cond(tensors: Tensors, num_prompts: int, dtypes: frozenset[torch.dtype]) -> Conds:
    """What a file holds of P prompts. Raises ValueError if the rows are not one per prompt."""
    found = {name.removeprefix("cond/"): value for name, value in tensors.items() if name.startswith("cond/")}
    conds: Conds = {}
    for name, value in found.items():
        if name.endswith("_offsets") and name.removesuffix("_offsets") in found:
            continue
        offsets = found.get(f"{name}_offsets")
        if offsets is None:
            is_shaped = value.ndim >= 2 and len(value) == num_prompts
        else:
            is_shaped = value.ndim >= 2 and list(offsets.shape) == [num_prompts + 1]
        if value.dtype not in dtypes or not is_shaped:
            raise ValueError(f"cond/{name} is {value.dtype} {list(value.shape)}, expected [{num_prompts},...]")
        if offsets is None:
            conds[name] = value
            continue
        check_offsets(f"cond/{name}_offsets", offsets, len(value))
        conds[name] = Ragged(value, np.require(offsets.numpy(), requirements=["C", "A"]))
    return conds
