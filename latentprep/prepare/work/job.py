"""What is the same for every unit of a run: where it goes, the recipe, the models; and what the run counts."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from heapq import nlargest
from typing import Any, Generic, TypeVar

import numpy as np

from latentprep.cache.storage import Stamp, Storage
from latentprep.options import TextOptions
from latentprep.prepare.models.doors import ImageEncoder, PromptEncoder

NAMED = 5  # prompts that are named where many were truncated
T = TypeVar("T")


class Stopwatch:
    """Seconds that the encoding loop spent on each stage: what limits a run."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


class Lazy(Generic[T]):
    """Something large that is made when it is first asked for, and can be let go."""

    def __init__(self, make: Callable[[], T]) -> None:
        self.make = make
        self.made: T | None = None

    def __call__(self) -> T:
        if self.made is None:
            self.made = self.make()
        return self.made

    def free(self) -> None:
        self.made = None


@dataclass
class Truncated:
    """The prompts of a run that were too long for the text encoder: how many, and the longest of them."""

    count: int = 0
    max_tokens: int = 0
    longest: list[tuple[int, str]] = field(default_factory=list)  # tokens and prompt

    def add(self, prompts: list[str], num_tokens: np.ndarray, max_tokens: int) -> None:
        """Count those of P prompts [P] that take more than `max_tokens`."""
        self.max_tokens = max_tokens
        found = [(int(num_tokens[n]), prompts[n]) for n in np.flatnonzero(num_tokens > max_tokens)]
        self.count += len(found)
        self.longest = nlargest(NAMED, {*self.longest, *found})


@dataclass(frozen=True)
class Job:
    """What is the same for every unit of a run."""

    storage: Storage
    recipe: dict[str, Any]
    latent: dict[str, Any]  # what a reader must know: normalization, factor, ...
    batch_size: int
    text_options: TextOptions
    seed: int
    found: Mapping[str, Stamp]  # unit -> its latents file, which an unfinished run has left
    conditions: Mapping[str, str]  # that skips depend on (survey.skip_conditions)
    vae: Lazy[ImageEncoder]  # a run that only rewrites text needs none
    text: Lazy[PromptEncoder] | None  # None: no conditioning
    watch: Stopwatch = field(default_factory=Stopwatch)
    counts: Counter[str] = field(default_factory=Counter)  # prompts: how many were encoded
    damaged: list[str] = field(default_factory=list)  # text files that were made anew
    noted: dict[str, list[str]] = field(default_factory=dict)  # one of NAMED_NOTES -> keys of its images, in this run
    truncated: Truncated = field(default_factory=Truncated)

    def latents_metadata(self) -> dict[str, Any]:
        return {**self.latent, "recipe": self.recipe["latents"], "libraries": self.recipe["libraries"]}

    def text_metadata(self) -> dict[str, Any]:
        return {"recipe": self.recipe["text"], "libraries": self.recipe["libraries"]}
