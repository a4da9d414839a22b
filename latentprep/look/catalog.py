"""A cache by hashes, in arrays: two caches of a million rows each are compared in 0.8 GB of memory."""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from latentprep.cache.group import Group, LatentGroup, TextGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.strings import Strings
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.recipe import TextRecipe
from latentprep.records import Problem

HASH = "S16"  # 16 bytes; numpy sorts and compares them as they are
Problems = dict[tuple[str, str], Problem]  # name of a cache, what is wrong -> the problem, each once
UNKNOWN = b""  # stands for what a damaged file does not say


@dataclass(frozen=True, eq=False)
class Catalog:
    """The N rows of a cache that count, and its P prompts."""

    name: str  # A or B
    storage: Storage
    manifest: Manifest
    keys: Strings  # [N]
    key: np.ndarray  # [N] S16: hash of the key
    content: np.ndarray  # [N] S16: digest of the image; UNKNOWN if its latents file is damaged
    caption: np.ndarray  # [N] S16: hash of all of its captions; UNKNOWN if its text file is damaged
    spot: np.ndarray  # [N,3] int32: shard, group, row
    prompt: np.ndarray  # [P] S16, sorted: hash of a prompt, each once
    prompt_spot: np.ndarray  # [P,2] int32: shard, number in its text


@dataclass(frozen=True, eq=False)
class Part:
    """What a catalog has of a shard."""

    lengths: np.ndarray  # [n] of the keys in bytes
    names: bytes  # the keys, end to end
    key: np.ndarray
    content: np.ndarray
    caption: np.ndarray
    spot: np.ndarray
    prompt: np.ndarray
    prompt_spot: np.ndarray


def make_catalog(
    name: str, storage: Storage, manifest: Manifest, problems: Problems, progress: Callable[[int], object]
) -> Catalog:
    """Reads keys, digests, captions and prompts. `progress` hears of images. A damaged file becomes a problem."""
    parts: list[Part] = []
    for number, entry in enumerate(manifest.shards):
        if entry.num_images:
            parts += read_part(name, storage, number, entry, problems)
        progress(entry.num_images)
    names = b"".join(part.names for part in parts)
    ends = np.cumsum(np.concatenate([[0], *(part.lengths for part in parts)])).astype(np.int64)
    tensors = {"key": torch.frombuffer(bytearray(names or b"\0"), dtype=torch.uint8)[: len(names)]}
    keys = Strings({**tensors, "key_offsets": torch.from_numpy(ends)}, "key")
    prompts = np.concatenate([hashes_of(()), *(part.prompt for part in parts)])
    prompt, first = np.unique(prompts, return_index=True)
    return Catalog(
        name, storage, manifest, keys,
        key=np.concatenate([hashes_of(()), *(part.key for part in parts)]),
        content=np.concatenate([hashes_of(()), *(part.content for part in parts)]),
        caption=np.concatenate([hashes_of(()), *(part.caption for part in parts)]),
        spot=np.concatenate([np.zeros((0, 3), np.int32), *(part.spot for part in parts)]),
        prompt=prompt,
        prompt_spot=np.concatenate([np.zeros((0, 2), np.int32), *(part.prompt_spot for part in parts)])[first],
    )  # fmt: skip


def read_part(name: str, storage: Storage, number: int, entry: Shard, problems: Problems) -> list[Part]:
    """A shard's rows that count; none if both of its files are damaged."""
    latents: list[LatentGroup] | None = None
    text = None
    try:
        latents = entry.open_latents(storage).groups
    except UserError as error:
        add_problem(problems, name, entry.latents_name, str(error))
    try:
        text = entry.open_text(storage)
    except UserError as error:
        add_problem(problems, name, entry.text_name, str(error))
    # a latents file has keys too, as they were when it was encoded
    groups: Sequence[Group] | None = text.groups if text is not None else latents
    if groups is None:
        detail = f"neither of its files can be read; its {counted(entry.num_images, 'image')} count as not there"
        add_problem(problems, name, entry.id, f"shard {entry.id}: {detail}")
        return []
    live = entry.live_rows()
    keys = [as_bytes(own.key[row]) for own, rows in zip(groups, live, strict=True) for row in rows.tolist()]
    unknown = np.full(len(keys), UNKNOWN, HASH)
    used = numbers_of_prompts(text.groups, live) if text is not None else np.zeros(0, np.int64)
    return [
        Part(
            lengths=np.array([len(key) for key in keys], np.int64),
            names=b"".join(keys),
            key=hashes_of(keys),
            content=unknown if latents is None else digests_of(latents, live),
            caption=unknown if text is None else captions_of(text.groups, live),
            spot=spots_of(number, live),
            prompt=prompts_of(text, used, latents, live) if text is not None else unknown[:0],
            prompt_spot=np.stack([np.full_like(used, number), used], axis=1).astype(np.int32),
        )
    ]


