"""The images of a run with their captions and masks: those of its source, or of its sets together."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from latentprep.cache.sets import MAX_REPEATS, SetFacts, set_of
from latentprep.errors import UserError
from latentprep.human import counted, printable
from latentprep.options import EncodeOptions, ImageSet
from latentprep.prepare.source.captions import Captioned, add_captions
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.joined import Joined
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.masks import Mask, Masks, add_masks, list_masks
from latentprep.prepare.source.sources import open_source
from latentprep.records import Item, Skip


@dataclass(frozen=True)
class Images:
    """What the source of a run holds, or all its sets together."""

    source: Source
    masks: Masks | None
    captioned: Captioned
    skips: list[Skip]  # of files that are no images; those of captions are in `captioned`
    facts: tuple[SetFacts, ...]  # of the sets; (): there is one source


def find_images(options: EncodeOptions, say: Callable[[str], None]) -> Images:
    """Every image with its captions and masks. Raises UserError."""
    sets = options.list_sets()
    # the cache and the masks may lie in a source, and are no images to encode
    own = [] if "://" in options.out else [Path(options.out)]
    own += [part.masks for part in sets if part.masks is not None]
    found = {part.name: find_images_of(part, own, say) for part in sets}
    if not options.sets:
        return found[""]
    for line in [*describe_overlaps(sets), *describe_without_masks(sets)]:
        say(line)
    return join(
        str(options.source), found, make_facts(sets, [len(images.captioned.items) for images in found.values()])
    )


def describe_overlaps(sets: Sequence[ImageSet]) -> Iterator[str]:
    """A line for each set whose folder lies in that of another: its images would be in both."""
    places = {part.name: part.source.absolute() for part in sets}
    for inner, place in places.items():
        for outer, above in places.items():
            if inner != outer and (above in place.parents or (above == place and inner > outer)):
                yield f"note     set {printable(inner)} lies in set {printable(outer)}: unless excluded, it is in both"


def describe_without_masks(sets: Sequence[ImageSet]) -> Iterator[str]:
    """A line for the sets without masks, if others have some."""
    names = [printable(part.name) for part in sets if part.masks is None]
    if 0 < len(names) < len(sets):
        yield f"masks    set {', '.join(names)}: none, so the images weigh evenly"


def find_images_of(part: ImageSet, without: Sequence[Path], say: Callable[[str], None]) -> Images:
    """The images of one set. Raises UserError, which names it."""
    with named(part):
        listing = list_images(open_source(part.source, without=without), part.exclude)
        masks = list_masks(part.masks) if part.masks is not None else None
        if masks is not None:
            items, without_mask = add_masks(listing.items, masks)
            listing = replace(listing, items=items, skips=[*listing.skips, *without_mask])
            with_mask = sum(masks.find(item.key) is not None for item in items)
            say(f"masks    {masks.source.where}: {with_mask:,} of {counted(len(items), 'image')} have one")
        return Images(listing.source, masks, add_captions(listing, part.text), listing.skips, ())


@contextmanager
def named(part: ImageSet) -> Iterator[None]:
    """Errors name the set, if it has a name."""
    try:
        yield
    except UserError as error:
        if not part.name:
            raise
        raise type(error)(f"set {printable(part.name)}: {error}") from error


def make_facts(sets: Sequence[ImageSet], counts: Sequence[int]) -> tuple[SetFacts, ...]:
    """What readers must know of sets with so many images. Sets without repeats get as many samples as the others."""
    given = sum(part.repeats * count for part, count in zip(sets, counts, strict=True) if part.repeats is not None)
    left = sum(count for part, count in zip(sets, counts, strict=True) if part.repeats is None)
    repeats = min(MAX_REPEATS, max(1, round(given / left))) if left else 1
    return tuple(
        SetFacts(part.name, part.repeats or repeats, part.sample_weight, part.caption_dropout, part.flip)
        for part in sets
    )


def join(where: str, found: Mapping[str, Images], facts: tuple[SetFacts, ...]) -> Images:
    """The images of several sets as those of one source."""
    return Images(
        Joined(where, {name: images.source for name, images in found.items()}),
        join_masks(where, {name: images.masks for name, images in found.items() if images.masks is not None}),
        join_captioned({name: images.captioned for name, images in found.items()}),
        [replace(skip, key=f"{name}/{skip.key}") for name, images in found.items() for skip in images.skips],
        facts,
    )


def join_masks(where: str, found: Mapping[str, Masks]) -> Masks | None:
    """The masks of several sets; None: no set has any."""
    by_stem = {
        f"{name}/{stem}": Mask(f"{name}/{mask.key}", mask.nbytes, mask.version)
        for name, own in found.items()
        for stem, mask in own.by_stem.items()
    }
    return Masks(Joined(where, {name: own.source for name, own in found.items()}), by_stem) if found else None


def join_captioned(found: Mapping[str, Captioned]) -> Captioned:
    def keys_of(part: Callable[[Captioned], list[str]]) -> list[str]:
        return [f"{name}/{key}" for name, own in found.items() for key in part(own)]

    items = [replace(item, key=f"{name}/{item.key}") for name, own in found.items() for item in own.items]
    return Captioned(
        sorted(items, key=key_of),
        sum((own.origins for own in found.values()), Counter()),
        keys_of(lambda own: own.without_image),
        keys_of(lambda own: own.shared),
        [replace(skip, key=f"{name}/{skip.key}") for name, own in found.items() for skip in own.skips],
        sum(own.num_long for own in found.values()),
        sum((own.ignored for own in found.values()), Counter()),
        sum((own.excluded for own in found.values()), Counter()),
    )


def key_of(item: Item) -> str:
    return item.key


def describe_sets(images: Images) -> list[str]:
    """A line for each set: what a person should see before a run."""
    counts = Counter(set_of(item.key) for item in images.captioned.items)
    lines = []
    for facts in images.facts:
        parts = [counted(counts[facts.name], "image")]
        if facts.repeats > 1:
            parts.append(f"x {facts.repeats} repeats")
        if facts.sample_weight != 1:
            parts.append(f"weight {facts.sample_weight:g}")
        if facts.caption_dropout:
            parts.append(f"captions left out {facts.caption_dropout:.0%}")
        lines.append(f"set      {printable(facts.name)}: {', '.join(parts)}".replace(", x ", " x "))
    return lines
