"""SampleReader: rows of a cache as batches. What chance decides is worked out for many batches at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.manifest import Manifest
from latentprep.errors import UserError
from latentprep.read.arguments import SamplingMethod, UseWeight
from latentprep.read.batch import LatentBatch
from latentprep.read.draws import Draws, noise_seeds_of
from latentprep.read.index import Index
from latentprep.read.order import Batches
from latentprep.read.prompts import Prompts
from latentprep.read.rows import OpenRows
from latentprep.read.sets import SetTable
from latentprep.read.shards import OpenShards, promised_by
from latentprep.read.weight import take_weight
from latentprep.records import is_flipped


@dataclass(frozen=True)
class Sampling:
    """How a sample is made of a row; the arguments of LatentDataset, checked."""

    method: SamplingMethod
    flip_p: float
    use_weight: UseWeight
    sample_weight: float


class SampleReader:
    """Makes batches of the samples of an index."""

    def __init__(self, manifest: Manifest, shards: OpenShards, prompts: Prompts, sampling: Sampling) -> None:
        self.shards, self.prompts, self.sampling = shards, prompts, sampling
        self.sets = SetTable(manifest.sets)
        self._controls = promised_by(manifest).controls
        self._normalization = manifest.latent.normalization
        self._is_mirrored = np.array([is_flipped(view) for view in manifest.latent.views], bool)  # [V]
        self._num_mirrors = 2 if self._is_mirrored.any() else 1  # views of each crop

    @property
    def num_views(self) -> int:
        return len(self._is_mirrored)

    @property
    def num_controls(self) -> int:
        """Control images of each image."""
        return len(self._controls)

    @property
    def has_mirrored(self) -> bool:
        return self._num_mirrors == 2

    def read(self, index: Index, batches: Batches, seed: int, epoch: int) -> Iterator[LatentBatch]:
        """Batches of samples, each when it is asked for.

        Raises UserError for files that are damaged or gone, and for a batch that mixes shapes.
        """
        samples = batches.samples
        images, repetitions = index.split_samples(samples)
        draws = Draws(seed, epoch, samples, images, repetitions)
        sets = index.set_of_image[images] if index.set_of_image is not None else None
        flip_p = self.sets.flips(sets, self.sampling.flip_p)
        view = draws.views(self.num_views // self._num_mirrors, self._num_mirrors, flip_p)
        weights = self.sets.weights(sets, self.sampling.sample_weight)
        numbers = torch.from_numpy(samples % len(index))
        flipped = torch.from_numpy(self._is_mirrored[view])
        noise = draws.noise_seeds() if self.sampling.method == "random" else None
        is_dropped = self.prompts.drops(draws, self.sets.dropouts(sets, self.prompts.caption_dropout))
        seeds = self.prompts.seeds(draws)
        groups, image_rows = index.find_images(images)
        check_buckets(index, groups, batches.edges)
        for piece in self._pieces(groups, batches.edges):
            whole = slice(piece[0].start, piece[-1].stop)
            rows = self.shards.rows(groups[whole], image_rows[whole], view[whole])
            prompts = self.prompts.choose(rows, draws, whole)
            sizes = {name: rows.take(name) for name in ("original_size", "resized_size", "crop")}
            if self.sampling.method == "once":
                noise = noise_seeds_of(seed, rows.digests())
            for span in piece:
                own = slice(span.start - whole.start, span.stop - whole.start)
                yield self._make(
                    rows.part(own), prompts[own], None if seeds is None else seeds[span],
                    None if is_dropped is None else is_dropped[span],
                    index=numbers[span], flipped=flipped[span],
                    noise_seed=None if noise is None else noise[own if self.sampling.method == "once" else span],
                    loss_weight=weights if isinstance(weights, float) else torch.from_numpy(weights[span]),
                    set_numbers=None if sets is None else sets[span],
                    **{name: value[own] for name, value in sizes.items()},
                )  # fmt: skip

    def _pieces(self, groups: np.ndarray, edges: np.ndarray) -> Iterator[list[slice]]:
        """The spans of the batches, in pieces: a piece ends before the next batch that must open a file."""
        spans = [slice(first, last) for first, last in pairwise(edges.tolist())]
        start = 0
        while start < len(spans):
            are_open = np.logical_and.reduceat(self.shards.is_open[groups], edges[:-1])
            wait = np.flatnonzero(~are_open[start:])
            count = max(1, int(wait[0])) if len(wait) else len(spans) - start
            yield spans[start : start + count]
            start += count

    def _make(
        self,
        rows: OpenRows,
        prompts: np.ndarray,
        seeds: np.ndarray | None,
        is_dropped: np.ndarray | None,
        noise_seed: Tensor | None,
        **fields: Any,
    ) -> LatentBatch:
        if torch.is_autocast_enabled("cpu"):  # autocast makes torch.cat fail for a 16-bit dtype other than its own
            with torch.autocast("cpu", enabled=False):
                return self._make(rows, prompts, seeds, is_dropped, noise_seed, **fields)
        use_weight = self.sampling.use_weight
        text = self.prompts.take(rows, prompts, seeds, is_dropped)
        others = {name: rows.take_if_there(name) for name in rows.one.others}
        return LatentBatch(
            latent_mean=rows.take("latent_mean"),
            latent_std=rows.take_if_there("latent_std") if noise_seed is not None else None,
            noise_seed=noise_seed,
            stored_control={name: rows.take(name) for name in self._controls},
            normalization=self._normalization,
            stored_cond=text.cond,
            cond_lengths=text.lengths,
            prompts=text.prompts,
            stored_weight=take_weight(rows, use_weight) if use_weight is not False else None,
            fields={name: value for name, value in others.items() if value is not None},
            set_names=self.sets.names,
            **fields,
        )


def check_buckets(index: Index, groups: np.ndarray, edges: np.ndarray) -> None:
    """Raise UserError if a batch mixes latents of several shapes."""
    buckets = index.bucket_of_group[groups]
    is_other = buckets != np.repeat(buckets[edges[:-1]], np.diff(edges))
    if is_other.any():
        batch = int(np.searchsorted(edges, np.flatnonzero(is_other)[0], side="right")) - 1
        own = buckets[edges[batch] : edges[batch + 1]]
        raise UserError(
            f"a batch of {len(own)} indices mixes latents of {len(np.unique(own))} shapes. "
            "Read with LatentLoader, or give DataLoader a BucketBatchSampler."
        )
