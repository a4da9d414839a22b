"""A folder as a source: every file in and below it."""

import errno
import os
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PureWindowsPath
from typing import IO

from latentprep import system
from latentprep.prepare.images.pillow import describe
from latentprep.prepare.source.door import File, NotRegularError, Source
from latentprep.records import Skip

HAS_EFFECTIVE_IDS = os.access in os.supports_effective_ids  # else os.access asks for the user who started the program
READ = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True)
class Folder(Source):
    """The files of a folder, searched recursively. The version of a file is its time."""

    where: str
    without: tuple[Path, ...] = ()  # folders that are left out

    def list(self) -> Iterator[File | Skip]:
        root = os.path.join(self.where, "")  # a Path for each file takes longer than all else here
        for found in scan(self.where, self.without):
            yield found if isinstance(found, Skip) else file_at(root + found, found)

    @contextmanager
    def open(self, key: str, limit: int) -> Iterator[IO[bytes]]:
        check_name(key)
        check_inside(key)
        with open_regular(Path(self.where) / key) as file:
            yield file

    def read(self, key: str, limit: int) -> bytes:
        with self.open(key, limit) as file:
            size = os.fstat(file.fileno()).st_size
            return file.read(max(0, min(size, limit)) + 1)  # Python takes memory for all that is asked for

    def is_there(self) -> bool:
        return Path(self.where).is_dir()

    def can_open(self, key: str) -> bool:
        return os.access(f"{self.where}/{key}", os.R_OK, effective_ids=HAS_EFFECTIVE_IDS)


def open_folder(where: str, without: tuple[Path, ...]) -> Folder | None:
    """A folder, whatever is in it."""
    return Folder(where, without) if Path(where).is_dir() else None


def check_name(key: str) -> None:
    """Raise OSError for a key that no file can have: a stranger's text may hold half a surrogate pair."""
    try:
        os.fsencode(key)
    except UnicodeEncodeError:
        raise FileNotFoundError(errno.ENOENT, "No such file or directory", key) from None


def check_inside(key: str) -> None:
    """Raise OSError for a key that leads out of its folder on Windows alone: with a drive, or .. between backslashes.

    Keys of a cache are a stranger's; that none has a leading / or .. between slashes was checked as it was opened.
    """
    path = PureWindowsPath(key)
    if system.IS_WINDOWS and (path.anchor or ".." in path.parts):
        raise OSError("its name leads outside of the source")


def file_at(path: Path | str, key: str) -> File:
    """A file on a disk, under a key."""
    try:
        status = os.stat(path)
    except OSError:
        return File(key, -1, -1, partial(open_regular, path))
    return File(key, status.st_size, status.st_mtime_ns, partial(open_regular, path))


def open_regular(path: Path | str) -> IO[bytes]:
    """A regular file, open for reading. Raises OSError; NotRegularError at once for a pipe, which may have no end."""
    descriptor = os.open(path, READ)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise NotRegularError("not a regular file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def walk(folder: Path, without: Iterable[Path] = ()) -> Iterator[Path | Skip]:
    """What `scan` finds, as paths."""
    for found in scan(str(folder), without):
        yield found if isinstance(found, Skip) else folder / found


def scan(folder: str, without: Iterable[Path] = ()) -> Iterator[str | Skip]:
    """Keys of the files under a folder, following links to folders but never in a circle; hidden files and caches are
    left out.

    A folder below it that cannot be listed is a Skip. Raises OSError if `folder` itself cannot be.
    """
    seen: set[object] = set()
    pending = [(Path(folder), "")]  # folders, each with what keys of its files begin with
    hidden = {path.resolve() for path in without}
    while pending:
        here, start = pending.pop()
        try:
            status = here.stat()
            # some network disks of Windows number no file
            known_by = (status.st_dev, status.st_ino) if status.st_ino else here.resolve()
            if known_by in seen or here.resolve() in hidden:
                continue
            seen.add(known_by)
            if start and (here / "cache.json").is_file() and (here / "shards").is_dir():
                continue  # another latent cache
            with os.scandir(here) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            if not start:
                raise
            yield Skip(start[:-1], "unreadable_folder", describe(error))
            continue
        for entry in entries:
            if is_folder(entry):
                pending.append((Path(entry.path), f"{start}{entry.name}/"))
            else:
                yield start + entry.name


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder, or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False
