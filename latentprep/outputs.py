"""Files that a person has asked for, such as a sheet: nothing is overwritten but an earlier one."""

import os
from pathlib import Path

from latentprep.cache.storage import Storage
from latentprep.errors import UserError

MARK = "a {kind} of latentprep"  # in the head of a file that may be overwritten
MARK_BYTES = 1000  # of a file in which its mark stands


def check_output(option: str, file: Path, suffix: str, kind: str) -> None:
    """Raise UserError unless a file may be written there: nothing is overwritten but an earlier one, with its mark."""
    if file.suffix.lower() != suffix:
        raise UserError(f"{option} {file}: expected the name of a {suffix} file.")
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}. Make it, or give another name.")
    if os.path.lexists(file) and not has_mark(file, kind):
        raise UserError(f"{option} {file}: is there, and is no {kind} of latentprep's. Give another name.")


def has_mark(file: Path, kind: str) -> bool:
    """Whether a file is an earlier one of a kind."""
    if not file.is_file():  # a folder, or a pipe, which may have no end
        return False
    with file.open("rb") as opened:
        return MARK.format(kind=kind).encode() in opened.read(MARK_BYTES)


def write_output(option: str, file: Path, suffix: str, kind: str, data: bytes) -> None:
    """Write a file that has its mark: all of it, or nothing. Raises UserError, also for OSError."""
    check_output(option, file, suffix, kind)
    Storage(file.absolute().parent).write_atomic(file.name, data)
