"""What workers tell: images done, units and texts done with all that was counted on the way, and what failed."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from heapq import nlargest

import numpy as np

from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp
from latentprep.records import Skip

NAMED = 5  # prompts that are named if many were truncated


@dataclass(frozen=True)
class Step:
    """Images of a task that are done, for a progress bar; and what the device has waited for since the last one."""

    id: str  # of the task
    num_images: int  # below 0: so many are to be done again
    is_new: bool = True  # False: an earlier run has done them
    waits: Mapping[str, float] = field(default_factory=dict)  # stage -> seconds
    num_skips: int = 0  # of the images: those that are skips, as far as it is known yet


@dataclass(frozen=True)
class LatentsResult:
    """What became of a unit."""

    id: str
    shard: Shard | None  # None: each of its images was skipped
    skips: tuple[Skip, ...]
    notes: Counter[str] = field(default_factory=Counter)  # what had to be done to its images
    named: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # one of NAMED_NOTES -> keys, of this run
    num_encoded: int = 0  # images, by this run
    num_found: int = 0  # images, by an earlier one
    num_retried: int = 0  # encodings done again in float32
    batch_limit: str = ""  # the message that a full memory made batches smaller; empty: memory has always sufficed


@dataclass(frozen=True)
class Truncated:
    """Prompts that were too long for the text encoder: how many, and the longest of them."""

    count: int = 0
    max_tokens: int = 0
    longest: tuple[tuple[int, str], ...] = ()  # tokens and prompt

    @classmethod
    def of(cls, prompts: list[str], num_tokens: np.ndarray, max_tokens: int) -> "Truncated":
        """Those of P prompts [P] that take more than `max_tokens`."""
        long = [(int(num_tokens[n]), prompts[n]) for n in np.flatnonzero(num_tokens > max_tokens)]
        return cls(len(long), max_tokens, tuple(nlargest(NAMED, long)))

    def __add__(self, other: "Truncated") -> "Truncated":
        longest = nlargest(NAMED, {*self.longest, *other.longest})
        return Truncated(self.count + other.count, max(self.max_tokens, other.max_tokens), tuple(longest))


@dataclass(frozen=True)
class TextResult:
    """What became of a text, of cond that texts share, or of the empty prompt's."""

    id: str  # of the shard, or of the cond file; "": the empty prompt
    shard: Shard | None = None  # with its text
    uncond_file: Stamp | None = None
    num_prompts: int = 0  # that the text encoder saw
    truncated: Truncated = field(default_factory=Truncated)
    batch_limit: str = ""  # the message that a full memory made batches smaller; empty: memory has always sufficed
    damaged: str = ""  # what is wrong with the old text file, if nothing of it could be taken over
    cond_file: Stamp | None = None


@dataclass(frozen=True)
class Failure:
    """A task that is not done, and will be tried by the next run; the others go on."""

    id: str
    error: str

    @classmethod
    def of(cls, task_id: str, error: Exception) -> "Failure":
        """What an exception does to a task: of a library or a remote, or a fault of ours."""
        return cls(task_id, f"{type(error).__name__}: {error}")


Result = LatentsResult | TextResult | Failure
Event = Step | Result
