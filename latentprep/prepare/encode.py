"""The whole of `latentprep encode`: source -> captions -> plan -> units -> manifest."""

import os
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep import __version__
from latentprep.cache import manifest
from latentprep.cache.manifest import Manifest, ShardEntry, commit, find_manifest, read_skips, recipe_digest
from latentprep.cache.shard import TORCH_DTYPES, UNCOND_NAME, latents_name, text_name
from latentprep.cache.storage import Storage
from latentprep.config import EncodeOptions, latents_recipe, recipe_changes, text_recipe
from latentprep.errors import UserError
from latentprep.prepare.buckets import make_place
from latentprep.prepare.captions import Captioned, add_captions
from latentprep.prepare.devices import choose_device, default_batch_size
from latentprep.prepare.models import TextFolder, VaeFolder, find_model, open_text, open_vae
from latentprep.prepare.plan import Plan, RowBytes, make_plan
from latentprep.prepare.source import list_folder
from latentprep.records import Item, Pixels, Placement, Skip

if TYPE_CHECKING:
    from latentprep.prepare.worker import Job

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A plan and all it rests on; nothing has been written and no weights are loaded."""

    options: EncodeOptions
    storage: Storage
    vae: VaeFolder
    text: TextFolder | None
    device: str
    recipe: dict[str, Any]
    manifest: Manifest | None
    captioned: Captioned
    row_bytes: RowBytes
    plan: Plan


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    num_encoded: int  # images, by this run
    num_found: int  # images that an unfinished run had encoded before
    num_retexted: int  # images whose text alone was made anew
    num_cached: int  # images in the cache now
    num_bytes: int
    skips: list[Skip]
    notes: Counter[str]
    failures: list[str]
    num_retried: int
    seconds: float  # of the whole run
    encode_seconds: float  # of its units, without the loading of models
    waits: dict[str, float]  # stage -> seconds that the loop waited for it


def prepare(options: EncodeOptions, say: Say) -> Prepared:
    """The plan for a folder and a cache; says what it chose and why. Raises UserError."""
    out = Path(options.out) if "://" not in options.out else None
    if out is not None and out.resolve() == options.source.resolve():
        raise UserError(f"--out {options.out}: is the image folder itself. Give the cache a folder of its own.")
    if out is not None and out.is_file():
        raise UserError(f"--out {options.out}: is a file, expected a folder for the cache.")
    source = list_folder(options.source, without=out)
    captioned = add_captions(source, options.text)
    model = find_model(options.model, say=say)
    vae = open_vae(find_model(options.vae, "--vae", say), "--vae") if options.vae else open_vae(model)
    text = open_text(model) if options.text.include_cond else None
    place = make_place(options.geometry, vae.factor)
    device, dtype, reason = choose_device(options.device, options.dtype)
    say(f"model    {options.model}" + (f", VAE {options.vae}" if options.vae else "") + f" (factor {vae.factor})")
    say(f"device   {device}, {dtype} ({reason})")

    recipe = {
        "latents": latents_recipe(
            vae=vae.digest, geometry=options.geometry, flip=options.flip,
            dtype=dtype, store=options.store, store_dtype=options.store_dtype,
        ),
        "text": text_recipe(
            text_encoder=text.digest if text else None, options=options.text, seed=options.seed,
            dtype=dtype, store_dtype=options.store_dtype,
        ),
    }  # fmt: skip
    storage = Storage(options.out)
    existing = None if options.overwrite else find_manifest(storage)
    if existing is not None:
        changes = list(recipe_changes(existing.recipe["latents"], recipe["latents"]))
        if changes:
            raise UserError(
                f"{options.out}: holds a cache of another recipe ({'; '.join(changes)}; cache -> asked). "
                "Give another --out, the options it was made with, or --overwrite to start anew."
            )
    row_bytes = estimate_row_bytes(recipe, vae, text)
    plan = make_plan(
        captioned.items, source.skips, place, row_bytes, recipe=recipe,
        shard_bytes=options.shard_bytes, storage=storage, manifest=existing,
    )  # fmt: skip
    if existing is None and not plan.new:
        skip = plan.skips[0]
        raise UserError(
            f"SOURCE {options.source}: none of its {len(plan.skips):,} images can be used "
            f"({skip.key}: {skip.reason}, {skip.detail}). Nothing was written."
        )
    return Prepared(options, storage, vae, text, device, recipe, existing, captioned, row_bytes, plan)


def estimate_row_bytes(recipe: dict[str, Any], vae: VaeFolder, text: TextFolder | None) -> RowBytes:
    """What rows will cost on disk, from the configs alone."""
    posterior = 2 if recipe["latents"]["store"] == "mean+std" else 1
    views = len(recipe["latents"]["views"])
    latent = views * (
        posterior * vae.latent_channels * TORCH_DTYPES[recipe["latents"]["store_dtype"]].itemsize + 2
    )  # + 2: weight
    cond = text.max_tokens * text.width * TORCH_DTYPES[recipe["text"]["store_dtype"]].itemsize if text else 0
    return RowBytes(latent, cond + 512, vae.factor)  # 512: key, caption and prompt


def encode(prepared: Prepared, make_progress: Callable[[int], Any]) -> Outcome:
    """Run the plan and commit the manifest. `make_progress(total)` gives a tqdm-like bar of images.

    Raises UserError, and KeyboardInterrupt once every finished file is safe on disk.
    """
    from latentprep.prepare.engine.local import run
    from latentprep.prepare.load import load_pixels
    from latentprep.prepare.worker import write_empty_prompt

    options, storage, plan = prepared.options, prepared.storage, prepared.plan
    started = time.perf_counter()
    if options.overwrite:
        clear(storage)
    job = make_job(prepared)
    units = [*plan.new, *(unit for _, unit in plan.retext)]
    existing = set(storage.names("shards"))
    to_encode = {unit.id for unit in plan.new if latents_name(unit.id) not in existing}
    # load models now, and not in the middle of the first unit: loading is no part of the images' speed
    if to_encode:
        job.vae()
    if job.text is not None:
        job.text()

    loop_started = time.perf_counter()
    with make_progress(sum(len(unit.items) for unit in units)) as bar:

        def progress(count: int, encoded: bool) -> None:
            if not encoded:
                bar.initial += count  # so that images/s counts what this run encodes
            waits = ", ".join(f"{name} {job.watch.seconds[name]:.0f}s" for name in STAGES)
            bar.set_postfix_str(f"waited: {waits}", refresh=False)
            bar.update(count)

        def load(item: Item, placement: Placement) -> Pixels | Skip:
            return load_pixels(options.source, item, placement, options.geometry.filter, prepared.vae.factor)

        result = run(units, to_encode, load, job, options.workers or min(8, os.cpu_count() or 1), progress)
    encode_seconds = time.perf_counter() - loop_started

    write_empty_prompt(job)
    replaced = {entry.unit: entry for entry, _ in plan.retext}
    entries = {unit.unit: unit.entry() for unit in result.units if unit.groups}
    shards = sorted([*plan.kept, *({**replaced, **entries}).values()], key=shard_order)
    new = [unit for unit in result.units if unit.unit not in replaced]
    skips = [*plan.skips, *(skip for unit in new for skip in unit.skips)]
    commit(storage, Manifest(prepared.recipe, job.latent, made_with(prepared, job), shards, len(skips)), skips)
    for unit, old in replaced.items():
        if unit in entries and entries[unit].text != old.text:
            storage.delete(text_name(old.unit, old.text))

    def count_rows(units: Iterable[str]) -> int:
        return sum(entries[unit].rows for unit in units if unit in entries)

    return Outcome(
        num_encoded=count_rows(to_encode),
        num_found=count_rows(entries.keys() - to_encode - replaced.keys()),
        num_retexted=count_rows(replaced),
        num_cached=sum(shard.rows for shard in shards),
        num_bytes=sum(shard.latents_bytes + shard.text_bytes for shard in shards),
        skips=skips,
        notes=sum((unit.notes for unit in new), Counter()),
        failures=[f"unit {unit.id}: {type(error).__name__}: {error}" for unit, error in result.failures],
        num_retried=job.vae().num_retried if to_encode else 0,
        seconds=time.perf_counter() - started,
        encode_seconds=encode_seconds,
        waits={name: job.watch.seconds[name] for name in STAGES},
    )


def update_skips(prepared: Prepared) -> None:
    """Bring skipped.jsonl up to date where there is nothing else to do: broken files came or went."""
    skips = sorted(prepared.plan.skips, key=lambda skip: skip.key)
    if prepared.manifest is not None and skips != read_skips(prepared.storage):
        commit(prepared.storage, replace(prepared.manifest, num_skipped=len(skips)), skips)


def shard_order(entry: ShardEntry) -> tuple[str, str]:
    return entry.groups[0][0], entry.unit


STAGES = ("decode", "encode", "text", "write")


def make_job(prepared: Prepared) -> "Job":
    """What every unit of the run needs; the models are loaded when they are first asked for."""
    import torch

    from latentprep.prepare.text import TextEncoder
    from latentprep.prepare.vae import VaeEncoder
    from latentprep.prepare.worker import Job

    options, recipe, vae, text = prepared.options, prepared.recipe, prepared.vae, prepared.text
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
        metadata={**latent, "recipe": recipe_digest(recipe), "versions": versions()},
        batch_size=options.batch_size or default_batch_size(prepared.device, prepared.plan.buckets()),
        template=options.text.template,
        placeholder=options.text.placeholder,
        seed=options.seed,
        vae=cache(lambda: VaeEncoder(vae, device, dtype)),
        text=cache(lambda: TextEncoder(text, device, dtype)) if text else None,
    )


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers come from."""
    libraries = ("torch", "diffusers", "transformers", "pillow")
    return {"latentprep": __version__, **{name: version(name) for name in libraries}}


def made_with(prepared: Prepared, job: "Job") -> dict[str, Any]:
    """How a cache was made, for people; nothing of it is compared."""
    options = prepared.options
    return {
        **job.metadata["versions"],
        "model": options.model,
        "vae": options.vae,
        "device": prepared.device,
        "batch_size": job.batch_size,
    }


def clear(storage: Storage) -> None:
    """Delete a cache's own files and nothing else, the manifest first."""
    shards = [name for name in storage.names("shards") if name.endswith(".safetensors")]
    for name in (manifest.NAME, manifest.SKIPPED_NAME, UNCOND_NAME, *shards):
        storage.delete(name)
