"""A folder's items against the rows of a cache: which row stands for which item now, and what has changed.

By key, size and time first, by content where those differ: so a touched file is known again, and a renamed one.
"""

from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np

from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.prepare.plan.stored import StoredRows
from latentprep.records import Change, Item, Row

HashFiles = Callable[[list[Item]], list[bytes | None]]  # 16 bytes each: content hash; None: cannot be read
Spot = tuple[int, int]  # a shard by its number, a row of it


@dataclass(eq=False)
class ShardRows:
    """A shard's rows: what they say, and what they are to stand for."""

    stored: StoredRows
    owner: list[Item | None]  # of each row: its item; None: a dead row

    @property
    def shard(self) -> Shard:
        return self.stored.shard

    def says(self) -> list[Item | Row]:
        """What the text file is to say: of a live row its item, of a dead row the row as it is stored."""
        return [self.stored.row(n) if item is None else item for n, item in enumerate(self.owner)]

    def rows(self) -> tuple[Row, ...]:
        """What says() gives, as Rows."""
        return tuple(own.row if isinstance(own, Item) else own for own in self.says())

    def dead(self) -> tuple[int, ...]:
        return tuple(n for n, item in enumerate(self.owner) if item is None)


class Matching:
    """Finds an item for every row, in three passes: the same file, the same content, the same content elsewhere."""

    def __init__(
        self,
        items: list[Item],
        shards: Iterable[StoredRows],
        storage: Storage,
        hash_files: HashFiles,
        unread: Collection[str] = (),
        check_content: bool = False,
    ) -> None:
        """`unread`: keys of images and folders that are there and cannot be read now: rows of theirs stay as they are.

        With `check_content` equal names, sizes and times are no proof: the content is compared.
        """
        self.left = {item.key: item for item in items}  # those that have no row, by key
        self.check_content = check_content
        self.storage = storage
        self.shards = [ShardRows(stored, [None] * len(stored)) for stored in shards]
        self.num_held = 0  # items that have a row
        self.changes: list[Change] = []  # of rows; the plan explains the items that have none
        self._digests: dict[int, np.ndarray] = {}
        self._hash_files = hash_files
        self._hashed: dict[str, bytes | None] = {}
        self._dead = {(s, n) for s, own in enumerate(self.shards) for n in own.shard.dead}
        self.unread: set[str] = set()  # keys of the rows that stay, since their image cannot be read now
        if unread:
            self._keep_unread(set(unread))
        self._match_files()
        self._match_contents()
        self._match_elsewhere()
        self.outdated = self._find_outdated()  # keys of images that have another content now

    def _row(self, spot: Spot) -> Row:
        return self.shards[spot[0]].stored.row(spot[1])

    def _fingerprint(self, spot: Spot) -> tuple[str, int, int]:
        """Key, bytes and version of a row."""
        stored, n = self.shards[spot[0]].stored, spot[1]
        return stored.key[n], stored.nbytes[n], stored.version[n]

    def _free(self) -> Iterator[Spot]:
        """Rows without an item. Those that count come first, so that no dead row takes an item from them."""
        for s, own in enumerate(self.shards):
            dead = frozenset(own.shard.dead)
            yield from ((s, n) for n, item in enumerate(own.owner) if item is None and n not in dead)
        yield from sorted(spot for spot in self._dead if self.shards[spot[0]].owner[spot[1]] is None)

    def _give(self, spot: Spot, item: Item, what: str = "", detail: str = "") -> None:
        self.shards[spot[0]].owner[spot[1]] = item
        self.left.pop(item.key)
        self.num_held += 1
        if spot in self._dead:
            what = "returned"
        if what:
            self.changes.append(Change(item.key, what, detail))

    def _stay(self, row: Row) -> Item:
        """What stands for a row whose image cannot be read now: the row as it is."""
        self.left[row.key] = Item(row.key, (0, 0), row.nbytes, row.version, row.captions)
        self.unread.add(row.key)
        return self.left[row.key]

    def _keep_unread(self, unread: set[str]) -> None:
        for spot in self._free():
            row = self._row(spot)
            above = {row.key, *map(str, PurePosixPath(row.key).parents)}
            if spot not in self._dead and row.key not in self.left and above & unread:
                self._stay(row)

    def _match_files(self) -> None:
        if self.check_content:
            self._hash([item for item in self.left.values() if item.key not in self.unread])
        for s, own in enumerate(self.shards):
            files = enumerate(zip(own.stored.key, own.stored.nbytes, own.stored.version, strict=True))
            self._match_rows(((s, n), *file) for n, file in files if (s, n) not in self._dead)
        self._match_rows((spot, *self._fingerprint(spot)) for spot in sorted(self._dead))

    def _match_rows(self, rows: Iterable[tuple[Spot, str, int, int]]) -> None:
        """Give rows, with their key, bytes and version, the items that they have as they are."""
        for spot, key, nbytes, version in rows:
            item = self.left.get(key)
            if item is None or item.nbytes != nbytes or item.version != version:
                continue
            is_read = self.check_content and key not in self.unread
            if not is_read or self._hashed[key] == self._digest(spot):
                self._give(spot, item)

    def content_of(self, item: Item) -> str:
        """With --check-content: the content hash, in hex, of an item whose row has another content; "" for others."""
        digest = self._hashed.get(item.key) if self.check_content else None
        return digest.hex() if digest is not None and item.key in self.outdated else ""

    def _match_contents(self) -> None:
        pairs: list[tuple[Spot, Item]] = []
        for spot in self._free():
            key, nbytes, _ = self._fingerprint(spot)
            item = self.left.get(key)
            if item is not None and item.nbytes == nbytes:
                pairs.append((spot, item))
        self._hash([item for _, item in pairs])
        for spot, item in pairs:
            if item.key not in self.left:
                continue
            if self._hashed[item.key] is None and spot not in self._dead:
                self._give(spot, self._stay(self._row(spot)))
            elif self._hashed[item.key] == self._digest(spot):
                self._give(spot, item, "touched")

    def _match_elsewhere(self) -> None:
        sizes = {self._fingerprint(spot)[1] for spot in self._free()}
        candidates = [item for item in self.left.values() if item.nbytes in sizes]
        self._hash(candidates)
        sizes = {item.nbytes for item in candidates}
        free: defaultdict[bytes, deque[Spot]] = defaultdict(deque)
        for spot in self._free():
            if self._fingerprint(spot)[1] in sizes:
                free[self._digest(spot)].append(spot)
        for item in candidates:
            digest = self._hashed[item.key]
            if digest is not None and free[digest]:
                spot = free[digest].popleft()
                self._give(spot, item, "renamed", f"was {self._fingerprint(spot)[0]}")

    def _find_outdated(self) -> set[str]:
        keys = {self._fingerprint(spot)[0] for spot in self._free() if spot not in self._dead}
        if not keys:
            return keys
        held = {item.key for own in self.shards for item in own.owner if item is not None}
        self.changes += [Change(key, "gone") for key in sorted(keys - held - self.left.keys())]
        return keys & self.left.keys()

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
