"""Whether a folder may become a cache: nothing of another program's is ever overwritten or deleted."""

import json
import os
from pathlib import Path

from latentprep import system
from latentprep.cache.names import FOLDER, MANIFEST, PARTIAL_NAME, SHARD_NAME, SKIPPED, is_temporary
from latentprep.cache.readers import NAME as READERS_NAME
from latentprep.cache.readers import SUPERSEDED_NAME
from latentprep.cache.storage import Storage
from latentprep.errors import UserError

LOCK_NAME = ".lock"
MANIFEST_START = b'{\n "format":'  # as commit() writes it


def check_ours(storage: Storage) -> None:
    """Raise UserError if a folder that is no cache of ours has files under the names that a cache gives.

    Other files in it are left alone, and are no obstacle.
    """
    folder = Path(storage.path)
    if not storage.is_local or not os.path.isdir(folder) or _is_cache(storage):
        return
    for name in (MANIFEST, SKIPPED, FOLDER, LOCK_NAME, READERS_NAME, SUPERSEDED_NAME):
        if os.path.lexists(folder / name) and not _may_be_ours(folder / name):
            raise UserError(
                f"--out {storage.root}: holds {name}, which latentprep did not write. "
                "Give the cache a folder of its own."
            )


def _is_cache(storage: Storage) -> bool:
    """Whether a folder holds a manifest or shards of ours, of a run that finished or not."""
    try:
        with open(storage.locate(MANIFEST), "rb") as file:
            if file.read(len(MANIFEST_START)) == MANIFEST_START:
                return True
    except OSError:
        pass  # there is none
    return any(SHARD_NAME.fullmatch(name) or PARTIAL_NAME.fullmatch(name) for name in storage.names(FOLDER))


def _may_be_ours(path: Path) -> bool:
    """Whether a killed run may have left this before its first shard: an empty folder, a lock, an empty file."""
    if path.name == FOLDER:
        return path.is_dir() and all(is_temporary(entry.name) for entry in path.iterdir())
    if path.is_symlink() or not path.is_file():
        return not os.path.lexists(path)  # gone meanwhile: another run has just ended
    try:
        data = path.read_bytes() if path.stat().st_size < 2**20 else b"?"
    except FileNotFoundError:
        return True  # gone meanwhile
    except OSError as error:
        return path.name == LOCK_NAME and system.is_in_use(error)  # whoever takes the lock sees that it is held
    if path.name == LOCK_NAME and data:
        try:
            found = json.loads(data)
        except ValueError:
            return False
        return isinstance(found, dict) and "pid" in found
    return not data
