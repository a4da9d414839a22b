"""Checks of the arguments of the reader's classes: a wrong value raises a UserError that names the argument."""

from operator import index
from operator import index as as_index
from os import PathLike
from typing import Any, Literal, get_args

import numpy as np

from latentprep.errors import UserError

SamplingMethod = Literal["once", "deterministic", "random"]
UseWeight = bool | Literal["raw"] | float
SAMPLING_METHODS = get_args(SamplingMethod)


def check_int(name: str, value: object, low: int | None = None, high: int | None = None) -> int:
    """An argument as an int; numpy integers are accepted. Raises UserError for a bool, for anything that is no integer,
    and for a number below `low` or above `high`."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = index(value)  # type: ignore[arg-type]
    except TypeError:
        raise UserError(f"{name}={value!r}: expected a whole number.") from None
    if low is not None and number < low:
        raise UserError(f"{name}={number}: expected at least {low}.")
    if high is not None and number > high:
        raise UserError(f"{name}={number}: expected at most {high}.")
    return number


def check_epoch(name: str, value: object) -> int:
    """The number of an epoch. Raises UserError for anything but 0 to 2**63 - 1."""
    return check_int(name, value, 0, 2**63 - 1)


def check_share(name: str, value: Any) -> float:
    """A probability as a float. Raises UserError if it is not 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating) or not 0 <= value <= 1:
        raise UserError(f"{name}={value!r}: a probability, expected 0 to 1.")
    return float(value)


def check_at_least_0(name: str, value: Any) -> float:
    """A finite number of 0 or more, as a float. Raises UserError."""
    is_number = isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)
    if not is_number or not 0 <= value < float("inf"):
        raise UserError(f"{name}={value!r}: expected a number of 0 or more.")
    return float(value)


def check_kind(name: str, value: Any, kinds: tuple[type, ...], expected: str) -> None:
    """Raise UserError unless an argument is of one of these types."""
    if not isinstance(value, kinds):
        raise UserError(f"{name}={value!r}: expected {expected}.")


def check_location(value: Any) -> None:
    """Raise UserError unless `cache` is a path or a URL."""
    if not isinstance(value, str | PathLike) or not str(value):
        raise UserError(f"cache={value!r}: expected a folder or a URL.")


def check_flags(**flags: Any) -> None:
    """Raise UserError unless all of these arguments are True or False, numpy's too."""
    for name, flag in flags.items():
        check_kind(name, flag, (bool, np.bool_), "True or False")


def check_sampling_method(value: Any) -> SamplingMethod:
    """`latent_sampling_method`. Raises UserError if it is none of the three."""
    if value not in SAMPLING_METHODS:
        raise UserError(f"latent_sampling_method={value!r}: expected one of {', '.join(SAMPLING_METHODS)}.")
    return value  # type: ignore[no-any-return]


def check_use_weight(value: Any) -> UseWeight:
    """`use_weight`, checked. Raises UserError unless it is a bool, "raw", or a minimum weight: a float from 0 to 1."""
    is_floor = isinstance(value, float) and 0 <= value <= 1
    if isinstance(value, bool) or is_floor or (isinstance(value, str) and value == "raw"):
        return value  # type: ignore[no-any-return]
    raise UserError(f"use_weight={value!r}: expected True, False, 'raw' or a floor such as 0.1.")


def check_index(index: object) -> int:
    """The index of one sample as an int. Raises UserError for anything that is no integer, such as a slice."""
    try:
        return as_index(index)  # type: ignore[arg-type]
    except TypeError:
        shown = f"{index!r:.40}"
        if isinstance(index, slice):
            shown = ":".join("" if part is None else str(part) for part in (index.start, index.stop))
        raise UserError(
            f"data[{shown}]: expected the index of one sample. Batches come from LatentLoader, or from a DataLoader "
            "with batch_sampler=BucketBatchSampler(...); a part of the data is data.select(...)."
        ) from None


def check_indices(indices: Any) -> np.ndarray:
    """The indices of a batch as [B] int64. Raises UserError if there are none, or if they are no integers."""
    samples = np.asarray(indices)
    if not samples.size:
        raise UserError("a batch of no indices: expected at least one.")
    if samples.ndim != 1 or samples.dtype.kind not in "iu":
        raise UserError(
            f"a batch of {indices!r:.60}: expected indices of samples, as a DataLoader with "
            "batch_sampler=BucketBatchSampler(...) gives them."
        )
    return samples.astype(np.int64)
