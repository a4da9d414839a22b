"""One safetensors file of a cache: written with a seal and our header; opened and checked like a file from a stranger.

The header's metadata is a single JSON value, because safetensors does not keep the order of several.
"""

import json
import os
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load as load_bytes
from safetensors.torch import save as to_bytes

from latentprep.cache.schema import FORMAT, check_format
from latentprep.cache.seal import EMPTY, FIELD, seal
from latentprep.cache.storage import Storage
from latentprep.cache.strings import Tensors
from latentprep.errors import UnreadableError, UserError

METADATA_KEY = "latentprep"


def pack(kind: str, tensors: Tensors, metadata: dict[str, Any]) -> bytes:
    """The bytes of a safetensors file with these tensors, and with metadata, kind, format and seal in its header."""
    fields = {**metadata, "kind": kind, "format": FORMAT, FIELD: EMPTY}
    header = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return seal(to_bytes(tensors, {METADATA_KEY: header}))


def open_file(storage: Storage, name: str, kind: str) -> tuple[dict[str, Any], Tensors]:
    """Metadata and tensors of a file; safetensors checks that no tensor lies outside it.

    Raises UserError if it is missing, damaged, of another format or of another kind.
    """
    where = storage.locate(name)
    try:
        storage.check_regular(name)
        if storage.is_local:
            with safe_open(where, framework="pt") as file:
                header = file.metadata()
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        else:
            data = storage.read(name)
            tensors = load_bytes(data)
            header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__")
        metadata = json.loads((header or {})[METADATA_KEY])
        if not isinstance(metadata, dict):
            raise ValueError("its metadata is no JSON object")
    except FileNotFoundError:
        raise _not_opened(storage, where) from None
    except (OSError, RuntimeError) as error:  # torch gives a RuntimeError if a file cannot be mapped
        if isinstance(error, RecursionError):
            raise damaged(storage, name, error) from None
        raise _unreadable(where, error) from None
    except (SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise damaged(storage, name, error) from None
    check_format(metadata.get("format"), where)
    if metadata.get("kind") != kind:
        raise damaged(storage, name, ValueError(f"a file of {metadata.get('kind')!r}, expected {kind}"))
    return metadata, tensors


def check_groups(metadata: dict[str, Any]) -> list[tuple[str, int]]:
    """Label and number of rows of each group. Raises KeyError, ValueError."""
    table = metadata["groups"]
    is_good = isinstance(table, list) and all(
        isinstance(row, list) and [type(value) for value in row] == [str, int] for row in table
    )
    if not is_good or not table or len({row[0] for row in table}) < len(table):
        raise ValueError("its group table is invalid")
    return [(label, rows) for label, rows in table]


def damaged(storage: Storage, name: str, error: Exception) -> UserError:
    """The error for a file that is damaged, or is not ours; `error` gives the reason."""
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return UserError(
        f"{storage.locate(name)}: damaged, or no shard of latentprep ({' '.join(reason.split())[:300]}). "
        "Delete it and run the same latentprep encode again: only its images are encoded."
    )


def _not_opened(storage: Storage, where: str) -> UserError:
    """The error for a file that safetensors did not find: it says "not found" also if reading is not allowed."""
    error = OSError("it could not be opened a moment ago")
    try:
        if storage.is_local:
            os.close(os.open(where, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
            return _unreadable(where, error)
    except FileNotFoundError:
        pass
    except OSError as reason:
        return _unreadable(where, reason)
    return UserError(f"{where}: missing. Run the same latentprep encode again to make it.")


def _unreadable(where: str, error: Exception) -> UnreadableError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
    return UnreadableError(
        f"{where}: is there, and cannot be read ({reason}). Mend that, and run the same command again."
    )
