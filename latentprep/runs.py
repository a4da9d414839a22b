"""What each public function does, once its arguments are checked. Errors name options as on the command line."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.cache.storage import Storage
from latentprep.differences import Compared
from latentprep.errors import UserError
from latentprep.log_file import Log, log_path
from latentprep.options import EncodeOptions, ImageSet, TextOptions
from latentprep.progress import LateBar, Progress
from latentprep.quiet import quiet_logs, quiet_warnings
from latentprep.results import Compacted, Encoded, Merged, Summary, Verified
from latentprep.system import share_freed_memory

if TYPE_CHECKING:
    from latentprep.cache.manifest import Manifest
    from latentprep.prepare.survey import Prepared


def run_encode(options: EncodeOptions, progress: Progress, *, dry_run: bool, log: str | None = None) -> Encoded:
    """Plan, encode and commit; or only plan. Raises UserError, and KeyboardInterrupt once all that is done is safe.

    `log`: the file that what is said is written into; "none": nowhere; None: beside the cache.
    """
    from latentprep import messages
    from latentprep.cache.lock import hold
    from latentprep.prepare.encode import encode
    from latentprep.prepare.engine.where import find_share
    from latentprep.prepare.images.pillow import kept_limit
    from latentprep.prepare.refusals import check_paths
    from latentprep.prepare.survey import prepare

    share_freed_memory()
    with quiet_warnings, kept_limit():
        check_paths(options, progress.say)
        if dry_run:
            return estimate(options, progress)
        share = find_share(options.rank, options.world_size)
        ranks = (share.rank, share.world_size) if share.world_size > 1 else None
        progress = logged = Log(progress, log_path(log, options.out, share.rank, share.world_size))
        with logged.to_the_end(), told_where_it_is_safe(options.out), hold(Storage(options.out), ranks):
            prepared = prepare(options, progress)
            progress.say(messages.source_text(prepared))
            if prepared.is_done:
                return nothing_to_do(prepared)
            logged.open(options.remembered)
            with quiet_logs:
                outcome = encode(prepared, progress.bar)
            report = messages.outcome_text(prepared, outcome)
            logged.write(report)
            return Encoded(
                cache=options.out,
                num_cached=outcome.num_cached,
                num_encoded=outcome.num_encoded,
                num_retexted=outcome.num_retexted,
                changes=prepared.plan.changes,
                skips=tuple(outcome.skips),
                failures=tuple(outcome.failures),
                seconds=outcome.seconds,
                report=report,
                is_strict=options.strict,
                absent=tuple(outcome.absent),
                num_prompts=outcome.num_prompts,
            )


@contextmanager
def told_where_it_is_safe(out: str) -> Iterator[None]:
    """Adds a note to a KeyboardInterrupt: what is kept, and how to go on."""
    from latentprep import messages

    try:
        yield
    except KeyboardInterrupt as stop:
        stop.cache = out  # type: ignore[attr-defined]
        with suppress(OSError, UserError):  # the disk may have gone; the stop is what is to be told
            stop.add_note(f"{messages.kept_text(out)}. The same call goes on from there.")
        raise


def nothing_to_do(prepared: "Prepared") -> Encoded:
    """Of a cache that is complete already; what runs before have left behind is cleared away."""
    from latentprep import messages
    from latentprep.cache.leftovers import clear_orphans, clear_temporaries
    from latentprep.cache.readers import invite_readers

    assert prepared.manifest is not None
    cleared = (0, 0)
    invite_readers(prepared.storage)  # a run that was killed just behind its commit has not
    if prepared.where.world_size == 1:
        clear_temporaries(prepared.storage)
        cleared = clear_orphans(prepared.storage, prepared.manifest)
    return Encoded(
        cache=prepared.options.out,
        num_cached=prepared.manifest.num_images,
        num_encoded=0,
        num_retexted=0,
        changes=prepared.plan.changes,
        skips=prepared.plan.skips,
        failures=(),
        seconds=0.0,
        report=messages.done_text(prepared, cleared),
        is_strict=prepared.options.strict,
    )


def estimate(options: EncodeOptions, progress: Progress) -> Encoded:
    """What there is to do, and how long it would take."""
    from latentprep import messages
    from latentprep.prepare.plan.estimate import estimate_time
    from latentprep.prepare.plan.tokens import measure_lengths, measure_texts
    from latentprep.prepare.survey import prepare

    prepared = prepare(options, progress)
    progress.say(messages.source_text(prepared))
    with quiet_logs:
        lengths = measure_lengths(prepared)
        sizes = measure_texts(prepared, lengths)
        found = estimate_time(prepared)
    plan, totals = prepared.plan, messages.list_totals(prepared, found, lengths, sizes)
    return Encoded(
        cache=options.out,
        num_cached=plan.num_kept_items,
        num_encoded=plan.num_unit_items,
        num_retexted=plan.num_text_items,
        changes=plan.changes,
        skips=plan.skips,
        failures=(),
        seconds=found.seconds if found is not None else 0.0,
        report=messages.plan_text(prepared, totals),
        totals="\n".join(totals),
        is_dry_run=True,
        num_prompts=found.num_prompts if found is not None else 0,
    )


def run_inspect(cache: str, key: str | None, most_cropped: int) -> Summary:
    """What is in a cache, or of one image in it. Raises UserError."""
    from latentprep.cache.readers import Reading
    from latentprep.look import summary

    storage = Storage(cache)
    with Reading(storage):
        return Summary(summary.describe_sample(storage, key) if key else summary.summarize(storage, most_cropped))


def run_list(cache: str, pattern: str, only_enlarged: bool = False) -> Iterator[dict[str, Any]]:
    """Each image of a cache whose key fits a shell pattern, as plain JSON values. Raises UserError."""
    from latentprep.cache.readers import Reading
    from latentprep.look.rows import list_rows

    storage = Storage(cache)
    with Reading(storage):
        yield from list_rows(storage, pattern, only_enlarged)


@contextmanager
def named_as_option() -> Iterator[None]:
    """Errors about SOURCE speak of --source."""
    try:
        yield
    except UserError as error:
        if not str(error).startswith("SOURCE "):
            raise
        raise type(error)(f"--source {str(error).removeprefix('SOURCE ')}") from None


def run_verify(
    cache: str,
    progress: Progress,
    *,
    source: Path | None,
    named: Sequence[tuple[ImageSet, ...]],
    recall_texts: Callable[[str], Mapping[str, TextOptions]],
    masks: Path | None,
    controls: tuple[Path, ...],
    re_encode: int,
    seed: int,
    model: str | None,
    vae: str | None,
    text_encoders: tuple[str, ...],
    no_cond: bool,
    device: str,
) -> Verified:
    """Every file of a cache against its manifest, and its images against those of `source`. Raises UserError."""
    from latentprep.cache.readers import Reading
    from latentprep.look.verify import verify

    if re_encode and source is None:
        raise UserError("--re-encode needs the images: give their folder with --source.")
    storage = Storage(cache)
    with progress.bar(count_bytes(storage), "hash", "B") as bar:
        manifest, found = verify(storage, bar.update)
    problems, not_compared = list(found), None
    differences: dict[str, float] = {}
    if source is not None and problems:
        not_compared = f"{source}: not compared; mend the cache first"
    elif source is not None and manifest is not None:
        from latentprep.prepare.recheck import compare_captions, compare_source, load_options, reencode
        from latentprep.prepare.recheck_source import find_originals
        from latentprep.prepare.recheck_text import find_text, reencode_text

        with Reading(storage), quiet_warnings, named_as_option():
            sets = choose_sets(source, named, manifest) if named else ()
            texts = remember_texts(cache, recall_texts, progress)
            originals = find_originals(storage, manifest, source, masks, controls, sets, texts)
            with progress.bar(manifest.num_images, "source") as bar:
                problems += compare_source(storage, manifest, originals, bar.update)
            problems += compare_captions(storage, manifest, originals)
            if re_encode:
                with quiet_logs:
                    text = None if no_cond else find_text(manifest, model, vae, text_encoders)
                    with LateBar(progress, min(re_encode, manifest.num_images), "latents") as bar:
                        more, differences["latents"] = reencode(
                            storage, manifest, originals, re_encode, seed=seed, model=model, vae=vae, device=device,
                            progress=bar.update,
                        )  # fmt: skip
                    problems += more
                    if text is not None:
                        with LateBar(progress, None, "cond", "prompt") as bar:
                            more, differences["cond"] = reencode_text(
                                storage, manifest, text, re_encode, load=load_options(manifest, originals), seed=seed,
                                device=device, progress=bar.update,
                            )  # fmt: skip
                        problems += more
    return Verified(
        cache=cache,
        problems=tuple(problems),
        num_images=manifest.num_images if manifest is not None else None,
        num_shards=len(manifest.shards) if manifest is not None else None,
        not_compared=not_compared,
        differences=differences,
    )


def remember_texts(
    cache: str, recall_texts: Callable[[str], Mapping[str, TextOptions]], progress: Progress
) -> Mapping[str, TextOptions]:
    """How the captions of a cache were found, by the names of its sets; nothing, which is said, if it is not known."""
    try:
        return recall_texts(cache)
    except UserError as error:
        progress.say(f"captions not compared: {error}")
        return {}


def choose_sets(source: Path, named: Sequence[tuple[ImageSet, ...]], manifest: "Manifest") -> tuple[ImageSet, ...]:
    """Of the sets that a file names for each of its runs, those of a cache. Raises UserError if there are none."""
    names = {facts.name for facts in manifest.sets}

    def likeness(sets: tuple[ImageSet, ...]) -> float:
        found = {own.name for own in sets}
        return len(found & names) / len(found | names)

    sets = max(named, key=likeness)
    if not likeness(sets):
        of_cache = f"sets {', '.join(sorted(names))}" if names else "one source, without sets"
        raise UserError(f"--source {source}: is not what this cache was made from, which has {of_cache}.")
    return sets


def count_bytes(storage: Storage) -> int | None:
    """Bytes of a cache's shards; None if that is not known."""
    from latentprep.cache.manifest import open_manifest

    with suppress(UserError):
        return sum(shard.nbytes for shard in open_manifest(storage).shards)
    return None


