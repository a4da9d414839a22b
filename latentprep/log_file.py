"""A file beside the cache with what a run has said: lines, what came of each pass, and how it ended."""

import errno
import json
import os
import re
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

from latentprep import __version__
from latentprep.human import harmless
from latentprep.progress import Lines, Progress

EVERY = 60  # seconds between two lines of a pass
NONE = "none"  # as --log
HEAD = re.compile(rb"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \S* latentprep \S+ encode \{")  # how the first line of a log begins
# a pipe is not waited for, and no link is followed; Windows has none of these
FLAGS = sum(getattr(os, name, 0) for name in ("O_CLOEXEC", "O_NONBLOCK", "O_NOFOLLOW", "O_BINARY"))


def log_path(log: str | None, out: str, rank: int, world_size: int) -> Path | None:
    """Where a run of the cache `out` writes what it says; None: nowhere.

    Without `log` each of several ranks has its own file.
    """
    if log == NONE or (not log and "://" in out):
        return None
    if log:
        return Path(log).expanduser()
    cache = Path(out).resolve()
    return cache.with_name(f"{cache.name}{f'.rank-{rank}' if world_size > 1 else ''}.log")


class Log:
    """A progress that passes on what it is told, and writes it into a file, once that is opened."""

    def __init__(self, progress: Progress, path: Path | None) -> None:
        self.progress, self.path = progress, path
        self._waiting: list[str] = []  # lines from before it was opened
        self._is_open = False

    def say(self, text: str) -> None:
        self.progress.say(text)
        self.write(text)

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        return LoggedBar(self.progress.bar(total, stage, unit), Lines(total, stage, unit, self.write, EVERY))

    def write(self, text: str) -> None:
        """Lines for the file alone."""
        now = time.strftime("%H:%M:%S")
        self._waiting += [f"{now} {line}" for line in harmless(text).splitlines()]
        if self._is_open:
            self._flush()

    def open(self, given: Mapping[str, Any]) -> None:
        """Begin to write: a head with the date, and what was asked for; then all that was said before."""
        asked = json.dumps(given, ensure_ascii=True, default=str)
        self._waiting.insert(0, f"{time.strftime('%Y-%m-%d %H:%M:%S %z')} latentprep {__version__} encode {asked}")
        self._is_open = True
        self._flush()

    @contextmanager
    def to_the_end(self) -> Iterator[None]:
        """Writes what ends the block too, if it fails and the log is open."""
        try:
            yield
        except KeyboardInterrupt as stop:
            notes = getattr(stop, "__notes__", [])  # what is kept, and how to go on
            self.write("\n".join(["ended    stopped by the user", *(f"         {note}" for note in notes)]))
            stop.log = self  # type: ignore[attr-defined]
            raise
        except BaseException as error:
            self.write(f"ended    {type(error).__name__}: {error}")
            raise

    def _flush(self) -> None:
        """A log that cannot be written stops no run; it is said once."""
        lines, self._waiting = self._waiting, []
        if self.path is None:
            return
        try:
            append(self.path, "".join(f"{line}\n" for line in lines))
        except (OSError, ValueError) as error:  # ValueError: a name that no system has
            reason = getattr(error, "strerror", None) or error
            self.progress.say(f"log      {self.path}: cannot be written ({reason}); --log FILE takes another")
            self.path = None


def append(path: Path, text: str) -> None:
    """Add text to a log. Raises OSError, also for a pipe, a link, and any file but a log of ours."""
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | FLAGS, 0o644)
    with open(descriptor, "r+b", buffering=0) as file:
        head = file.read(100) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b"\0"
        if head and HEAD.match(head) is None:
            raise OSError(errno.EEXIST, "it is there, and is no log of latentprep")
        file.write(text.encode("utf-8", "replace"))


class LoggedBar:
    """A bar, and beside it what a log says of it."""

    def __init__(self, bar: Any, lines: Lines) -> None:
        self.bar, self.lines = bar, lines

    def __enter__(self) -> Self:
        self.bar.__enter__()
        return self

    def __exit__(self, *raised: Any) -> None:
        self.bar.__exit__(*raised)
        self.lines.__exit__()

    @property
    def initial(self) -> int:
        return self.lines.initial

    @initial.setter
    def initial(self, count: int) -> None:
        self.bar.initial = self.lines.initial = count

    def update(self, count: int) -> None:
        self.bar.update(count)
        self.lines.update(count)

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.bar.set_postfix_str(text, refresh)
        self.lines.set_postfix_str(text)
