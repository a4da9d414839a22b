"""The run of `latentprep encode`: a plan -> units -> manifest, and what became of it."""

import time
from collections import Counter
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from latentprep.cache.leftovers import clear_cache, clear_orphans, clear_temporaries
from latentprep.cache.manifest import Manifest, commit
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.shard import ShardEntry
from latentprep.prepare.devices import default_batch_size
from latentprep.prepare.survey import Prepared
from latentprep.records import Item, Pixels, Placement, Skip

if TYPE_CHECKING:
    from latentprep.prepare.job import Job


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    num_encoded: int  # images, by this run
    num_found: int  # images that an unfinished run had encoded before
    num_retexted: int  # images whose text alone was made anew
    num_prompts: int  # prompts that the text encoder saw, the empty one included
    num_cached: int  # images in the cache now
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


def encode(prepared: Prepared, make_progress: Callable[[int], Any]) -> Outcome:
    """Run the plan and commit the manifest. `make_progress(total)` gives a tqdm-like bar of images.

    Raises UserError, and KeyboardInterrupt once every finished file is safe on disk.
    """
    from latentprep.prepare.engine.local import run
    from latentprep.prepare.load import LARGE_PIXELS, load_pixels
    from latentprep.prepare.textfile import write_empty_prompt

    options, storage, plan = prepared.options, prepared.storage, prepared.plan
    started = time.perf_counter()
    if options.overwrite:
        clear_cache(storage)
    clear_temporaries(storage)
    job = make_job(prepared)
    to_encode = {unit.id for unit in plan.new} - prepared.found
    # load models now, and not in the middle of the first unit: loading is no part of the images' speed
    if to_encode:
        job.vae()
        if job.text is not None:
            job.text()

    loop_started = time.perf_counter()
    large = Lock()  # several images at once, but only one that is very large: memory stays bounded
    with make_progress(plan.num_new_items + plan.num_retexted_items) as bar:

        def progress(count: int, encoded: bool) -> None:
            if not encoded:
                bar.initial += count  # so that images/s counts what this run encodes
            waits = ", ".join(f"{name} {job.watch.seconds[name]:.0f}s" for name in STAGES)
            bar.set_postfix_str(f"waited: {waits}", refresh=False)
            bar.update(count)

        def load(item: Item, placement: Placement) -> Pixels | Skip:
            with large if item.size[0] * item.size[1] > LARGE_PIXELS else nullcontext():
                return load_pixels(options.source, item, placement, options.geometry.filter, prepared.models.vae.factor)

        result = run(plan.new, plan.retext, to_encode, load, job, prepared.workers, progress)
    encode_seconds = time.perf_counter() - loop_started

    uncond_file = write_empty_prompt(job)
    entries = {unit.unit: unit.entry() for unit in result.units if unit.groups}
    before = {retext.entry.unit: retext.entry for retext in plan.retext}  # stays where making its new text failed
    shards = sorted([*plan.kept, *({**before, **entries}).values()], key=shard_order)
    new = [unit for unit in result.units if unit.unit not in before]
    skips = [*plan.skips, *(skip for unit in new for skip in unit.skips)]
    manifest = Manifest(prepared.recipe, job.latent, made_with(prepared, job), shards, uncond_file=uncond_file)
    commit(storage, manifest, skips)
    cleared = clear_orphans(storage, manifest) if not result.failures else (0, 0)

    def count(units: Iterable[str]) -> int:
        return sum(entries[unit].num_images for unit in units if unit in entries)

    return Outcome(
        num_encoded=count(to_encode),
        num_found=count(entries.keys() - to_encode - before.keys()),
        num_retexted=count(before),
        num_prompts=job.counts["prompts"],
        num_cached=manifest.num_images,
        num_tombstones=manifest.num_tombstones,
        num_bytes=sum(shard.nbytes for shard in shards),
        skips=skips,
        notes=sum((unit.notes for unit in new), Counter()),
        failures=[f"unit {unit}: {type(error).__name__}: {error}" for unit, error in result.failures.items()],
        num_retried=job.vae().num_retried if to_encode else 0,
        batch_limit=job.vae().limit.said if to_encode else "",
        cleared=cleared,
        seconds=time.perf_counter() - started,
        encode_seconds=encode_seconds,
        waits={name: job.watch.seconds[name] for name in STAGES},
    )


def shard_order(entry: ShardEntry) -> tuple[str, str]:
    return entry.groups[0][0], entry.unit


STAGES = ("decode", "encode", "text", "write")


def make_job(prepared: Prepared) -> "Job":
    """What every unit of the run needs; the models are loaded when they are first asked for."""
    import torch

    from latentprep.prepare.job import Job

    options, recipe, models, vae = prepared.options, prepared.recipe, prepared.models, prepared.models.vae
    make_text = models.make_text
    device, dtype = torch.device(prepared.device), TORCH_DTYPES[recipe["latents"]["dtype"]]
    latent = {
        "scaling_factor": vae.scaling_factor,
        "shift_factor": vae.shift_factor,
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
        template=options.text.template,
        placeholder=options.text.placeholder,
        seed=options.seed,
        vae=cache(lambda: models.make_vae(device, dtype)),
        text=cache(lambda: make_text(device, dtype)) if make_text is not None else None,
    )


def made_with(prepared: Prepared, job: "Job") -> dict[str, Any]:
    """How a cache was made, for people; nothing of it is compared."""
    options = prepared.options
    return {
        "model": options.model,
        "vae": options.vae,
        "device": prepared.device,
        "batch_size": job.batch_size,
        "compile": options.compile,
    }
