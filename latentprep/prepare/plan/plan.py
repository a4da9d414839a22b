"""Items and what the cache already holds -> the units to do, and why each image is new, kept, changed or gone."""

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, groupby
from typing import Any, TypeVar

from latentprep.cache.leftovers import Leftover
from latentprep.cache.names import make_text_id, make_unit_id
from latentprep.cache.sets import SetFacts, list_runs, recipe_of
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.prepare.plan.buckets import PlaceImage
from latentprep.prepare.plan.changes import HashFiles, Matching, ShardRows
from latentprep.prepare.plan.stored import StoredRows, StoredShards, read_shards
from latentprep.prepare.plan.tasks import TextTask
from latentprep.recipe import Recipe
from latentprep.recipe_words import describe_text_changes
from latentprep.records import REASONS, Change, Item, Placement, Row, Size, Skip, Unit, set_of

# an item's placement -> the same with the buckets of its control images, or the skip of an item that cannot have one
PlaceControls = Callable[[Item, Placement], Placement | Skip]
Planned = dict[tuple[str, *tuple[Size, ...]], tuple[list[Item], list[Placement]]]  # set, buckets -> rows, sorted by key
T = TypeVar("T")
LATENT_CHANGES = ("new", "changed", "gone", "returned")  # of records.CHANGES: all but changes of text files


