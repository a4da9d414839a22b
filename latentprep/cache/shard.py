"""The two files of a shard: write_latents, write_text, open_latents, open_text. Nobody else knows their tensors.

What is opened is checked first: every dtype, shape and offset, so that no crafted file leads a reader astray.
The header's metadata is a single JSON value, because safetensors does not keep the order of several.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as to_bytes

from latentprep.cache.ragged import Conds, put_cond, take_cond
from latentprep.cache.schema import (
    FORMAT,
    LATENT_FIELDS,
    OPTIONAL,
    SIZES,
    STORED,
    TEXT_FIELDS,
    check_fields,
    check_format,
    check_keys,
    check_num_tokens,
    check_table,
)
from latentprep.cache.seal import EMPTY, FIELD, check_seal, seal
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.strings import StringLists, Strings, Tensors, put_strings
from latentprep.errors import UnreadableError, UserError
from latentprep.recipe import digest_of
from latentprep.records import Row

METADATA_KEY = "latentprep"
FOLDER = "shards"
UNCOND_NAME = re.compile(r"uncond\.([0-9a-f]{16})\.safetensors")
PARTIAL_NAME = re.compile(rf"{FOLDER}/(\w+)\.partial\.safetensors")
SHARD_NAME = re.compile(rf"{FOLDER}/(\w+)\.(?:latents|(\w+)\.text)\.safetensors")

Groups = tuple[tuple[str, int, tuple[int, ...]], ...]  # label, rows, and the [C,h,w] of a latent


def latents_name(unit: str) -> str:
    return f"{FOLDER}/{unit}.latents.safetensors"


def text_name(unit: str, text: str) -> str:
    return f"{FOLDER}/{unit}.{text}.text.safetensors"


def partial_name(unit: str) -> str:
    return f"{FOLDER}/{unit}.partial.safetensors"


def uncond_name(uncond: str) -> str:
    return f"uncond.{uncond}.safetensors"


def unit_id(rows: Iterable[Row], recipe: dict[str, Any], contents: Sequence[str] = ()) -> str:
    """Digest of what goes into a latents file: the recipe's latents part, and every row's key, size and mtime.

    `contents` are the content hashes of rows for which those are known to tell nothing, "" for the others.
    """
    known = [list(contents)] if any(contents) else []
    return digest_of([FORMAT, recipe["latents"], [row.fingerprint for row in rows], *known])


def text_id(unit: str, rows: Iterable[Row], recipe: dict[str, Any]) -> str:
    """Digest of what goes into a text file: the recipe's text part, and all that its rows say."""
    return digest_of([unit, recipe["text"], [[*row.fingerprint, row.captions] for row in rows]])[:16]


@dataclass(frozen=True)
class ShardEntry:
    """What the manifest says of one shard."""

    unit: str
    text: str
    groups: Groups
    latents_file: Stamp
    text_file: Stamp
    tombstones: tuple[int, ...] = ()  # rows that count no longer, numbered through all groups, rising

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows, _ in self.groups)

    @property
    def num_images(self) -> int:
        return self.num_rows - len(self.tombstones)

    @property
    def nbytes(self) -> int:
        return self.latents_file.nbytes + self.text_file.nbytes

    def names(self) -> tuple[str, str]:
        return latents_name(self.unit), text_name(self.unit, self.text)

    def files(self) -> dict[str, Stamp]:
        return dict(zip(self.names(), (self.latents_file, self.text_file), strict=True))

    def live_rows(self) -> list[np.ndarray]:
        """For each group the numbers of its rows that count, counted in the group."""
        is_live = np.ones(self.num_rows, bool)
        is_live[list(self.tombstones)] = False
        edges = np.cumsum([rows for _, rows, _ in self.groups])[:-1]
        return [np.flatnonzero(part) for part in np.split(is_live, edges)]


@dataclass(frozen=True, eq=False)
class LatentGroup:
    """Rows of one bucket: N images, V views each."""

    label: str
    latent_mean: torch.Tensor  # [N,V,C,h,w] in the store dtype; unscaled
    latent_std: torch.Tensor | None  # like latent_mean; None: the cache holds means only
    weight: torch.Tensor | None  # [N,V,h,w] float16 in 0..1; None: no row has transparency
    original_size: torch.Tensor  # [N,2] int32: height, width after orientation
    resized_size: torch.Tensor  # [N,V,2] int32
    crop: torch.Tensor  # [N,V,4] int32: top, left, height, width in the resized image
    flipped: torch.Tensor  # [V] uint8: 1 where the view is mirrored
    digest: torch.Tensor  # [N,16] uint8: content hash of the source file

    def __len__(self) -> int:
        return self.latent_mean.shape[0]


@dataclass(frozen=True, eq=False)
class Latents:
    """An open latents file; its tensors are views of the memory-mapped file."""

    name: str
    metadata: dict[str, Any]
    groups: list[LatentGroup]

    def table(self) -> Groups:
        return table_of(self.groups)


def table_of(groups: list[LatentGroup]) -> Groups:
    """What the manifest says of groups."""
    return tuple((group.label, len(group), tuple(group.latent_mean.shape[2:])) for group in groups)


