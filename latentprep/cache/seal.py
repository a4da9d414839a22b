"""The seal of a shard's file: its own hash in its header, so that a file that no manifest knows yet can be checked.

The seal is BLAKE2b of all of the file's bytes, with zeros in the place of the seal's 32 digits.
"""

import hashlib

from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UnreadableError, UserError

FIELD, EMPTY = "seal", "0" * 32
# in the header, where the JSON of our metadata is itself a string in JSON
_MARK = rf"\"{FIELD}\":\"".encode()


def seal(data: bytes) -> bytes:
    """The bytes of a file whose header has an EMPTY seal, with its seal in it."""
    start = _place(data)
    assert start is not None
    return data[:start] + _hash(data).encode() + data[start + len(EMPTY) :]


def is_sealed(data: bytes) -> bool:
    """Whether these are the bytes that were sealed."""
    start = _place(data)
    if start is None:
        return False
    end = start + len(EMPTY)
    return _hash(data[:start] + EMPTY.encode() + data[end:]).encode() == data[start:end]


def check_seal(storage: Storage, name: str) -> Stamp:
    """Size and hash of a file that no manifest knows, if its seal fits.

    Raises UserError if it does not, UnreadableError if the file cannot be read, FileNotFoundError if it is missing.
    """
    try:
        data = storage.read(name)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise UnreadableError(f"{storage.locate(name)}: cannot be read ({error.strerror or error}).") from None
    if not is_sealed(data):
        raise UserError(f"{storage.locate(name)}: damaged, its bytes have changed since they were written.")
    return Stamp.of(data)


def check_stamp(storage: Storage, name: str, stamp: Stamp) -> None:
    """Raise UserError unless a file has the size and hash in `stamp`; call it before a new file is made of it.

    Raises UnreadableError (a UserError) if it cannot be read or is missing.
    """
    try:
        found = storage.stamp(name)
    except OSError as error:
        raise UnreadableError(f"{storage.locate(name)}: cannot be read ({error.strerror or error}).") from None
    if found != stamp:
        raise UserError(f"{storage.locate(name)}: damaged, its bytes have changed since they were written.")


def _place(data: bytes) -> int | None:
    """Where the digits of a seal begin; only the header is searched."""
    end = 8 + int.from_bytes(data[:8], "little")
    found = data.find(_MARK, 8, end)
    start = found + len(_MARK)
    return start if found >= 0 and start + len(EMPTY) <= end else None


def _hash(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
