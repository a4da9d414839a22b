"""Index: which sample is which row of which group, and which samples belong to a bucket. Numbers only, no files."""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from latentprep.cache.shard import Shard

Shape = tuple[int, ...]  # [C,h,w] of a latent


class Index:
    """The samples of a cache in their order: group after group, dead rows left out, and all of that `repeats` times."""

    def __init__(self, shards: Sequence[Shard], repeats: int = 1) -> None:
        self.repeats = repeats
        # (shard, group in it) by group number: the groups of all shards in a row
        self.groups = [(s, n) for s, shard in enumerate(shards) for n in range(len(shard.groups))]
        shapes = [shape for shard in shards for _, _, shape in shard.groups]
        counts = [rows for shard in shards for _, rows, _ in shard.groups]
        self._live: dict[int, np.ndarray] = {}  # of groups with dead rows: the numbers of the others
        for group, (shard, number) in enumerate(self.groups):
            if shards[shard].dead:
                self._live[group] = shards[shard].live_rows()[number]
                counts[group] = len(self._live[group])
        self._starts = np.cumsum([0, *counts], dtype=np.int64)  # group g holds images _starts[g] to _starts[g + 1]
        self.num_images = int(self._starts[-1])
        self.buckets: list[Shape] = sorted({s for s, n in zip(shapes, counts, strict=True) if n})
        numbers = {shape: number for number, shape in enumerate(self.buckets)}
        of_group = np.array([numbers.get(shape, -1) for shape in shapes], np.int64)
        self._groups_of_bucket = [np.flatnonzero(of_group == bucket) for bucket in range(len(self.buckets))]
        sizes = np.array(counts, np.int64)
        self._bucket_starts = [np.concatenate([[0], np.cumsum(sizes[own])]) for own in self._groups_of_bucket]

    def __len__(self) -> int:
        return self.num_images * self.repeats

    def locate(self, indices: np.ndarray) -> Iterator[tuple[int, np.ndarray, slice]]:
        """Where samples [B] stand, cut into runs of one group: its number, [n] rows in it, and the run's place in B.

        Negative indices count from the end. Raises IndexError.
        """
        outside = indices[(indices < -len(self)) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"index {outside[0]} of a dataset of {len(self)}")
        images = indices % len(self) % self.num_images
        groups = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[groups]
        edges = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist(), len(groups)]
        for first, last in pairwise(edges):
            group, own = int(groups[first]), rows[first:last]
            yield group, self._live[group][own] if group in self._live else own, slice(first, last)

    def count_of_bucket(self, bucket: int) -> int:
        """Images of a bucket, by its place in `buckets`."""
        return int(self._bucket_starts[bucket][-1])

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [B] of samples given by their numbers in a bucket: image after image, repeat after repeat."""
        starts = self._bucket_starts[bucket]
        repeat, image = np.divmod(numbers.astype(np.int64), starts[-1])
        place = np.searchsorted(starts, image, side="right") - 1
        group = self._groups_of_bucket[bucket][place]
        samples: np.ndarray = self._starts[group] + image - starts[place] + repeat * self.num_images
        return samples
