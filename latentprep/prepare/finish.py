"""The end of a run: what was made becomes the cache, or this rank's part of it; and what came of it all."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace

from latentprep.cache.compact import would_rewrite
from latentprep.cache.leftovers import clear_orphans, find_missing
from latentprep.cache.manifest import MadeWith, Manifest, Uncond, commit
from latentprep.cache.names import make_uncond_id
from latentprep.cache.readers import free, invite_readers
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp
from latentprep.errors import UserError
from latentprep.prepare.engine import ranks
from latentprep.prepare.outcome import STAGES, Outcome, Tally
from latentprep.prepare.plan.plan import Plan
from latentprep.prepare.refusals import nothing_usable
from latentprep.prepare.survey import Prepared
from latentprep.prepare.work.events import Truncated
from latentprep.recipe import digest_of
from latentprep.records import Skip


def check_usable(prepared: Prepared, latents: Tally) -> None:
    """Raise UserError if a new cache would hold no image at all."""
    plan, is_alone = prepared.plan, prepared.where.world_size == 1
    if is_alone and prepared.manifest is None and not (latents.shards or plan.kept or plan.text_tasks):
        skips, failures = [*plan.skips, *latents.skips], list(latents.failures.values())
        raise UserError(nothing_usable(prepared.options, skips, failures))


def finish(prepared: Prepared, latents: Tally, texts: Tally, seconds: float, encode_seconds: float) -> Outcome:
    """Commit what was made. Raises UserError if it has vanished."""
    plan, storage = prepared.plan, prepared.storage
    failures = {**latents.failures, **texts.failures}
    skips = [*plan.skips, *latents.skips]
    before = {task.shard.id: task.shard for task in plan.text_tasks if task.shard.text_id}
    # if making a new text failed, or cond that it borrows, the shard stays with what it has
    made = {
        name: shard
        for name, shard in texts.shards.items()
        if shard.text_id and not texts.failures.keys() & {*shard.cond_files}
    }
    shards = sorted(
        {shard.id: shard for shard in (*plan.kept, *before.values(), *made.values())}.values(), key=Shard.order
    )
    vanished = find_missing(storage, shards, texts.cond_files) if storage.is_local else {}  # only a local disk can
    if vanished:
        raise UserError(
            f"{prepared.options.out}: vanished in part while it was written ({next(iter(vanished.values()))}). "
            "Nothing was committed. Run the same command again."
        )
    manifest = make_manifest(prepared, shards, texts)
    cleared: tuple[int, int] = (0, 0)
    absent: tuple[int, ...] = ()
    if prepared.where.world_size > 1:
        manifest, absent = hand_in(prepared, manifest, texts.cond_files, before, skips, len(failures))
    else:
        manifest = commit(storage, manifest, skips)
        invite_readers(storage)
        cleared = clear_orphans(storage, manifest) if not failures else (0, 0)
        if not storage.is_local and prepared.manifest is not None:
            free(storage, prepared.manifest.files().keys() - manifest.files().keys(), manifest.files())
    return Outcome(
        num_encoded=sum(result.num_encoded for result in latents.latents),
        num_found=sum(result.num_found for result in latents.latents),
        num_retexted=sum(shard.num_images for name, shard in made.items() if name in before),
        num_prompts=sum(text.num_prompts for text in texts.texts),
        truncated=sum((text.truncated for text in texts.texts), Truncated()),
        noted=join(result.named for result in latents.latents),
        damaged=[text.damaged for text in texts.texts if text.damaged],
        num_cached=manifest.num_images,
        can_compact=any(map(would_rewrite, manifest.shards)),
        num_dead=manifest.num_dead,
        num_bytes=manifest.nbytes,
        skips=skips,
        notes=sum((result.notes for result in latents.latents), Counter()),
        failures=name_failures(plan, latents, texts),
        num_retried=sum(result.num_retried for result in latents.latents),
        batch_limits=list_limits(latents, texts),
        cleared=cleared,
        seconds=seconds,
        encode_seconds=encode_seconds,
        waits={stage: latents.waits[stage] + texts.waits[stage] for stage in STAGES},
        absent=absent,
    )


def list_limits(latents: Tally, texts: Tally) -> list[str]:
    """How a full memory made batches smaller: the first message of each pass."""
    limits = (
        [result.batch_limit for result in results if result.batch_limit] for results in (latents.latents, texts.texts)
    )
    return [first for found in limits for first in found[:1]]


def name_failures(plan: Plan, latents: Tally, texts: Tally) -> list[str]:
    """What failed, and why."""
    units = [f"unit {name}: {error}" for name, error in latents.failures.items()]
    shards = {*(unit.id for unit in plan.units), *(task.id for task in plan.text_tasks)}

    def name_task(task: str) -> str:
        if not task:
            return "empty prompt"
        return f"text of {task}" if task in shards else f"cond of several shards, {task}"

    return units + [f"{name_task(task)}: {error}" for task, error in texts.failures.items()]


def join(parts: Iterable[Mapping[str, tuple[str, ...]]]) -> dict[str, list[str]]:
    """Keys by note, of all units."""
    joined: dict[str, list[str]] = {}
    for part in parts:
        for note, keys in part.items():
            joined.setdefault(note, []).extend(keys)
    return joined


def make_manifest(prepared: Prepared, shards: list[Shard], texts: Tally) -> Manifest:
    """What the cache is to consist of."""
    recipe, file, before = prepared.recipe, texts.uncond_file, prepared.manifest
    uncond = Uncond(make_uncond_id(recipe.text), file) if file is not None else None
    if before is not None and prepared.options.only == "latents":  # its shards may have cond
        recipe, uncond = replace(recipe, text=before.recipe.text), before.uncond
    manifest = Manifest(recipe, prepared.facts, made_with(prepared), uncond=uncond, sets=prepared.images.facts)
    named = before.cond_files if before is not None else {}
    return manifest.having(shards, {**named, **prepared.cond_files, **texts.cond_files})


def made_with(prepared: Prepared) -> MadeWith:
    """How the cache was made, for people."""
    options = prepared.options
    return MadeWith(
        model=options.model,
        source=str(options.source.resolve()),
        vae=options.vae,
        config=options.config,
        text_encoders=options.text_encoders,
        revision=options.revision,
        commit=prepared.models.commit,
        exclude=options.exclude,
        masks=str(options.masks) if options.masks is not None else None,
        control=tuple(map(str, options.controls)),
        control_columns=options.control_columns,
        device=", ".join(prepared.where.devices),
        batch_size=prepared.batch_size,
        compile=options.compile,
        again=dict(options.remembered),
    )


def hand_in(
    prepared: Prepared,
    manifest: Manifest,
    cond_files: Mapping[str, Stamp],
    before: Mapping[str, Shard],
    skips: list[Skip],
    num_failures: int,
) -> tuple[Manifest, tuple[int, ...]]:
    """Leave this rank's part, and commit if it is the last; the manifest, and the ranks that are absent.

    `cond_files`: those that this rank has made, for its own shards or for others'.
    """
    where = prepared.where
    own = [shard for shard in manifest.shards if shard != before.get(shard.id)]
    part = ranks.Part(
        base=ranks.base_of(prepared.manifest),
        plan=plan_digest(prepared),
        rank=where.rank,
        world_size=where.world_size,
        manifest=replace(manifest, shards=own, cond_files={**manifest.cond_files, **cond_files}),
        fallback=tuple(before.values()),
        skips=tuple(skips),
        num_failures=num_failures,
    )
    ranks.hand_in(prepared.storage, part)
    return ranks.merge_if_complete(prepared.storage, part)


def plan_digest(prepared: Prepared) -> str:
    """Digest of a plan: the ranks of a run must have the same one, else they have planned different work."""
    plan = prepared.plan
    tasks = [[task.id, [[*row.fingerprint, row.captions] for row in task.rows]] for task in plan.text_tasks]
    kept = [[shard.id, shard.text_id, shard.dead] for shard in plan.kept]
    units = [[unit.id, [item.captions for item in unit.items]] for unit in plan.units]
    recipe = prepared.recipe
    return digest_of([recipe.latents.to_json(), recipe.text.to_json(), prepared.options.only, units, tasks, kept])