def add_problem(problems: Problems, cache: str, file: str, detail: str) -> None:
    """Add a file that cannot be read. Several may tell of the same one: those that borrow cond from it."""
    problems.setdefault((cache, detail), Problem(file, "unreadable", detail))


def as_bytes(text: str) -> bytes:
    """UTF-8; bytes of a file name that are none pass through, as in strings.py."""
    return text.encode("utf-8", "surrogateescape")


def hashes_of(texts: Iterable[bytes]) -> np.ndarray:
    """[n] S16."""
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=16).digest() for text in texts), HASH)


def numbers_of_prompts(groups: Sequence[TextGroup], live: list[np.ndarray]) -> np.ndarray:
    """The prompts of rows that count, by their numbers in the file, rising."""
    return np.unique(np.concatenate([group.numbers(rows).ravel() for group, rows in zip(groups, live, strict=True)]))


def prompts_of(text: Text, used: np.ndarray, latents: list[LatentGroup] | None, live: list[np.ndarray]) -> np.ndarray:
    """[n] S16: hashes of prompts, given by their numbers; of prompts that see images, with those of their images."""
    seen: dict[int, bytes] = {}
    if TextRecipe.SEES_IMAGES in text.metadata.get("recipe", {}):
        for group, own, rows in zip(text.groups, latents or [], live, strict=False):
            for row in rows.tolist():
                seen |= dict.fromkeys(
                    group.numbers(np.array([row])).ravel().tolist(), own.digest[row].numpy().tobytes()
                )
    return hashes_of(seen.get(n, b"") + as_bytes(text.prompt[n]) for n in used.tolist())


def digests_of(groups: list[LatentGroup], live: list[np.ndarray]) -> np.ndarray:
    found = [group.digest.numpy()[rows].tobytes() for group, rows in zip(groups, live, strict=True)]
    return np.frombuffer(b"".join(found), HASH)


def captions_of(groups: list[TextGroup], live: list[np.ndarray]) -> np.ndarray:
    own = (group.caption[row] for group, rows in zip(groups, live, strict=True) for row in rows.tolist())
    return hashes_of(json.dumps(captions).encode() for captions in own)


def spots_of(number: int, live: list[np.ndarray]) -> np.ndarray:
    """[n,3] int32: shard, group, row."""
    groups = np.repeat(np.arange(len(live)), [len(rows) for rows in live])
    return np.stack([np.full_like(groups, number), groups, np.concatenate(live)], axis=1).astype(np.int32)


def pair_up(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[K,2] int64: places of equal values in `one` and in `other`, in the order of `one`.

    If a value is there more than once, its n-th place in `one` is paired with its n-th place in `other`.
    """
    _, numbers = np.unique(np.concatenate([one, other]), return_inverse=True)
    numbers = numbers.reshape(-1).astype(np.int64)  # numpy 2.0 alone gives it another shape
    most = len(numbers) + 1
    mine, theirs = (part * most + occurrences(part) for part in np.split(numbers, [len(one)]))
    _, first, second = np.intersect1d(mine, theirs, assume_unique=True, return_indices=True)
    order = np.argsort(first)
    return np.stack([first[order], second[order]], axis=1)


def occurrences(numbers: np.ndarray) -> np.ndarray:
    """[n] how often each number stands before its place."""
    order = np.argsort(numbers, kind="stable")
    ordered = numbers[order]
    begins = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if len(ordered) else order
    lengths = np.diff([*begins, len(ordered)]) if len(ordered) else order
    found = np.empty_like(numbers)
    found[order] = np.arange(len(numbers)) - np.repeat(begins, lengths)
    return found


def without(count: int, taken: np.ndarray) -> np.ndarray:
    """The numbers below `count` that are not taken, rising."""
    is_left = np.ones(count, bool)
    is_left[taken] = False
    return np.flatnonzero(is_left)
