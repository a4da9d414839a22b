"""A folder's items against the rows of a cache: which row stands for which item now, and what has changed.

By key, size and time first, by content where those differ: so a touched file is known again, and a renamed one.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.records import Change, Item, Row

HashFiles = Callable[[list[Item]], list[bytes | None]]  # 16 bytes each: content hash; None: cannot be read
Spot = tuple[int, int]  # a shard by its number, a row of it


@dataclass(eq=False)
class ShardRows:
    """A shard's rows: what they say, and what they are to stand for."""

    shard: Shard
    recipe: dict[str, Any]  # that its text file was made with, in JSON; empty: it has none
    stored: list[Row]
    owner: list[Item | None]  # of each row: its item; None: a dead row
    silent: tuple[int, ...] = ()  # rows that were dead when its text was made, and have no prompts
    cond_files: tuple[str, ...] = ()  # that its text borrows from

    def rows(self) -> list[Row]:
        """What the text file is to say; of a dead row, what it says."""
        return [row if item is None else item.row for row, item in zip(self.stored, self.owner, strict=True)]

    def dead(self) -> tuple[int, ...]:
        return tuple(n for n, item in enumerate(self.owner) if item is None)


def _open(storage: Storage, shard: Shard) -> ShardRows:
    """The rows of a shard, none of them matched. Raises UserError."""
    text = shard.open_text(storage) if shard.text_id else None
    stored = text.rows() if text is not None else shard.open_latents(storage).rows()
    if text is None:
        return ShardRows(shard, {}, stored, [None] * len(stored))
    recipe = text.metadata.get("recipe", {})
    return ShardRows(shard, recipe, stored, [None] * len(stored), text.dead, text.cond_files)


class Matching:
    """Finds an item for every row, in three passes: the same file, the same content, the same content elsewhere."""

    def __init__(
        self,
        items: list[Item],
        shards: list[Shard],
        storage: Storage,
        hash_files: HashFiles,
        unread: Collection[str] = (),
        check_content: bool = False,
        count: Callable[[int], object] = int,
    ) -> None:
        """`unread`: keys of images and folders that are there and cannot be read now: rows of theirs stay as they are.

        With `check_content` equal names, sizes and times are no proof: the content is compared. `count` hears of each
        shard that was read.
        """
        self.items = {item.key: item for item in items}
        self.check_content = check_content
        self.storage = storage
        self.shards: list[ShardRows] = []
        self.lost: list[str] = []  # what is wrong with the shards that cannot be read: as if they were not there
        for shard in shards:
            count(1)
            try:
                self.shards.append(_open(storage, shard))
            except UnreadableError:
                raise  # it may be whole
            except UserError as error:
                self.lost.append(str(error))
        self.held: set[str] = set()  # keys of the items that have a row
        self.changes: list[Change] = []  # of rows; the plan explains the items that have none
        self._digests: dict[int, np.ndarray] = {}
        self._hash_files = hash_files
        self._hashed: dict[str, bytes | None] = {}
        # rows that count come first, so that no dead row takes an item from them
        spots = [(s, n) for s, shard in enumerate(self.shards) for n in range(len(shard.stored))]
        dead = {(s, n) for s, shard in enumerate(self.shards) for n in shard.shard.dead}
        self._spots = sorted(spots, key=lambda spot: spot in dead)
        self._dead = dead
        self.unread: set[str] = set()  # keys of the rows that stay, since their image cannot be read now
        self._keep_unread(set(unread))
        self._match_files()
        self._match_contents()
        self._match_elsewhere()
        self.outdated = self._find_outdated()  # keys of images that have another content now

    def _row(self, spot: Spot) -> Row:
        return self.shards[spot[0]].stored[spot[1]]

    def _free(self) -> Iterator[Spot]:
        return (spot for spot in self._spots if self.shards[spot[0]].owner[spot[1]] is None)

    def _give(self, spot: Spot, item: Item, what: str = "", detail: str = "") -> None:
        self.shards[spot[0]].owner[spot[1]] = item
        self.held.add(item.key)
        if spot in self._dead:
            what = "returned"
        if what:
            self.changes.append(Change(item.key, what, detail))

    def _stay(self, row: Row) -> Item:
        """What stands for a row whose image cannot be read now: the row as it is."""
        self.items[row.key] = Item(row.key, (0, 0), row.nbytes, row.version, row.captions)
        self.unread.add(row.key)
        return self.items[row.key]

    def _keep_unread(self, unread: set[str]) -> None:
        for spot in self._spots:
            row = self._row(spot)
            above = {row.key, *map(str, PurePosixPath(row.key).parents)}
            if spot not in self._dead and row.key not in self.items and above & unread:
                self._stay(row)

    def _match_files(self) -> None:
        if self.check_content:
            self._hash([item for item in self.items.values() if item.key not in self.unread])
        for spot in self._spots:
            row = self._row(spot)
            item = self.items.get(row.key)
            if item is None or item.key in self.held or item.row.fingerprint != row.fingerprint:
                continue
            is_read = self.check_content and item.key not in self.unread
            if not is_read or self._hashed[item.key] == self._digest(spot):
                self._give(spot, item)

    def content_of(self, item: Item) -> str:
        """The content hash of an item that differs from what stands under its name, size and time; "" for others."""
        digest = self._hashed.get(item.key) if self.check_content else None
        return digest.hex() if digest is not None and item.key in self.outdated else ""

    def _match_contents(self) -> None:
        pairs = [(spot, item) for spot in self._free() if (item := self.items.get(self._row(spot).key))]
        pairs = [(p, item) for p, item in pairs if item.key not in self.held and item.nbytes == self._row(p).nbytes]
        self._hash([item for _, item in pairs])
        for spot, item in pairs:
            if item.key in self.held:
                continue
            if self._hashed[item.key] is None and spot not in self._dead:
                self._give(spot, self._stay(self._row(spot)))
            elif self._hashed[item.key] == self._digest(spot):
                self._give(spot, item, "touched")

    def _match_elsewhere(self) -> None:
        sizes = {self._row(spot).nbytes for spot in self._free()}
        candidates = [item for item in self.items.values() if item.key not in self.held and item.nbytes in sizes]
        self._hash(candidates)
        sizes = {item.nbytes for item in candidates}
        free: defaultdict[bytes, deque[Spot]] = defaultdict(deque)
        for spot in self._free():
            if self._row(spot).nbytes in sizes:
                free[self._digest(spot)].append(spot)
        for item in candidates:
            digest = self._hashed[item.key]
            if digest is not None and free[digest]:
                spot = free[digest].popleft()
                self._give(spot, item, "renamed", f"was {self._row(spot).key}")

    def _find_outdated(self) -> set[str]:
        keys = {self._row(spot).key for spot in self._free() if spot not in self._dead} - self.held
        self.changes += [Change(key, "gone") for key in sorted(keys - self.items.keys())]
        return keys & self.items.keys()

    def _hash(self, items: list[Item]) -> None:
        missing = list({item.key: item for item in items if item.key not in self._hashed}.values())
        if missing:
            self._hashed.update(zip((item.key for item in missing), self._hash_files(missing), strict=True))

    def _digest(self, spot: Spot) -> bytes:
        shard, row = spot
        if shard not in self._digests:
            groups = self.shards[shard].shard.open_latents(self.storage).groups
            self._digests[shard] = np.concatenate([group.digest.numpy() for group in groups])
        return bytes(self._digests[shard][row].tobytes())
