"""Several runs that share the work, on machines that share nothing but the cache: under torchrun, SLURM or by hand.

Each makes the same plan, and does its own tasks of it. There is no process group, which could hang: at its end a run
hands in what it has done, and the last one to do so commits, or `latentprep merge`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import msgspec

from latentprep.cache.leftovers import clear_orphans
from latentprep.cache.lock import hold
from latentprep.cache.manifest import Manifest, commit, manifest_to_json, open_manifest
from latentprep.cache.names import PART_NAME, part_name
from latentprep.cache.readers import invite_readers
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import LockedError, UserError
from latentprep.prepare.engine import local
from latentprep.prepare.engine.where import Where
from latentprep.prepare.work.events import Event
from latentprep.records import Skip


def run(worker: Any, tasks: Sequence[Any], where: Where) -> Iterator[Event]:
    """What a worker tells of this rank's tasks. Raises UserError."""
    return local.run(worker, [task for task in tasks if task.number % where.world_size == where.rank], where)


@dataclass(frozen=True)
class Part:
    """What one rank hands in: the cache as it would commit it, of its own tasks alone."""

    plan: str  # digest of what all ranks are to do together
    rank: int
    world_size: int
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


def read_parts(storage: Storage) -> list[Part]:
    """What has been handed in, by rank. Raises UserError for what is none."""
    parts = []
    for name in storage.names():
        if PART_NAME.fullmatch(name):
            try:
                parts.append(msgspec.convert(json.loads(storage.read_json(name)), Part))
            except (OSError, ValueError, RecursionError) as error:
                raise UserError(f"{storage.locate(name)}: cannot be read ({error}). Start that rank again.") from None
    return sorted(parts, key=lambda part: part.rank)


def begin(storage: Storage, where: Where) -> None:
    """Take back what an earlier run of this rank has handed in: it may have planned other work."""
    storage.delete(part_name(where.rank, where.world_size))


def merge_if_complete(storage: Storage, part: Part) -> tuple[Manifest, tuple[int, ...]]:
    """The manifest, and the ranks that have not handed in their part yet. If there are none, it is committed."""
    parts = read_parts(storage)
    if part not in parts:
        return open_manifest(storage), ()  # another rank was as late, and has committed all of them
    absent = list_absent([other for other in parts if other.group == part.group])
    if absent:
        return part.manifest, absent
    try:
        return merge(storage)[0], ()
    except LockedError:
        return part.manifest, ()  # another rank is at it


def list_absent(parts: Sequence[Part]) -> tuple[int, ...]:
    """The ranks that have not handed in their part of a plan."""
    return tuple(sorted(set(range(parts[0].world_size)) - {part.rank for part in parts}))


def merge(storage: Storage, incomplete: bool = False) -> tuple[Manifest, tuple[int, ...]]:
    """Commit what ranks have handed in; the manifest, and the ranks that are missing.

    Raises UserError if ranks are missing, unless it is to be `incomplete`: then the next run does what they had to do.
    """
    with hold(storage, beside_ranks=True):
        all_parts = read_parts(storage)
        parts = choose_parts(storage, all_parts)
        absent = list_absent(parts)
        if absent and not incomplete:
            named = ", ".join(map(str, absent))
            raise UserError(
                f"{storage.root}: of {parts[0].world_size} ranks these have not finished: {named}. Start them again, "
                "or give --incomplete to commit without them."
            )
        skips = {skip.key: skip for part in parts for skip in part.skips}
        manifest = commit(storage, join(parts), skips.values())
        invite_readers(storage)
        for part in all_parts:
            storage.delete(part_name(part.rank, part.world_size))
        if not absent:
            clear_orphans(storage, manifest)
    return manifest, absent


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


def join(parts: Sequence[Part]) -> Manifest:
    """One manifest of all parts. A shard whose new text nobody has made stays as it was."""
    shards = {shard.id: shard for part in parts for shard in part.fallback}
    shards |= {shard.id: shard for part in parts for shard in part.manifest.shards}
    return replace(parts[0].manifest, shards=sorted(shards.values(), key=Shard.order))
