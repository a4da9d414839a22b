"""Items and what the cache already holds -> the units to do, and why each item is new, kept, changed or gone."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from latentprep.cache.manifest import Manifest, ShardEntry, read_skips, recipe_digest
from latentprep.cache.shard import open_shard, read_keys, text_name
from latentprep.cache.storage import Storage
from latentprep.config import digest_of
from latentprep.errors import UserError
from latentprep.prepare.buckets import Place
from latentprep.records import Item, Placement, Size, Skip, Unit


@dataclass(frozen=True)
class RowBytes:
    """What a row costs on disk, for cutting units by a byte budget."""

    per_latent_pixel: int  # latents file: bytes of one latent pixel, all channels and views
    per_row: int  # text file: bytes of one row, were its prompt unlike all others
    factor: int  # pixels per latent, each way

    def latents(self, bucket: Size) -> int:
        return self.per_latent_pixel * (bucket[0] // self.factor) * (bucket[1] // self.factor)

    def largest(self, bucket: Size) -> int:
        return max(self.latents(bucket), self.per_row)


@dataclass(frozen=True)
class Plan:
    new: list[Unit]  # to encode
    retext: list[tuple[ShardEntry, Unit]]  # shards whose captions or prompts changed: text only
    kept: list[ShardEntry]  # nothing to do
    skips: list[Skip]  # items that no unit holds, and why
    num_kept_items: int

    @property
    def num_new_items(self) -> int:
        return sum(len(unit.items) for unit in self.new)

    @property
    def is_done(self) -> bool:
        return not self.new and not self.retext

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
    manifest: Manifest | None,
) -> Plan:
    """The plan for a folder's items, given a cache of the same recipe or none.

    An item is kept if its key, size and mtime are in the cache, or in skipped.jsonl.
    Raises UserError where cached images changed or are gone.
    """
    by_key = {item.key: item for item in items}
    kept: list[ShardEntry] = []
    retext: list[tuple[ShardEntry, Unit]] = []
    held: set[str] = set()
    stale: list[str] = []
    for entry in manifest.shards if manifest else ():
        found = list(_rows_of(storage, entry))
        held.update(key for key, _, _ in found)
        stale += [key for key, *print_ in found if key not in by_key or print_ != _fingerprint(by_key[key])]
        if stale:
            continue
        own = [by_key[key] for key, _, _ in found]
        unit = Unit(entry.unit, tuple(own), ())
        if text_id(unit.id, own, recipe["text"]) == entry.text:
            kept.append(entry)
        else:
            retext.append((entry, unit))
    if stale:
        where = ", ".join(stale[:3]) + (f" and {len(stale) - 3} more" if len(stale) > 3 else "")
        raise UserError(
            f"{storage.root}: {len(stale)} of its images changed or are gone ({where}). --overwrite starts anew."
        )

    known = {skip.key: skip for skip in read_skips(storage)} if manifest else {}
    planned: list[tuple[Item, Placement]] = []
    left_out = list(skips)
    for item in items:
        if item.key in held:
            continue
        verdict = place(item.size)
        if not isinstance(verdict, Placement):
            left_out.append(item.skip(*verdict))
        elif item.key in known and [known[item.key].nbytes, known[item.key].mtime_ns] == _fingerprint(item):
            left_out.append(known[item.key])
        else:
            planned.append((item, verdict))
    planned.sort(key=lambda pair: (pair[1].bucket, pair[0].key))
    digest = recipe_digest(recipe)
    new = [
        Unit(unit_id([item for item, _ in rows], digest), *zip(*rows, strict=True))
        for rows in cut_rows(planned, row_bytes, shard_bytes)
    ]
    return Plan(new, retext, kept, left_out, len(held))


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


def unit_id(items: list[Item], digest: str) -> str:
    """Digest of what goes into a latents file: the recipe, and every item's key, size and mtime."""
    return digest_of([digest, [[item.key, *_fingerprint(item)] for item in items]])


def text_id(unit: str, rows: list[Item], recipe: dict[str, Any]) -> str:
    """Digest of what goes into a text file: the recipe's text part, and every row's item and caption."""
    return digest_of([unit, recipe, [[item.key, *_fingerprint(item), item.caption] for item in rows]])[:16]


def _fingerprint(item: Item) -> list[int]:
    return [item.nbytes, item.mtime_ns]


def _rows_of(storage: Storage, entry: ShardEntry) -> Iterator[tuple[str, int, int]]:
    """key, nbytes, mtime_ns of every row of a shard."""
    text = open_shard(storage, text_name(entry.unit, entry.text))
    for label, _ in text.groups():
        nbytes, mtime_ns = text.tensors[f"{label}/nbytes"].tolist(), text.tensors[f"{label}/mtime_ns"].tolist()
        yield from zip(read_keys(text, label), nbytes, mtime_ns, strict=True)
