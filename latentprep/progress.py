"""What a run says while it works: lines, and bars of what is done; in a pipe or a log a line now and then."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from functools import cache, partial
from typing import Any, Protocol, Self, TypeVar

from latentprep.errors import UserError
from latentprep.human import harmless, human_bytes, human_seconds
from latentprep.keywords import Keywords

EVERY = 10  # seconds between two lines, if nobody watches
LATE = 2  # seconds, before a short stage gets a bar
T = TypeVar("T")


class Progress(Protocol):
    """Something that shows how a run gets on: a terminal, a notebook, or the window of another program."""

    def say(self, text: str) -> None:
        """Lines of text: what was chosen, and why. Nothing in them is escaped yet."""

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        """A context manager that has tqdm's `update`, `initial` and `set_postfix_str`; total None: not known."""


class LateBar:
    """A bar of a stage that is often short: it appears once its work has taken two seconds."""

    def __init__(self, progress: Progress, total: int | None, stage: str, unit: str = "img") -> None:
        self.make, self.started = partial(progress.bar, total, stage, unit), time.monotonic()
        self.num_done = 0
        self.bar: Any = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: Any) -> None:
        if self.bar is not None:
            self.bar.__exit__(*raised)

    def update(self, count: int) -> None:
        self.num_done += count
        if self.bar is not None:
            self.bar.update(count)
        elif time.monotonic() - self.started >= LATE:
            self.bar = self.make().__enter__()
            self.bar.initial = self.num_done  # the rate is that from now on
            self.bar.update(self.num_done)

    def each(self, values: Iterable[T]) -> Iterator[T]:
        """The same values, each counted when the next one is asked for."""
        for value in values:
            yield value
            self.update(1)


class Shown:
    """Lines on stderr and tqdm's bars: in a notebook its own, else those of a terminal."""

    def __init__(self, keywords: Keywords) -> None:
        self.keywords = keywords

    def say(self, text: str) -> None:
        print(harmless(self.keywords.translate(text)), file=sys.stderr)

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        from tqdm.auto import tqdm

        is_notebook = any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
        is_seen = is_notebook or (sys.stderr is not None and sys.stderr.isatty())
        return make_bar(tqdm if is_seen else None, total, stage, unit, disable=total == 0)


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        pass

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        from tqdm import tqdm

        return make_bar(tqdm, total, stage, unit, disable=True)


def make_bar(kind: Any, total: int | None, stage: str, unit: str, disable: bool) -> Any:
    """A bar of one of tqdm's classes; without one, and not disabled, plain lines."""
    if kind is None and not disable:
        return Lines(total, stage, unit)
    if kind is None:
        from tqdm import tqdm as kind

    bar = bar_class(kind)(
        total=total, desc=stage, unit=unit, unit_scale=unit == "B", dynamic_ncols=True, smoothing=0.1,
        file=sys.stderr, disable=disable,
    )  # fmt: skip
    bar.initial = 0  # a bar that is not shown has none
    return bar


@cache
def bar_class(kind: Any) -> Any:
    """A class of bars for one of tqdm's. It is made once: tqdm starts a thread for each class, which never ends."""

    class Bar(kind):  # type: ignore[misc,valid-type]
        """Says what the run waits for only if there is room beside the bar."""

        @property
        def format_dict(self) -> dict[str, Any]:
            found: dict[str, Any] = super().format_dict
            said, columns = found["postfix"] or "", found["ncols"]
            if said and isinstance(columns, int):
                whole = self.format_meter(**{**found, "ncols": None})  # with a bar of ten characters
                said = said if len(whole) <= columns else said.partition("waited")[0]
            return {**found, "postfix": said.rstrip("; ").replace("; ", ", ") or None}

    return Bar


def print_line(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Lines:
    """A bar as lines for a pipe, a file or a log: one every so many seconds, and one at the end."""

    def __init__(
        self,
        total: int | None,
        stage: str,
        unit: str,
        write: Callable[[str], object] = print_line,
        every: float = EVERY,
    ) -> None:
        self.total, self.stage, self.unit, self.write, self.every = total, stage, unit, write, every
        self.initial = self.num_done = 0
        self.postfix = ""
        self.started = self.said = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write(self.describe(is_last=True))

    def set_postfix_str(self, text: str, refresh: bool = True) -> None:
        self.postfix = text

    def update(self, count: int) -> None:
        self.num_done += count
        if time.monotonic() - self.said >= self.every:
            self.said = time.monotonic()
            self.write(self.describe(is_last=False))

    def measure(self) -> tuple[float, float, float | None]:
        """Seconds since it began, how many a second, and the seconds that are left; None: not known."""
        seconds = time.monotonic() - self.started
        rate = (self.num_done - self.initial) / seconds if seconds > 0 else 0.0
        return seconds, rate, (self.total - self.num_done) / rate if self.total and rate else None

    def describe(self, is_last: bool) -> str:
        """One line."""
        seconds, rate, left = self.measure()
        done = self._amount(self.num_done)
        if self.total:
            done = f"{self.num_done / self.total:4.0%}  {done} of {self._amount(self.total)}"
        parts = [done, f"{self._amount(rate)}/s"]
        if is_last:
            parts.append(human_seconds(seconds))
        elif left is not None:
            parts.append(f"{human_seconds(left)} left")
        parts += [part for part in self.postfix.split("; ") if part and (is_last or not part.startswith("waited"))]
        return f"{self.stage:<8} {', '.join(parts)}"

    def _amount(self, count: float) -> str:
        if self.unit == "B":
            return human_bytes(count)
        return f"{count:,}" if isinstance(count, int) else f"{count:,.1f}"


def open_progress(progress: bool | Progress, keywords: Keywords) -> Progress:
    """What the argument `progress` of a function asks for. Raises UserError."""
    if isinstance(progress, bool):
        return Shown(keywords) if progress else Silent()
    if not (callable(getattr(progress, "say", None)) and callable(getattr(progress, "bar", None))):
        raise UserError(f"progress={progress!r:.80}: expected True, False, or an object with `say` and `bar`.")
    return progress
