"""The text file of a shard: captions, prompts, and their cond or where it is borrowed from."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from latentprep.cache.cond import put_prompt_cond, take_prompt_cond
from latentprep.cache.files import check_groups, damaged, open_file, pack
from latentprep.cache.group import TextGroup, rows_of
from latentprep.cache.names import COND_ID, text_name
from latentprep.cache.ragged import Conds, take_conds
from latentprep.cache.schema import Groups
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.strings import Strings, Tensors, put_strings
from latentprep.records import Row

NOTHING = np.zeros((0, 2), np.int32)


@dataclass(frozen=True, eq=False)
class Text:
    """What a text file holds: its groups, and the P distinct prompts of the shard; of each row, if they see its images.

    The first Q prompts have their cond here. The others borrow it from cond files, since other shards have them too.
    """

    groups: list[TextGroup]
    prompt: Sequence[str]
    cond: Conds = field(default_factory=dict)  # name -> [Q,...], a row per prompt
    num_tokens: np.ndarray | None = None  # [Q] int32: tokens of the whole prompt, start and end included
    max_tokens: int | None = None  # the text encoder's window: longer prompts were cut
    metadata: dict[str, Any] = field(default_factory=dict)
    # rows that were dead when the file was made: they have no prompts of their own, prompt_of points to prompt 0
    dead: tuple[int, ...] = ()
    cond_files: tuple[str, ...] = ()  # ids of those that it borrows from
    borrowed: np.ndarray = field(default_factory=NOTHING.copy)  # [P-Q,2] int32: number of a cond file, row in it

    @property
    def num_own(self) -> int:
        """Prompts whose cond is not borrowed: Q."""
        return len(self.prompt) - len(self.borrowed)

    @property
    def has_cond(self) -> bool:
        return bool(self.cond or self.cond_files)

    def rows(self) -> list[Row]:
        """A Row for each image, group after group, with captions."""
        return rows_of(self.groups)

    def take(self, live: list[np.ndarray]) -> "Text":
        """Some rows of every group, with only the prompts that they use; groups without rows are left out.

        live: for each group, the numbers of the rows.
        """
        used = np.unique(np.concatenate([g.numbers(rows) for g, rows in zip(self.groups, live, strict=True)]))
        taken = [group.take(rows) for group, rows in zip(self.groups, live, strict=True) if len(rows)]
        own, borrowed = used[used < self.num_own], self.borrowed[used[used >= self.num_own] - self.num_own]
        files, numbers = np.unique(borrowed[:, 0], return_inverse=True)
        return Text(
            [renumbered(group, used) for group in taken],
            prompt=[self.prompt[n] for n in used],
            cond=take_conds(self.cond, own) if len(own) else {},
            num_tokens=self.num_tokens[own] if self.num_tokens is not None else None,
            max_tokens=self.max_tokens,
            metadata={name: value for name, value in self.metadata.items() if name not in ("dead", "cond_files")},
            cond_files=tuple(self.cond_files[n] for n in files),
            borrowed=np.stack([numbers.astype(np.int32), borrowed[:, 1]], axis=1),
        )

    def pack(self) -> bytes:
        """The bytes of its file."""
        tensors: Tensors = {}
        for group in self.groups:
            group.put(tensors)
        put_strings(tensors, "prompt", self.prompt)
        put_prompt_cond(tensors, self.cond, self.num_tokens)
        if self.cond_files:
            tensors["borrowed"] = torch.from_numpy(np.ascontiguousarray(self.borrowed))
        metadata = {**self.metadata, **({"cond_files": self.cond_files} if self.cond_files else {})}
        metadata |= {"dead": self.dead} if self.dead else {}
        table = [[group.label, len(group)] for group in self.groups]
        return pack("text", tensors, {**metadata, "groups": table, "max_tokens": self.max_tokens})


def renumbered(group: TextGroup, used: np.ndarray) -> TextGroup:
    """A group whose prompts are some of those that there were, by their numbers, rising."""
    columns = {name: group.columns[name] for name in ("prompt_of", "uncond_of") if group.columns.get(name) is not None}
    return group.having(**{name: np.searchsorted(used, own).astype(np.int32) for name, own in columns.items()})


def write_text(storage: Storage, shard: str, text_id: str, text: Text) -> Stamp:
    """Write a text file. Raises WriteError (a UserError) if that fails, on a remote too."""
    return storage.write_atomic(text_name(shard, text_id), text.pack())


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


def _text_of(tensors: Tensors, metadata: dict[str, Any]) -> Text:
    """The text of a file's tensors. Raises KeyError, ValueError."""
    prompt = Strings(tensors, "prompt")
    groups = [TextGroup.take_from(tensors, label, rows) for label, rows in check_groups(metadata)]
    for group in groups:
        for name in ("prompt_of", "uncond_of"):
            own = group.columns.get(name)
            if own is not None and (own.size == 0 or own.min() < 0 or own.max() >= len(prompt)):
                raise ValueError(f"{group.label}/{name} points outside the {len(prompt)} prompts")
    cond_files, borrowed = _borrowed_of(tensors, metadata, len(prompt))
    cond, num_tokens = take_prompt_cond(tensors, len(prompt) - len(borrowed), metadata)
    if cond_files and len(borrowed) < len(prompt) and not cond:
        raise ValueError("some of its prompts borrow cond, and others have none")
    dead = metadata.get("dead", [])
    if not isinstance(dead, list) or not all(type(row) is int and row >= 0 for row in dead):
        raise ValueError("its list of dead rows is invalid")
    window = metadata.get("max_tokens")
    return Text(groups, prompt, cond, num_tokens, window, metadata, tuple(dead), cond_files, borrowed)


def _borrowed_of(tensors: Tensors, metadata: dict[str, Any], num_prompts: int) -> tuple[tuple[str, ...], np.ndarray]:
    """The ids of the cond files that a text borrows from, and [P-Q,2] int32 where in them. Raises ValueError."""
    files, borrowed = metadata.get("cond_files", []), tensors.get("borrowed")
    if not isinstance(files, list) or not all(isinstance(name, str) and COND_ID.fullmatch(name) for name in files):
        raise ValueError("its list of cond files is invalid")
    if borrowed is None and not files:
        return (), NOTHING.copy()
    if borrowed is None or borrowed.dtype != torch.int32 or borrowed.ndim != 2 or borrowed.shape[1] != 2:
        raise ValueError("borrowed is not int32 with two numbers for each prompt that is borrowed")
    if not 0 < len(borrowed) <= num_prompts or len(set(files)) < len(files):
        raise ValueError(f"borrowed has {len(borrowed)} rows for {num_prompts} prompts, of {len(files)} cond files")
    rows = np.require(borrowed.numpy(), requirements=["C", "A"])
    if rows.min() < 0 or rows[:, 0].max() >= len(files):
        raise ValueError(f"borrowed points outside its {len(files)} cond files")
    return tuple(files), rows
