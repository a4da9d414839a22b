"""WebDataset tar shards as a source: the members of every tar in a folder, or of one. Nothing is unpacked to disk.

The key of a member is that of its tar and its name: `00000.tar/0001.jpg`.
"""

import re
from array import array
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from io import BufferedReader
from pathlib import Path
from threading import Lock
from typing import IO, Any, cast

import numpy as np

from latentprep.prepare.images.pillow import describe, is_image_name
from latentprep.prepare.source.door import TEXTS, File, NotRegularError, Source
from latentprep.prepare.source.folder import Folder, check_inside, check_name, file_at, open_regular, walk
from latentprep.prepare.source.members import Member, Region, TarError, list_members, read_member
from latentprep.records import Skip

SUFFIX = ".tar"
INSIDE = re.compile(r"\.tar/", re.IGNORECASE | re.ASCII)
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")  # of those, no member can be read by itself


@dataclass(frozen=True, eq=False)
class Offsets:
    """Where the members of a tar begin, sorted by a hash of their names: 16 bytes for each of a million members."""

    hashes: np.ndarray  # [N] uint64, sorted
    offsets: np.ndarray  # [N] int64: of the first of the member's headers

    @classmethod
    def from_members(cls, hashes: "array[int]", offsets: "array[int]") -> "Offsets":
        """Members of equal names stay in their order, so that find() gives the last."""
        order = np.argsort(found := np.array(hashes, np.uint64), kind="stable")
        return cls(found[order], np.array(offsets, np.int64)[order])

    def find(self, name: str) -> int | None:
        """Where the last member of a name begins, as unpacking would have it."""
        wanted = np.uint64(hash_name(name))
        place = int(np.searchsorted(self.hashes, wanted, side="right")) - 1
        return int(self.offsets[place]) if place >= 0 and self.hashes[place] == wanted else None


class Tars(Source):
    """The members of tars, and the files beside them. The version of a member is made of its place and its header.

    Where members begin is learnt while a tar is listed. This is kept for reading, and goes to other processes too. A
    tar that was not listed is searched when it is first read.
    """

    sidecars = (*TEXTS, ".json")  # of img2dataset and others: width, height, url, and the caption

    def __init__(self, where: str, without: tuple[Path, ...] = ()) -> None:
        self.where = where
        self._is_one = Path(where).is_file()
        self._root = Path(where).parent if self._is_one else Path(where)  # what keys are relative to
        self._files = Folder(str(self._root), without)
        self._known: dict[str, Offsets] = {}  # key of a tar -> where its members are
        self._lock = Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _lock=Lock())

    def list(self) -> Iterator[File | Skip]:
        name = Path(self.where).name
        for found in [file_at(Path(self.where), name)] if self._is_one else self._files.list():
            if isinstance(found, Skip) or not is_tar_name(found.key):
                yield found
            else:
                yield from self._list_tar(found)

    def _list_tar(self, tar: File) -> Iterator[File | Skip]:
        """The members of a tar, then what is wrong with it, if anything: what a cache has of the rest stays."""
        hashes, offsets = array("Q"), array("q")
        try:
            check_not_compressed(tar.key)
            with open_regular(self._root / tar.key) as file:
                for member in list_members(file):
                    hashes.append(hash_name(member.name))
                    offsets.append(member.offset)
                    opens = partial(open_member, file, member)
                    yield File(f"{tar.key}/{member.name}", member.nbytes, member.version, opens)
        except (TarError, OSError) as error:
            yield Skip(tar.key, "unreadable_folder", str(error) if isinstance(error, TarError) else describe(error))
        with self._lock:
            self._known[tar.key] = Offsets.from_members(hashes, offsets)

    @contextmanager
    def open(self, key: str, limit: int) -> Iterator[IO[bytes]]:
        check_name(key)
        tar = self._tar_of(key)
        if tar is None:
            with self._files.open(key, limit) as opened:
                yield opened
        else:
            with self._open_in(tar, key) as (opened, _):
                yield opened

    def read(self, key: str, limit: int) -> bytes:
        check_name(key)
        tar = self._tar_of(key)
        if tar is None:
            return self._files.read(key, limit)
        with self._open_in(tar, key) as (opened, nbytes):
            return opened.read(min(nbytes, max(0, limit) + 1))

    @contextmanager
    def _open_in(self, tar: str, key: str) -> Iterator[tuple[IO[bytes], int]]:
        """A member of a tar, and how many bytes it has."""
        check_inside(tar)
        name = key[len(tar) + 1 :]
        with open_regular(self._root / tar) as file:
            try:
                offset = self._search(tar, file).find(name)
                member = read_member(file, offset) if offset is not None else None
            except TarError as error:
                raise OSError(f"{tar}: {error}") from error
            if offset is None:
                raise FileNotFoundError(2, "No such member", key)
            if member is None or member.name != name:
                raise OSError(f"{tar} was written anew while its images were read")
            with open_member(file, member) as opened:
                yield opened, member.nbytes

    def is_there(self) -> bool:
        return Path(self.where).is_file() if self._is_one else Path(self.where).is_dir()

    def _tar_of(self, key: str) -> str | None:
        """The key of the tar that holds a member; None: a file beside the tars."""
        for found in INSIDE.finditer(key):
            tar = key[: found.end() - 1]
            if tar in self._known or (self._root / tar).is_file():
                return tar
        return None

    def _search(self, tar: str, file: IO[bytes]) -> Offsets:
        """Where the members of a tar are: as it was listed, or looked for now."""
        with self._lock:
            if tar not in self._known:
                self._known[tar] = search_tar(file)
            return self._known[tar]


def search_tar(file: IO[bytes]) -> Offsets:
    """Where the members of a tar are; of a damaged one those that stand before the damage."""
    hashes, offsets = array("Q"), array("q")
    with suppress(TarError):
        for member in list_members(file):
            hashes.append(hash_name(member.name))
            offsets.append(member.offset)
    return Offsets.from_members(hashes, offsets)


def open_tars(where: str, without: tuple[Path, ...]) -> Tars | None:
    """A tar, or a folder that holds tars and no images, neither in it nor below it."""
    path = Path(where)
    if not path.is_dir():
        return Tars(where) if is_tar_name(path.name) and path.is_file() else None
    has_tars = False
    try:
        for found in walk(path, without):
            name = "" if isinstance(found, Skip) else found.name
            if is_image_name(name):
                return None
            has_tars = has_tars or is_tar_name(name)
    except OSError:
        return None  # the folder will say so itself
    return Tars(where, without) if has_tars else None


def is_tar_name(name: str) -> bool:
    return name.lower().endswith((SUFFIX, *COMPRESSED))


def check_not_compressed(name: str) -> None:
    """Raise TarError for a name that says so."""
    if not name.lower().endswith(SUFFIX):
        raise TarError("a compressed tar, of which no image can be read by itself. Decompress it to a .tar once")


def open_member(file: IO[bytes], member: Member) -> IO[bytes]:
    """The content of a member of an open tar. Raises NotRegularError for links and the like."""
    if not member.is_regular:
        raise NotRegularError("a link or another special member of a tar, not a regular file")
    return cast("IO[bytes]", BufferedReader(Region(file, member.start, member.nbytes)))


def hash_name(name: str) -> int:
    return int.from_bytes(blake2b(name.encode("utf-8", "surrogateescape"), digest_size=8).digest())
