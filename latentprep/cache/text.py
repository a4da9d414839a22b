"""The text file of a shard, and the one of the empty prompt: captions, prompts and cond; written, opened, checked."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latentprep.cache.files import check_groups, damaged, open_file, pack
from latentprep.cache.group import TextGroup, rows_of
from latentprep.cache.int8 import check_scales
from latentprep.cache.names import text_name, uncond_name
from latentprep.cache.ragged import Conds, Ragged, put_cond, stack_rows, take_cond
from latentprep.cache.schema import COND_STORED, Groups
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.strings import Strings, Tensors, put_strings
from latentprep.records import Row


@dataclass(frozen=True, eq=False)
class Text:
    """What a text file holds: its groups, and the distinct prompts of the shard with their cond."""

    groups: list[TextGroup]
    prompt: Sequence[str]
    cond: Conds = field(default_factory=dict)  # name -> [P,...], a row per prompt; empty: no conditioning
    num_tokens: np.ndarray | None = None  # [P] int32: tokens of the whole prompt, start and end included
    max_tokens: int | None = None  # the text encoder's window: longer prompts were cut
    metadata: dict[str, Any] = field(default_factory=dict)

    def rows(self) -> list[Row]:
        """What it says of every row, through all groups."""
        return rows_of(self.groups)

    def take(self, live: list[np.ndarray]) -> "Text":
        """Some rows of every group, and of the prompts only those that they use; groups without rows are left out."""
        used = np.unique(np.concatenate([g.prompt_of[rows] for g, rows in zip(self.groups, live, strict=True)]))
        taken = [group.take(rows) for group, rows in zip(self.groups, live, strict=True) if len(rows)]
        return Text(
            [group.having(prompt_of=np.searchsorted(used, group.prompt_of).astype(np.int32)) for group in taken],
            prompt=[self.prompt[n] for n in used],
            cond={
                name: stack_rows([value[n] for n in used.tolist()], isinstance(value, Ragged))
                for name, value in self.cond.items()
            },
            num_tokens=self.num_tokens[used] if self.num_tokens is not None else None,
            max_tokens=self.max_tokens,
            metadata=self.metadata,
        )

    def pack(self) -> bytes:
        """The bytes of its file."""
        tensors: Tensors = {}
        for group in self.groups:
            group.put(tensors)
        put_strings(tensors, "prompt", self.prompt)
        if self.num_tokens is not None:
            tensors["num_tokens"] = torch.from_numpy(self.num_tokens)
        put_cond(tensors, self.cond)
        table = [[group.label, len(group)] for group in self.groups]
        return pack("text", tensors, {**self.metadata, "groups": table, "max_tokens": self.max_tokens})


def write_text(storage: Storage, shard: str, text_id: str, text: Text) -> Stamp:
    """Write a text file. Raises UserError, and what a remote raises."""
    return storage.write_atomic(text_name(shard, text_id), text.pack())


def write_uncond(storage: Storage, uncond: str, cond: Conds, metadata: dict[str, Any]) -> Stamp:
    """Write the cond of the empty prompt, name -> [1,...]; `uncond` is the digest of what it is made by."""
    tensors: Tensors = {}
    put_cond(tensors, cond)
    return storage.write_atomic(uncond_name(uncond), pack("uncond", tensors, metadata))


def open_text(storage: Storage, shard: str, text_id: str, groups: Groups | None = None) -> Text:
    """Open and check a text file; `groups` is what the manifest says it holds. Raises UserError like open_latents."""
    name = text_name(shard, text_id)
    metadata, tensors = open_file(storage, name, "text")
    try:
        found = _text_of(tensors, metadata)
    except (KeyError, ValueError) as error:
        raise damaged(storage, name, error) from None
    if groups is not None and [(g.label, len(g)) for g in found.groups] != [(label, n) for label, n, _ in groups]:
        raise damaged(storage, name, ValueError("holds other rows than cache.json says"))
    return found


def open_uncond(storage: Storage, uncond: str) -> tuple[dict[str, Any], Conds]:
    """Metadata, and cond of the empty prompt, name -> [1,...]. Raises UserError like open_latents."""
    name = uncond_name(uncond)
    metadata, tensors = open_file(storage, name, "uncond")
    try:
        return metadata, _cond_of(tensors, 1)
    except ValueError as error:
        raise damaged(storage, name, error) from None


def _text_of(tensors: Tensors, metadata: dict[str, Any]) -> Text:
    """The text of a file's tensors. Raises KeyError, ValueError."""
    prompt = Strings(tensors, "prompt")
    groups = [TextGroup.take_from(tensors, label, rows) for label, rows in check_groups(metadata)]
    for group in groups:
        if group.prompt_of.size == 0 or group.prompt_of.min() < 0 or group.prompt_of.max() >= len(prompt):
            raise ValueError(f"{group.label}/prompt_of points outside the {len(prompt)} prompts")
    num_tokens, max_tokens = tensors.get("num_tokens"), metadata.get("max_tokens")
    if num_tokens is not None and (num_tokens.dtype != torch.int32 or list(num_tokens.shape) != [len(prompt)]):
        raise ValueError(f"num_tokens is {num_tokens.dtype} {list(num_tokens.shape)}, expected int32 [{len(prompt)}]")
    if (num_tokens is not None or max_tokens is not None) and not isinstance(max_tokens, int):
        raise ValueError(f"max_tokens is {max_tokens!r}")
    cond = _cond_of(tensors, len(prompt))
    return Text(groups, prompt, cond, num_tokens.numpy() if num_tokens is not None else None, max_tokens, metadata)


def _cond_of(tensors: Tensors, num_prompts: int) -> Conds:
    """The cond of a file's tensors. Raises ValueError."""
    cond = take_cond(tensors, num_prompts, COND_STORED)
    check_scales(cond)
    return cond