@dataclass(frozen=True)
class RowBytes:
    """What a row costs on disk, for cutting units by a byte budget."""

    per_latent_pixel: int  # latents file: bytes of one latent pixel, all channels and views
    per_row: int  # text file: bytes of one row whose prompts no other row has
    factor: int  # pixels per latent, each way
    per_control_pixel: int = 0  # of that the bytes of one control image

    def latents(self, bucket: Size, controls: Sequence[Size] = ()) -> int:
        """Bytes in the latents file; `controls` are the buckets of control images that have their own."""
        of_image = self.per_latent_pixel - len(controls) * self.per_control_pixel
        pixels = [(height // self.factor) * (width // self.factor) for height, width in (bucket, *controls)]
        return of_image * pixels[0] + self.per_control_pixel * sum(pixels[1:])

    def largest(self, bucket: Size, controls: Sequence[Size] = ()) -> int:
        return max(self.latents(bucket, controls), self.per_row)


@dataclass(frozen=True)
class Plan:
    units: tuple[Unit, ...]  # to encode
    text_tasks: tuple[TextTask, ...]  # for shards whose latents are there
    kept: tuple[Shard, ...]  # no file of them is written; their dead rows may have changed
    skips: tuple[Skip, ...]  # items that no unit holds, and why
    changes: tuple[Change, ...]  # of every image that there is something to do for, sorted by key
    num_kept_items: int
    unread: tuple[str, ...]  # keys of images that cannot be read now: what the cache has of them stays
    lost: tuple[str, ...]  # shards that cannot be read, and why; their images are encoded again
    later: tuple[str, ...] = ()  # keys of images of which --only text makes nothing, since they have no latents
    leftovers: frozenset[str] = frozenset()  # ids of the units whose latents file a run that did not finish has left

    @property
    def num_unit_items(self) -> int:
        return sum(len(unit.items) for unit in self.units)

    @property
    def num_text_items(self) -> int:
        return sum(task.shard.num_images for task in self.text_tasks)

    def buckets(self) -> set[Size]:
        """The buckets of the images to encode, and of their control images."""
        return {bucket for _, placement in self.rows() for bucket in placement.buckets}

    def rows(self) -> Iterator[tuple[Item, Placement]]:
        for unit in self.units:
            yield from zip(unit.items, unit.placements, strict=True)


@dataclass(frozen=True)
class Planner:
    """What a plan is made from, other than the cache: the images, and how they are encoded."""

    items: list[Item]
    skips: list[Skip]  # of what was listed
    place: PlaceImage
    row_bytes: RowBytes
    recipe: Recipe
    shard_bytes: int
    conditions: Mapping[str, str]  # of this run, that skips depend on
    hash_files: HashFiles
    unread: Collection[str] = ()
    check_content: bool = False
    only: str | None = None  # latents, text; None: both
    sets: tuple[SetFacts, ...] = ()
    cond_files: Collection[str] = ()  # ids of those that are there
    place_controls: PlaceControls | None = None  # None: control images have the buckets of their targets

    def plan(
        self,
        storage: Storage,
        stored: StoredShards,
        known_skips: list[Skip],
        leftovers: Mapping[str, Leftover],
        is_shared: bool = False,
    ) -> Plan:
        """What there is to do for a cache of this recipe. Raises UserError for files that cannot be read now.

        An image is kept if a shard holds its content. It stays skipped if neither it nor what the skip depends on has
        changed since.

        If nothing has changed since an unfinished run, its units are those of this plan, and are known by their names.
        If something has, each whole shard of it is taken into the cache as it is, and what is left is cut into units.
        If several runs share the plan (`is_shared`), nothing of that is done: each plans at another time, and what the
        others have done by then must not matter.
        """
        plan = self._plan(storage, stored, known_skips)
        if is_shared:
            return self._narrow(replace(plan, leftovers=frozenset(leftovers) & {unit.id for unit in plan.units}))
        left_skips = [skip for leftover in leftovers.values() for skip in leftover.skips]
        if leftovers.keys() <= {unit.id for unit in plan.units} and all(
            is_current(skip, self.conditions) for skip in left_skips
        ):
            return self._narrow(replace(plan, leftovers=frozenset(leftovers)))
        checked = (leftover.check(storage, self.cond_files) for leftover in leftovers.values())
        taken = read_shards(storage, [shard for shard in checked if shard is not None])
        return self._narrow(self._plan(storage, stored + taken, [*known_skips, *left_skips], leftovers.keys()))

    def _plan(
        self,
        storage: Storage,
        stored: StoredShards,
        known_skips: list[Skip],
        of_leftovers: Collection[str] = (),
    ) -> Plan:
        matching = Matching(self.items, stored.shards, storage, self.hash_files, self.unread, self.check_content)
        kept: list[Shard] = []
        tasks: list[TextTask] = []
        changes = list(matching.changes)
        explained = {change.key for change in changes}
        recipe = self.recipe.text.to_json()
        for matched in matching.shards:
            dead, rows = matched.dead(), matched.says()
            shard = matched.shard.with_dead(dead).with_sets(list_runs((row.key for row in rows), self.sets))
            if not shard.num_images and shard.id in of_leftovers:
                continue  # of no use, and in no manifest
            own = recipe_of(recipe, (row.key for row in live_rows(rows, dead)))
            if self._is_current(matched.stored, rows, dead, own) or not shard.num_images:
                kept.append(shard)  # what nobody reads needs no new text
            else:
                tasks.append(TextTask(shard, matched.rows(), len(tasks)))
                changes += [change for change in explain_text(matched, self.recipe) if change.key not in explained]

        planned, left_out = self._place(matching, known_skips, changes)
        units = []
        for number, pairs in enumerate(self._cut(planned)):
            items, placements = zip(*pairs, strict=True)
            contents = [matching.content_of(item) for item in items]
            unit_id = make_unit_id(items, self.recipe.latents, contents)
            units.append(Unit(unit_id, items, placements, number))
        changes.sort(key=lambda change: change.what)
        changes.sort(key=lambda change: change.key)  # a tuple of both for each would take as much memory as the change
        return Plan(
            tuple(units), tuple(tasks), tuple(kept), tuple(left_out), tuple(changes), matching.num_held,
            tuple(sorted(matching.unread)), stored.lost,
        )  # fmt: skip

    def _is_current(
        self, stored: StoredRows, rows: Sequence[Item | Row], dead: tuple[int, ...], recipe: dict[str, Any]
    ) -> bool:
        """Whether a shard's text says what its rows are to say, and those that count have prompts with cond."""
        shard = stored.shard
        is_whole = set(stored.cond_files) == set(shard.cond_files) and set(shard.cond_files) <= set(self.cond_files)
        is_spoken = set(stored.silent) <= set(dead)
        return is_whole and is_spoken and make_text_id(shard.id, rows, recipe, stored.silent) == shard.text_id

    def _place(self, matching: Matching, known_skips: list[Skip], changes: list[Change]) -> tuple[Planned, list[Skip]]:
        """The items to encode with their placements, and those that are left out."""
        known = {skip.key: skip for skip in known_skips}
        planned: Planned = defaultdict(lambda: ([], []))
        left_out = [skip for skip in self.skips if skip.key not in matching.unread]
        place = cache(self.place)  # few sizes are distinct
        for item in sorted(self.items, key=lambda item: item.key):
            if item.key not in matching.left:
                continue
            before = known.get(item.key)
            placed = self._place_item(item, before, place)
            if isinstance(placed, Skip):
                left_out.append(placed)
            else:
                items, placements = planned[self._set_of(item), *placed.buckets]
                items.append(item)
                placements.append(placed)
                what = "changed" if item.key in matching.outdated else "new"
                changes.append(Change(item.key, what, f"was skipped: {before.reason}" if before is not None else ""))
        return planned, left_out

    def _place_item(self, item: Item, before: Skip | None, place: PlaceImage) -> Placement | Skip:
        """Where an item goes, or why nowhere; `before` is how it was skipped before."""
        verdict = place(item.size)
        if not isinstance(verdict, Placement):
            return item.skip(*verdict)
        if before is not None and self._is_same(before, item):
            return before
        return verdict if self.place_controls is None else self.place_controls(item, verdict)

    def _set_of(self, item: Item) -> str:
        return set_of(item.key) if self.sets else ""

    def _cut(self, planned: Planned) -> Iterator[list[tuple[Item, Placement]]]:
        """The rows of units: each has images of one set, so that a rule of another changes none of its files.

        `planned` is empty afterwards, so that its rows are not in memory twice.
        """
        for _, own in groupby(sorted(planned), key=lambda place: place[0]):
            rows = chain.from_iterable(zip(*planned.pop(place), strict=True) for place in own)
            yield from cut_rows(rows, self.row_bytes, self.shard_bytes)

    def _is_same(self, before: Skip, item: Item) -> bool:
        is_unchanged = (before.nbytes, before.version) == (item.nbytes, item.version)
        return is_unchanged and is_current(before, self.conditions)

    def _narrow(self, plan: Plan) -> Plan:
        """The part of a plan that --only asks for."""
        if self.only == "latents":  # a shard without text gets one, since a manifest names no other
            later = [task.shard for task in plan.text_tasks if task.shard.text_id]
            return replace(
                plan,
                text_tasks=tuple(task for task in plan.text_tasks if not task.shard.text_id),
                kept=(*plan.kept, *later),
                changes=tuple(change for change in plan.changes if change.what in LATENT_CHANGES),
            )
        if self.only == "text":
            left = {item.key for unit in plan.units if unit.id not in plan.leftovers for item in unit.items}
            return replace(
                plan,
                units=tuple(unit for unit in plan.units if unit.id in plan.leftovers),
                changes=tuple(change for change in plan.changes if change.key not in left),
                later=tuple(sorted(left)),
            )
        return plan


def is_current(skip: Skip, conditions: Mapping[str, str]) -> bool:
    """Whether what a skip depends on is as it was, so that the same file would be skipped again."""
    return skip.reason in REASONS and skip.condition != "" and skip == skip.under(conditions)


def live_rows(rows: Sequence[T], dead: Collection[int]) -> Iterator[T]:
    """Rows but the dead ones, which are given by their numbers."""
    gone = frozenset(dead)
    return (row for n, row in enumerate(rows) if n not in gone)


def explain_text(matched: ShardRows, recipe: Recipe) -> Iterator[Change]:
    """Why a text file is written anew, image by image: its own caption, or prompts that are made otherwise."""
    stored = matched.stored
    if not stored.recipe:
        return  # its first
    now, known = recipe.text.to_json(), dict[str, str]()

    def list_fields(key: str) -> str:
        """What differs in the recipe of an image: of the sets only its own counts."""
        if (name := set_of(key)) not in known:
            before, after = (recipe_of(made, [key]) for made in (stored.recipe, now))
            said = "; ".join(describe_text_changes(before, after))
            known[name] = said or "other options of its set" * (before != after)
        return known[name]

    for n, item in enumerate(matched.owner):
        if item is None:
            continue
        if item.captions != tuple(stored.caption[n]):
            yield Change(item.key, "caption")
        elif fields := list_fields(item.key):
            yield Change(item.key, "prompt", fields)


def cut_rows(
    rows: Iterable[tuple[Item, Placement]], row_bytes: RowBytes, shard_bytes: int
) -> Iterator[list[tuple[Item, Placement]]]:
    """Consecutive runs of rows, each of at most shard_bytes in either file, but of at least one row."""
    run: list[tuple[Item, Placement]] = []
    used = 0
    for row in rows:
        cost = row_bytes.largest(row[1].bucket, row[1].controls)
        if run and used + cost > shard_bytes:
            yield run
            run, used = [], 0
        run.append(row)
        used += cost
    if run:
        yield run
