"""The control images of a shard's rows, for prompts that see them: read again, and cut as the VAE saw them."""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from latentprep.cache.group import LatentGroup
from latentprep.cache.seal import check_stamp
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.prepare.images.load import LoadOptions, load_controls
from latentprep.prepare.plan.buckets import with_controls
from latentprep.records import Item, Placement, Row, Skip


class UnseenError(Exception):
    """The images of a row are not those that were encoded, or cannot be read now."""


@dataclass(frozen=True)
class SeenImages:
    """The control images of the rows of a shard."""

    storage: Storage
    shard: Shard
    rows: Sequence[Row]  # as they are now, through all groups
    options: LoadOptions

    def each(self, rows: Iterable[int]) -> Iterator[list[np.ndarray]]:
        """Of each row given by its number its control images, [H,W,3] uint8; the next row is read meanwhile.

        Raises UnseenError; UserError if the source is not there any more.
        """
        groups = self._open()
        places = [(group, number) for group in groups for number in range(len(group))]
        counts = [(row, len(list(same))) for row, same in groupby(rows)]
        with ThreadPoolExecutor(1, thread_name_prefix="read") as reader:
            later = [reader.submit(load_seen, self.rows[n], *places[n], self.options) for n, _ in counts[:1]]
            for after, (_, count) in enumerate(counts, 1):
                images = later.pop().result()
                later = [
                    reader.submit(load_seen, self.rows[n], *places[n], self.options)
                    for n, _ in counts[after : after + 1]
                ]
                yield from [images] * count

    def _open(self) -> list[LatentGroup]:
        """The rows as they were encoded. Raises UnseenError if their file is not as it was written."""
        try:
            check_stamp(self.storage, self.shard.latents_name, self.shard.latents_file)
            return self.shard.open_latents(self.storage).groups
        except UnreadableError:
            raise
        except UserError as error:
            raise UnseenError(str(error)) from None


def load_seen(row: Row, group: LatentGroup, number: int, options: LoadOptions) -> list[np.ndarray]:
    """The control images of a row, which is so many in its group. Raises UnseenError, and UserError."""
    size, _, _ = group.geometry(number, 0)
    item = Item(row.key, size, row.nbytes, row.version)
    placement = place_again(group, number, options.factor)
    found = load_controls(item, placement, options, group.key[number], bytes(group.digest[number].tolist()))
    if isinstance(found, Skip):
        raise UnseenError(f"{row.key}: {found.reason}, {found.detail}. The next run looks at it again")
    return found


def place_again(group: LatentGroup, number: int, factor: int) -> Placement:
    """Where the first view of a row was placed when it was encoded, and the buckets of its control images."""
    _, resized, crop = group.geometry(number, 0)
    buckets = [(own.shape[-2] * factor, own.shape[-1] * factor) for own in group.controls.values()]
    return with_controls(Placement(crop[2:], resized, crop), buckets)