def run_diff(a: str, b: str, samples: int | None, seed: int, progress: Progress) -> Compared:
    """What differs between two caches. Raises UserError."""
    from latentprep.cache.readers import Reading
    from latentprep.look.diff import compare

    one, other = Storage(a), Storage(b)
    with Reading(one), Reading(other):
        return compare(one, other, samples, seed, progress)


def run_compact(cache: str, progress: Progress, min_share: float) -> Compacted:
    """Rewrite the shards that hold many dead rows. Raises UserError."""
    from latentprep.cache.compact import compact
    from latentprep.cache.lock import hold
    from latentprep.cache.manifest import open_manifest

    storage = Storage(cache)
    open_manifest(storage)  # before the lock, which would make the folder
    with hold(storage), LateBar(progress, None, "compact", "shard") as bar:
        done = compact(storage, min_share, bar.update)
    return Compacted(
        cache, done.num_shards, done.num_rows, done.num_left, max(0, done.nbytes), done.num_read, tuple(done.damaged)
    )


def run_merge(cache: str, incomplete: bool) -> Merged:
    """Commit what ranks have handed in. Raises UserError."""
    from latentprep.prepare.engine.ranks import merge

    manifest, absent = merge(Storage(cache), incomplete)
    return Merged(cache, manifest.num_images, tuple(absent))
