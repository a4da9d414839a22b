"""Files of cond alone: of prompts that several shards have, and of the empty prompt; written, opened, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latentprep.cache.files import damaged, open_file, pack
from latentprep.cache.int8 import check_scales
from latentprep.cache.names import cond_name, uncond_name
from latentprep.cache.ragged import Conds, put_cond, take_cond
from latentprep.cache.schema import COND_STORED
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.strings import Strings, Tensors, put_strings


@dataclass(frozen=True, eq=False)
class CondFile:
    """Prompts that several shards have, each once, and their cond: texts borrow it from here."""

    prompt: Sequence[str]
    cond: Conds  # name -> [P,...]
    num_tokens: np.ndarray | None = None  # [P] int32, as in a text file
    max_tokens: int | None = None
    metadata: dict[str, Any] = field(default_factory=dict)

    def pack(self) -> bytes:
        """The bytes of its file."""
        tensors: Tensors = {}
        put_strings(tensors, "prompt", self.prompt)
        put_prompt_cond(tensors, self.cond, self.num_tokens)
        return pack("cond", tensors, {**self.metadata, "max_tokens": self.max_tokens})


def write_cond(storage: Storage, cond_file: str, cond: CondFile) -> Stamp:
    """Write a cond file. Raises WriteError (a UserError) if that fails, on a remote too."""
    return storage.write_atomic(cond_name(cond_file), cond.pack())


def open_cond(storage: Storage, cond_file: str) -> CondFile:
    """Open and check a cond file. Raises UserError like open_latents."""
    name = cond_name(cond_file)
    metadata, tensors = open_file(storage, name, "cond")
    try:
        prompt = Strings(tensors, "prompt")
        cond, num_tokens = take_prompt_cond(tensors, len(prompt), metadata)
        if not len(prompt) or not cond:
            raise ValueError("it has no prompts, or no cond")
    except (KeyError, ValueError) as error:
        raise damaged(storage, name, error) from None
    return CondFile(prompt, cond, num_tokens, metadata.get("max_tokens"), metadata)


def write_uncond(storage: Storage, uncond: str, cond: Conds, metadata: dict[str, Any]) -> Stamp:
    """Write the cond of the empty prompt, name -> [1,...]; `uncond` is the digest of what it is made by."""
    tensors: Tensors = {}
    put_cond(tensors, cond)
    return storage.write_atomic(uncond_name(uncond), pack("uncond", tensors, metadata))


def open_uncond(storage: Storage, uncond: str) -> tuple[dict[str, Any], Conds]:
    """Metadata, and cond of the empty prompt, name -> [1,...]. Raises UserError like open_latents."""
    name = uncond_name(uncond)
    metadata, tensors = open_file(storage, name, "uncond")
    try:
        return metadata, _cond_of(tensors, 1)
    except ValueError as error:
        raise damaged(storage, name, error) from None


def put_prompt_cond(tensors: Tensors, cond: Conds, num_tokens: np.ndarray | None) -> None:
    """Add the cond of prompts, and how many tokens each takes."""
    if num_tokens is not None:
        tensors["num_tokens"] = torch.from_numpy(num_tokens)
    put_cond(tensors, cond)


def take_prompt_cond(tensors: Tensors, num_prompts: int, metadata: dict[str, Any]) -> tuple[Conds, np.ndarray | None]:
    """Cond of a file's P prompts, and the number of tokens of each, [P] int32 or None. Raises ValueError."""
    num_tokens, max_tokens = tensors.get("num_tokens"), metadata.get("max_tokens")
    if num_tokens is not None and (num_tokens.dtype != torch.int32 or list(num_tokens.shape) != [num_prompts]):
        raise ValueError(f"num_tokens is {num_tokens.dtype} {list(num_tokens.shape)}, expected int32 [{num_prompts}]")
    if (num_tokens is not None or max_tokens is not None) and not isinstance(max_tokens, int):
        raise ValueError(f"max_tokens is {max_tokens!r}")
    return _cond_of(tensors, num_prompts), num_tokens.numpy() if num_tokens is not None else None


def _cond_of(tensors: Tensors, num_prompts: int) -> Conds:
    """The cond of a file's tensors. Raises ValueError."""
    cond = take_cond(tensors, num_prompts, COND_STORED)
    check_scales(cond)
    return cond
