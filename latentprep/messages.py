"""What `latentprep encode` tells the person: the plan, the outcome, and what to type next."""

import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from latentprep.cache.names import FOLDER
from latentprep.cache.names import MANIFEST as MANIFEST_NAME
from latentprep.cache.storage import Storage
from latentprep.human import counted, human_bytes, human_seconds, printable, shortened
from latentprep.options import EncodeOptions
from latentprep.prepare.find_images import describe_sets
from latentprep.prepare.outcome import Outcome
from latentprep.prepare.plan.buckets import cropped_away
from latentprep.prepare.plan.estimate import Estimate
from latentprep.prepare.plan.tokens import Lengths, TextSizes
from latentprep.prepare.survey import Prepared
from latentprep.prompts import make_prompts
from latentprep.records import CHANGES, NOTES, Change, Size, Skip
from latentprep.results import Encoded, text_line
from latentprep.size_words import disk_lines, token_lines
from latentprep.speed_words import describe_load

if TYPE_CHECKING:
    from latentprep.prepare.work.events import Truncated

NUM_CROPPED = 20  # images whose crop a dry run shows
NUM_PROMPTS = 3  # that are shown before a run
NAMED = 5  # how many keys a line names before it says "and N more"


def source_text(prepared: Prepared) -> str:
    """What was found, before anything is encoded."""
    captioned = prepared.images.captioned
    words = {
        "txt": "from .txt", "caption": "from .caption", "json": "from .json", "metadata": "from metadata files",
        "default": "by default", "filename": "from file names", "folder": "from folders",
        "nothing": "without one",
    }  # fmt: skip
    origins = sorted(captioned.origins, key=lambda name: list(words).index(name) if name in words else -1)
    found = ", ".join(f"{captioned.origins[name]:,} {words.get(name, f'from .{name}')}" for name in origins)
    lines = [
        f"source   {prepared.options.source}: {counted(len(captioned.items), 'image')}; captions: {found or 'none'}"
    ]
    lines += [f"note     {printable(note)}" for note in prepared.options.notes]
    lines += describe_sets(prepared.images, prepared.options.sets)
    counts = [len(item.captions) for item in captioned.items]
    if sum(counts) > len(counts):
        lines.append(f"         {counted(sum(counts), 'caption')} in all, up to {max(counts)} an image")
    if captioned.num_long:
        lines.append(
            f"         {counted(captioned.num_long, 'caption file')} of several lines, taken as one caption "
            "(--caption-lines makes each line a caption)"
        )
    options = prepared.options.text
    lines += describe_captions(prepared)
    if options.prompts_per_image > 1 and max(counts, default=1) == 1 and not options.has_choices:
        lines.append(
            f"         the {options.prompts_per_image} prompts of an image are all its one caption, since nothing "
            "varies it (--template, --shuffle-tags, --tag-drop-out, --wildcards, --caption-lines)"
        )
    if captioned.without_image:
        lines.append(f"         captions without an image: {_name(captioned.without_image)}")
    if captioned.second:
        files = counted(len(captioned.second), "caption file")
        lines.append(f"         {files} not read, since the image has a .txt too: {_name(captioned.second)}")
    if captioned.ignored:
        suffixes = [suffix for suffix, _ in captioned.ignored.most_common()]
        lines.append(
            f"         {counted(captioned.ignored.total(), 'file')} of other kinds left out: {_name(suffixes)}"
        )
    if captioned.excluded:
        named = ", ".join(f"{printable(name)} ({count:,})" for name, count in sorted(captioned.excluded.items()))
        lines.append(f"         {counted(captioned.excluded.total(), 'file')} excluded: {named}")
    if captioned.shared:
        lines.append(f"         one caption file for several images of one stem: {_name(captioned.shared)}")
    return "\n".join(lines)


