"""Prompts -> cond, through the pipeline's own encode_prompt, as a family's row says: what every family has in common.

The result is what inference uses: where encode_prompt and __call__ have other defaults, those of __call__ count.
"""

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.ragged import Cond, Conds, Ragged
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.families import FIXED, LIST, MASK, Call, Family


def inference_defaults(kind: type) -> dict[str, Any]:
    """The arguments of a pipeline's encode_prompt for which its __call__ has another default: name -> that one.

    kind: a class of diffusers.
    """
    of_encode, of_call = (inspect.signature(getattr(kind, name)).parameters for name in ("encode_prompt", "__call__"))
    found = {}
    for name in of_encode.keys() & of_call.keys():
        default = of_call[name].default
        is_asked = name in ("self", "prompt") or default is inspect.Parameter.empty
        if not is_asked and not _is_same(default, of_encode[name].default):
            found[name] = default
    return found


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def make_arguments(family: Family, call: Call, kind: type, device: torch.device, num_tokens: int) -> dict[str, Any]:
    """All arguments of one call of encode_prompt but the prompts."""
    known = inspect.signature(kind.encode_prompt).parameters  # type: ignore[attr-defined]
    own: dict[str, Any] = {"device": device, "num_images_per_prompt": 1}  # Z-Image's takes but the first
    if family.sequence is not None:
        own["max_sequence_length"] = num_tokens
    arguments = {**inference_defaults(kind), **call.arguments, **own}
    return {name: value for name, value in arguments.items() if name in known}


def call_pipeline(pipeline: Any, family: Family, arguments: list[dict[str, Any]], prompts: list[str]) -> Conds:
    """Cond of P prompts, name -> [P,...] float32 on the CPU, or rows of lengths of their own.

    `arguments` are those of each of the family's calls.
    """
    conds: Conds = {}
    for call, own in zip(family.calls, arguments, strict=True):
        result = pipeline.encode_prompt(prompt=list(prompts), **own)  # a copy: Z-Image's overwrites what it is given
        named = {name: value for name, value in zip(call.returns, result, strict=True) if name is not None}
        for name, value in named.items():
            if family.length == MASK and name.endswith("_mask"):
                continue
            mask = named.get(f"{name}_mask") if family.length == MASK else None
            conds[name] = take_rows(name, family.length, value, mask, len(prompts))
            check_tokens(name, conds[name], prompts)
    return {name: value.to(torch.float32) for name, value in conds.items()}


def take_rows(name: str, length: str, value: Any, mask: Tensor | None, num_prompts: int) -> Cond:
    """What encode_prompt gave under one name => a row for each prompt, on the CPU.

    A mask that is None counts all tokens (Qwen-Image). Positions [T,3] (FLUX.1's text_ids) are the same for all.
    """
    if length == LIST and isinstance(value, (list, tuple)):
        return Ragged.of([row.cpu() for row in value])
    value = value.cpu()
    if length == FIXED or value.ndim < 3:  # pooled embeddings have no tokens
        is_shared = value.ndim == 2 and name.endswith("_ids")
        return value.expand(num_prompts, -1, -1) if is_shared else value
    if mask is None:
        return Ragged.of(list(value))
    return Ragged.of([row[:count] for row, count in zip(value, count_tokens(mask.cpu()), strict=True)])


def check_tokens(name: str, cond: Cond, prompts: list[str]) -> None:
    """Raise UserError for a prompt of no tokens, which nothing can be trained on."""
    if isinstance(cond, Ragged):
        for prompt, count in zip(prompts, np.diff(cond.offsets).tolist(), strict=True):
            if not count:
                raise UserError(f"--model: its {name} gives no tokens for {shortened(prompt)!r}. Use another model.")


def count_tokens(mask: Tensor) -> list[int]:
    """How many tokens of each prompt count, of a mask [P,T] of any dtype.

    Raises ValueError if they are not the first ones: then their number alone would not tell which they are.
    """
    counts = mask.bool().sum(1)
    is_first = torch.arange(mask.shape[1])[None] < counts[:, None]
    if not torch.equal(is_first, mask.bool()):
        raise ValueError("the mask of encode_prompt counts tokens that are not the first ones")
    found: list[int] = counts.tolist()
    return found
