"""The images of a cache in numbers: what a report counts, ranks and compares."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.normalization import Normalization
from latentprep.cache.storage import Storage
from latentprep.look.images import cropped_away
from latentprep.look.samples import distances, means_and_stds
from latentprep.records import Size

MOST_LOOKED = 20_000  # images whose latents are read, at most, unless a report shows more; chosen at random
BLOCK = 2**22  # numbers of latents that are in memory at once
LIMIT, NUM_BINS = 5.0, 60  # of the histogram of all numbers: -5 to 5
GRID = 4  # latents are averaged to 4x4 to be compared
Place = tuple[int, int, int]  # shard, group, row


@dataclass(frozen=True, eq=False)
class Images:
    """All M images of a cache, in its order."""

    places: np.ndarray  # [M,3] int32: shard, group, row
    losses: np.ndarray  # [M] float32: the share of each that its crop cuts away
    bucket_of: np.ndarray  # [M] int32: number of its bucket
    buckets: list[Size]  # (height, width)

    def __len__(self) -> int:
        return len(self.places)

    def place(self, image: int) -> Place:
        shard, group, row = self.places[image].tolist()
        return shard, group, row


@dataclass(frozen=True, eq=False)
class Looked:
    """The L images whose latents were read, of each its first view."""

    images: np.ndarray  # [L]: their numbers, rising
    scores: np.ndarray  # [L] float64: how far from the usual; samples.distances
    digests: np.ndarray  # [L,16] uint8: of their content
    averaged: np.ndarray  # [L,C*GRID*GRID] float32: latent_mean, averaged to GRID x GRID
    channels: "Channels"


@dataclass(frozen=True, eq=False)
class Channels:
    """Latents as the denoiser sees them: latent_mean, patched, shifted and scaled; rows that are finite alone."""

    num_rows: int
    mean: np.ndarray  # [C] of each channel
    std: np.ndarray  # [C]
    noise: np.ndarray | None  # [C]: mean of latent_std, likewise; None: it is not stored
    counts: np.ndarray  # [NUM_BINS]: numbers of all channels, from -LIMIT to LIMIT
    num_beyond: int  # numbers outside of these


def list_all(storage: Storage, manifest: Manifest) -> Images:
    """Every image of a cache; no latent is read. Raises UserError."""
    factor, places, losses, sizes, counts = manifest.latent.factor, [], [], [], []
    for n, shard in enumerate(manifest.shards):
        groups = shard.open_latents(storage).groups
        for number, (group, live) in enumerate(zip(groups, shard.live_rows(), strict=True)):
            places.append(np.stack([np.full_like(live, n), np.full_like(live, number), live], axis=1))
            losses.append(np.nan_to_num(cropped_away(group)[live]).clip(0, 1))
            height, width = group.latent_mean.shape[-2:]
            sizes.append((height * factor, width * factor))
            counts.append(len(live))
    buckets = sorted({size for size, count in zip(sizes, counts, strict=True) if count})
    numbers = {size: n for n, size in enumerate(buckets)}
    return Images(
        np.concatenate([np.zeros((0, 3), int), *places]).astype(np.int32),
        np.concatenate([np.zeros(0), *losses]).astype(np.float32),
        np.repeat([numbers.get(size, 0) for size in sizes], counts).astype(np.int32),
        buckets,
    )


def look_at(
    storage: Storage, manifest: Manifest, images: Images, chosen: np.ndarray, progress: Callable[[int], object]
) -> Looked:
    """What the latents of some images say; `chosen` are their numbers, rising. Raises UserError."""
    measures, averaged, digests, sums = [], [], [], Sums(manifest.latent.normalization)
    for group, rows in list_blocks(storage, manifest, images.places[chosen]):
        values = group.latent_mean[rows, 0].float()
        std = group.latent_std[rows, 0].float() if group.latent_std is not None else None
        measures.append(means_and_stds(values))
        averaged.append(torch.nn.functional.adaptive_avg_pool2d(values, GRID).flatten(1).numpy())
        digests.append(group.digest[rows].numpy())
        sums.add(values, std)
        progress(len(values))
    size = 2 * manifest.latent.channels
    found = np.concatenate([np.zeros((0, size), np.float32), *measures])
    return Looked(
        images=chosen,
        scores=distances(found[:, None])[:, 0] if len(found) else np.zeros(0),
        digests=np.concatenate([np.zeros((0, 16), np.uint8), *digests]),
        averaged=np.concatenate([np.zeros((0, size // 2 * GRID**2), np.float32), *averaged]),
        channels=sums.result(),
    )


def list_blocks(storage: Storage, manifest: Manifest, places: np.ndarray) -> Iterator[tuple[LatentGroup, Tensor]]:
    """Groups, and some of their rows: as many as BLOCK allows at once. `places` [L,3] are in the order of the cache."""
    edges = np.flatnonzero(np.any(np.diff(places[:, :2], axis=0, prepend=-1), axis=1)).tolist()
    opened: tuple[int, list[LatentGroup]] = (-1, [])
    for start, end in pairwise([*edges, len(places)]):
        shard, number, _ = places[start].tolist()
        if opened[0] != shard:
            opened = shard, manifest.shards[shard].open_latents(storage).groups
        group, rows = opened[1][number], torch.from_numpy(places[start:end, 2].astype(np.int64))
        for block in rows.split(max(1, BLOCK // group.latent_mean[0, 0].numel())):
            yield group, block


class Sums:
    """Sums over latents, block by block, from which the statistics of channels are made."""

    def __init__(self, normalization: Normalization) -> None:
        self.normalization = normalization
        self.without_shift = replace(normalization, shift=(0.0,))
        self.num_rows, self.num_values, self.num_beyond = 0, 0, 0
        self.total = self.squares = self.noise = torch.zeros(1, dtype=torch.float64)
        self.has_noise = False
        self.counts = np.zeros(NUM_BINS, np.int64)

    def add(self, mean: Tensor, std: Tensor | None) -> None:
        """mean [B,C,h,w], std the same or None: unscaled."""
        is_finite = mean.isfinite().flatten(1).all(1)
        if std is not None:
            is_finite &= std.isfinite().flatten(1).all(1)
        seen = self.normalization.apply(mean[is_finite])
        self.num_rows += len(seen)
        self.num_values += seen.numel() // seen.shape[1]
        self.total = self.total + seen.double().sum((0, 2, 3))
        self.squares = self.squares + seen.double().square().sum((0, 2, 3))
        found = torch.histc(seen, NUM_BINS, -LIMIT, LIMIT).long().numpy() if seen.numel() else 0
        self.counts += found
        self.num_beyond += seen.numel() - int(np.sum(found))
        if std is not None:
            self.has_noise = True
            self.noise = self.noise + self.without_shift.apply(std[is_finite]).double().sum((0, 2, 3))

    def result(self) -> Channels:
        count = max(1, self.num_values)
        mean = self.total / count
        std = (self.squares / count - mean.square()).clamp(min=0).sqrt()
        noise = (self.noise / count).numpy() if self.has_noise else None
        return Channels(self.num_rows, mean.numpy(), std.numpy(), noise, self.counts, self.num_beyond)