def describe_captions(prepared: Prepared) -> list[str]:
    """What a person should see before hours are spent: captions that are file names, or empty; and some prompts."""
    options, items, lines = prepared.options, prepared.images.captioned.items, []
    of_names = [item for item in items if item.caption_origin == "filename"]
    if of_names and any(options.text.of(item.key).caption_from == "auto" for item in of_names):
        shown = ", ".join(repr(shortened(item.captions[0], 30)) for item in of_names[:3])
        lines.append(f"         file names as captions: {shown} (--caption-from file leaves such images without)")
    num_empty = sum(item.captions == ("",) for item in items)
    if num_empty:
        lines.append(f"         {counted(num_empty, 'caption')} empty (--trigger or a --template gives words to all)")
    some = items[:: max(1, len(items) // NUM_PROMPTS)][:NUM_PROMPTS]
    prompts = [make_prompts(item.captions, item.key, options.text, options.seed)[0] for item in some]
    if prompts:
        lines.append(f"prompts  such as {', '.join(repr(shortened(prompt)) for prompt in dict.fromkeys(prompts))}")
    return lines


def plan_text(prepared: Prepared, totals: Sequence[str]) -> str:
    """What a run would do: the --dry-run page. Each kind of change and of skip first, the totals last."""
    plan = prepared.plan
    lines = [*change_lines(plan.changes), *skip_lines(plan.skips)]
    return "\n".join([*lines, *([""] if lines else ()), *totals])


def list_totals(prepared: Prepared, estimate: Estimate | None, lengths: Lengths | None, sizes: TextSizes) -> list[str]:
    """Lines of what a run would do, without what --list says of each image."""
    plan = prepared.plan
    lines = [f"plan     {prepared.options.out}: {summary_of_changes(prepared) or 'nothing to do'}"]
    if plan.num_text_items:
        lines.append(f"         {text_line(plan.num_text_items)}; latents left alone")
    lines.append(f"         {counted(plan.num_kept_items, 'image')} there already")
    rows: dict[Size, list[float]] = {}
    for _, placement in plan.rows():
        rows.setdefault(placement.bucket, []).append(cropped_away(placement))
    if rows:
        lines.append("")
        lines.append(f"{'bucket':>12} {'images':>9} {'cropped away':>14} {'worst':>7}")
        for (height, width), losses in sorted(rows.items()):
            mean = sum(losses) / len(losses)
            lines.append(f"{f'{width}x{height}':>12} {len(losses):>9,} {mean:>14.1%} {max(losses):>7.1%}")
        lines.append("")
        worst = sorted(((-cropped_away(p), item.key) for item, p in plan.rows()))[:NUM_CROPPED]
        if worst[0][0] < 0:
            lines.append("most cropped")
            lines += [f"{-loss:>12.1%} {printable(key)}" for loss, key in worst if loss < 0]
            lines.append("")
        enlarged = sorted(item.key for item, placement in plan.rows() if placement.enlarges(item.size))
        if enlarged:
            smaller = f"{counted(len(enlarged), 'image')} smaller than the bucket (--no-upscale keeps the pixels)"
            lines.append(f"enlarged: {smaller}: {_name(enlarged)}")
    lines += disk_lines(prepared, sizes)
    lines += token_lines(prepared, lengths, sizes)
    to_encode = f", {estimate.num_prompts:,} to encode" if estimate is not None and estimate.num_prompts else ""
    lines.append(f"prompts: {prepared.options.text.prompts_per_image} per image{to_encode}")
    if estimate is not None:
        lines.append(f"time: about {human_seconds(estimate.seconds)} on this machine ({estimate.measured})")
        lines += describe_load(estimate.load, estimate.cores, "without them it may take much less")
    lines.append("nothing was written (--dry-run)")
    return lines


def count_change(what: str, count: int) -> str:
    """So many images of one of CHANGES: 3 new, 1 caption changed."""
    if what == "caption":
        return f"{counted(count, 'caption')} changed"
    return f"{count:,} with prompts made otherwise" if what == "prompt" else f"{count:,} {what}"


def change_lines(changes: Sequence[Change]) -> list[str]:
    """How many images each kind of change is for, and the first of them with its reason."""
    lines = []
    for what, meaning in CHANGES.items():
        those = [change for change in changes if change.what == what]
        if those:
            such_as = ", such as" if len(those) > 1 else ":"
            lines.append(f"{what:<9}{counted(len(those), 'image')}{such_as} {describe_change(those[0])}: {meaning}")
    if len(changes) > len(lines):
        lines.append("         --list names them all")
    return lines


def list_lines(result: Encoded) -> Iterator[str]:
    """A line for every image that there is something to do for, and for every one that is skipped, with its reason."""
    for change in result.changes:
        yield f"{change.what:<9}{printable(change.key)}" + (f"  ({printable(change.detail)})" if change.detail else "")
    for skip in result.skips:
        yield f"skipped  {printable(skip.key)} ({skip.reason}: {printable(skip.detail)})"


def describe_change(change: Change) -> str:
    return printable(change.key) + (f" ({printable(change.detail)})" if change.detail else "")


def summary_of_changes(prepared: Prepared) -> str:
    """3 new, 1 renamed, ... in the order of CHANGES; what was found of an unfinished run is said apart."""
    counts = Counter(change.what for change in prepared.plan.changes)
    parts = [count_change(what, counts[what]) for what in CHANGES if counts[what]]
    found = sum(len(unit.items) for unit in prepared.plan.units if unit.id in prepared.plan.leftovers)
    if found:
        parts.append(f"of the new {found:,} encoded by a run that did not finish")
    return ", ".join(parts)


def done_text(prepared: Prepared, cleared: tuple[int, int]) -> str:
    """Of a cache that is complete already; `cleared` are files and bytes that nothing referred to."""
    cached = sum(entry.num_images for entry in prepared.plan.kept)
    lines = [
        f"{prepared.options.out} is complete with {counted(cached, 'image')}; nothing to do.",
        *cleared_lines(cleared),
    ]
    return "\n".join([*lines, *skip_lines(prepared.plan.skips), _next(prepared.options)])


def outcome_text(prepared: Prepared, outcome: Outcome) -> str:
    """What was written, what was skipped and why, and the next command to type."""
    rate = outcome.num_encoded / outcome.encode_seconds
    speed = f" (latents at {rate:.1f} images/s)" if outcome.num_encoded else ""
    done = [counted(outcome.num_encoded, "image")] if outcome.num_encoded else []
    done += [counted(outcome.num_prompts, "prompt")] if outcome.num_prompts else []
    lines = [f"encoded  {' and '.join(done) or 'nothing'} in {outcome.seconds:.1f} s{speed}"]
    if outcome.num_found:
        lines.append(f"         {counted(outcome.num_found, 'image')} found from an earlier run that did not finish")
    if prepared.manifest is not None or prepared.plan.num_kept_items:
        lines.append(f"         {summary_of_changes(prepared) or 'no image changed'}")
    if outcome.num_retexted:
        lines.append(f"         {text_line(outcome.num_retexted)}; latents left alone")
    if outcome.num_encoded or outcome.num_retexted:
        lines.append(
            "         waited for " + ", ".join(f"{stage} {seconds:.1f} s" for stage, seconds in outcome.waits.items())
        )
    lines += [
        f"         {counted(count, 'image')} {NOTES.get(note, note)}"
        + (f": {_name(outcome.noted[note], count)}" if note in outcome.noted else "")
        for note, count in sorted(outcome.notes.items())
    ]
    if outcome.num_retried:
        lines.append(f"         {counted(outcome.num_retried, 'encoding')} done again in float32, after an overflow")
    lines += [f"         {limit}" for limit in outcome.batch_limits]
    lines += cleared_lines(outcome.cleared)
    lines += skip_lines(outcome.skips)
    if outcome.truncated.count:
        lines.append(truncated_line(prepared, outcome.truncated))
    lines += [f"damaged  {line} It was made anew." for line in outcome.damaged]
    for failure in outcome.failures:
        lines.append(f"FAILED   {printable(failure)}")
    if outcome.failures:
        lines.append("         none of that is in the cache yet; run the same command again to retry it")
    if outcome.absent:
        where, named = prepared.where, ", ".join(map(str, outcome.absent))
        command = shlex.join(["latentprep", "merge", prepared.options.out])
        lines.append(f"rank     {where.rank} of {where.world_size} is done; not yet: {named}. The last one commits")
        return "\n".join([*lines, f"         the cache, or {command}"])
    count = prepared.options.text.prompts_per_image
    images = counted(outcome.num_cached, "image") + (f" with {count} prompts each" if count > 1 else "")
    lines.append(f"cache    {prepared.options.out}: {images}, {human_bytes(outcome.num_bytes)}")
    if outcome.num_dead:
        command = shlex.join(["latentprep", "compact", prepared.options.out])
        frees = f"; {command} frees their space" if outcome.can_compact else ", too few to compact"
        lines.append(f"         and {counted(outcome.num_dead, 'row')} of changed or removed images{frees}")
    return "\n".join([*lines, _next(prepared.options)])


def cleared_lines(cleared: tuple[int, int]) -> list[str]:
    files, nbytes = cleared
    return [f"cleared  {counted(files, 'file')} that nothing refers to ({human_bytes(nbytes)})"] if files else []


def truncated_line(prepared: Prepared, truncated: "Truncated") -> str:
    """cut      3 prompts of more than 77 tokens (--max-tokens 150 keeps more): 99 'a ...', ..."""
    text, limit = prepared.models.text, truncated.max_tokens
    more = text.more_tokens(limit) if text is not None else None
    hint = f" (--max-tokens {more} keeps more)" if more else ""
    named = ", ".join(f"{tokens} {shortened(prompt)!r}" for tokens, prompt in truncated.longest)
    others = ", ..." if truncated.count > len(truncated.longest) else ""
    return f"cut      {counted(truncated.count, 'prompt')} of more than {limit:,} tokens{hint}: {named}{others}"


def kept_text(out: str) -> str:
    """What of a run that was stopped is safe."""
    names = Storage(out).names(FOLDER)
    finished, started = (sum(part in name for name in names) for part in (".latents.", ".partial."))
    parts = [counted(finished, "finished shard")] if finished else []
    parts += ["what is encoded of the next" if finished else "what is encoded so far"] if started else []
    is_or_are = "is" if len(parts) == 1 and finished < 2 else "are"
    return f"Stopped; {' and '.join(parts)} {is_or_are} safe in {out}" if parts else "Stopped; nothing was encoded yet"


def command_to_go_on(out: str, arguments: list[str]) -> str:
    """What to type; --overwrite would throw away what is safe, once it has deleted the old cache."""
    if not Storage(out).exists(MANIFEST_NAME):
        arguments = [word for word in arguments if word != "--overwrite"]
    return shlex.join(["latentprep", *arguments])


def interrupted_text(out: str | None, arguments: list[str]) -> str:
    """What is safe, and what to type to go on.

    `out` is None if the run had not begun.
    """
    if out is None:
        return f"\nStopped before the run began. To start it, type:\n  {shlex.join(['latentprep', *arguments])}"
    return f"\n{kept_text(out)}. To go on, type:\n  {command_to_go_on(out, arguments)}"


def skip_lines(skips: Sequence[Skip]) -> list[str]:
    """A line for each reason, naming the first images."""
    reasons = Counter(skip.reason for skip in skips)
    lines = []
    for reason, count in sorted(reasons.items()):
        named = [f"{printable(skip.key)}: {printable(skip.detail)}" for skip in skips if skip.reason == reason][:2]
        lines.append(f"skipped  {count:,} {reason} ({'; '.join(named)}{'; ...' if count > 2 else ''})")
    return lines


def _name(keys: list[str], count: int | None = None) -> str:
    """The first keys, and how many more there are of `count`; without it, of the keys."""
    named = keys[:NAMED]
    left = (len(keys) if count is None else count) - len(named)
    return ", ".join(map(printable, named)) + (f" and {left:,} more" if left > 0 else "")


def _next(options: EncodeOptions) -> str:
    return f"next     {shlex.join(['latentprep', 'inspect', options.out])}"
