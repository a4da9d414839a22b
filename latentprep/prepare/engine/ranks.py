"""Several runs that share the work, on machines that share nothing but the cache: under torchrun, SLURM or by hand.

Each makes the same plan, and does its own tasks of it. There is no process group, which could hang: at its end a run
hands in what it has done, and the last one to do so commits, or `latentprep merge`.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from latentprep.cache.leftovers import clear_orphans
from latentprep.cache.lock import hold
from latentprep.cache.manifest import Manifest, Uncond, commit, find_manifest, manifest_to_json, open_manifest, pack
from latentprep.cache.names import PART_NAME, part_name, uncond_name
from latentprep.cache.readers import free, invite_readers
from latentprep.cache.seal import check_seal
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import LockedError, UserError
from latentprep.prepare.engine import local
from latentprep.prepare.engine.where import MAX_WORLD_SIZE, Where
from latentprep.prepare.work.events import Event
from latentprep.records import Skip

PATIENCE = 30.0  # seconds, for others that commit at the same moment
MOMENT = 0.05


def run(worker: Any, tasks: Sequence[Any], where: Where) -> Iterator[Event]:
    """What a worker tells of this rank's tasks. Raises UserError."""
    return local.run(worker, [task for task in tasks if task.number % where.world_size == where.rank], where)


@dataclass(frozen=True)
class Part:
    """What one rank hands in: the cache as it would commit it, of its own tasks alone."""

    base: str  # digest of the manifest that the cache had when it was planned; "": none
    plan: str  # digest of what all ranks are to do together
    rank: Annotated[int, Meta(ge=0)]
    world_size: Annotated[int, Meta(ge=1, le=MAX_WORLD_SIZE)]
    manifest: Manifest  # its shards: those that all keep, and what this rank has done
    fallback: tuple[Shard, ...]  # of all ranks' tasks: shards as they are without their new text
    skips: tuple[Skip, ...]
    num_failures: int  # tasks of this rank that are not done

    @property
    def group(self) -> tuple[str, int]:
        """What the parts of one run have in common."""
        return self.plan, self.world_size


def hand_in(storage: Storage, part: Part) -> None:
    """Leave a rank's part beside the cache, whole. Raises UserError."""
    others = {name: value for name, value in vars(part).items() if name != "manifest"}
    data = {**msgspec.to_builtins(others), "manifest": manifest_to_json(part.manifest)}
    storage.write_atomic(part_name(part.rank, part.world_size), json.dumps(data).encode())


def read_parts(storage: Storage, base: str) -> list[Part]:
    """The parts that were handed in for the cache as it is, by rank. Raises UserError for one that cannot be read.

    Parts that an earlier run has left are not among them: they were planned for another manifest.
    """
    parts = []
    for name in storage.names():
        match = PART_NAME.fullmatch(name)
        if match is None:
            continue
        try:
            part = msgspec.convert(json.loads(storage.read_json(name)), Part)
            if name != part_name(part.rank, part.world_size) or part.rank >= part.world_size:
                raise ValueError(f"it is of rank {part.rank} of {part.world_size}")
        except FileNotFoundError:
            continue  # somebody has committed it just now
        except (OSError, ValueError, RecursionError) as error:
            raise UserError(
                f"{storage.locate(name)}: cannot be read ({' '.join(str(error).split())[:300]}). "
                "Delete it, and start that rank again."
            ) from None
        parts += [part] if part.base == base else []
    return sorted(parts, key=lambda part: (part.world_size, part.rank))


def base_of(manifest: Manifest | None) -> str:
    """Digest of a manifest; "" for none."""
    return Stamp.of(pack(manifest)).blake2b if manifest is not None else ""


def begin(storage: Storage, where: Where) -> None:
    """Take back what an earlier run of this rank has handed in: it may have planned other work."""
    storage.delete(part_name(where.rank, where.world_size))


def merge_if_complete(storage: Storage, part: Part) -> tuple[Manifest, tuple[int, ...]]:
    """The manifest, and the ranks that have not handed in their part yet. If there are none, it is committed.

    Raises UserError; LockedError if somebody else holds the cache all the time.
    """
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with hold(storage, beside_ranks=True):  # others may end at the same moment
                return _merge_own(storage, part)
        except LockedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(MOMENT)


