"""Bytes, times, counts, names and paths as people write them."""

from collections.abc import Iterator
from pathlib import Path

from latentprep.errors import UserError

UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def parse_bytes(option: str, text: str) -> int:
    """Bytes of a size such as 256MB, 64MiB, 1.5GB or 1000000. Raises UserError."""
    number = text.strip().lower().rstrip("bikmg")
    unit = text.strip().lower()[len(number) :]
    try:
        size = int(float(number) * UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{option} {text}: expected a size such as 256MB or 1GiB.") from None
    if size < 1:
        raise UserError(f"{option} {text}: must be at least 1 byte.")
    return size


def human_bytes(count: float) -> str:
    """12.3 MB: in powers of 1000, as disks are sold and --shard-size counts."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def counted(count: int, noun: str, ending: str = "s") -> str:
    """1 image, 2,000 images."""
    return f"{count:,} {noun}" + ("" if count == 1 else ending)


def human_seconds(seconds: float) -> str:
    """45 s, 12 min, 3.5 h."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 5400:
        return f"{round(seconds / 60)} min"
    return f"{seconds / 3600:.1f} h"


def expand_user(path: str | Path) -> Path:
    """A path with the home folder in place of ~, if there is one of that name."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def printable(text: str) -> str:
    """Text of a stranger's, with what a terminal would obey instead of show escaped."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def shortened(text: str, length: int = 60) -> str:
    """The beginning of a text, in which nothing is left for a terminal to obey."""
    return printable(text if len(text) <= length else text[: length - 3] + "...")


def harmless(text: str) -> str:
    """The text, in which a terminal has nothing to obey but ends of lines and tabs."""
    return "".join(part if part in "\n\t" else printable(part) for part in _split(text))


def _split(text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n")):
        if number:
            yield "\n"
        for place, part in enumerate(line.split("\t")):
            if place:
                yield "\t"
            yield part
