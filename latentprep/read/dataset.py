"""LatentDataset: a latent cache as a map-style PyTorch dataset."""

from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentprep.cache.latents import Latents
from latentprep.cache.manifest import open_manifest
from latentprep.cache.ragged import Conds, fill_of, pad, row_shape
from latentprep.cache.readers import Reading
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text, open_uncond
from latentprep.errors import UserError
from latentprep.prompts import expand_wildcards, load_template, make_prompt, vary_tags
from latentprep.read.batch import CondModel, LatentBatch, rescale_weight
from latentprep.read.counters import CAPTION, CROP, DROP, FLIP, NOISE, PROMPT, check_int, fractions, mix
from latentprep.records import is_flipped

SAMPLING_METHODS = ("once", "deterministic", "random")
MAX_OPEN = 16_000  # groups, of two memory maps each: Linux allows a process 65,530 maps


class OpenGroup:
    """One group of a shard, memory-mapped: N images in V views. Of image n, view v stands in row n * V + v."""

    def __init__(self, latents: Latents, text: Text, number: int) -> None:
        group, words = latents.groups[number], text.groups[number]

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        self.num_views, self.shape = group.latent_mean.shape[1], tuple(group.latent_mean.shape[2:])
        self.mean, self.std, self.weight = group.latent_mean.flatten(0, 1), rows(group.latent_std), rows(group.weight)
        # [N*V,8]: original_size, resized_size, crop; numpy, since a row of it costs a tenth of a tensor's
        original_size = group.original_size[:, None].expand(-1, self.num_views, -1)
        self.geometry = torch.cat([original_size, group.resized_size, group.crop], dim=2).flatten(0, 1).numpy()
        self.digest = group.digest.numpy().view(np.uint64)[:, 0]
        self.key, self.caption, self.prompt_of = words.key, words.caption, words.prompt_of
        self.prompt, self.cond = text.prompt, text.cond


class Run(NamedTuple):
    """Consecutive images of a batch that stand in one group."""

    group: OpenGroup
    images: np.ndarray  # [n] int64: their rows in the group
    span: slice  # where they are in the batch


