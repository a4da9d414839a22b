"""The two files of a shard: write_latents, write_text, open_shard. Nobody else writes them or checks their headers.

Strings are ragged: one uint8 tensor of UTF-8 and one int64 tensor of offsets, since a safetensors header is capped.
The header's metadata is a single JSON value, because safetensors does not keep the order of several.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as to_bytes

from latentprep.cache.storage import Storage
from latentprep.errors import UserError

FORMAT = 1
METADATA_KEY = "latentprep"
UNCOND_NAME = "uncond.safetensors"
TORCH_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

Tensors = dict[str, torch.Tensor]


def latents_name(unit_id: str) -> str:
    return f"shards/{unit_id}.latents.safetensors"


def text_name(unit_id: str, text_id: str) -> str:
    return f"shards/{unit_id}.{text_id}.text.safetensors"


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
class TextGroup:
    """The same rows as the LatentGroup of this label: what may change without touching a pixel."""

    label: str
    key: list[str]
    caption: list[list[str]]  # one or more per row
    prompt_of: np.ndarray  # [N,K] int32: row -> its K prompts
    nbytes: np.ndarray  # [N] int64
    mtime_ns: np.ndarray  # [N] int64

    def __len__(self) -> int:
        return len(self.key)


@dataclass(frozen=True, eq=False)
class Text:
    """A text file: its groups, and the distinct prompts of the shard with their cond."""

    groups: list[TextGroup]
    prompt: list[str]
    cond: Tensors = field(default_factory=dict)  # name -> [P,...], a row per prompt; empty: no conditioning
    num_tokens: np.ndarray | None = None  # [P] int32: tokens of the whole prompt, start and end included
    max_tokens: int | None = None  # the text encoder's window: longer prompts were cut


def write_latents(storage: Storage, unit_id: str, groups: list[LatentGroup], metadata: dict[str, Any]) -> int:
    """Write a latents file; returns its bytes."""
    tensors: Tensors = {}
    for group in groups:
        for name in _LATENT_FIELDS:
            value = getattr(group, name)
            if value is not None:
                tensors[f"{group.label}/{name}"] = value.contiguous()
    table = [[group.label, len(group)] for group in groups]
    return _write(storage, latents_name(unit_id), tensors, {**metadata, "kind": "latents", "groups": table})


_LATENT_FIELDS = (
    "latent_mean", "latent_std", "weight", "original_size", "resized_size", "crop", "flipped", "digest",
)  # fmt: skip


def write_text(storage: Storage, unit_id: str, text_id: str, text: Text, metadata: dict[str, Any]) -> int:
    """Write a text file; returns its bytes."""
    tensors: Tensors = {}
    for group in text.groups:
        rows = np.cumsum([0, *(len(captions) for captions in group.caption)])
        _put_strings(tensors, f"{group.label}/key", group.key)
        _put_strings(tensors, f"{group.label}/caption", [text for captions in group.caption for text in captions])
        tensors[f"{group.label}/caption_rows"] = torch.from_numpy(rows.astype(np.int64))
        for name in ("prompt_of", "nbytes", "mtime_ns"):
            tensors[f"{group.label}/{name}"] = torch.from_numpy(np.ascontiguousarray(getattr(group, name)))
    _put_strings(tensors, "prompt", text.prompt)
    if text.num_tokens is not None:
        tensors["num_tokens"] = torch.from_numpy(text.num_tokens)
    for name, cond in text.cond.items():
        tensors[f"cond/{name}"] = cond.contiguous()
    table = [[group.label, len(group)] for group in text.groups]
    metadata = {**metadata, "kind": "text", "groups": table, "max_tokens": text.max_tokens}
    return _write(storage, text_name(unit_id, text_id), tensors, metadata)


def write_uncond(storage: Storage, cond: Tensors, metadata: dict[str, Any]) -> int:
    """Write the cond of the empty prompt, name -> [1,...]; returns its bytes."""
    tensors = {f"cond/{name}": value.contiguous() for name, value in cond.items()}
    return _write(storage, UNCOND_NAME, tensors, {**metadata, "kind": "uncond"})


def _write(storage: Storage, name: str, tensors: Tensors, metadata: dict[str, Any]) -> int:
    header = json.dumps({"format": FORMAT, **metadata}, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    data = to_bytes(tensors, {METADATA_KEY: header})
    storage.write_atomic(name, data)
    return len(data)


def _put_strings(tensors: Tensors, name: str, strings: list[str]) -> None:
    encoded = [text.encode("utf-8", "surrogateescape") for text in strings]
    offsets = np.cumsum([0, *map(len, encoded)]).astype(np.int64)
    tensors[name] = torch.from_numpy(np.frombuffer(b"".join(encoded), np.uint8).copy())
    tensors[f"{name}_offsets"] = torch.from_numpy(offsets)


class Strings:
    """The strings of a ragged tensor: each is decoded when it is asked for."""

    def __init__(self, tensors: Tensors, name: str) -> None:
        self.data, self.offsets = tensors[name].numpy(), tensors[f"{name}_offsets"].numpy()

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> str:
        return self.data[self.offsets[row] : self.offsets[row + 1]].tobytes().decode("utf-8", "surrogateescape")


@dataclass(frozen=True, eq=False)
class ShardFile:
    """An open shard file: its metadata, and its tensors as views of the memory-mapped file."""

    name: str
    metadata: dict[str, Any]
    tensors: Tensors

    def groups(self) -> Iterator[tuple[str, int]]:
        """(label, rows) of every group, in order."""
        yield from ((label, rows) for label, rows in self.metadata["groups"])

    def get(self, label: str, name: str) -> torch.Tensor | None:
        return self.tensors.get(f"{label}/{name}")


def open_shard(storage: Storage, name: str) -> ShardFile:
    """Open a shard file. Raises UserError where it is missing, is not one, or is of a newer format."""
    where = storage.locate(name)
    try:
        if storage.is_local:
            with safe_open(where, framework="pt") as file:
                header = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            data = storage.read(name)
            tensors = load_bytes(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
        metadata = json.loads((header or {})[METADATA_KEY])
    except FileNotFoundError:
        raise UserError(f"{where}: missing. Run latentprep encode again to make it.") from None
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        raise UserError(f"{where}: not a latentprep shard ({error}). Run latentprep encode again.") from None
    check_format(metadata.get("format"), where)
    return ShardFile(name, metadata, tensors)


def check_format(found: object, where: str) -> None:
    """Raise UserError unless this version of latentprep reads the format."""
    if not isinstance(found, int):
        raise UserError(f"{where}: no format number, so not a latentprep cache.")
    if found > FORMAT:
        raise UserError(f"{where}: format {found}, this latentprep reads up to format {FORMAT}. Upgrade latentprep.")


def read_keys(text: ShardFile, label: str) -> list[str]:
    return list(Strings(text.tensors, f"{label}/key"))


def read_captions(text: ShardFile, label: str) -> list[list[str]]:
    captions = list(Strings(text.tensors, f"{label}/caption"))
    rows = text.tensors[f"{label}/caption_rows"].tolist()
    return [captions[a:b] for a, b in pairwise(rows)]


def cond_of(tensors: Tensors) -> Tensors:
    """name -> tensor of every cond in a text or uncond file."""
    return {name.removeprefix("cond/"): value for name, value in tensors.items() if name.startswith("cond/")}
