"""One writer at a time: a lock on a cache folder that the system takes back when its holder dies, however it dies."""

import json
import os
import re
import shlex
import socket
import stat
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from latentprep import system
from latentprep.cache.ours import LOCK_NAME, check_ours
from latentprep.cache.storage import Storage
from latentprep.errors import LockedError, UserError

NAME = LOCK_NAME
PATIENCE = 0.5  # seconds to wait for a lock: a process that only checks whether it is free holds it for a moment
MOMENT = 0.02  # seconds between two attempts
RANK_NAME = re.compile(r"\.lock\.\d+-of-(\d+)")  # beside it, of each of several runs that share the work


@contextmanager
def hold(storage: Storage, share: tuple[int, int] | None = None, *, beside_ranks: bool = False) -> Iterator[None]:
    """Keep every other latentprep from writing to this cache. The folder is created, and removed if it stays empty.

    share: (rank, world size) of a run that shares the work with others. Runs of the other ranks may write too; all
    other runs, and a second run of the same rank, may not. beside_ranks: the caller is one of these runs, and the locks
    of the others are ignored.

    Raises LockedError with the process that holds the lock, or UserError if the folder has files of another program or
    cannot be locked. A remote cache has no lock: there, the same work writes the same files.
    """
    if not storage.is_local:
        yield
        return
    check_ours(storage)
    folder = Path(storage.path)
    made = _make_folder(folder)
    path = folder / (NAME if share is None else f"{NAME}.{share[0]}-of-{share[1]}")
    try:
        with _lock(storage, path):
            if not beside_ranks:
                ranks = {other: match[1] for other in folder.iterdir() if (match := RANK_NAME.fullmatch(other.name))}
                size = str(share[1]) if share is not None else ""
                strangers = [other for other, world_size in ranks.items() if world_size != size]
                _check_free(storage, [*strangers, folder / NAME] if share is not None else strangers)
            yield
    finally:
        with suppress(OSError):
            for empty in made:
                if any(empty.iterdir()):
                    break
                empty.rmdir()


@contextmanager
def _lock(storage: Storage, path: Path) -> Iterator[None]:
    """Hold one lock. Raises LockedError, UserError."""
    _check_lock(path)
    lock = FileLock(path)
    try:
        lock.acquire(PATIENCE, MOMENT)
    except Timeout:
        raise _locked(storage, path) from None
    except (OSError, NotImplementedError) as error:  # NotImplementedError: a disk without locks
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{storage.root}: cannot be locked ({reason}). Is it read-only?") from None
    try:
        try:
            path.write_text(json.dumps(_myself()), encoding="utf-8")
        except OSError as error:
            if not system.is_in_use(error):  # on Windows not even the holder of a lock may write to the locked file
                raise UserError(f"{path}: cannot be written ({error.strerror or error}).") from None
        yield
    finally:
        # Errors are suppressed here: they would hide an earlier one. If the file stays, the next run locks it again.
        # Unlink first, then release: a process that opened the file meanwhile sees that its name is gone, and retries.
        with suppress(OSError):
            path.unlink(missing_ok=True)
        with suppress(OSError):
            lock.release()
        if system.IS_WINDOWS:  # Windows does not unlink open files: if this works, no other process has it open
            with suppress(OSError):
                path.unlink(missing_ok=True)


def _check_free(storage: Storage, paths: list[Path]) -> None:
    """Raise LockedError if somebody holds one of these locks."""
    for path in paths:
        if not path.exists():
            continue
        lock = FileLock(path)
        try:
            lock.acquire(PATIENCE, MOMENT)
        except Timeout:
            raise _locked(storage, path) from None
        except (OSError, NotImplementedError):
            continue  # whether it is held cannot be known, so it counts as free
        with suppress(OSError):  # the process that held it was killed before it could delete the file
            path.unlink(missing_ok=True)
        lock.release()


def _locked(storage: Storage, path: Path) -> LockedError:
    return LockedError(
        f"{storage.root}: another latentprep run is writing it ({_holder(path)}). Wait for it, or stop it; "
        "what it has finished by then is taken up."
    )


def _check_lock(path: Path) -> None:
    """Raise UserError if something else has the lock's name: to write through a link would overwrite another file."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # not there; FileLock reports other errors
    if not stat.S_ISREG(mode):
        raise UserError(f"{path}: not a regular file, expected latentprep's lock. Remove it.")


def _make_folder(folder: Path) -> list[Path]:
    """Make a folder and its parents; returns those that were not there, the innermost first."""
    try:
        missing = [path for path in (folder, *folder.parents) if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made ({error.strerror or error}). Give another --out.") from None
    return missing


def _myself() -> dict[str, str | int]:
    return {
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        "command": shlex.join([_program(), *sys.argv[1:]]),
    }


def _program() -> str:
    """What this process runs: latentprep, or the script or notebook that called one of its functions."""
    path = Path(sys.argv[0])
    return path.parent.name if path.stem == "__main__" else path.name  # of `python -m latentprep`


def _holder(path: Path) -> str:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return "process {pid} on {host} since {since}: {command}".format(**found)
    except (OSError, ValueError, TypeError, KeyError):
        return "it has not said which"  # it has only just begun
