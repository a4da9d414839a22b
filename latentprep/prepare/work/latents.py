"""run_unit: load -> encode -> write, for one unit. Engines only decide who calls it."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.manifest import skip_from_json
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.seal import check_seal, check_stamp
from latentprep.cache.shard import (
    Groups,
    ShardEntry,
    Text,
    open_latents,
    open_text,
    table_of,
    text_id,
    text_name,
    write_latents,
    write_text,
)
from latentprep.cache.storage import Stamp
from latentprep.errors import UnreadableError, UserError
from latentprep.prepare.devices import OutOfMemoryError
from latentprep.prepare.models.vae_encoder import Posterior
from latentprep.prepare.plan.plan import Retext
from latentprep.prepare.work.group import GroupBuilder
from latentprep.prepare.work.job import Job
from latentprep.prepare.work.partial import Progress, load_partial, save_partial
from latentprep.prepare.work.text import make_text
from latentprep.records import NAMED_NOTES, Item, Pixels, Placement, Row, Size, Skip, Unit, is_flipped

Loaded = Iterator[Pixels | Skip]  # of a unit's items, in their order
Stamped = Callable[[], Stamp]  # of a file; waits until it is written
Submit = Callable[[Callable[[], Stamp]], "Future[Stamp]"]  # hands a write to the writer; may wait for the one before


@dataclass(eq=False)
class UnitResult:
    """What became of a unit. entry() waits for its files; a unit whose every item was skipped has none."""

    unit: str
    text: str
    groups: Groups
    latents_file: Stamped
    text_file: Stamped
    skips: list[Skip] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    tombstones: tuple[int, ...] = ()

    def entry(self) -> ShardEntry:
        return ShardEntry(self.unit, self.text, self.groups, self.latents_file(), self.text_file(), self.tombstones)


def run_unit(
    unit: Unit, loaded: Loaded | None, job: Job, submit: Submit, progress: Callable[[int], None]
) -> UnitResult:
    """Encode a unit and hand its files to the writer.

    `loaded` is None where the latents file is there already: then only the text file is made, if it is missing.
    """
    if loaded is None:
        latents = open_latents(job.storage, unit.id)
        skips = [skip_from_json(skip) for skip in latents.metadata["skipped"]]
        notes = Counter(latents.metadata["notes"])
        groups = latents.table()
        found = job.found[unit.id]
        latents_file: Stamped = lambda: found  # noqa: E731
    else:
        builders, done, skips = load_partial(job.storage, unit, job.recipe["latents"]["views"]) or ({}, Progress(), [])
        progress(done.num_done)
        try:
            for batch, num_done in make_batches(unit, done.num_done, loaded, job, skips, progress):
                encode_rows(batch, job, builders, skips)
                name_noted(batch, job)
                notes = sum((Counter(set(pixels.notes)) for _, _, pixels in batch), done.notes or Counter())
                counts = tuple((bucket, len(builder.digest)) for bucket, builder in builders.items())
                done = Progress(num_done, counts, len(skips), notes)
        except KeyboardInterrupt:
            save_partial(job.storage, unit, builders, skips, done, job.recipe["latents"])
            raise
        notes = done.notes or Counter()
        skips = [skip.under(job.conditions) for skip in skips]
        made = [builder.build() for builder in builders.values() if builder.digest]
        groups = table_of(made)
        if not made:
            return UnitResult(unit.id, "", groups, _no_file, _no_file, skips, notes)
        # skips and notes stand in the header too: a killed run is taken up from its shards alone
        metadata = {
            **job.latents_metadata(),
            "skipped": [asdict(skip) for skip in skips],
            "notes": dict(sorted(notes.items())),
        }
        latents_file = submit(partial(write_latents, job.storage, unit.id, made, metadata)).result

    skipped = {skip.key for skip in skips}
    rows = [item.row for item in unit.items if item.key not in skipped]
    text = text_id(unit.id, rows, job.recipe)
    text_file = hand_over_text(unit.id, text, rows, groups, job, submit)
    return UnitResult(unit.id, text, groups, latents_file, text_file, skips, notes)


def retext_unit(retext: Retext, job: Job, submit: Submit) -> UnitResult:
    """Make a new text file for a shard whose latents stay; prompts whose cond is there are not encoded again.

    A text file that is damaged gives no cond: all of its prompts are encoded again.
    """
    entry, rows, text, old = retext.entry, retext.rows, retext.text, None
    dead = frozenset(entry.tombstones)
    with job.watch.on("text"):
        try:
            check_stamp(job.storage, text_name(entry.unit, entry.text), entry.text_file)
            old = open_text(job.storage, entry.unit, entry.text, entry.groups)
        except UnreadableError:
            raise
        except UserError as error:  # nothing of it is taken over: what dead rows said is not known any more
            job.damaged.append(str(error))
            rows = [Row(f"unknown/{n}", -1, -1, ("",)) if n in dead else row for n, row in enumerate(rows)]
            text = text_id(entry.unit, rows, job.recipe)
    text_file = hand_over_text(entry.unit, text, rows, entry.groups, job, submit, old, dead)
    return UnitResult(
        entry.unit, text, entry.groups, lambda: entry.latents_file, text_file, tombstones=entry.tombstones
    )


def hand_over_text(
    unit: str,
    text: str,
    rows: list[Row],
    groups: Groups,
    job: Job,
    submit: Submit,
    old: Text | None = None,
    tombstones: frozenset[int] = frozenset(),
) -> Stamped:
    """Make the text file of a unit and hand it to the writer, if it is not there from a run that was stopped."""
    try:
        stamp = check_seal(job.storage, text_name(unit, text))
        open_text(job.storage, unit, text, groups)
        return lambda: stamp
    except UnreadableError:
        raise
    except (UserError, FileNotFoundError):
        pass  # not there, or damaged: make it anew
    with job.watch.on("text"):
        made = make_text(rows, groups, job, old, tombstones)
    return submit(partial(write_text, job.storage, unit, text, made, job.text_metadata())).result


def _no_file() -> Stamp:
    return Stamp(0, "")


Image = tuple[Item, Placement, Pixels]


def make_batches(
    unit: Unit, start: int, loaded: Loaded, job: Job, skips: list[Skip], progress: Callable[[int], None]
) -> Iterator[tuple[list[Image], int]]:
    """Rows of one bucket, at most batch_size, in the unit's order from item `start` on; what cannot be loaded goes to
    `skips`. With each batch the number of items up to its end.
    """
    batch: list[Image] = []
    found: list[Skip] = []  # since the batch began: they count with the next one
    end = start
    for number in range(start, len(unit.items)):
        item, placement = unit.items[number], unit.placements[number]
        with job.watch.on("decode"):
            result = next(loaded)
        progress(1)
        if isinstance(result, Skip):
            found.append(result)
            continue
        if batch and (len(batch) == job.batch_size or batch[0][1].bucket != placement.bucket):
            yield batch, end
            batch = []
        skips += found
        found = []
        batch.append((item, placement, result))
        end = number + 1
    if batch:
        yield batch, end
    skips += found


def name_noted(batch: list[Image], job: Job) -> None:
    """Remember which images the notes are about that a person should look at."""
    for item, _, pixels in batch:
        for note in set(pixels.notes):
            if note in NAMED_NOTES:
                job.noted.setdefault(note, []).append(item.key)


def encode_rows(batch: list[Image], job: Job, builders: dict[Size, "GroupBuilder"], skips: list[Skip]) -> None:
    """Encode a batch and add it to the group of its bucket."""
    try:
        with job.watch.on("encode"):
            encoded = encode_batch(batch, job)
    except OutOfMemoryError as error:
        skips += [item.skip("out_of_memory", str(error)) for item, _, _ in batch]
    else:
        keep_rows(batch, encoded, builders, job, skips)


@dataclass(frozen=True, eq=False)
class Encoded:
    """Posterior of N images in V views, in the store dtype."""

    mean: Tensor  # [N,V,C,h,w]
    std: Tensor | None  # the same; None: not stored
    is_finite: list[bool]


def encode_batch(batch: list[Image], job: Job) -> Encoded:
    recipe = job.recipe["latents"]
    dtype = TORCH_DTYPES[recipe["store_dtype"]]
    crops = np.stack([pixels.pixels for _, _, pixels in batch], axis=1)  # [K,N,H,W,3]
    boxes = list(zip(*(pixels.crops for _, _, pixels in batch), strict=True))
    mirrors = len(recipe["views"]) // len(boxes)  # views of each crop
    seen: dict[tuple[Any, bool], Posterior] = {}
    found = []
    for n, view in enumerate(recipe["views"]):
        crop = n // mirrors
        same = boxes[crop], is_flipped(view)
        if same not in seen:  # images that just fit their bucket have one crop only
            images = np.ascontiguousarray(crops[crop][:, :, ::-1]) if is_flipped(view) else crops[crop]
            seen[same] = job.vae().encode(images)
        found.append(seen[same])
    mean = torch.stack([posterior.mean for posterior in found], dim=1).to(dtype)
    stds = [posterior.std for posterior in found if posterior.std is not None]
    std = torch.stack(stds, dim=1).to(dtype) if stds else None
    # after the cast: a mean of 70,000 is finite in float32 and not in a float16 cache
    finite = mean.isfinite().flatten(1).all(1)
    if std is not None:
        finite &= std.isfinite().flatten(1).all(1)
    return Encoded(mean, std if recipe["store"] == "mean+std" else None, finite.tolist())


def keep_rows(
    batch: list[Image], encoded: Encoded, builders: dict[Size, "GroupBuilder"], job: Job, skips: list[Skip]
) -> None:
    """Add a batch to the group of its bucket, without the rows that are not finite."""
    bucket = batch[0][1].bucket
    builder = builders.setdefault(bucket, GroupBuilder(bucket, job.recipe["latents"]["views"]))
    for n, (item, placement, pixels) in enumerate(batch):
        if encoded.is_finite[n]:
            builder.mean.append(encoded.mean[n])
            if encoded.std is not None:
                builder.std.append(encoded.std[n])
            builder.weight.append(pixels.weight)
            builder.original_size.append(item.size)
            builder.placement.append(placement)
            builder.crops.append(pixels.crops)
            builder.digest.append(pixels.digest)
        else:
            detail = (
                f"the VAE gives no finite latents in float32, or none that {job.recipe['latents']['store_dtype']} holds"
            )
            skips.append(item.skip("non_finite", detail))
