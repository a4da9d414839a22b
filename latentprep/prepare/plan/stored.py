"""What the shards of a cache say of its images: read once, before the source is listed and the plan is made."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.strings import StringLists, join_lists
from latentprep.errors import UnreadableError, UserError
from latentprep.prepare.images.pillow import max_bytes, max_pixels
from latentprep.records import Item, Row, Size


@dataclass(frozen=True, eq=False)
class StoredRows:
    """The rows of a shard, field by field: as objects they would take four times the memory."""

    shard: Shard
    recipe: dict[str, Any]  # that its text file was made with, in JSON; empty: it has none
    key: list[str]
    nbytes: list[int]
    version: list[int]
    caption: Sequence[list[str]]  # decoded when asked for
    silent: tuple[int, ...] = ()  # rows that were dead when its text was made, and have no prompts
    cond_files: tuple[str, ...] = ()  # that its text borrows from

    def __len__(self) -> int:
        return len(self.key)

    def row(self, number: int) -> Row:
        return Row(self.key[number], self.nbytes[number], self.version[number], tuple(self.caption[number]))


@dataclass(frozen=True)
class StoredShards:
    """The rows of the shards that can be read, and what is wrong with the others: as if those were not there."""

    shards: tuple[StoredRows, ...] = ()
    lost: tuple[str, ...] = ()

    def __add__(self, other: "StoredShards") -> "StoredShards":
        return StoredShards(self.shards + other.shards, self.lost + other.lost)


def read_shards(storage: Storage, shards: Iterable[Shard], count: Callable[[int], object] = int) -> StoredShards:
    """What shards say of their images. `count` is called for each, before it is read.

    Raises UnreadableError for a file that cannot be read now: it may be undamaged.
    """
    found: list[StoredRows] = []
    lost: list[str] = []
    for shard in shards:
        count(1)
        try:
            found.append(read_rows(storage, shard))
        except UnreadableError:
            raise
        except UserError as error:
            lost.append(str(error))
    return StoredShards(tuple(found), tuple(lost))


def read_rows(storage: Storage, shard: Shard) -> StoredRows:
    """What a shard says of its images: by its text file, or before it has one by its latents file. Raises UserError."""
    text = shard.open_text(storage) if shard.text_id else None
    groups: Sequence[Any] = text.groups if text is not None else shard.open_latents(storage).groups
    key = [name for group in groups for name in group.key]
    nbytes = [value for group in groups for value in group.nbytes.tolist()]
    version = [value for group in groups for value in group.version.tolist()]
    if text is None:
        return StoredRows(shard, {}, key, nbytes, version, [[]] * len(key))
    recipe = text.metadata.get("recipe", {})
    return StoredRows(
        shard,
        recipe,
        key,
        nbytes,
        version,
        join_lists([cast(StringLists, group.caption) for group in text.groups]),
        text.dead,
        text.cond_files,
    )


def list_known(storage: Storage, stored: StoredShards) -> dict[str, Item]:
    """Images whose header need not be read if their file has the same bytes and version, by key.

    Those are the images of rows that count, within --max-megapixels. Their sizes are in latents files: at a URL each of
    those would be fetched as a whole, so none is known.
    """
    known: dict[str, Item] = {}
    sizes: dict[Size, Size] = {}  # each once
    most_pixels, most_bytes = max_pixels(), max_bytes()
    for own in stored.shards if storage.is_local else ():
        try:
            groups = own.shard.open_latents(storage).groups
        except UserError:
            continue
        dead = frozenset(own.shard.dead)
        found = ((height, width) for group in groups for height, width in group.original_size.tolist())
        for n, size in enumerate(found):
            if n not in dead and size[0] * size[1] <= most_pixels and own.nbytes[n] <= most_bytes:
                known[own.key[n]] = Item(own.key[n], sizes.setdefault(size, size), own.nbytes[n], own.version[n])
    return known
