"""What the public functions return: numbers to go on with, and a few lines to look at."""

import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any

from latentprep.human import counted, harmless, human_bytes, printable
from latentprep.records import CHANGES, Change, Problem, Skip
from latentprep.speeds import Advice, DecodeSpeed, Rates, ReadSpeed, TextSpeed, VaeSpeed, WriteSpeed


@dataclass(frozen=True, repr=False)
class Encoded:
    """What encode() did; of a dry run, what it would do.

    A failure is a fault of latentprep's own or of the disk: it stopped one unit, whose images are not in the cache.
    """

    cache: str  # where it is: a folder, or a URL
    num_cached: int  # images in the cache now
    num_encoded: int  # how many of them this run encoded; in a dry run: how many it would encode
    num_retexted: int  # images that got only a new text, or in a dry run would get one
    changes: tuple[Change, ...]  # the images for which there was something to do, and why
    skips: tuple[Skip, ...]  # the images that are not in the cache, and why
    failures: tuple[str, ...]
    seconds: float  # that the run took; in a dry run: an estimate of what it would take
    report: str  # the page that `latentprep encode` prints
    totals: str = ""  # of a dry run the same without what it says of single images
    is_dry_run: bool = False
    is_strict: bool = False  # whether a skipped image is a fault
    absent: tuple[int, ...] = ()  # ranks that are still at work: the one that ends last commits the cache
    num_prompts: int = 0  # prompts that this run encoded; in a dry run: would encode

    @property
    def ok(self) -> bool:
        """Whether all is as it should be: no failures, and with strict=True no skipped images."""
        return not self.failures and not (self.is_strict and self.skips)

    @property
    def num_skipped(self) -> dict[str, int]:
        """Reason -> images that were skipped for it."""
        return dict(sorted(Counter(skip.reason for skip in self.skips).items()))

    def list_json(self) -> Iterator[dict[str, Any]]:
        """Plain values, as `encode --json` prints them: one for each change, skip and failure, and the totals."""
        for change in self.changes:
            yield {"key": change.key, "what": change.what, "detail": change.detail}
        for skip in self.skips:
            yield {"key": skip.key, "reason": skip.reason, "detail": skip.detail}
        for failure in self.failures:
            yield {"failure": failure}
        counts = Counter(change.what for change in self.changes)
        totals = {
            "cache": self.cache, "cached": self.num_cached, "encode": self.num_encoded, "new_text": self.num_retexted,
            "prompts": self.num_prompts, "seconds": round(self.seconds, 1),
            "changes": {what: counts[what] for what in CHANGES if counts[what]}, "skipped": self.num_skipped,
            "ok": self.ok,
        }  # fmt: skip
        yield {"totals": totals}

    def __repr__(self) -> str:
        did, took = ("to encode", "about ") if self.is_dry_run else ("encoded", "")
        lines = [
            f"Encoded {printable(self.cache)}: {'ok' if self.ok else 'NOT OK'}" + " (dry run)" * self.is_dry_run,
            f"  {counted(self.num_cached, 'image')} cached, {self.num_encoded:,} {did}, {took}{self.seconds:.1f} s",
        ]
        if self.num_retexted:
            lines.append(f"  {text_line(self.num_retexted)}")
        if self.skips:
            reasons = ", ".join(f"{count:,} {reason}" for reason, count in self.num_skipped.items())
            lines.append(f"  skipped: {reasons}")
        if self.absent:
            lines.append(f"  not committed yet: rank {', '.join(map(str, self.absent))} is still at work")
        lines += [f"  FAILED: {printable(failure)}" for failure in self.failures]
        return "\n".join(lines)


def join_runs(runs: list[Encoded]) -> Encoded:
    """Several runs of one call as one result. `cache` is the folder that holds all their caches."""
    first = runs[0]
    if len(runs) == 1:
        return first
    return Encoded(
        cache=os.path.commonpath([run.cache for run in runs]),
        num_cached=sum(run.num_cached for run in runs),
        num_encoded=sum(run.num_encoded for run in runs),
        num_retexted=sum(run.num_retexted for run in runs),
        changes=tuple(change for run in runs for change in run.changes),
        skips=tuple(skip for run in runs for skip in run.skips),
        failures=tuple(f"{run.cache}: {failure}" for run in runs for failure in run.failures),
        seconds=sum(run.seconds for run in runs),
        report="\n\n".join(run.report for run in runs),
        totals="\n\n".join(run.totals for run in runs),
        is_dry_run=first.is_dry_run,
        is_strict=first.is_strict,
        absent=tuple(sorted({rank for run in runs for rank in run.absent})),
        num_prompts=sum(run.num_prompts for run in runs),
    )


