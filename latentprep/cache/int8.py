"""Cond in 8 bits: whole numbers of -127 to 127, and a scale for each block of 32 values of a token.

The form is that of Q8_0 in llama.cpp, in two tensors: X, and X_scale. Small blocks, because text encoders have channels
and tokens with values a hundred times the rest, and a scale that fits those leaves little of their neighbours.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from latentprep.cache.ragged import Cond, Conds, Ragged, row_shape, stack_rows, values_of
from latentprep.cache.schema import COND_DTYPES
from latentprep.cache.strings import Tensors

BLOCK = 32  # values that share a scale; benchmarks/cond_dtype.py measures the errors of 32, 64 and 128
LARGEST = 127
AT_ONCE = 2**18  # float32 values that are converted at once: 1 MB stays in the cache of a CPU core
SCALE = "_scale"
SCALE_DTYPE = torch.float16
POSITIONS = "_ids"  # how the names of positions end


def store_as(conds: Conds, dtype: str) -> Conds:
    """Cond [P,...] float32 => as it is stored with `dtype`, one of COND_DTYPES.

    With int8, float32 stays for: positions, cond without tokens, and tokens of fewer than 32 values.
    """
    stored: Conds = {}
    for name, cond in conds.items():
        kind = dtype_of(name, cond, dtype)
        if kind != torch.int8:
            stored[name] = cond.to(kind)
            continue
        packed = [pack(cond[n]) for n in range(len(cond))]
        for n, own in enumerate((name, f"{name}{SCALE}")):
            stored[own] = stack_rows([row[n] for row in packed], isinstance(cond, Ragged))
    return stored


def dtype_of(name: str, cond: Cond, dtype: str) -> torch.dtype:
    """The number type that cond of this name and shape has on disk with `dtype`, one of COND_DTYPES.

    With int8, pooled embeddings stay float32: they are a single vector for each prompt. Positions must be exact, so
    they are never int8 or bfloat16: bfloat16 cannot hold all integers above 256.
    """
    kind = COND_DTYPES[dtype]
    if name.endswith(POSITIONS):
        return kind if kind in (torch.float16, torch.float32) else torch.float32
    shape = row_shape(cond)
    is_wide = len(shape) >= 2 and (shape[-1] or 0) >= BLOCK
    return torch.float32 if kind == torch.int8 and not is_wide else kind


def nbytes_of(num_values: int, dtype: str) -> int:
    """Bytes on disk of num_values values of cond; as if all were packed, though a few are not (see dtype_of)."""
    scales = -(-num_values // BLOCK) * SCALE_DTYPE.itemsize if dtype == "int8" else 0
    return num_values * COND_DTYPES[dtype].itemsize + scales


def pack(values: Tensor) -> tuple[Tensor, Tensor]:
    """values [...,D] float32 => [...,D] int8 in -127..127, and their scales [...,D/32 rounded up] float16.

    A scale is not finite if a value is not, or is beyond 8.3 million.
    """
    blocks = pad(values, (0, -values.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = (blocks.abs().amax(-1) / LARGEST).to(SCALE_DTYPE)
    divisor = torch.where(scale > 0, scale, 1).float()[..., None]
    packed = (blocks / divisor).round_().clamp_(-LARGEST, LARGEST).to(torch.int8)
    return packed.flatten(-2)[..., : values.shape[-1]].contiguous(), scale


def unpack(packed: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """packed [...,D] int8 and scale [...,D/32 rounded up] float16, from pack => [...,D] in `dtype`."""
    if dtype == torch.float32 or not packed.is_cpu:
        return _multiply(packed, scale).to(dtype)
    found = torch.empty(packed.shape, dtype=dtype)
    count = max(1, AT_ONCE // packed.shape[-1])
    parts = (tensor.flatten(0, -2).split(count) for tensor in (packed, scale, found))
    for own, factors, there in zip(*parts, strict=True):
        there.copy_(_multiply(own, factors))
    return found


def _multiply(packed: Tensor, scale: Tensor) -> Tensor:
    """[...,D] float32."""
    width = packed.shape[-1]
    whole = packed if width % BLOCK == 0 else pad(packed, (0, -width % BLOCK))
    blocks = whole.float().unflatten(-1, (-1, BLOCK)).mul_(scale.float()[..., None])
    return blocks.flatten(-2)[..., :width].contiguous()


def unpack_all(stored: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Tensors:
    """Cond as it is stored, name -> [...], of any number of prompts => in a dtype, without the scales.

    Positions are given in float32 whatever the dtype, and masks as bool.
    """
    scales, found = scales_in(stored), {}
    for name, value in stored.items():
        if name in scales:
            continue
        if value.dtype == torch.int8:
            found[name] = unpack(value, stored[f"{name}{SCALE}"], dtype)
        else:
            found[name] = value.to(kept_dtype(name, dtype))
    return found


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that a reader gives one tensor of cond in, if embeddings are given in `dtype`."""
    if name.endswith("_mask"):
        return torch.bool
    return torch.float32 if name.endswith(POSITIONS) else dtype


def scales_in(conds: Mapping[str, Cond]) -> set[str]:
    """The names that are scales of others."""
    return scales_of({name: cond.dtype for name, cond in conds.items()})


def scales_of(dtypes: Mapping[str, torch.dtype]) -> set[str]:
    """The names that are scales of others, by the number types of cond."""
    return {f"{name}{SCALE}" for name, dtype in dtypes.items() if dtype == torch.int8}


def check_scales(conds: Conds) -> None:
    """Raise ValueError for cond in 8 bits without a scale for each of its blocks."""
    for name, cond in conds.items():
        if cond.dtype != torch.int8:
            continue
        scale = conds.get(f"{name}{SCALE}")
        *tokens, width = values_of(cond).shape
        wanted = [*tokens, -(-width // BLOCK)]
        found = None if scale is None else list(values_of(scale).shape)
        if scale is None or scale.dtype != SCALE_DTYPE or found != wanted or not _are_alike(cond, scale):
            kind = "not there" if scale is None else f"{scale.dtype} {found}"
            raise ValueError(f"cond/{name}{SCALE} is {kind}, expected {SCALE_DTYPE} {wanted}")


def _are_alike(cond: Cond, scale: Cond) -> bool:
    """Whether both have the same number of tokens for each prompt."""
    if isinstance(cond, Ragged) and isinstance(scale, Ragged):
        return bool((cond.offsets == scale.offsets).all())
    return isinstance(cond, Tensor) and isinstance(scale, Tensor)
