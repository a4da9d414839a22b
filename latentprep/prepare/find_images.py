"""The images of a run with captions, masks and control images: those of its source, or of its sets together."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Protocol

from latentprep.cache.sets import SetFacts
from latentprep.errors import UserError
from latentprep.human import counted, printable
from latentprep.options import EncodeOptions, ImageSet
from latentprep.prepare.source.captions import Captioned, add_captions
from latentprep.prepare.source.controls import Controls, add_controls, find_controls
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.joined import Joined
from latentprep.prepare.source.listing import Listing, list_images
from latentprep.prepare.source.masks import add_masks, list_masks
from latentprep.prepare.source.partners import Partner, Partners, in_order
from latentprep.prepare.source.sources import open_source
from latentprep.progress import LateBar, Progress
from latentprep.records import MAX_REPEATS, Item, Skip, set_of

NAMED_SETS = 50
NAMED_PAIRS, MANY_PAIRS = 5, 100  # of sets that share images: how many are named, and looked for


@dataclass(frozen=True)
class Images:
    """What the source of a run holds, or all its sets together."""

    source: Source
    masks: Partners | None
    controls: tuple[Partners, ...]
    captioned: Captioned
    skips: list[Skip]  # what cannot be listed or used, also for its partners; those of captions are in `captioned`
    facts: tuple[SetFacts, ...]  # of the sets; (): there is one source

    @property
    def partners(self) -> tuple[Partners, ...]:
        return in_order(self.masks, self.controls)


def find_images(options: EncodeOptions, progress: Progress, known: Mapping[str, Item] | None = None) -> Images:
    """Every image with its captions, masks and control images. Raises UserError.

    `known`: images whose header need not be read if their file has the same bytes and version, by key.
    """
    sets = options.list_sets()
    # the cache, the masks and the control images may lie in a source, and are no images to encode
    own = [] if "://" in options.out else [Path(options.out)]
    own += [folder for part in sets for folder in part.partners]
    known_of = split_known(known or {}, [part.name for part in sets])
    found = {part.name: find_images_of(part, own, progress, known_of[part.name]) for part in sets}
    if not options.sets:
        return found[""]
    counts = [len(images.captioned.items) for images in found.values()]
    lines = (describe_overlaps(sets, found), describe_without_masks(sets), describe_balance(sets, counts))
    for line in chain(*lines):
        progress.say(line)
    return join(str(options.source), found, make_facts(sets, counts))


def split_known(known: Mapping[str, Item], names: Sequence[str]) -> dict[str, Mapping[str, Item]]:
    """What is known of the images of each set, by their keys in its source."""
    if names == [""]:
        return {"": known}
    found: dict[str, dict[str, Item]] = {name: {} for name in names}
    for key, item in known.items():
        name, _, rest = key.partition("/")
        if name in found:
            found[name][rest] = replace(item, key=rest)
    return {**found}


def describe_overlaps(sets: Sequence[ImageSet], found: Mapping[str, Images]) -> Iterator[str]:
    """Lines for sets that have files of another set too."""
    by_place: dict[Path, list[str]] = {}
    for part in sets:
        by_place.setdefault(part.source.absolute(), []).append(part.name)
    keys: dict[str, set[str]] = {}
    pairs: list[tuple[int, str, str]] = []
    for inner in sets:
        place = inner.source.absolute()
        for above in [place, *place.parents]:
            for outer in by_place.get(above, ()):
                if outer == inner.name or (above == place and inner.name < outer) or len(pairs) >= MANY_PAIRS:
                    continue
                of_outer = keys.setdefault(outer, {item.key for item in found[outer].captioned.items})
                start = place.relative_to(above)
                own = found[inner.name].captioned.items
                count = sum((start / item.key).as_posix() in of_outer for item in own)
                pairs += [(count, inner.name, outer)] if count else []
    for count, inner_name, outer in pairs[:NAMED_PAIRS]:
        which = f"set {printable(inner_name)} and set {printable(outer)}"
        are = "is" if count == 1 else "are"
        yield f"note     {counted(count, 'image')} {are} in {which}: exclude from one what is not to come twice"
    if len(pairs) > NAMED_PAIRS:
        yield f"note     and so on: at least {len(pairs)} pairs of sets share images"


def describe_balance(sets: Sequence[ImageSet], counts: Sequence[int]) -> Iterator[str]:
    """A line for each set with repeats = "auto" that has more images than the others have samples: none is left out."""
    others = count_given(sets, counts)
    for part, count in zip(sets, counts, strict=True):
        if part.repeats is None and count > others > 0:
            more = f"has {counted(count, 'image')}, more than the {others:,} samples of the others"
            yield f"note     set {printable(part.name)} {more}: each comes once an epoch (sd-scripts leaves some out)"


def describe_without_masks(sets: Sequence[ImageSet]) -> Iterator[str]:
    """A line for the sets without masks, if others have some."""
    names = [printable(part.name) for part in sets if part.masks is None]
    if 0 < len(names) < len(sets):
        yield f"masks    set {', '.join(names)}: none, so the images weigh evenly"


def find_images_of(part: ImageSet, without: Sequence[Path], progress: Progress, known: Mapping[str, Item]) -> Images:
    """The images of one set. Raises UserError, which names it."""
    with named(part):
        check_controls(part)
        with LateBar(progress, None, "list", "file") as bar:
            # an image that has a mask or control images is not known: the cache counts those with it
            listing = list_images(open_source(part.source, without=without), part.exclude, bar.update, known)
        masks = list_masks(part.masks) if part.masks is not None else None
        controls = find_controls(part)
        listing = leave_out(listing, controls)
        if masks is not None:
            items, without_mask = add_masks(listing.items, masks)
            listing = replace(listing, items=items, skips=[*listing.skips, *without_mask])
            with_mask = sum(masks.find(item.key) is not None for item in items)
            progress.say(f"masks    {masks.source.where}: {with_mask:,} of {counted(len(items), 'image')} have one")
        if controls.partners:
            for own in controls.partners:
                with_own = sum(own.find(item.key) is not None for item in listing.items)
                of_all = counted(len(listing.items), "image")
                progress.say(f"control  {own.said}: {with_own:,} of {of_all} have one")
            if controls.alone:
                what = "is a control image" if len(controls.alone) == 1 else "are control images"
                progress.say(f"         {counted(len(controls.alone), 'image')} of SOURCE {what} alone")
            items, without_control = add_controls(listing.items, controls.partners)
            listing = replace(listing, items=items, skips=[*listing.skips, *without_control])
        captioned = add_captions(listing, part.text)
        return Images(listing.source, masks, controls.partners, captioned, listing.skips, ())


def leave_out(listing: Listing, controls: Controls) -> Listing:
    """A listing without the images that are control images alone."""
    if not controls.alone:
        return listing
    items = [item for item in listing.items if item.key not in controls.alone]
    return replace(listing, items=items, skips=[skip for skip in listing.skips if skip.key not in controls.alone])


def check_controls(part: ImageSet) -> None:
    """Raise UserError if a folder of control images is the source itself, or holds it."""
    source = part.source.resolve()
    for folder in part.controls:
        if folder.resolve() in (source, *source.parents):
            raise UserError(
                f"--control {folder}: holds SOURCE {part.source} itself. Targets and control images need folders of "
                "their own."
            )


@contextmanager
def named(part: ImageSet) -> Iterator[None]:
    """Errors name the set, if it has a name."""
    try:
        yield
    except UserError as error:
        if not part.name:
            raise
        raise type(error)(f"set {printable(part.name)}: {error}") from error


def count_given(sets: Sequence[ImageSet], counts: Sequence[int]) -> int:
    """Samples of the sets whose repeats are given."""
    return sum(part.repeats * count for part, count in zip(sets, counts, strict=True) if part.repeats is not None)


def make_facts(sets: Sequence[ImageSet], counts: Sequence[int]) -> tuple[SetFacts, ...]:
    """What readers must know of sets with so many images.

    Those with repeats = "auto" get, together, about as many samples as all others.
    """
    given = count_given(sets, counts)
    left = sum(count for part, count in zip(sets, counts, strict=True) if part.repeats is None)
    repeats = min(MAX_REPEATS, max(1, round(given / left))) if left else 1
    return tuple(
        SetFacts(part.name, part.repeats or repeats, part.sample_weight, part.caption_dropout, part.flip)
        for part in sets
    )


def join(where: str, found: Mapping[str, Images], facts: tuple[SetFacts, ...]) -> Images:
    """The images of several sets as those of one source."""
    return Images(
        *join_sources(where, found),
        join_captioned({name: images.captioned for name, images in found.items()}),
        [replace(skip, key=f"{name}/{skip.key}") for name, images in found.items() for skip in images.skips],
        facts,
    )


class HasSource(Protocol):
    """Where the images of a set come from, its masks and its control images."""

    @property
    def source(self) -> Source: ...
    @property
    def masks(self) -> Partners | None: ...
    @property
    def controls(self) -> tuple[Partners, ...]: ...


def join_sources(where: str, sets: Mapping[str, HasSource]) -> tuple[Source, Partners | None, tuple[Partners, ...]]:
    """The sources of several sets as one, their masks (None: no set has any), and their control images.

    All sets have as many control images.
    """
    masks = {name: own.masks for name, own in sets.items() if own.masks is not None}
    controls = zip(*(own.controls for own in sets.values()), strict=True)
    return (
        Joined(where, {name: own.source for name, own in sets.items()}),
        join_partners(where, masks) if masks else None,
        tuple(join_partners(where, dict(zip(sets, own, strict=True))) for own in controls),
    )


def join_partners(where: str, sets: Mapping[str, Partners]) -> Partners:
    """Partners of the images of several sets, by name, as those of one source."""

    def of_sets(part: Callable[[Partners], dict[str, Partner]]) -> dict[str, Partner]:
        return {
            f"{name}/{image}": Partner(f"{name}/{partner.key}", partner.nbytes, partner.version)
            for name, own in sets.items()
            for image, partner in part(own).items()
        }

    source = Joined(where, {name: own.source for name, own in sets.items()})
    return Partners(source, of_sets(lambda own: own.by_stem), of_sets(lambda own: own.by_key))


def join_captioned(found: Mapping[str, Captioned]) -> Captioned:
    def keys_of(part: Callable[[Captioned], list[str]]) -> list[str]:
        return [f"{name}/{key}" for name, own in found.items() for key in part(own)]

    items = [replace(item, key=f"{name}/{item.key}") for name, own in found.items() for item in own.items]
    return Captioned(
        sorted(items, key=key_of),
        sum((own.origins for own in found.values()), Counter()),
        keys_of(lambda own: own.without_image),
        keys_of(lambda own: own.shared),
        keys_of(lambda own: own.second),
        [replace(skip, key=f"{name}/{skip.key}") for name, own in found.items() for skip in own.skips],
        sum(own.num_long for own in found.values()),
        sum((own.ignored for own in found.values()), Counter()),
        sum((own.excluded for own in found.values()), Counter()),
    )


def key_of(item: Item) -> str:
    return item.key


def describe_sets(images: Images, sets: Sequence[ImageSet]) -> list[str]:
    """A line for each set, or for the first of many: what a person should see before a run."""
    counts = Counter(set_of(item.key) for item in images.captioned.items)
    lines = []
    for facts, part in list(zip(images.facts, sets, strict=False))[:NAMED_SETS]:
        repeats = f" x {facts.repeats} repeats" if facts.repeats > 1 else ""
        parts = [counted(counts[facts.name], "image") + repeats]
        if facts.sample_weight != 1:
            parts.append(f"weight {facts.sample_weight:g}")
        if facts.caption_dropout:
            parts.append(f"captions left out {facts.caption_dropout:.0%}")
        lines.append(f"set      {printable(facts.name)}: {', '.join(parts)} ({printable(str(part.source))})")
    more = len(images.facts) - NAMED_SETS
    return [*lines, f"         and {more:,} more sets"] if more > 0 else lines
