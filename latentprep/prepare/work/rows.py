"""The rows of a unit on their way to its shard, and what a run that is stopped keeps of them.

The next run of the same unit goes on behind them, at the same batch: so the shard ends as that of an undisturbed run.
"""

from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from latentprep.cache.group import LatentGroup
from latentprep.cache.latents import Latents, open_partial, write_partial
from latentprep.cache.manifest import skips_from_json
from latentprep.cache.names import partial_name
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.records import Size, Skip, Unit


@dataclass(eq=False)
class UnitRows:
    """What is done of a unit: always whole batches."""

    unit: Unit
    num_done: int = 0  # items, of the unit's first
    num_found: int = 0  # images among them that an earlier run has encoded
    groups: dict[tuple[Size, ...], list[dict[str, Any]]] = field(default_factory=dict)  # Placement.buckets -> rows
    skips: list[Skip] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)

    def build(self, metadata: dict[str, Any]) -> Latents:
        """Its latents, with skips and notes: a killed run's shard is whole by itself. The rows are empty afterwards."""
        groups = [LatentGroup.stack(group_label(*buckets), rows) for buckets, rows in self.groups.items() if rows]
        done = {"skipped": [asdict(skip) for skip in self.skips], "notes": dict(sorted(self.notes.items()))}
        return Latents(groups, {**metadata, **done})

    def save(self, storage: Storage, metadata: dict[str, Any]) -> None:
        """Write what is done, if it is anything."""
        if any(self.groups.values()):
            write_partial(storage, self.unit.id, self.build({**metadata, "num_done": self.num_done}))


def load_rows(storage: Storage, unit: Unit) -> UnitRows:
    """The rows that an earlier run has left of a unit; none if there is no such file, or it is damaged.

    Raises UnreadableError.
    """
    if not storage.exists(partial_name(unit.id)):
        return UnitRows(unit)
    try:
        latents = open_partial(storage, unit.id)
        skips = list(skips_from_json(latents.metadata["skipped"]))
        num_done, notes = int(latents.metadata["num_done"]), Counter(dict(latents.metadata["notes"]))
    except UnreadableError:
        raise
    except (FileNotFoundError, UserError, KeyError, TypeError, ValueError):
        return UnitRows(unit)  # damaged: as if it were not there
    if not 0 < num_done <= len(unit.items) or num_done != len(skips) + sum(map(len, latents.groups)):
        return UnitRows(unit)
    buckets_of = {item.key: placement.buckets for item, placement in zip(unit.items, unit.placements, strict=True)}
    labels = {key: group_label(*buckets) for key, buckets in buckets_of.items()}
    if any(labels.get(key) != group.label for group in latents.groups for key in group.key):
        return UnitRows(unit)  # a control image has another shape now, with as many bytes and the same time
    groups = {buckets_of[group.key[0]]: [group.row(n) for n in range(len(group))] for group in latents.groups}
    return UnitRows(unit, num_done, num_done - len(skips), groups, skips, notes)


def group_label(*buckets: Size) -> str:
    """Name of the group of a bucket, and of those of control images; a label only, shapes are read from tensors."""
    return "+".join(f"h{height}w{width}" for height, width in buckets)
