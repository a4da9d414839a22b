"""What a run says while it works: lines, and bars of what is done."""

import sys
from typing import Any, Protocol

from latentprep.errors import UserError
from latentprep.human import harmless
from latentprep.keywords import Keywords


class Progress(Protocol):
    """Something that shows how a run gets on: a terminal, a notebook, or the window of another program."""

    def say(self, text: str) -> None:
        """Lines of text: what was chosen, and why. Nothing in them is escaped yet."""

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        """A context manager that has tqdm's `update`, `initial` and `set_postfix_str`."""


class Shown:
    """Lines on stderr and tqdm's bars: in a notebook its own, else those of a terminal."""

    def __init__(self, keywords: Keywords) -> None:
        self.keywords = keywords

    def say(self, text: str) -> None:
        print(harmless(self.keywords.translate(text)), file=sys.stderr)

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        from tqdm.auto import tqdm

        return make_bar(tqdm, total, stage, unit, disable=total == 0)


class Silent:
    """Says nothing."""

    def say(self, text: str) -> None:
        pass

    def bar(self, total: int | None, stage: str, unit: str = "img") -> Any:
        from tqdm import tqdm

        return make_bar(tqdm, total, stage, unit, disable=True)


def make_bar(kind: Any, total: int | None, stage: str, unit: str, disable: bool | None) -> Any:
    """A bar of one of tqdm's classes."""
    bar = kind(
        total=total, desc=stage, unit=unit, unit_scale=unit == "B", dynamic_ncols=True, smoothing=0.1,
        file=sys.stderr, disable=disable,
    )  # fmt: skip
    bar.initial = 0  # a bar that is not shown has none
    return bar


def open_progress(progress: bool | Progress, keywords: Keywords) -> Progress:
    """What the argument `progress` of a function asks for. Raises UserError."""
    if isinstance(progress, bool):
        return Shown(keywords) if progress else Silent()
    if not (callable(getattr(progress, "say", None)) and callable(getattr(progress, "bar", None))):
        raise UserError(f"progress={progress!r:.80}: expected True, False, or an object with `say` and `bar`.")
    return progress
