"""The one exit of text to the terminal: nothing in it is obeyed there, and nothing breaks if nobody listens."""

import errno
import io
import json
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

from latentprep import system
from latentprep.human import harmless, printable
from latentprep.progress import Lines, make_bar


def say(text: str) -> None:
    """Lines for the person, on stderr."""
    typer.echo(harmless(text), err=True)


def show(text: str) -> None:
    """What a command was asked for, on stdout."""
    typer.echo(harmless(text))


def show_json(text: str) -> None:
    """JSON as json.dumps gives it, which escapes all control characters but one."""
    typer.echo(text.replace("\x7f", "\\u007f"))


def fail(message: str, as_json: bool = False) -> None:
    """One line that says what is wrong."""
    if as_json:
        typer.echo(json.dumps({"error": message}), err=True)
        return
    typer.secho("error: ", fg=typer.colors.RED, bold=True, err=True, nl=False)
    say(printable(message))


def quiet() -> None:
    """Keep other libraries from talking while they are imported."""
    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")  # read at import, where it already talks
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Terminal:
    """How a run gets on: lines on stderr, and tqdm's bars. `has_bars` None: only if somebody looks at stderr."""

    def __init__(self, has_bars: bool | None = True) -> None:
        self.has_bars = has_bars

    def say(self, text: str) -> None:
        say(text)

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        from tqdm import tqdm

        is_seen = sys.stderr.isatty()
        has_bars = is_seen if self.has_bars is None else self.has_bars
        return make_bar(tqdm if is_seen else None, total, stage, unit, disable=not has_bars or total == 0)


class JsonLines:
    """How a run gets on, as JSON on stderr: an object for each thing that is said, and for a pass one every second."""

    def say(self, text: str) -> None:
        typer.echo(json.dumps({"said": text}), err=True)

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        return JsonBar(total, stage, unit, lambda line: typer.echo(line, err=True), every=1.0)


class JsonBar(Lines):
    """A bar whose lines are objects."""

    def describe(self, is_last: bool) -> str:
        seconds, rate, left = self.measure()
        state = {
            "stage": self.stage, "done": self.num_done, "total": self.total, "unit": self.unit,
            "per_second": round(rate, 3), "seconds": round(seconds, 1),
            "seconds_left": round(left, 1) if left is not None else None, "is_over": is_last,
        }  # fmt: skip
        return json.dumps(state)


class Unbreakable(io.RawIOBase):
    """A file descriptor to write to; what cannot be written (a full disk, a closed pipe) is dropped."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self.is_full = False  # whether something could not be written, though somebody listens

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, data: "bytes | bytearray | memoryview") -> int:  # type: ignore[override]
        view = memoryview(data)
        try:
            while view:
                view = view[os.write(self.descriptor, view) :]
        except OSError as error:  # the work goes on
            self.is_full |= error.errno != errno.EPIPE
        return len(data)


@contextmanager
def unbreakable() -> Iterator[list[Unbreakable]]:
    """stdout and stderr that raise nothing, for as long as the context lasts; also for file names that are no UTF-8.

    Gives what they write to, stdout's first.
    """
    before, descriptors = (sys.stdout, sys.stderr), list[Unbreakable]()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        with suppress(OSError, ValueError, AttributeError):  # a full disk, closed, or no stream at all
            stream.flush()
        try:
            if system.IS_WINDOWS and stream.isatty():
                continue  # a console takes text and no bytes, and does not break
            raw = Unbreakable(stream.fileno())
        except (OSError, ValueError, AttributeError):
            continue  # a notebook's, or none
        descriptors.append(raw)
        is_error = name == "stderr"
        writer = io.BufferedWriter(raw)  # type: ignore[type-var]
        wrapper = io.TextIOWrapper(
            writer, stream.encoding, "backslashreplace", line_buffering=True, write_through=is_error
        )
        setattr(sys, name, wrapper)
    try:
        yield descriptors
    finally:
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.flush()
        sys.stdout, sys.stderr = before
