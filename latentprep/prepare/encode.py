"""The run of `latentprep encode`: a plan -> units -> manifest, and what became of it."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from threading import Lock
from typing import TYPE_CHECKING, Any

from latentprep.cache.compact import would_rewrite
from latentprep.cache.leftovers import clear_cache, clear_orphans, clear_temporaries, find_missing
from latentprep.cache.manifest import Manifest, commit
from latentprep.cache.readers import free, invite_readers
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.shard import ShardEntry, open_text, text_id, text_name
from latentprep.errors import UserError
from latentprep.prepare.devices import default_batch_size, empty_cache
from latentprep.prepare.plan.plan import Retext
from latentprep.prepare.survey import Prepared, nothing_usable
from latentprep.records import Item, Pixels, Placement, Skip

if TYPE_CHECKING:
    from latentprep.prepare.work.job import Job, Truncated


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    num_encoded: int  # images, by this run
    num_found: int  # images that an unfinished run had encoded before
    num_retexted: int  # images whose text alone was made anew
    num_prompts: int  # prompts that the text encoder saw, the empty one included
    truncated: "Truncated"
    noted: dict[str, list[str]]  # note -> keys of its images that this run encoded, for some of records.NOTES
    damaged: list[str]  # text files of the cache whose bytes had changed, made anew
    num_cached: int  # images in the cache now
    can_compact: bool  # whether a compact would free some of those rows
    num_tombstones: int  # rows of images that are gone or changed
    num_bytes: int
    skips: list[Skip]
    notes: Counter[str]
    failures: list[str]
    num_retried: int
    batch_limit: str  # what an overfull memory has taught; empty: nothing
    cleared: tuple[int, int]  # files of unfinished runs that were of no use, and their bytes
    seconds: float  # of the whole run
    encode_seconds: float  # of its units, without the loading of models
    waits: dict[str, float]  # stage -> seconds that the loop waited for it


def encode(prepared: Prepared, make_progress: Callable[[int, str], Any]) -> Outcome:
    """Run the plan and commit the manifest. `make_progress(total, stage)` gives a tqdm-like bar of images.

    In two passes, so that the VAE and the text encoders are never in memory together: first the latents of every new
    unit, with a text file that has no cond; then cond, for those units and for all whose text changed.

    Raises UserError, and KeyboardInterrupt once every finished file is safe on disk.
    """
    from latentprep.prepare.engine.local import run
    from latentprep.prepare.images.load import is_large, load_pixels
    from latentprep.prepare.images.pillow import describe
    from latentprep.prepare.work.text import uncond_id, write_empty_prompt

    options, storage, plan, load_options = prepared.options, prepared.storage, prepared.plan, prepared.load_options
    started = time.perf_counter()
    if options.overwrite:
        clear_cache(storage)
    clear_temporaries(storage)
    job = make_job(prepared)
    to_encode = {unit.id for unit in plan.new} - prepared.found.keys()
    if to_encode:
        job.vae()  # loaded now, and not in the middle of the first unit: loading is no part of the images' speed

    loop_started = time.perf_counter()
    large = Lock()  # several images at once, but only one that is very large: memory stays bounded
    with make_progress(plan.num_new_items, "latents") as bar:

        def load(item: Item, placement: Placement) -> Pixels | Skip:
            with large if is_large(item) else nullcontext():
                return load_pixels(item, placement, load_options)

        bare = replace(job, recipe=prepared.bare_recipe, text=None)
        result = run(plan.new, [], to_encode, load, bare, prepared.workers, partial(show_progress, bar, job))
    encode_seconds = time.perf_counter() - loop_started
    num_retried = job.vae().num_retried if to_encode else 0
    batch_limit = job.vae().limit.said if to_encode else ""
    job.vae.free()
    empty_cache()

    first = {unit.unit: unit.entry() for unit in result.units if unit.groups}
    skips = [*plan.skips, *(skip for unit in result.units for skip in unit.skips)]
    if prepared.manifest is None and not (first or plan.kept or plan.retext):
        raise UserError(nothing_usable(options.source, skips, [describe(e) for e in result.failures.values()]))
    before = {retext.entry.unit: retext.entry for retext in plan.retext}
    retexts: Iterable[Retext] = plan.retext
    total = plan.num_retexted_items
    if job.text is not None:
        retexts = chain((add_cond(entry, prepared) for entry in first.values()), retexts)
        total += sum(entry.num_images for entry in first.values())
    with make_progress(total, "text") as bar:
        again = run([], retexts, set(), load, job, prepared.workers, partial(show_progress, bar, job))
    uncond_file, text_recipe = write_empty_prompt(job), prepared.recipe["text"]
    uncond = uncond_id(text_recipe)
    if options.only == "latents" and prepared.manifest is not None:  # its shards may have cond
        before_it = prepared.manifest
        uncond, uncond_file, text_recipe = before_it.uncond, before_it.uncond_file, before_it.recipe["text"]

    # where making a new text failed, the shard stays with what it has
    entries = {**first, **before, **{unit.unit: unit.entry() for unit in again.units}}
    shards = sorted([*plan.kept, *entries.values()], key=shard_order)
    vanished = find_missing(storage, shards) if storage.is_local else {}  # only a local disk can vanish
    if vanished:
        raise UserError(
            f"{options.out}: vanished in part while it was written ({next(iter(vanished.values()))}). "
            "Nothing was committed. Run the same command again."
        )
    recipe = {**prepared.recipe, "text": text_recipe}
    manifest = Manifest(recipe, job.latent, made_with(prepared, job), shards, uncond=uncond, uncond_file=uncond_file)
    commit(storage, manifest, skips)
    invite_readers(storage)
    failures = {**result.failures, **again.failures}
    for unit, entry in first.items():
        if entries[unit].text != entry.text:
            storage.delete(text_name(unit, entry.text))
    cleared = clear_orphans(storage, manifest) if not failures else (0, 0)
    if not storage.is_local and prepared.manifest is not None:
        free(storage, prepared.manifest.files().keys() - manifest.files().keys(), manifest.files())

    def count(units: Iterable[str]) -> int:
        return sum(entries[unit].num_images for unit in units if unit in entries)

    return Outcome(
        num_encoded=count(to_encode),
        num_found=count(first.keys() - to_encode),
        num_retexted=count(before),
        num_prompts=job.counts["prompts"],
        truncated=job.truncated,
        noted=job.noted,
        damaged=job.damaged,
        num_cached=manifest.num_images,
        can_compact=any(map(would_rewrite, shards)),
        num_tombstones=manifest.num_tombstones,
        num_bytes=sum(shard.nbytes for shard in shards),
        skips=skips,
        notes=sum((unit.notes for unit in result.units), Counter()),
        failures=[f"unit {unit}: {type(error).__name__}: {error}" for unit, error in failures.items()],
        num_retried=num_retried,
        batch_limit=batch_limit,
        cleared=cleared,
        seconds=time.perf_counter() - started,
        encode_seconds=encode_seconds,
        waits={name: job.watch.seconds[name] for name in STAGES},
    )


def show_progress(bar: Any, job: "Job", count: int, encoded: bool) -> None:
    if not encoded:
        bar.initial += count  # so that images/s counts what this run encodes
    waits = ", ".join(f"{name} {job.watch.seconds[name]:.0f}s" for name in STAGES)
    bar.set_postfix_str(f"waited: {waits}", refresh=False)
    bar.update(count)


def add_cond(entry: ShardEntry, prepared: Prepared) -> Retext:
    """What the second pass does for a shard of the first."""
    rows = list(open_text(prepared.storage, entry.unit, entry.text, entry.groups).rows())
    return Retext(entry, rows, text_id(entry.unit, rows, prepared.recipe))


def shard_order(entry: ShardEntry) -> tuple[str, str]:
    return entry.groups[0][0], entry.unit


STAGES = ("decode", "encode", "text", "write")


def make_job(prepared: Prepared) -> "Job":
    """What every unit of the run needs; the models are loaded when they are first asked for."""
    import torch

    from latentprep.prepare.work.job import Job, Lazy

    options, recipe, models, vae = prepared.options, prepared.recipe, prepared.models, prepared.models.vae
    text, device = models.text, torch.device(prepared.device)
    latent = {
        "normalization": vae.normalization.to_json(),
        "factor": vae.factor,
        "channels": vae.latent_channels,
        "pixel_range": [-1, 1],
        "views": recipe["latents"]["views"],
    }
    return Job(
        storage=prepared.storage,
        recipe=recipe,
        latent=latent,
        batch_size=options.batch_size or default_batch_size(prepared.device, prepared.plan.buckets()),
        text_options=options.text,
        seed=options.seed,
        found=prepared.found,
        conditions=prepared.conditions,
        vae=Lazy(
            lambda: vae.open(
                device, TORCH_DTYPES[recipe["latents"]["dtype"]], tiling=options.tiling, compile=options.compile
            )
        ),
        text=Lazy(lambda: text.open(device, TORCH_DTYPES[recipe["text"]["dtype"]], options.text))
        if text is not None
        else None,
    )


def made_with(prepared: Prepared, job: "Job") -> dict[str, Any]:
    """How a cache was made, for people; nothing of it is compared."""
    options = prepared.options
    return {
        "source": str(options.source.resolve()),
        "model": options.model,
        "vae": options.vae,
        "config": options.config,
        "revision": options.revision,
        "commit": prepared.models.commit,
        "masks": str(options.masks) if options.masks is not None else None,
        "device": prepared.device,
        "batch_size": job.batch_size,
        "compile": options.compile,
    }