@dataclass(frozen=True, eq=False)
class TextGroup:
    """The same rows as the LatentGroup of this label."""

    label: str
    key: Sequence[str]
    caption: Sequence[list[str]]  # one or more per row
    prompt_of: np.ndarray  # [N,K] int32: row -> its K prompts
    nbytes: np.ndarray  # [N] int64
    version: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, eq=False)
class Text:
    """A text file: its groups, and the distinct prompts of the shard with their cond."""

    groups: list[TextGroup]
    prompt: Sequence[str]
    cond: Conds = field(default_factory=dict)  # name -> [P,...], a row per prompt; empty: no conditioning
    num_tokens: np.ndarray | None = None  # [P] int32: tokens of the whole prompt, start and end included
    max_tokens: int | None = None  # the text encoder's window: longer prompts were cut
    metadata: dict[str, Any] = field(default_factory=dict)  # of an open file

    def rows(self) -> Iterator[Row]:
        """What it says of every row, through all groups."""
        for group in self.groups:
            columns = (group.key, group.nbytes.tolist(), group.version.tolist(), group.caption)
            for key, nbytes, version, captions in zip(*columns, strict=True):
                yield Row(key, nbytes, version, tuple(captions))


def write_latents(storage: Storage, unit: str, groups: list[LatentGroup], metadata: dict[str, Any]) -> Stamp:
    """Write a latents file."""
    return _write_groups(storage, latents_name(unit), groups, {**metadata, "kind": "latents"})


def write_partial(storage: Storage, unit: str, groups: list[LatentGroup], metadata: dict[str, Any]) -> Stamp:
    """Write the first rows of a unit that is not finished. Such a file is in no manifest."""
    return _write_groups(storage, partial_name(unit), groups, {**metadata, "kind": "partial"})


def _write_groups(storage: Storage, name: str, groups: list[LatentGroup], metadata: dict[str, Any]) -> Stamp:
    tensors: Tensors = {}
    for group in groups:
        for field_name in LATENT_FIELDS:
            value = getattr(group, field_name)
            if value is not None:
                tensors[f"{group.label}/{field_name}"] = value.contiguous()
    return _write(storage, name, tensors, {**metadata, "groups": [[group.label, len(group)] for group in groups]})


def write_text(storage: Storage, unit: str, text_id: str, text: Text, metadata: dict[str, Any]) -> Stamp:
    """Write a text file."""
    tensors: Tensors = {}
    for group in text.groups:
        rows = np.cumsum([0, *(len(captions) for captions in group.caption)])
        put_strings(tensors, f"{group.label}/key", group.key)
        put_strings(tensors, f"{group.label}/caption", [text for captions in group.caption for text in captions])
        tensors[f"{group.label}/caption_rows"] = torch.from_numpy(rows.astype(np.int64))
        for name in TEXT_FIELDS:
            tensors[f"{group.label}/{name}"] = torch.from_numpy(np.ascontiguousarray(getattr(group, name)))
    put_strings(tensors, "prompt", text.prompt)
    if text.num_tokens is not None:
        tensors["num_tokens"] = torch.from_numpy(text.num_tokens)
    put_cond(tensors, text.cond)
    table = [[group.label, len(group)] for group in text.groups]
    metadata = {**metadata, "kind": "text", "groups": table, "max_tokens": text.max_tokens}
    return _write(storage, text_name(unit, text_id), tensors, metadata)


def write_uncond(storage: Storage, uncond: str, cond: Conds, metadata: dict[str, Any]) -> Stamp:
    """Write the cond of the empty prompt, name -> [1,...]; `uncond` is the digest of what it is made by."""
    tensors: Tensors = {}
    put_cond(tensors, cond)
    return _write(storage, uncond_name(uncond), tensors, {**metadata, "kind": "uncond"})


def _write(storage: Storage, name: str, tensors: Tensors, metadata: dict[str, Any]) -> Stamp:
    fields = {**metadata, "format": FORMAT, FIELD: EMPTY}
    header = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return storage.write_atomic(name, seal(to_bytes(tensors, {METADATA_KEY: header})))


def open_latents(storage: Storage, unit: str, groups: Groups | None = None) -> Latents:
    """Open and check a latents file; `groups` is what the manifest says it holds.

    Raises UserError where it is missing, damaged, of a newer format or not what the manifest says.
    """
    name = latents_name(unit)
    metadata, tensors = _open(storage, name, "latents")
    try:
        made = [_latent_group(tensors, label, rows) for label, rows in check_table(metadata)]
    except (KeyError, ValueError) as error:
        raise _damaged(storage, name, error) from None
    latents = Latents(name, metadata, made)
    if groups is not None and latents.table() != groups:
        raise _damaged(storage, name, ValueError("holds other rows than cache.json says"))
    return latents


def open_partial(storage: Storage, unit: str) -> tuple[dict[str, Any], list[LatentGroup]]:
    """Metadata and groups of a unit that is not finished, if its seal fits. Raises UserError like open_latents."""
    name = partial_name(unit)
    check_seal(storage, name)
    metadata, tensors = _open(storage, name, "partial")
    try:
        return metadata, [_latent_group(tensors, label, rows) for label, rows in check_table(metadata)]
    except (KeyError, ValueError) as error:
        raise _damaged(storage, name, error) from None