def gather(parts: list[tuple[Tensor, np.ndarray]]) -> Tensor:
    """[B,...]: rows of memory-mapped tensors, part after part."""
    count = sum(len(rows) for _, rows in parts)
    if len(parts) * 4 > count:  # few rows of each: one stack of views is the fastest
        return torch.stack([tensor[row] for tensor, rows in parts for row in rows.tolist()])
    out = torch.empty((count, *parts[0][0].shape[1:]), dtype=parts[0][0].dtype)
    start = 0
    for tensor, rows in parts:
        torch.index_select(tensor, 0, torch.from_numpy(rows.astype(np.int64)), out=out[start : start + len(rows)])
        start += len(rows)
    return out


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
        self.storage = Storage(cache)
        self._reading = Reading(self.storage)  # held from before the manifest is read: what it names stays
        self.manifest = open_manifest(self.storage)
        self.latent_sampling_method, self.repeats, self.flip_p = latent_sampling_method, repeats, flip_p
        self.include_cond, self.use_weight, self.seed = include_cond, use_weight, check_int("seed", seed)
        self.caption_dropout, self.shuffle_tags, self.keep_tags = caption_dropout, shuffle_tags, keep_tags
        self.tag_drop_out, self.placeholder_token, self.cond_model = tag_drop_out, placeholder_token, cond_model
        self.template = load_template(str(template)) if template is not None else None
        self.wildcards = wildcards
        self.makes_prompts = template is not None or shuffle_tags or tag_drop_out > 0 or wildcards
        self.normalization = self.manifest.latent.normalization
        self._fill = fill_of(self.manifest.recipe.text.to_json())  # of cond that is shorter than others of its batch
        self._check()
        views = self.manifest.latent.views
        self._flipped = torch.tensor([is_flipped(view) for view in views])  # [V] bool
        self._mirrors = 2 if self._flipped.any() else 1  # views of each crop
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are kept between epochs
        # the groups of all shards in a row: group g holds the images _starts[g] to _starts[g + 1]
        self._groups = [(s, n) for s, shard in enumerate(self.manifest.shards) for n in range(len(shard.groups))]
        shapes = [shape for shard in self.manifest.shards for _, _, shape in shard.groups]
        counts = [rows for shard in self.manifest.shards for _, rows, _ in shard.groups]
        self._rows: dict[int, np.ndarray] = {}  # of groups with tombstones: the rows that count
        for group, (shard, number) in enumerate(self._groups):
            if self.manifest.shards[shard].dead:
                self._rows[group] = self.manifest.shards[shard].live_rows()[number]
                counts[group] = len(self._rows[group])
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        self.buckets: list[tuple[int, ...]] = sorted({s for s, n in zip(shapes, counts, strict=True) if n})  # [C,h,w]
        numbers = {shape: number for number, shape in enumerate(self.buckets)}
        of_group = np.array([numbers.get(shape, -1) for shape in shapes], np.int64)
        self._groups_of_bucket = [np.flatnonzero(of_group == bucket) for bucket in range(len(self.buckets))]
        sizes = np.array(counts, np.int64)
        self._bucket_starts = [np.concatenate([[0], np.cumsum(sizes[own])]) for own in self._groups_of_bucket]
        self._open: dict[int, OpenGroup] = {}
        self._uncond: Conds | None = None
        self._cond: dict[str, Any] | None = None  # name -> dtype and shape of a row, the same in all shards

    def _check(self) -> None:
        method, views, recipe = self.latent_sampling_method, self.manifest.latent.views, self.manifest.recipe
        if method not in SAMPLING_METHODS:
            raise UserError(f"latent_sampling_method={method!r}: expected one of {', '.join(SAMPLING_METHODS)}.")
        if method != "deterministic" and recipe.latents.store == "mean":
            raise UserError(
                f"latent_sampling_method={method!r}: {self.storage.root} holds means only. "
                "Use 'deterministic', or encode with --store mean+std."
            )
        for name in ("flip_p", "caption_dropout", "tag_drop_out"):
            value = getattr(self, name)
            if not isinstance(value, int | float | np.floating) or not 0 <= value <= 1:
                raise UserError(f"{name}={value!r}: a probability, expected 0 to 1.")
        if self.flip_p and not any(map(is_flipped, views)):
            raise UserError(f"flip_p={self.flip_p}: {self.storage.root} holds no mirrored views. Encode with --flip.")
        is_floor = isinstance(self.use_weight, float) and 0 <= self.use_weight <= 1
        if not (isinstance(self.use_weight, bool) or self.use_weight == "raw" or is_floor):
            raise UserError(f"use_weight={self.use_weight!r}: expected True, False, 'raw' or a floor such as 0.1.")
        check_int("repeats", self.repeats, 1)
        check_int("keep_tags", self.keep_tags, 0)
        self._check_prompts()
        if self.manifest.num_images == 0:
            raise UserError(f"{self.storage.root}: the cache is empty, there is nothing to train on.")

    def _check_prompts(self) -> None:
        has_cond = self.manifest.uncond is not None
        if self.makes_prompts and self.include_cond and self.cond_model is None and has_cond:
            raise UserError(
                "template, shuffle_tags, tag_drop_out and wildcards make prompts anew, which the stored cond does not "
                "fit. Give cond_model=, a callable from prompts to cond, or include_cond=False."
            )
        if self.cond_model is not None and not self.makes_prompts:
            raise UserError(
                "cond_model: the cond is stored already. It is for prompts that are made anew: template, shuffle_tags, "
                "tag_drop_out, wildcards."
            )
        if self.template and any("[name]" in line for line in self.template) and not self.placeholder_token:
            raise UserError("template: uses [name]. Say what it stands for: placeholder_token='sks dog'.")
        if self.placeholder_token and self.template is None:
            raise UserError("placeholder_token: without a template there is no [name]. Give template= as well.")
        if self.keep_tags and not (self.shuffle_tags or self.tag_drop_out):
            raise UserError(f"keep_tags={self.keep_tags}: nothing is shuffled or dropped. Give shuffle_tags=True.")

    @property
    def num_images(self) -> int:
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.num_images * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """The epoch that flips and random draws depend on; LatentLoader sets it."""
        self._epoch.fill_(check_int("epoch", epoch, 0) % 2**63)

    def count_of_bucket(self, bucket: int) -> int:
        """Images of a bucket, by its place in `buckets`."""
        return int(self._bucket_starts[bucket][-1])

    def samples_of_bucket(self, bucket: int, numbers: np.ndarray) -> np.ndarray:
        """Indices [B] of samples given by their numbers in a bucket: image after image, repeat after repeat."""
        starts = self._bucket_starts[bucket]
        repeat, image = np.divmod(numbers.astype(np.int64), starts[-1])
        place = np.searchsorted(starts, image, side="right") - 1
        group = self._groups_of_bucket[bucket][place]
        found: np.ndarray = self._starts[group] + image - starts[place] + repeat * self.num_images
        return found

    def key(self, index: int) -> str:
        """Path of an image relative to the folder that was encoded."""
        (run,) = self._locate(np.array([index]))
        return run.group.key[int(run.images[0])]

    def caption(self, index: int) -> list[str]:
        """The captions of an image."""
        (run,) = self._locate(np.array([index]))
        return run.group.caption[int(run.images[0])]

    def uncond(self) -> dict[str, Tensor] | None:
        """Cond of the empty prompt, name -> [1,T,D] float32, for classifier-free guidance; None with --no-cond."""
        if self.manifest.uncond is None:
            return None
        return {name: value[0][None].float() for name, value in self._empty_cond().items()}

    def _locate(self, indices: np.ndarray) -> list[Run]:
        """The images of a batch, cut into runs that stand in one group."""
        outside = indices[(indices < -len(self)) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"index {outside[0]} of a dataset of {len(self)}")
        images = indices % len(self) % self.num_images
        groups = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[groups]
        edges = [0, *(np.flatnonzero(groups[1:] != groups[:-1]) + 1).tolist(), len(groups)]
        runs = []
        for first, last in pairwise(edges):
            group = int(groups[first])
            own = rows[first:last]
            if group in self._rows:
                own = self._rows[group][own]
            runs.append(Run(self._group(group), own, slice(first, last)))
        return runs

    def _group(self, number: int) -> OpenGroup:
        """A group, its files memory-mapped on first touch."""
        group = self._open.get(number)
        if group is None:
            shard, own = self._groups[number]
            entry = self.manifest.shards[shard]
            latents = entry.open_latents(self.storage)
            group = OpenGroup(latents, entry.open_text(self.storage), own)
            self._check_group(group, entry.latents_name)
            if len(self._open) >= MAX_OPEN:
                del self._open[next(iter(self._open))]  # the one that was opened first
            self._open[number] = group
        return group

    def _check_group(self, group: OpenGroup, name: str) -> None:
        """Raise UserError where a shard is not what the manifest, and the shards read before, promise of it."""
        recipe = self.manifest.recipe.latents
        promised = (len(self.manifest.latent.views), recipe.store_dtype, recipe.store != "mean")
        found = (group.num_views, str(group.mean.dtype).removeprefix("torch."), group.std is not None)
        cond = {key: (value.dtype, row_shape(value)) for key, value in group.cond.items()}
        if not self.include_cond:
            cond = self._cond = {}  # what there is of it does not matter
        has_cond = self.manifest.uncond is not None
        if self._cond is None and bool(cond) == has_cond:
            self._cond = cond
        if self.include_cond and found == promised and has_cond and not cond:
            raise UserError(
                f"{self.storage.locate(name)}: its images have no cond yet, as encode --only latents leaves them. "
                "Run the same latentprep encode with --only text."
            )
        if found != promised or cond != self._cond:
            raise UserError(
                f"{self.storage.locate(name)}: this shard and its text do not fit the others, or cache.json "
                "(views, dtype, std or cond). Run latentprep verify."
            )

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
        runs = self._locate(chosen)
        shapes = {run.group.shape for run in runs}
        if len(shapes) > 1:
            raise UserError(
                f"a batch of {len(indices)} indices mixes latents of {len(shapes)} shapes. "
                "Read with LatentLoader, or give DataLoader a BucketBatchSampler."
            )
        counters = chosen % len(self)
        view = self._choose_views(epoch, counters)
        rows = [run.images * run.group.num_views + view[run.span] for run in runs]
        geometry = torch.from_numpy(np.concatenate([r.group.geometry[own] for r, own in zip(runs, rows, strict=True)]))
        is_drawn = self.latent_sampling_method != "deterministic"
        cond_text, stored_cond, cond_lengths = self._take_text(runs, epoch, counters)
        return LatentBatch(
            index=torch.from_numpy(chosen),
            latent_mean=gather([(run.group.mean, own) for run, own in zip(runs, rows, strict=True)]),
            latent_std=gather(
                [(r.group.std, own) for r, own in zip(runs, rows, strict=True) if r.group.std is not None]
            )
            if is_drawn
            else None,
            noise_seed=self._noise_seeds(runs, epoch, counters) if is_drawn else None,
            normalization=self.normalization,
            stored_cond=stored_cond,
            cond_lengths=cond_lengths,
            cond_text=cond_text,
            cond_model=self.cond_model if self.include_cond else None,
            weight=self._gather_weight(runs, rows) if self.use_weight is not False else None,
            original_size=geometry[:, :2],
            resized_size=geometry[:, 2:4],
            crop=geometry[:, 4:],
            flipped=self._flipped[torch.from_numpy(view)],
        )

    def _choose(self, what: int, count: int, epoch: int, counters: np.ndarray) -> np.ndarray:
        """[B] int64 below count: a crop or a prompt for each sample; repetitions of an image take them in turn."""
        repeat, image = np.divmod(counters, self.num_images)
        start = (mix(self.seed, what, epoch, image) % np.uint64(count)).astype(np.int64)
        found: np.ndarray = (start + repeat) % count
        return found

    def _choose_views(self, epoch: int, counters: np.ndarray) -> np.ndarray:
        """[B] int64: of each sample one of its crops, as it is or mirrored. Views stand crop after crop."""
        crops = len(self._flipped) // self._mirrors
        view = np.zeros(len(counters), np.int64)
        if crops > 1:
            view = self._choose(CROP, crops, epoch, counters) * self._mirrors
        if self.flip_p:
            view += fractions(mix(self.seed, FLIP, epoch, counters)) < self.flip_p
        return view

    def _noise_seeds(self, runs: list[Run], epoch: int, counters: np.ndarray) -> Tensor:
        """[B] int64. "once" counts by the image's content, so that a cache may grow without changing its draws."""
        if self.latent_sampling_method == "once":
            counters, epoch = np.concatenate([run.group.digest[run.images] for run in runs]), 0
        return torch.from_numpy((mix(self.seed, NOISE, epoch, counters) >> np.uint64(1)).astype(np.int64))

    def _take_text(
        self, runs: list[Run], epoch: int, counters: np.ndarray
    ) -> tuple[list[str], dict[str, Tensor] | None, dict[str, Tensor]]:
        """B prompts, their cond as far as it is stored, and the lengths of what has lengths of its own."""
        is_dropped = np.zeros(len(counters), bool)
        if self.caption_dropout:
            is_dropped = fractions(mix(self.seed, DROP, epoch, counters)) < self.caption_dropout
        if self.makes_prompts:
            prompts, cond = self._make_prompts(runs, epoch, counters), None
        else:
            prompts, cond = self._stored_prompts(runs, epoch, counters)
        if is_dropped.any():
            prompts = ["" if drop else prompt for prompt, drop in zip(prompts, is_dropped.tolist(), strict=True)]
            for name, rows in (cond or {}).items():
                empty = self._empty_cond()[name][0]
                if isinstance(rows, Tensor):
                    rows[torch.from_numpy(is_dropped)] = empty.to(rows.dtype)
                else:
                    rows[:] = [empty.to(row.dtype) if drop else row for row, drop in zip(rows, is_dropped, strict=True)]
        if cond is None:
            return prompts, None, {}
        padded = {name: pad(rows, self._fill) for name, rows in cond.items() if not isinstance(rows, Tensor)}
        stacked = {name: rows if isinstance(rows, Tensor) else padded[name][0] for name, rows in cond.items()}
        return prompts, stacked, {name: lengths for name, (_, lengths) in padded.items()}

    def _stored_prompts(
        self, runs: list[Run], epoch: int, counters: np.ndarray
    ) -> tuple[list[str], dict[str, Tensor | list[Tensor]] | None]:
        """Of each sample one of its stored prompts, and its cond: [B,T,D], or B rows of lengths of their own."""
        chosen: list[np.ndarray] = []
        for run in runs:
            count = run.group.prompt_of.shape[1]
            variant: np.ndarray | int = 0
            if count > 1:
                variant = self._choose(PROMPT, count, epoch, counters[run.span])
            chosen.append(run.group.prompt_of[run.images, variant])
        prompts = [run.group.prompt[n] for run, own in zip(runs, chosen, strict=True) for n in own.tolist()]
        if not self.include_cond or not runs[0].group.cond:
            return prompts, None
        cond: dict[str, Tensor | list[Tensor]] = {}
        for name in runs[0].group.cond:
            parts = [(run.group.cond[name], own) for run, own in zip(runs, chosen, strict=True)]
            dense = [(value, own) for value, own in parts if isinstance(value, Tensor)]
            cond[name] = gather(dense) if dense else [value[row] for value, own in parts for row in own.tolist()]
        return prompts, cond

    def _make_prompts(self, runs: list[Run], epoch: int, counters: np.ndarray) -> list[str]:
        """A prompt for each sample, of a caption of its: tags dropped and shuffled, a line of the template filled."""
        seeds = mix(self.seed, CAPTION, epoch, counters).tolist()
        places = [(run.group, n) for run in runs for n in run.images.tolist()]
        prompts = []
        for (group, n), seed in zip(places, seeds, strict=True):
            captions = group.caption[n]
            random = np.random.default_rng(seed)
            caption = captions[int(random.integers(len(captions)))] if captions else ""
            caption = expand_wildcards(caption, random) if self.wildcards else caption
            caption = vary_tags(caption, random, self.shuffle_tags, self.tag_drop_out, self.keep_tags)
            of_line = random if self.wildcards else None
            prompts.append(
                make_prompt(self.template, caption, self.placeholder_token, seed, group.key[n], wildcards=of_line)
            )
        return prompts

    def _empty_cond(self) -> Conds:
        """Cond of the empty prompt, as stored; read once."""
        if self._uncond is None:
            self._uncond = open_uncond(self.storage, self.manifest.uncond.id)[1]
        return self._uncond

    def _gather_weight(self, runs: list[Run], rows: list[np.ndarray]) -> Tensor:
        ones = torch.ones(runs[0].group.shape[1:])
        maps = [
            ones if run.group.weight is None else run.group.weight[row].float()
            for run, own in zip(runs, rows, strict=True)
            for row in own.tolist()
        ]
        weight = torch.stack(maps)[:, None]
        if self.use_weight is True:
            return rescale_weight(weight)
        return weight if self.use_weight == "raw" else weight.clamp(min=float(self.use_weight))

    @staticmethod
    def collate(batch: "LatentBatch | list[LatentBatch]") -> LatentBatch:
        """For DataLoader's collate_fn: __getitems__ has made the batch already."""
        if isinstance(batch, LatentBatch):
            return batch
        if len(batch) == 1:
            return batch[0]
        raise UserError("collate: DataLoader did not fetch a whole batch at once. Use LatentLoader.")

    def __getstate__(self) -> dict[str, Any]:
        # memory maps are opened anew in each process, and a text encoder stays where it is
        return {**self.__dict__, "_open": {}, "_uncond": None, "cond_model": None}
