"""What the passes of a run tell, added up, and the outcome that a person is shown."""

from collections import Counter
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any

from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp
from latentprep.prepare.work.events import Event, Failure, LatentsResult, Step, TextResult, Truncated
from latentprep.records import Skip

STAGES = ("decode", "encode", "text", "write")  # what a device may wait for; not "load", the loading of a model


@dataclass(eq=False)
class Tally:
    """What the workers of a pass have told."""

    latents: list[LatentsResult] = field(default_factory=list)
    texts: list[TextResult] = field(default_factory=list)
    failures: dict[str, str] = field(default_factory=dict)  # id of a task -> what went wrong
    waits: Counter[str] = field(default_factory=Counter)  # stage -> seconds, of all devices
    skipped: Counter[str] = field(default_factory=Counter)  # id of a unit -> images of it that are skips, so far

    @property
    def shards(self) -> dict[str, Shard]:
        """id -> shard, of all that was made."""
        made = [*(result.shard for result in self.latents), *(result.shard for result in self.texts)]
        return {shard.id: shard for shard in made if shard is not None}

    @property
    def cond_files(self) -> dict[str, Stamp]:
        """id -> file, of the cond that texts share."""
        return {text.id: text.cond_file for text in self.texts if text.cond_file is not None}

    @property
    def uncond_file(self) -> Stamp | None:
        return next((text.uncond_file for text in self.texts if text.uncond_file is not None), None)

    @property
    def skips(self) -> list[Skip]:
        return [skip for result in self.latents for skip in result.skips]


def collect(events: Iterator[Event], bar: Any) -> Tally:
    """All events of a pass, shown on a bar as they come."""
    tally = Tally()
    with closing(events), bar:  # type: ignore[type-var]
        for event in events:
            if isinstance(event, Step):
                tally.waits.update(event.waits)
                tally.skipped[event.id] = tally.skipped[event.id] + event.num_skips if event.num_images >= 0 else 0
                show(event, tally, bar)
            elif isinstance(event, Failure):
                tally.failures[event.id] = event.error
            elif isinstance(event, LatentsResult):
                tally.latents.append(event)
                tally.skipped[event.id] = len(event.skips)
            else:
                tally.texts.append(event)
    return tally


def show(step: Step, tally: Tally, bar: Any) -> None:
    """Move the bar on. What it says besides is in parts, the most important first: there may be no room for all."""
    if not step.is_new:
        bar.initial += step.num_images  # so that images/s counts what this run encodes
    num_skipped = tally.skipped.total()
    waited = "waited: " + ", ".join(f"{stage} {tally.waits[stage]:.0f}s" for stage in STAGES)
    bar.set_postfix_str("; ".join([*([f"{num_skipped:,} skipped"] if num_skipped else []), waited]), refresh=False)
    bar.update(step.num_images)


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    num_encoded: int  # images, by this run
    num_found: int  # images that an unfinished run had encoded before
    num_retexted: int  # images whose text alone was made anew
    num_prompts: int  # prompts that the text encoder saw, the empty one included
    truncated: Truncated
    noted: dict[str, list[str]]  # note -> keys of its images that this run encoded, for some of records.NOTES
    damaged: list[str]  # text files of the cache whose bytes had changed, made anew
    num_cached: int  # images in the cache now
    can_compact: bool  # whether a compact would free some of the dead rows
    num_dead: int  # rows of images that are gone or changed
    num_bytes: int
    skips: list[Skip]
    notes: Counter[str]
    failures: list[str]
    num_retried: int
    batch_limits: list[str]  # how a full memory made batches smaller: the first message of each pass
    cleared: tuple[int, int]  # files of unfinished runs that were of no use, and their bytes
    seconds: float  # of the whole run
    encode_seconds: float  # of its units, without the loading of models
    waits: dict[str, float]  # stage -> seconds that the devices waited for it
    absent: tuple[int, ...] = ()  # ranks that have not handed in their part: the cache is not committed yet
