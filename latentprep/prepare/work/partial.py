"""What a run that is stopped keeps of the shard that it was working on: the rows of its first images, in a file.

The next run of the same unit goes on behind them, at the same batch: so the shard ends as that of an undisturbed run.
"""

from collections import Counter
from dataclasses import asdict, dataclass

import numpy as np

from latentprep.cache.manifest import skip_from_json
from latentprep.cache.shard import LatentGroup, open_partial, partial_name, write_partial
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.prepare.work.group import GroupBuilder
from latentprep.records import Placement, Size, Skip, Unit


@dataclass
class Progress:
    """How far a unit is: everything is changed together, behind each batch."""

    num_done: int = 0  # items, of the unit's first
    num_rows: tuple[tuple[Size, int], ...] = ()  # of each bucket
    num_skips: int = 0
    notes: Counter[str] | None = None


def save_partial(
    storage: Storage,
    unit: Unit,
    builders: dict[Size, GroupBuilder],
    skips: list[Skip],
    progress: Progress,
    recipe: dict[str, object],
) -> None:
    """Write what is done of a unit, if it is anything. The builders are of no use afterwards."""
    if not any(count for _, count in progress.num_rows):
        return
    groups = []
    for bucket, count in progress.num_rows:
        builders[bucket].cut(count)
        if count:
            groups.append(builders[bucket].build())
    metadata = {
        "recipe": recipe,
        "num_done": progress.num_done,
        "skipped": [asdict(skip) for skip in skips[: progress.num_skips]],
        "notes": dict(sorted((progress.notes or Counter()).items())),
    }
    write_partial(storage, unit.id, groups, metadata)


def count_partial(storage: Storage, unit: Unit) -> int:
    """How many of a unit's items an earlier run has left done; 0 if there is no such file, or it is damaged."""
    found = load_partial(storage, unit, [])
    return found[1].num_done if found is not None else 0


def load_partial(
    storage: Storage, unit: Unit, views: list[str]
) -> tuple[dict[Size, GroupBuilder], Progress, list[Skip]] | None:
    """Builders with the rows that are done, how far they go, and their skips; None if there are none."""
    if not storage.exists(partial_name(unit.id)):
        return None
    try:
        metadata, groups = open_partial(storage, unit.id)
        skips = [skip_from_json(skip) for skip in metadata["skipped"]]
        num_done, notes = int(metadata["num_done"]), Counter(dict(metadata["notes"]))
    except UnreadableError:
        raise
    except (FileNotFoundError, UserError, KeyError, TypeError, ValueError):
        return None  # damaged: as if it were not there
    if not 0 < num_done <= len(unit.items) or num_done != len(skips) + sum(map(len, groups)):
        return None
    builders = {}
    for group in groups:
        builder = _to_builder(group, views)
        builders[builder.bucket] = builder
    rows = tuple((bucket, len(builder.digest)) for bucket, builder in builders.items())
    return builders, Progress(num_done, rows, len(skips), notes), skips


def _to_builder(group: LatentGroup, views: list[str]) -> GroupBuilder:
    """A group's rows as they were before it was built."""
    flipped = group.flipped.tolist()
    mirrors = 2 if any(flipped) else 1  # views of each crop
    boxes = [[(b[0], b[1], b[2], b[3]) for b in row] for row in group.crop[:, ::mirrors].tolist()]
    bucket = (boxes[0][0][2], boxes[0][0][3])
    sizes = [(size[0], size[1]) for size in group.resized_size[:, 0].tolist()]
    weights: list[np.ndarray | None] = [None] * len(group)
    if group.weight is not None:
        weights = list(group.weight[:, ::mirrors].float().numpy())
    return GroupBuilder(
        bucket,
        views,
        mean=[row.clone() for row in group.latent_mean],
        std=[row.clone() for row in group.latent_std] if group.latent_std is not None else [],
        weight=weights,
        original_size=[(size[0], size[1]) for size in group.original_size.tolist()],
        placement=[Placement(bucket, size, row[0]) for size, row in zip(sizes, boxes, strict=True)],
        crops=[tuple(row) for row in boxes],
        digest=[bytes(row) for row in group.digest.tolist()],
    )
