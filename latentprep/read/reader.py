"""SampleReader: rows of a cache as batches. What chance decides is worked out for many batches at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

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
from latentprep.read.shards import OpenShards, Run, gather, gather_others, gather_std
from latentprep.read.weight import gather_weight
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
        self._normalization = manifest.latent.normalization
        self._is_mirrored = np.array([is_flipped(view) for view in manifest.latent.views], bool)  # [V]
        self._num_mirrors = 2 if self._is_mirrored.any() else 1  # views of each crop

    @property
    def num_views(self) -> int:
        return len(self._is_mirrored)

    @property
    def has_mirrored(self) -> bool:
        return self._num_mirrors == 2

    def read(self, index: Index, batches: Batches, seed: int, epoch: int) -> Iterator[LatentBatch]:
        """Batches of samples, each when it is asked for. Sample n is of image n % num_images of the index.

        Raises UserError for files that are damaged or gone, and for a batch that mixes shapes.
        """
        samples = batches.samples
        draws = Draws(seed, epoch, samples, index.num_images)
        view = draws.views(self.num_views // self._num_mirrors, self._num_mirrors, self.sampling.flip_p)
        numbers = torch.from_numpy(samples % len(index))
        flipped = torch.from_numpy(self._is_mirrored[view])
        noise = draws.noise_seeds() if self.sampling.method == "random" else None
        is_dropped = self.prompts.drops(draws)
        all_runs = self._open_runs(index, batches, view)
        for first, last in pairwise(batches.edges.tolist()):
            own = slice(first, last)
            runs = next(all_runs)
            noise_seed = None if noise is None else noise[own]
            if self.sampling.method == "once":
                noise_seed = noise_seeds_of(seed, np.concatenate([run.group.digest[run.images] for run in runs]))
            dropped = None if is_dropped is None else is_dropped[own]
            yield self._make(runs, draws, dropped, numbers[own], flipped[own], noise_seed)

    def _open_runs(self, index: Index, batches: Batches, view: np.ndarray) -> Iterator[list[Run]]:
        """The rows of each batch; of each sample [S] the view [S]."""
        runs: list[Run] = []
        ends = iter(batches.edges[1:].tolist())
        end = next(ends)
        for number, images, span in index.locate(batches.samples % len(index), batches.edges):
            group = self.shards[number]
            runs.append(Run(group, images, images * group.num_views + view[span], span))
            if span.stop < end:
                continue
            num_shapes = len({run.group.shape for run in runs})
            if num_shapes > 1:
                raise UserError(
                    f"a batch of {sum(len(run.images) for run in runs)} indices mixes latents of {num_shapes} shapes. "
                    "Read with LatentLoader, or give DataLoader a BucketBatchSampler."
                )
            yield runs
            runs, end = [], next(ends, 0)

    def _make(
        self,
        runs: list[Run],
        draws: Draws,
        is_dropped: np.ndarray | None,
        index: Tensor,
        flipped: Tensor,
        noise_seed: Tensor | None,
    ) -> LatentBatch:
        if torch.is_autocast_enabled("cpu"):  # it would join no tensors of another 16-bit dtype than its own
            with torch.autocast("cpu", enabled=False):
                return self._make(runs, draws, is_dropped, index, flipped, noise_seed)
        use_weight = self.sampling.use_weight
        geometry = torch.from_numpy(np.concatenate([run.group.geometry[run.views] for run in runs]))
        text = self.prompts.take(runs, draws, is_dropped)
        return LatentBatch(
            index=index,
            latent_mean=gather([(run.group.mean, run.views) for run in runs]),
            latent_std=gather_std(runs) if noise_seed is not None else None,
            noise_seed=noise_seed,
            normalization=self._normalization,
            stored_cond=text.cond,
            cond_lengths=text.lengths,
            cond_text=text.prompts,
            stored_weight=gather_weight(runs, use_weight) if use_weight is not False else None,
            original_size=geometry[:, :2],
            resized_size=geometry[:, 2:4],
            crop=geometry[:, 4:],
            flipped=flipped,
            fields=gather_others(runs),
            loss_weight=self.sampling.sample_weight,
        )
