"""What a file of a cache must hold: dtypes, shapes, offsets and keys. Everything that is opened passes here first."""

from pathlib import PurePosixPath
from typing import Any

import numpy as np
import torch

from latentprep.cache.strings import Strings, Tensors
from latentprep.errors import UserError

FORMAT = 1
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# field -> dtypes, and its shape: a letter is the same number in all fields of a group
STORED = frozenset(TORCH_DTYPES.values())
LATENT_FIELDS: dict[str, tuple[frozenset[torch.dtype], str]] = {
    "latent_mean": (STORED, "NVChw"),
    "latent_std": (STORED, "NVChw"),
    "weight": (frozenset({torch.float16}), "NVhw"),
    "original_size": (frozenset({torch.int32}), "N2"),
    "resized_size": (frozenset({torch.int32}), "NV2"),
    "crop": (frozenset({torch.int32}), "NV4"),
    "flipped": (frozenset({torch.uint8}), "V"),
    "digest": (frozenset({torch.uint8}), "ND"),
}
TEXT_FIELDS: dict[str, tuple[frozenset[torch.dtype], str]] = {
    "prompt_of": (frozenset({torch.int32}), "NK"),
    "nbytes": (frozenset({torch.int64}), "N"),
    "version": (frozenset({torch.int64}), "N"),
}
OPTIONAL = ("latent_std", "weight")
SIZES = {"2": 2, "4": 4, "D": 16}


def check_fields(
    label: str, fields: Tensors, spec: dict[str, tuple[frozenset[torch.dtype], str]], sizes: dict[str, int]
) -> None:
    """Raise ValueError unless all fields have their dtypes, and shapes that agree with each other."""
    for name, tensor in fields.items():
        dtypes, shape = spec[name]
        found = list(tensor.shape)
        wanted = [sizes.setdefault(letter, size) for letter, size in zip(shape, found, strict=False)]
        if tensor.dtype not in dtypes or len(found) != len(shape) or found != wanted or 0 in found:
            raise ValueError(f"{label}/{name} is {tensor.dtype} {found}, expected [{','.join(shape)}]")


def check_keys(keys: Strings) -> None:
    """Raise ValueError where a key is not a path inside the source: absolute, with .. in it, or empty."""
    data, starts = keys.data.tobytes(), keys.offsets[:-1]
    if len(starts) and (starts == keys.offsets[1:]).any():
        raise ValueError("a key is empty")
    if b".." not in data and b"\0" not in data and not (keys.data[starts] == ord("/")).any():
        return  # the usual case, without decoding a string
    for key in keys:
        path = PurePosixPath(key)
        if path.is_absolute() or ".." in path.parts or "\0" in key:
            raise ValueError(f"key {key!r} leads outside the image folder")


def check_num_tokens(tensors: Tensors, num_prompts: int) -> np.ndarray | None:
    found = tensors.get("num_tokens")
    if found is None:
        return None
    if found.dtype != torch.int32 or list(found.shape) != [num_prompts]:
        raise ValueError(f"num_tokens is {found.dtype} {list(found.shape)}, expected int32 [{num_prompts}]")
    return found.numpy()


def check_table(metadata: dict[str, Any]) -> list[tuple[str, int]]:
    table = metadata["groups"]
    is_good = isinstance(table, list) and all(
        isinstance(row, list) and [type(value) for value in row] == [str, int] for row in table
    )
    if not is_good or not table or len({row[0] for row in table}) < len(table):
        raise ValueError("its table of groups is none")
    return [(label, rows) for label, rows in table]


def check_format(found: object, where: str) -> None:
    """Raise UserError unless this version of latentprep reads the format."""
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        raise UserError(f"{where}: no format number, so not a latentprep cache.")
    if found > FORMAT:
        raise UserError(f"{where}: format {found}, this latentprep reads up to format {FORMAT}. Upgrade latentprep.")