class Summary(dict[str, Any]):
    """What is in a cache, or of one image in it: plain JSON values, which print as tables."""

    def table(self) -> Any:
        """The summary as tables of rich."""
        from latentprep.look.tables import render_sample, render_summary

        return render_sample(self) if "key" in self else render_summary(self)

    def __repr__(self) -> str:
        from io import StringIO

        from rich.console import Console

        page = StringIO()
        Console(file=page, width=120, force_jupyter=False, color_system=None, highlight=False).print(
            self.table(), markup=False
        )
        return "\n".join(line.rstrip() for line in page.getvalue().splitlines())

    __str__ = __repr__


def text_line(count: int) -> str:
    """Of images whose latents stay: a text file holds all images of its shard, also if one caption has changed."""
    return f"the text of {counted(count, 'image')} is written anew, in whole shards"


@dataclass(frozen=True, repr=False)
class Verified:
    """What verify() found."""

    cache: str
    problems: tuple[Problem, ...]
    num_images: int | None  # None: there is no manifest that can be read
    num_shards: int | None
    not_compared: str | None  # why its images were not compared, though they were to be
    differences: Mapping[str, float]  # of re_encode: "latents" and "cond" -> the largest, in standard deviations

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `latentprep verify --json` prints them; a difference that is no number is None."""
        found: dict[str, Any] = {"cache": self.cache}
        if self.num_images is not None:
            found |= {"images": self.num_images, "shards": self.num_shards}
        if self.not_compared is not None:
            found["source"] = self.not_compared
        names = {"latents": "largest_difference", "cond": "largest_cond_difference"}
        for name, value in self.differences.items():
            found[names[name]] = value if isfinite(value) else None  # JSON knows no NaN
        found["problems"] = [asdict(problem) for problem in self.problems]
        return found

    def __repr__(self) -> str:
        from latentprep.look.tables import render_problems

        return render_problems(self.to_json())


@dataclass(frozen=True, repr=False)
class Compacted:
    """What compact() did. A dead row is that of an image that changed or was removed."""

    cache: str
    num_shards: int  # rewritten or removed
    num_rows: int  # dead rows that are gone
    num_left: int  # dead rows that stay, in shards that have few
    num_bytes: int  # freed
    num_read: int  # old files that a training loop may still read: they go with a later encode or compact
    damaged: tuple[str, ...]  # what is wrong with the shards that were left alone

    @property
    def ok(self) -> bool:
        """Whether no shard is damaged."""
        return not self.damaged

    def __repr__(self) -> str:
        few = f"; {counted(self.num_left, 'dead row')} left in shards that have few (--min-share 0 rewrites these too)"
        left = few if self.num_left else ""
        lines = [
            f"{self.cache}: {counted(self.num_shards, 'shard')} rewritten or removed, {counted(self.num_rows, 'row')} "
            f"and {human_bytes(self.num_bytes)} freed{left}"
        ]
        if self.num_read:
            lines.append(
                f"{counted(self.num_read, 'old file')} stay while a training loop may read them; the next latentprep "
                "encode or compact deletes them"
            )
        advice = "The shard was left alone: delete this file and run latentprep encode again."
        lines += [f"damaged  {line} {advice}" for line in self.damaged]
        return harmless("\n".join(lines))


@dataclass(frozen=True, repr=False)
class Merged:
    """What merge() committed."""

    cache: str
    num_images: int
    absent: tuple[int, ...]  # ranks whose work is missing; the next encode does it

    @property
    def ok(self) -> bool:
        """Whether all ranks are in it."""
        return not self.absent

    def __repr__(self) -> str:
        missing = f"; without rank {', '.join(map(str, self.absent))}: run encode again" if self.absent else ""
        return f"{printable(self.cache)}: {counted(self.num_images, 'image')}{missing}"


@dataclass(frozen=True, repr=False)
class Benched:
    """What bench() measured. Rates are per second."""

    model: str
    source: str | None  # None: pictures that were drawn
    versions: Mapping[str, str]  # of Python and of the libraries
    seconds: float  # that the whole bench took, including the loading of the models
    load: float | None  # cores that other programs used in the minute before; None: not known
    decode: DecodeSpeed
    vae: VaeSpeed
    text: TextSpeed | None  # None: no text encoder was asked for
    write: WriteSpeed
    read: ReadSpeed
    now: Rates  # of a run with the present settings
    best: Rates  # the same, with the batch size at which the VAE is fastest
    advice: tuple[Advice, ...]  # what would make a run faster, the best first; empty if nothing that was tried would
    unsure: tuple[str, ...]  # what seems to, but was measured once
    tried: tuple[str, ...]

    @property
    def limit(self) -> str:
        """The slowest stage with the VAE at its best: decode, VAE or write."""
        return self.best.limit

    @property
    def line(self) -> str:
        """All in one line, for an issue."""
        from latentprep.speed_words import issue_line

        return issue_line(self)

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `latentprep bench --json` prints them; sizes are [height, width]."""
        found = asdict(self)
        for name in ("now", "best"):
            rates = getattr(self, name)
            found[name] |= {"images_per_second": rates.images_per_second, "text_share": rates.text_share}
        return {**found, "limit": self.limit, "line": self.line}

    def __repr__(self) -> str:
        from latentprep.speed_words import page

        return page(self)
