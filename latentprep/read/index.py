"""Index: which sample is which row of which group, and which samples belong to a bucket. Numbers only, no files."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from hashlib import blake2b

import numpy as np

from latentprep.cache.sets import SetFacts
from latentprep.cache.shard import Shard
from latentprep.read.repeats import Repeats

Shape = tuple[int, ...]  # of a bucket: [C,h,w] of a latent, and [h,w] of control images (cache/schema.py)


class Index:
    """The samples of a cache in their order: group after group, dead rows left out, and all of that `repeats` times.

    With sets, an image appears `repeats` times the repeats of its set, in rounds (repeats.py).
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        repeats: int = 1,
        chosen: Mapping[int, np.ndarray] | None = None,
        sets: Sequence[SetFacts] = (),
    ) -> None:
        """chosen: group number -> its rows [n] that are samples, ascending. In other groups all live rows are."""
        self.repeats, self._shards, self._chosen, self._sets = repeats, shards, chosen, sets
        # (shard, group in it) by group number: the groups of all shards in a row
        self.groups = [(s, n) for s, shard in enumerate(shards) for n in range(len(shard.groups))]
        shapes = [shape for shard in shards for _, _, shape in shard.groups]
        counts = [rows for shard in shards for _, rows, _ in shard.groups]
        self._live: dict[int, np.ndarray] = {}  # group -> its rows that are samples; only groups where some are not
        for group, (shard, number) in enumerate(self.groups):
            if shards[shard].dead:
                self._live[group] = shards[shard].live_rows()[number]
            if chosen is not None and group in chosen:
                self._live[group] = chosen[group]
            if group in self._live:
                counts[group] = len(self._live[group])
        self._starts = np.cumsum([0, *counts], dtype=np.int64)  # group g holds images _starts[g] to _starts[g + 1]
        self.num_images = int(self._starts[-1])
        self.buckets: list[Shape] = sorted({s for s, n in zip(shapes, counts, strict=True) if n})
        numbers = {shape: number for number, shape in enumerate(self.buckets)}
        self.bucket_of_group = of_group = np.array([numbers.get(shape, -1) for shape in shapes], np.int64)
        self._groups_of_bucket = [np.flatnonzero(of_group == bucket) for bucket in range(len(self.buckets))]
        # the rows of _live, end to end; and where those of each group begin, or -1 if all its rows are samples
        self._live_rows = np.concatenate([*self._live.values(), np.arange(0)])
        self._live_starts = np.full(len(self.groups), -1, np.int64)
        ends = np.cumsum([0, *map(len, self._live.values())])
        self._live_starts[list(self._live)] = ends[:-1]
        sizes = np.array(counts, np.int64)
        self._bucket_starts = [np.concatenate([[0], np.cumsum(sizes[own])]) for own in self._groups_of_bucket]
        self.set_of_image = self._list_sets() if sets else None  # [n] uint16: numbers of sets
        self._repeats = Repeats(self.num_images, self._count_repeats(np.arange(len(self.groups))))
        self._repeats_of_bucket = [
            Repeats(int(starts[-1]), self._count_repeats(own))
            for starts, own in zip(self._bucket_starts, self._groups_of_bucket, strict=True)
        ]

    def _list_sets(self) -> np.ndarray:
        """The number of the set of each image [n]."""
        rows_of = dict(self.rows())
        found, group = [np.zeros(0, np.uint16)], 0
        for shard in self._shards:
            numbers, counts = np.array(shard.sets, np.int64).reshape(-1, 2).T
            sets = np.repeat(numbers.astype(np.uint16), counts)
            edges = np.cumsum([rows for _, rows, _ in shard.groups])[:-1]
            for own in np.split(sets, edges):
                found += [own[rows_of[group]]] if group in rows_of else []
                group += 1
        return np.concatenate(found)

    def _count_repeats(self, groups: np.ndarray) -> np.ndarray | int:
        """How often each image of some groups stands in an epoch; one number, if that is the same for all."""
        if self.set_of_image is None:
            return self.repeats
        parts = [self.set_of_image[self._starts[group] : self._starts[group + 1]] for group in groups.tolist()]
        of_set = np.array([facts.repeats for facts in self._sets], np.int64) * self.repeats
        counts: np.ndarray = of_set[np.concatenate([np.zeros(0, np.uint16), *parts])]
        return counts if counts.size and (counts != counts[0]).any() else int(counts[0]) if counts.size else 1

    def __len__(self) -> int:
        return len(self._repeats)

    @cached_property
    def digest(self) -> str:
        """16 hex digits: a hash of which samples there are and of their order."""
        parts = blake2b(digest_size=8)
        for shard in self._shards:
            parts.update(repr((shard.id, shard.groups, shard.dead)).encode())
            parts.update(repr(shard.sets).encode() if self._sets else b"")
        parts.update(repr([facts.repeats for facts in self._sets]).encode() if self._sets else b"")
        for group, rows in sorted((self._chosen or {}).items()):
            parts.update(group.to_bytes(8, "little") + rows.astype("<i8").tobytes())
        return parts.hexdigest()

    def rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """(group number, its rows [n] that are samples) for each group that has samples."""
        for group, count in enumerate(np.diff(self._starts).tolist()):
            if count:
                yield group, self._live[group] if group in self._live else np.arange(count)

    def split(self, values: np.ndarray) -> list[np.ndarray]:
        """Values [n] of all images, cut into those of each group of rows()."""
        ends = self._starts[1:][np.diff(self._starts) > 0]
        return np.split(values, ends[:-1])

    def choose(self, chosen: Mapping[int, np.ndarray]) -> "Index":
        """The index of some of its rows, given group by group; groups that are not given have none."""
        none = np.arange(0)
        every = {group: chosen.get(group, none) for group in range(len(self.groups))}
        return Index(self._shards, self.repeats, every, self._sets)

    def check(self, indices: np.ndarray) -> np.ndarray:
        """Indices [S] with negative ones counted from the end: 0 to len - 1. Raises IndexError for one out of range."""
        outside = indices[(indices < -len(self)) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"index {outside[0]} of a dataset of {len(self)}")
        found: np.ndarray = indices % len(self)
        return found

    def find(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of each sample [S], and its row in the group: two [S] int64.

        Negative indices count from the end. Raises IndexError for one out of range.
        """
        return self.find_images(self._repeats.split(self.check(indices))[0])

    def split_samples(self, samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The image of each sample [S], and which repetition of the image it is: two [S] int64.

        Samples are 0 or more. A sample beyond the last starts over, with further repetitions.
        """
        return self._repeats.split(samples)

    def join_samples(self, images: np.ndarray, repetitions: np.ndarray) -> np.ndarray:
        """The samples [S] of images and their repetitions."""
        return self._repeats.join(images, repetitions)

    def find_images(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The group of each image [S], and its row in the group: two [S] int64."""
        groups = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[groups]
        live = self._live_starts[groups]
        is_part = live >= 0
        if is_part.any():
            rows[is_part] = self._live_rows[live[is_part] + rows[is_part]]
        return groups, rows

    def sizes_of_buckets(self) -> list[int]:
        """Samples of each bucket, in the order of `buckets`."""
        return list(map(len, self._repeats_of_bucket))

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [B] of samples given by their numbers in a bucket: round after round, image after image."""
        starts = self._bucket_starts[bucket]
        image, repetition = self._repeats_of_bucket[bucket].split(numbers.astype(np.int64))
        place = np.searchsorted(starts, image, side="right") - 1
        group = self._groups_of_bucket[bucket][place]
        return self._repeats.join(self._starts[group] + image - starts[place], repetition)