def _merge_own(storage: Storage, part: Part) -> tuple[Manifest, tuple[int, ...]]:
    manifest = find_manifest(storage)
    if manifest is not None and base_of(manifest) != part.base:
        return manifest, ()  # another rank was as late, and has committed all of them
    parts = [other for other in read_parts(storage, part.base) if other.group == part.group]
    absent = list_absent(parts) if parts else (part.rank,)
    return (part.manifest, absent) if absent else (_commit(storage, manifest, parts), ())


def list_absent(parts: Sequence[Part]) -> tuple[int, ...]:
    """The ranks that have not handed in their part of a plan."""
    return tuple(sorted(set(range(parts[0].world_size)) - {part.rank for part in parts}))


def merge(storage: Storage, incomplete: bool = False) -> tuple[Manifest, tuple[int, ...]]:
    """Commit what ranks have handed in; the manifest, and the ranks that are missing.

    Raises UserError if ranks are missing, unless it is to be `incomplete`: then the next run does what they had to do.
    Raises LockedError while they are at work.
    """
    if not storage.names():  # before the lock, which would make the folder
        open_manifest(storage)
    with hold(storage):
        manifest = find_manifest(storage)
        parts = choose_parts(storage, read_parts(storage, base_of(manifest)))
        absent = list_absent(parts)
        if absent and not incomplete:
            named = ", ".join(map(str, absent))
            raise UserError(
                f"{storage.root}: of {parts[0].world_size} ranks, some have not finished: {named}. Start them again, "
                "or give --incomplete to commit without them."
            )
        return _commit(storage, manifest, parts), absent


def _commit(storage: Storage, before: Manifest | None, parts: Sequence[Part]) -> Manifest:
    """Make the parts of one plan the cache, which was `before`; for who holds the lock. Raises UserError."""
    skips = {skip.key: skip for part in parts for skip in part.skips}
    manifest = join(storage, parts)
    if not manifest.shards and before is None:
        why = next((f" ({skip.key}: {skip.reason}, {skip.detail})" for skip in skips.values()), "")
        raise UserError(f"{storage.root}: no cache was made, since no rank has an image that can be used{why}.")
    manifest = commit(storage, manifest, skips.values())
    invite_readers(storage)
    for name in storage.names():
        if PART_NAME.fullmatch(name):
            storage.delete(name)
    is_whole = not list_absent(parts) and not any(part.num_failures for part in parts)
    if is_whole:  # else what is there of the others is of use to the next run
        clear_orphans(storage, manifest)
    if not storage.is_local and before is not None:
        free(storage, before.files().keys() - manifest.files().keys(), manifest.files())
    return manifest


def choose_parts(storage: Storage, parts: Sequence[Part]) -> Sequence[Part]:
    """The parts of one plan: of the one that is complete, or else the only one. Raises UserError."""
    if not parts:
        raise UserError(f"{storage.root}: no rank has handed in anything. Run latentprep encode with ranks first.")
    groups = [[part for part in parts if part.group == group] for group in {part.group for part in parts}]
    complete = [group for group in groups if not list_absent(group)]
    if len(complete) == 1:
        return complete[0]  # what the others have left is of an earlier run
    if len(groups) > 1:
        named = ", ".join(f"{part.rank} of {part.world_size}" for part in parts)
        raise UserError(
            f"{storage.root}: ranks {named} have planned different work. Their images differ in number, size or time, "
            "or their options do. Give all of them the same; copies keep their times with rsync -a or cp -p."
        )
    return groups[0]


def join(storage: Storage, parts: Sequence[Part]) -> Manifest:
    """One manifest of all parts. A shard whose new text nobody has made stays as it was."""
    cond_files = {name: stamp for part in parts for name, stamp in part.manifest.cond_files.items()}
    made = [shard for part in parts for shard in part.manifest.shards]
    shards = {shard.id: shard for part in parts for shard in part.fallback}
    # a text that borrows cond which nobody has made does not count yet
    shards |= {shard.id: shard for shard in made if cond_files.keys() >= {*shard.cond_files}}
    uncond = next((part.manifest.uncond for part in parts if part.manifest.uncond is not None), None)
    if uncond is not None:  # each has made it, and on other devices the last digits may differ: the last one's is there
        uncond = Uncond(uncond.id, check_seal(storage, uncond_name(uncond.id)))
    manifest = replace(parts[0].manifest, uncond=uncond)
    return manifest.having(sorted(shards.values(), key=Shard.order), cond_files)
