"""What the ancestor's dataset gives: an entry for each image, with its posterior; and lists that read when touched."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, overload

import torch
from torch import Tensor

from latentprep.human import shortened
from latentprep.read.describe import show_tensors

T = TypeVar("T")


@dataclass(repr=False)
class LatentDist:
    """The posterior of one image, unscaled, as the ancestor's entries held it."""

    mean: Tensor  # [1,C,h,w] float32
    std: Tensor  # the same

    def sample(self) -> Tensor:
        return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def __repr__(self) -> str:
        return f"LatentDist({show_tensors(vars(self))})"


@dataclass(repr=False)
class DatasetEntry:
    """One image, as the ancestor handed it out."""

    filename: str
    filename_text: str  # its caption
    latent_dist: LatentDist | None = None  # with latent_sampling_method "random"
    latent_sample: Tensor | None = None  # [C,h,w] float32, scaled for the UNet
    cond: Tensor | None = None  # [T,D]; T is the prompt's own
    cond_text: str | None = None  # its prompt
    weight: Tensor | None = None  # [C,h,w], minimum 0 and mean 1

    def __repr__(self) -> str:
        parts = [shortened(self.filename, 200), repr(shortened(self.cond_text or ""))]
        parts.append(show_tensors({name: value for name, value in vars(self).items() if isinstance(value, Tensor)}))
        return f"DatasetEntry({', '.join(filter(None, parts))})"


class OnTouch(Sequence[T]):
    """A list whose parts are read from the cache when they are touched, and not kept."""

    def __init__(self, count: int, read: Callable[[int], T]) -> None:
        self._numbers, self._read = range(count), read

    def __len__(self) -> int:
        return len(self._numbers)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self._read(n) for n in self._numbers[number]]
        return self._read(self._numbers[number])

    def __repr__(self) -> str:
        return f"<{len(self)} that are read when touched>"
