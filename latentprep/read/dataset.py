"""LatentDataset: a latent cache as a map-style PyTorch dataset."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentprep.cache.manifest import open_manifest
from latentprep.cache.ragged import Ragged
from latentprep.cache.readers import Reading
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.prompts import load_template
from latentprep.read.arguments import (
    check_flags,
    check_int,
    check_location,
    check_sampling_method,
    check_share,
    check_use_weight,
)
from latentprep.read.batch import CondModel, LatentBatch
from latentprep.read.cond import StoredCond, finish_cond
from latentprep.read.describe import show_cond, show_shape
from latentprep.read.draws import Draws
from latentprep.read.index import Index, Shape
from latentprep.read.prompts import Prompts, Wording, check_cond_model
from latentprep.read.shards import OpenShards, Run, gather, gather_others, gather_std, promised_by
from latentprep.read.weight import gather_weight
from latentprep.records import is_flipped


class LatentDataset(Dataset[LatentBatch]):
    """A latent cache. An index stands for one image (with repeats, for one of its repetitions).

    cache: folder or URL.
    latent_sampling_method: "once": one draw for each image, the same in every epoch and process; "deterministic": the
        mean; "random": a fresh draw every epoch, which the seed decides.
    repeats: how often each image stands in an epoch. Of several crops or prompts its repetitions take others, in turn.
    flip_p: how often the mirrored view is taken, 0..1; the cache needs `encode --flip`.
    include_cond: whether batches hold text embeddings.
    use_weight: True rescales each weight map to a minimum of 0 and a mean of 1, so that losses stay comparable, as the
        ancestor did (a constant map becomes ones); "raw" gives alpha as stored, 0..1; a number such as 0.1 gives alpha,
        but never less than that. Images without alpha get ones.
    caption_dropout: how often a sample gets the empty prompt and its cond, 0..1, for classifier-free guidance.

    Prompts are the stored ones, with their stored cond, unless one of these asks for prompts that are made anew for
    every sample and epoch, from the stored captions (of several captions one is taken):

    template, placeholder_token: as in `encode`: a shipped name or a file, with [filewords] and [name].
    shuffle_tags, keep_tags: shuffle the comma-separated tags of the caption, all but the first `keep_tags`.
    tag_drop_out: how often each of those tags is left out, 0..1.
    wildcards: {a|b|c} in captions and templates becomes one of its parts.
    cond_model: makes their cond: a callable from a list of B prompts to [B,T,D], or to a dict of such. It is called in
        the training process, when batch.cond is asked for; without it, say include_cond=False.

    Fields of the cache that have no name of their own in a batch are in batch.fields, name -> [B,...].

    `data[i]` and `data.__getitems__(indices)` give a LatentBatch; the indices of one batch are to be of one bucket, as
    BucketBatchSampler gives them. Raises UserError for a cache that is missing or lacks what is asked for.
    """

    def __init__(
        self,
        cache: str | Path,
        *,
        latent_sampling_method: str = "once",
        repeats: int = 1,
        flip_p: float = 0.0,
        include_cond: bool = True,
        use_weight: bool | str | float = False,
        caption_dropout: float = 0.0,
        template: str | Path | None = None,
        placeholder_token: str = "",
        shuffle_tags: bool = False,
        keep_tags: int = 0,
        tag_drop_out: float = 0.0,
        wildcards: bool = False,
        cond_model: CondModel | None = None,
        seed: int = 0,
    ) -> None:
        check_location(cache)
        check_flags(include_cond=include_cond)
        self.latent_sampling_method = check_sampling_method(latent_sampling_method)
        self.repeats, self.seed = check_int("repeats", repeats, 1), check_int("seed", seed)
        self.flip_p, self.use_weight = check_share("flip_p", flip_p), check_use_weight(use_weight)
        self.include_cond, self.cond_model = include_cond, cond_model
        lines = load_template(str(template)) if template is not None else None
        wording = Wording(lines, placeholder_token, shuffle_tags, keep_tags, tag_drop_out, wildcards)
        self.storage = Storage(cache)
        self._reading = Reading(self.storage)  # held from before the manifest is read: what it names stays
        self.manifest = open_manifest(self.storage)
        self.normalization = self.manifest.latent.normalization
        self._index = Index(self.manifest.shards, self.repeats)
        stored = StoredCond(self.storage, self.manifest)
        check_cond_model(cond_model, wording, needs_cond=include_cond and stored.is_there)
        self._prompts = Prompts(wording, stored, include_cond=include_cond, caption_dropout=caption_dropout)
        self._shards = OpenShards(self.storage, self.manifest, self._index.groups, needs_cond=include_cond)
        is_mirrored = [is_flipped(view) for view in self.manifest.latent.views]
        self._flipped = torch.tensor(is_mirrored)  # [V] bool
        self._num_mirrors = 2 if any(is_mirrored) else 1  # views of each crop
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are kept between epochs
        self._check()

    def _check(self) -> None:
        """Raise UserError if the cache lacks what is asked for."""
        method, root = self.latent_sampling_method, self.storage.root
        if method != "deterministic" and not promised_by(self.manifest).has_std:
            raise UserError(
                f"latent_sampling_method={method!r}: {root} holds means only. "
                "Use 'deterministic', or encode with --store mean+std."
            )
        if self.flip_p and not self._flipped.any():
            raise UserError(f"flip_p={self.flip_p}: {root} holds no mirrored views. Encode with --flip.")
        if self._index.num_images == 0:
            raise UserError(f"{root}: the cache is empty, there is nothing to train on.")

    @property
    def num_images(self) -> int:
        return self._index.num_images

    @property
    def buckets(self) -> list[Shape]:
        """[C,h,w] of the latents of each bucket."""
        return self._index.buckets

    def __len__(self) -> int:
        return len(self._index)

    def __repr__(self) -> str:
        sizes = [show_shape(shape) for shape in self.buckets[:4]] + ["..."] * (len(self.buckets) > 4)
        parts = [
            counted(self.num_images, "image") + (f" x {self.repeats} repeats" if self.repeats > 1 else ""),
            f"{counted(len(self.buckets), 'bucket')} {' '.join(sizes)}",
            counted(len(self._flipped), "view"),
            self.latent_sampling_method,
        ]
        return f"LatentDataset({shortened(self.storage.root, 200)}: {', '.join(parts)}, {self._describe_cond()})"

    def _describe_cond(self) -> str:
        """Names and shapes of the cond, as far as a shard was opened."""
        if not self.include_cond or not (self._prompts.stored.is_there or self.cond_model is not None):
            return "no cond"
        if self.cond_model is not None:
            return "cond by cond_model"
        return f"cond {show_cond(self._shards.cond or {}) or 'stored'}"

    def set_epoch(self, epoch: int) -> None:
        """The epoch that flips and random draws depend on; LatentLoader sets it."""
        self._epoch.fill_(check_int("epoch", epoch, 0) % 2**63)

    def count_of_bucket(self, bucket: int) -> int:
        """Images of a bucket, by its place in `buckets`."""
        return self._index.count_of_bucket(bucket)

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [B] of samples given by their numbers in a bucket: image after image, repeat after repeat."""
        return self._index.samples_of_bucket(bucket, numbers)

    def key(self, index: int) -> str:
        """Path of an image relative to the folder that was encoded."""
        ((number, rows, _),) = self._index.locate(np.array([index]))
        return self._shards[number].key[int(rows[0])]

    def caption(self, index: int) -> list[str]:
        """The captions of an image."""
        ((number, rows, _),) = self._index.locate(np.array([index]))
        return self._shards[number].caption[int(rows[0])]

    def uncond(self) -> dict[str, Tensor] | None:
        """Cond of the empty prompt, name -> [1,T,D] float32, for classifier-free guidance; None with --no-cond.

        It has the names of batch.cond, masks too.
        """
        stored = self._prompts.stored
        if not stored.is_there:
            return None
        rows = {name: value[0][None] for name, value in stored.empty().items()}
        ragged = [name for name, value in stored.empty().items() if isinstance(value, Ragged)]
        return finish_cond(rows, {name: torch.tensor([rows[name].shape[1]]) for name in ragged})

    def __getitem__(self, index: int) -> LatentBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> LatentBatch:
        return self.read(indices, int(self._epoch))

    def read(self, indices: list[int], epoch: int) -> LatentBatch:
        """The batch that `__getitems__` gives in an epoch."""
        if torch.is_autocast_enabled("cpu"):  # it would join no tensors of another 16-bit dtype than its own
            with torch.autocast("cpu", enabled=False):
                return self.read(indices, epoch)
        chosen = np.asarray(indices, np.int64)
        if not len(chosen):
            raise UserError("a batch of no indices: expected at least one.")
        draws = Draws(self.seed, epoch, chosen % len(self), self.num_images)
        view = draws.views(len(self._flipped) // self._num_mirrors, self._num_mirrors, self.flip_p)
        runs = self._open_runs(chosen, view)
        geometry = torch.from_numpy(np.concatenate([run.group.geometry[run.views] for run in runs]))
        is_drawn = self.latent_sampling_method != "deterministic"
        text = self._prompts.take(runs, draws)
        return LatentBatch(
            index=torch.from_numpy(chosen),
            latent_mean=gather([(run.group.mean, run.views) for run in runs]),
            latent_std=gather_std(runs) if is_drawn else None,
            noise_seed=self._noise_seeds(runs, draws) if is_drawn else None,
            normalization=self.normalization,
            stored_cond=text.cond,
            cond_lengths=text.lengths,
            cond_text=text.prompts,
            cond_model=self.cond_model if self.include_cond else None,
            stored_weight=gather_weight(runs, self.use_weight) if self.use_weight is not False else None,
            original_size=geometry[:, :2],
            resized_size=geometry[:, 2:4],
            crop=geometry[:, 4:],
            flipped=self._flipped[torch.from_numpy(view)],
            fields=gather_others(runs),
        )

    def _open_runs(self, chosen: np.ndarray, view: np.ndarray) -> list[Run]:
        """The rows of samples [B], of each the view [B]. Raises UserError if their latents are not of one shape."""
        runs = []
        for number, images, span in self._index.locate(chosen):
            group = self._shards[number]
            runs.append(Run(group, images, images * group.num_views + view[span], span))
        num_shapes = len({run.group.shape for run in runs})
        if num_shapes > 1:
            raise UserError(
                f"a batch of {len(chosen)} indices mixes latents of {num_shapes} shapes. "
                "Read with LatentLoader, or give DataLoader a BucketBatchSampler."
            )
        return runs

    def _noise_seeds(self, runs: list[Run], draws: Draws) -> Tensor:
        """[B] int64; "once" counts by the images' content."""
        is_once = self.latent_sampling_method == "once"
        return draws.noise_seeds(np.concatenate([run.group.digest[run.images] for run in runs]) if is_once else None)

    @staticmethod
    def collate(batch: "LatentBatch | list[LatentBatch]") -> LatentBatch:
        """For DataLoader's collate_fn: __getitems__ has made the batch already."""
        if isinstance(batch, LatentBatch):
            return batch
        if len(batch) == 1:
            return batch[0]
        raise UserError("collate: DataLoader did not fetch a whole batch at once. Use LatentLoader.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "cond_model": None}  # a text encoder stays where it is
