"""Readers of a cache hold a shared lock. Files that the manifest no longer names are deleted once nobody holds it.

So a reader can read to the end what it has opened, whatever encode and compact do meanwhile. Where there are no locks
(Windows, a remote, some network disks), such files are deleted after a day.
"""

import errno
import json
import os
import time
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from latentprep.cache.names import MANIFEST
from latentprep.cache.storage import Storage
from latentprep.errors import UserError

NAME = ".readers"  # the file that is locked; it is empty
SUPERSEDED_NAME = ".superseded.json"  # name of a file -> since when no manifest names it, in seconds since 1970
GRACE = 24 * 3600  # seconds
# a pipe of that name is not waited for, and no link is followed; Windows has none of these
FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW"))


class Reading:
    """A reader of a cache, from before it reads the manifest until it is closed, or forgotten."""

    def __init__(self, storage: Storage) -> None:
        self.storage = storage
        # the lock file is created only if the folder is a cache
        self._descriptor = _open(storage, os.O_RDONLY, may_make=os.path.isfile(storage.locate(MANIFEST)))
        if self._descriptor is not None and not _lock(self._descriptor, exclusive=False):
            self.close()

    def close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "Reading":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        if getattr(self, "_descriptor", None) is not None:
            self.close()

    def __reduce__(self) -> tuple[Any, ...]:
        return Reading, (self.storage,)  # a spawned process takes the lock itself; until then its parent holds it


def free(storage: Storage, names: Iterable[str], named: Collection[str] = ()) -> list[str]:
    """Delete files that the manifest does not name, if no reader can need them; returns those that were deleted.

    named: the files that the manifest names. One of them may still be on the list of files to delete after a day; it is
    taken off that list.
    """
    names = list(names)
    if not names and storage.is_local:
        return []
    with _alone(storage) as is_alone:
        if is_alone is False:
            return []
        if is_alone is None:
            return _free_after_a_day(storage, names, named)
        return [name for name in names if storage.delete_unless_open(name)]


def invite_readers(storage: Storage) -> None:
    """Make the file that readers lock: they may not be allowed to make one."""
    descriptor = _open(storage, os.O_RDWR)
    if descriptor is not None:
        os.close(descriptor)


def list_waiting(storage: Storage, names: list[str]) -> list[str]:
    """Those of `names` that are kept because somebody may read them. Writes nothing.

    names: files that the manifest does not name.
    """
    descriptor = _open(storage, os.O_RDONLY, may_make=False)
    try:
        if descriptor is not None and _lock(descriptor, exclusive=True) is False:
            return names
    finally:
        if descriptor is not None:
            os.close(descriptor)
    return [name for name in names if name in _superseded(storage)]


@contextmanager
def _alone(storage: Storage) -> Iterator[bool | None]:
    """Whether nobody reads, for as long as the context lasts; None if that cannot be known."""
    descriptor = _open(storage, os.O_RDWR)
    try:
        yield None if descriptor is None else _lock(descriptor, exclusive=True)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open(storage: Storage, flags: int, may_make: bool = True) -> int | None:
    """Descriptor of the lock file; it is created if it is missing and may_make is true. None if it cannot be opened."""
    if not storage.is_local or not os.path.isdir(storage.path):
        return None
    path = storage.locate(NAME)
    if may_make:
        try:
            return os.open(path, flags | os.O_CREAT | FLAGS, 0o644)
        except OSError:
            pass  # read-only: it may be there all the same
    try:
        return os.open(path, os.O_RDONLY | FLAGS)
    except OSError:
        return None


def _lock(descriptor: int, *, exclusive: bool) -> bool | None:
    """Whether the lock was taken; None if this system or disk has no locks.

    A shared lock waits until it is free; an exclusive one does not wait.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB if exclusive else fcntl.LOCK_SH)
    except OSError as error:
        return False if error.errno in (errno.EWOULDBLOCK, errno.EACCES) else None
    return True


def _free_after_a_day(storage: Storage, names: list[str], named: Collection[str]) -> list[str]:
    """Delete the files that no manifest has named for a day: of `names`, and of the list in SUPERSEDED_NAME.

    The others are written to this list, with the time since when. Returns the files that were deleted.
    """
    now, known = time.time(), _superseded(storage)
    since = {name: min(known.get(name, now), now) for name in {*names, *known} if name not in named}
    old = sorted(name for name in since if now - since[name] >= GRACE)
    gone = {name for name in old if storage.delete_unless_open(name)}
    left = {name: since[name] for name in since if name not in gone}
    if left != known:
        with suppress(UserError):  # then a day begins anew
            storage.write_atomic(SUPERSEDED_NAME, json.dumps(left, indent=1, sort_keys=True).encode())
    return sorted(gone)


def _superseded(storage: Storage) -> dict[str, float]:
    """What SUPERSEDED_NAME says; nothing if it is not there, or damaged: then a day begins anew."""
    try:
        found = json.loads(storage.read_json(SUPERSEDED_NAME))
        return {str(name): float(since) for name, since in found.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