def open_text(storage: Storage, unit: str, text: str, groups: Groups | None = None) -> Text:
    """Open and check a text file; `groups` is what the manifest says it holds. Raises UserError like open_latents."""
    name = text_name(unit, text)
    metadata, tensors = _open(storage, name, "text")
    try:
        prompt = Strings(tensors, "prompt")
        found = Text(
            [_text_group(tensors, label, rows, len(prompt)) for label, rows in check_table(metadata)],
            prompt,
            take_cond(tensors, len(prompt), STORED),
            check_num_tokens(tensors, len(prompt)),
            metadata.get("max_tokens"),
            metadata,
        )
        if (found.num_tokens is not None or found.max_tokens is not None) and not isinstance(found.max_tokens, int):
            raise ValueError(f"max_tokens is {found.max_tokens!r}")
    except (KeyError, ValueError) as error:
        raise _damaged(storage, name, error) from None
    if groups is not None and [(g.label, len(g)) for g in found.groups] != [(label, n) for label, n, _ in groups]:
        raise _damaged(storage, name, ValueError("holds other rows than cache.json says"))
    return found


def open_uncond(storage: Storage, uncond: str) -> tuple[dict[str, Any], Conds]:
    """Metadata, and cond of the empty prompt, name -> [1,...]. Raises UserError like open_latents."""
    name = uncond_name(uncond)
    metadata, tensors = _open(storage, name, "uncond")
    try:
        return metadata, take_cond(tensors, 1, STORED)
    except ValueError as error:
        raise _damaged(storage, name, error) from None


def _latent_group(tensors: Tensors, label: str, rows: int) -> LatentGroup:
    fields = {
        name: tensors[f"{label}/{name}"]
        for name in LATENT_FIELDS
        if name not in OPTIONAL or f"{label}/{name}" in tensors
    }
    check_fields(label, fields, LATENT_FIELDS, {"N": rows, **SIZES})
    return LatentGroup(label, **{name: fields.get(name) for name in LATENT_FIELDS})  # type: ignore[arg-type]


def _text_group(tensors: Tensors, label: str, rows: int, num_prompts: int) -> TextGroup:
    fields = {name: tensors[f"{label}/{name}"] for name in TEXT_FIELDS}
    check_fields(label, fields, TEXT_FIELDS, {"N": rows})
    prompt_of = fields["prompt_of"].numpy()
    if prompt_of.size == 0 or prompt_of.min() < 0 or prompt_of.max() >= num_prompts:
        raise ValueError(f"{label}/prompt_of points outside the {num_prompts} prompts")
    key = Strings(tensors, f"{label}/key")
    caption_rows = tensors[f"{label}/caption_rows"]
    caption = StringLists(Strings(tensors, f"{label}/caption"), f"{label}/caption_rows", caption_rows)
    if len(key) != rows or len(caption) != rows:
        raise ValueError(f"{label} has {rows} rows, {len(key)} keys and captions for {len(caption)}")
    check_keys(key)
    return TextGroup(label, key, caption, prompt_of, fields["nbytes"].numpy(), fields["version"].numpy())


def _open(storage: Storage, name: str, kind: str) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of a file of ours; safetensors checks that no tensor lies outside it."""
    where = storage.locate(name)
    try:
        storage.check_regular(name)
        if storage.is_local:
            with safe_open(where, framework="pt") as file:
                header = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            data = storage.read(name)
            tensors = load_bytes(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
        metadata = json.loads((header or {})[METADATA_KEY])
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
    except FileNotFoundError:
        raise _not_opened(storage, where) from None
    except (OSError, RuntimeError) as error:  # torch gives a RuntimeError if a file cannot be mapped
        if isinstance(error, RecursionError):
            raise _damaged(storage, name, error) from None
        raise _unreadable(where, error) from None
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise _damaged(storage, name, error) from None
    check_format(metadata.get("format"), where)
    if metadata.get("kind") != kind:
        raise _damaged(storage, name, ValueError(f"a file of {metadata.get('kind')!r}, expected {kind}"))
    return metadata, tensors


def _not_opened(storage: Storage, where: str) -> UserError:
    """Why a file could not be opened: safetensors says "not found" of all of them, forbidden ones too."""
    error = OSError("it could not be opened a moment ago")
    try:
        if storage.is_local:
            os.close(os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
            return _unreadable(where, error)
    except FileNotFoundError:
        pass
    except OSError as reason:
        return _unreadable(where, reason)
    return UserError(f"{where}: missing. Run the same latentprep encode again to make it.")


def _unreadable(where: str, error: Exception) -> UnreadableError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
    return UnreadableError(
        f"{where}: is there, and cannot be read ({reason}). Mend that, and run the same command again."
    )


def _damaged(storage: Storage, name: str, error: Exception) -> UserError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return UserError(
        f"{storage.locate(name)}: damaged, or no shard of latentprep ({' '.join(reason.split())[:300]}). "
        "Delete it and run the same latentprep encode again: only its images are encoded."
    )
