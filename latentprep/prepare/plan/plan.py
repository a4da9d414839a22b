"""Items and what the cache already holds -> the units to do, and why each image is new, kept, changed or gone."""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from latentprep.cache.shard import ShardEntry, text_id, unit_id
from latentprep.cache.storage import Storage
from latentprep.prepare.plan.buckets import Place
from latentprep.prepare.plan.changes import HashFiles, Matching, ShardRows
from latentprep.recipe import recipe_changes
from latentprep.records import REASONS, Change, Item, Placement, Row, Size, Skip, Unit


@dataclass(frozen=True)
class RowBytes:
    """What a row costs on disk, for cutting units by a byte budget."""

    per_latent_pixel: int  # latents file: bytes of one latent pixel, all channels and views
    per_row: int  # text file: bytes of one row, were its prompts unlike all others
    factor: int  # pixels per latent, each way

    def latents(self, bucket: Size) -> int:
        return self.per_latent_pixel * (bucket[0] // self.factor) * (bucket[1] // self.factor)

    def largest(self, bucket: Size) -> int:
        return max(self.latents(bucket), self.per_row)


@dataclass(frozen=True)
class Retext:
    """A shard that gets a new text file; its latents stay."""

    entry: ShardEntry
    rows: list[Row]  # what the new file says
    text: str  # its id


@dataclass(frozen=True)
class Plan:
    new: list[Unit]  # to encode
    retext: list[Retext]
    kept: list[ShardEntry]  # no file of them is written; their tombstones may have changed
    skips: list[Skip]  # items that no unit holds, and why
    changes: list[Change]  # of every image that there is something to do for, sorted by key
    num_kept_items: int
    unread: list[str]  # keys of images that cannot be read now: what the cache has of them stays
    lost: list[str]  # shards that cannot be read, and why; their images are encoded again

    @property
    def num_new_items(self) -> int:
        return sum(len(unit.items) for unit in self.new)

    @property
    def num_retexted_items(self) -> int:
        return sum(retext.entry.num_images for retext in self.retext)

    def buckets(self) -> set[Size]:
        """The buckets of the images to encode."""
        return {placement.bucket for _, placement in self.rows()}

    def rows(self) -> Iterator[tuple[Item, Placement]]:
        for unit in self.new:
            yield from zip(unit.items, unit.placements, strict=True)


def make_plan(
    items: list[Item],
    skips: list[Skip],
    place: Place,
    row_bytes: RowBytes,
    *,
    recipe: dict[str, Any],
    shard_bytes: int,
    storage: Storage,
    shards: list[ShardEntry],
    known_skips: list[Skip],
    conditions: Mapping[str, str],
    hash_files: HashFiles,
    unread: Collection[str] = (),
    check_content: bool = False,
) -> Plan:
    """The plan for a folder's items, given the shards of a cache of the same recipe, or none.

    An image is kept if a shard holds its content, or if it was skipped before, and neither it has changed since nor
    what the skip depends on (`conditions`: those of this run).
    """
    matching = Matching(items, shards, storage, hash_files, unread, check_content)
    kept: list[ShardEntry] = []
    retext: list[Retext] = []
    changes = list(matching.changes)
    explained = {change.key for change in changes}
    for shard in matching.shards:
        entry = replace(shard.entry, tombstones=shard.tombstones())
        rows = shard.rows()
        text = text_id(entry.unit, rows, recipe)
        if text == entry.text or entry.num_images == 0:  # what nobody reads needs no new text
            kept.append(entry)
        else:
            retext.append(Retext(entry, rows, text))
            changes += [change for change in explain_text(shard, recipe["text"]) if change.key not in explained]

    known = {skip.key: skip for skip in known_skips}
    planned: list[tuple[Item, Placement]] = []
    left_out = [skip for skip in skips if skip.key not in matching.unread]
    for item in items:
        if item.key in matching.held:
            continue
        verdict = place(item.size)
        before = known.get(item.key)
        if not isinstance(verdict, Placement):
            left_out.append(item.skip(*verdict))
        elif (
            before is not None
            and (before.nbytes, before.version) == (item.nbytes, item.version)
            and is_current(before, conditions)
        ):
            left_out.append(before)
        else:
            planned.append((item, verdict))
            what = "changed" if item.key in matching.outdated else "new"
            changes.append(Change(item.key, what, f"was skipped: {before.reason}" if before is not None else ""))
    planned.sort(key=lambda pair: (pair[1].bucket, pair[0].key))
    new = [
        Unit(
            unit_id([item.row for item, _ in rows], recipe, [matching.content_of(item) for item, _ in rows]),
            *zip(*rows, strict=True),
        )
        for rows in cut_rows(planned, row_bytes, shard_bytes)
    ]
    changes.sort(key=lambda change: (change.key, change.what))
    return Plan(new, retext, kept, left_out, changes, len(matching.held), sorted(matching.unread), matching.lost)


def is_current(skip: Skip, conditions: Mapping[str, str]) -> bool:
    """Whether what a skip depends on is as it was, so that the same file would be skipped again."""
    return skip.reason in REASONS and skip.condition != "" and skip == skip.under(conditions)


def explain_text(shard: ShardRows, recipe: dict[str, Any]) -> Iterator[Change]:
    """Why a text file is written anew, image by image: its own caption, or prompts that are made otherwise."""
    fields = "; ".join(recipe_changes(shard.recipe, recipe))
    for row, item in zip(shard.stored, shard.owner, strict=True):
        if item is None:
            continue
        if item.row.captions != row.captions:
            yield Change(item.key, "caption")
        elif fields:
            yield Change(item.key, "prompt", fields)


def cut_rows(
    rows: list[tuple[Item, Placement]], row_bytes: RowBytes, shard_bytes: int
) -> Iterator[list[tuple[Item, Placement]]]:
    """Consecutive runs of rows, each of at most shard_bytes in either file, but of at least one row."""
    run: list[tuple[Item, Placement]] = []
    used = 0
    for row in rows:
        cost = row_bytes.largest(row[1].bucket)
        if run and used + cost > shard_bytes:
            yield run
            run, used = [], 0
        run.append(row)
        used += cost
    if run:
        yield run
