"""LatentDataset: a latent cache as a map-style PyTorch dataset, and LatentBatch: what it hands to a training loop."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from latentprep.cache.manifest import open_manifest
from latentprep.cache.shard import UNCOND_NAME, Latents, Text, open_latents, open_text, open_uncond
from latentprep.cache.storage import Storage
from latentprep.errors import UserError

SAMPLING_METHODS = ("once", "deterministic", "random")


@dataclass(eq=False)
class LatentBatch:
    """B samples of one bucket. Numbers stay as stored until they are asked for, so that little crosses to the GPU."""

    index: Tensor  # [B] int64: indices into the dataset
    latent_mean: Tensor  # [B,C,h,w] in the store dtype; unscaled
    latent_std: Tensor | None  # the same; None: the mean is the sample
    noise_seed: Tensor | None  # [B] int64, on the CPU: what each sample's draw starts from
    scaling_factor: float
    shift_factor: float
    stored_cond: dict[str, Tensor] | None  # name -> [B,T,D] in the store dtype
    cond_text: list[str]  # B prompts
    weight: Tensor | None  # [B,1,h,w] float32: loss weight of every latent pixel; None without use_weight
    original_size: Tensor  # [B,2] int32: height, width before the resize
    resized_size: Tensor  # [B,2] int32
    crop: Tensor  # [B,4] int32: top, left, height, width in the resized image
    flipped: Tensor  # [B] bool
    _drawn: Tensor | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def latent_sample(self) -> Tensor:
        """[B,C,h,w] float32, scaled for the UNet: (mean + std * noise - shift_factor) * scaling_factor.

        Drawn on the batch's device, the first time it is asked for; the same batch gives the same sample there. (From
        one seed a GPU draws other numbers than a CPU.)
        """
        if self._drawn is None:
            sample = self.latent_mean.float()
            if self.latent_std is not None and self.noise_seed is not None:
                sample = sample + self.latent_std.float() * draw_noise(self.noise_seed, sample)
            self._drawn = (sample - self.shift_factor) * self.scaling_factor
        return self._drawn

    @property
    def cond(self) -> dict[str, Tensor] | None:
        """Text embeddings in float32: {"prompt_embeds": [B,T,D], ...}; None where the dataset leaves them out."""
        return None if self.stored_cond is None else {name: value.float() for name, value in self.stored_cond.items()}

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "LatentBatch":
        """The batch on another device. Seeds stay behind: they are for the CPU's eyes."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "LatentBatch":
        """The batch in page-locked memory; a DataLoader with pin_memory=True calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, move: Any) -> "LatentBatch":
        names = (
            "index",
            "latent_mean",
            "latent_std",
            "weight",
            "original_size",
            "resized_size",
            "crop",
            "flipped",
            "_drawn",
        )
        moved = {name: move(value) for name in names if (value := getattr(self, name)) is not None}
        if self.stored_cond is not None:
            moved["stored_cond"] = {name: move(value) for name, value in self.stored_cond.items()}
        return replace(self, **moved)


def draw_noise(seeds: Tensor, like: Tensor) -> Tensor:
    """Standard normal noise of like's shape; every row from a seed of its own, so that batches may be cut anyhow."""
    generator = torch.Generator(like.device)
    noise = torch.empty_like(like)
    for row, seed in zip(noise, seeds.tolist(), strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return noise


def mix(seed: int, *parts: np.ndarray | int) -> np.ndarray:
    """uint64 numbers that depend on every part and on nothing else (splitmix64, chained): counters, not state."""
    state = np.asarray(seed % 2**64, np.uint64)
    with np.errstate(over="ignore"):
        for part in parts:
            state = (state ^ np.asarray(part, np.uint64)) + np.uint64(0x9E3779B97F4A7C15)
            state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            state = state ^ (state >> np.uint64(31))
    return state


FLIP, NOISE, PROMPT = 1, 2, 3  # what a counter is for, so that no two choices share one


class OpenGroup:
    """One group of a shard, memory-mapped: N images in V views. Of image n, view v stands in row n * V + v."""

    def __init__(self, latents: Latents, text: Text, number: int) -> None:
        group, words = latents.groups[number], text.groups[number]

        def rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.flatten(0, 1)

        self.num_views, self.shape = group.latent_mean.shape[1], tuple(group.latent_mean.shape[2:])
        self.mean, self.std, self.weight = group.latent_mean.flatten(0, 1), rows(group.latent_std), rows(group.weight)
        # numpy, since a row of it costs a tenth of a tensor's
        self.original_size = group.original_size.numpy()
        self.resized_size = group.resized_size.flatten(0, 1).numpy()
        self.crop = group.crop.flatten(0, 1).numpy()
        self.digest = group.digest.numpy().view(np.uint64)[:, 0]
        self.key, self.caption, self.prompt_of = words.key, words.caption, words.prompt_of
        self.prompt, self.cond = text.prompt, text.cond


class LatentDataset(Dataset[LatentBatch]):
    """A latent cache. An index stands for one image (with repeats, for one of its repetitions).

    cache: folder or URL.
    latent_sampling_method: "once": one draw for each image, the same in every epoch and process; "deterministic": the
        mean; "random": a fresh draw every epoch, which the seed decides.
    repeats: how often each image stands in an epoch.
    flip_p: how often the mirrored view is taken, 0..1; the cache needs `encode --flip`.
    use_weight: True rescales each weight map to a minimum of 0 and a mean of 1, so that losses stay comparable, as the
        ancestor did (a constant map becomes ones); "raw" gives alpha as stored, 0..1. Images without alpha get ones.

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
        use_weight: bool | str = False,
        seed: int = 0,
    ) -> None:
        self.storage = Storage(cache)
        self.manifest = open_manifest(self.storage)
        self.latent_sampling_method, self.repeats, self.flip_p = latent_sampling_method, repeats, flip_p
        self.include_cond, self.use_weight, self.seed = include_cond, use_weight, seed
        self.scaling_factor: float = self.manifest.latent["scaling_factor"]
        self.shift_factor: float = self.manifest.latent["shift_factor"]
        self._check()
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()  # seen by workers that are kept between epochs
        # the groups of all shards in a row: group g holds the images _starts[g] to _starts[g + 1]
        self._groups = [(s, n) for s, shard in enumerate(self.manifest.shards) for n in range(len(shard.groups))]
        shapes = [shape for shard in self.manifest.shards for _, _, shape in shard.groups]
        counts = [rows for shard in self.manifest.shards for _, rows, _ in shard.groups]
        self._rows: dict[int, np.ndarray] = {}  # of groups with tombstones: the rows that count
        for group, (shard, number) in enumerate(self._groups):
            if self.manifest.shards[shard].tombstones:
                self._rows[group] = self.manifest.shards[shard].live_rows()[number]
                counts[group] = len(self._rows[group])
        self._starts = np.cumsum([0, *counts], dtype=np.int64)
        self.buckets: list[tuple[int, ...]] = sorted({s for s, n in zip(shapes, counts, strict=True) if n})  # [C,h,w]
        numbers = {shape: number for number, shape in enumerate(self.buckets)}
        self._bucket_of_group = np.array([numbers.get(shape, -1) for shape in shapes], np.int64)
        self._open: dict[int, OpenGroup] = {}
        self._cond: dict[str, Any] | None = None  # name -> dtype and shape of a row, the same in all shards

    def _check(self) -> None:
        method, views, recipe = self.latent_sampling_method, self.manifest.latent["views"], self.manifest.recipe
        if method not in SAMPLING_METHODS:
            raise UserError(f"latent_sampling_method={method!r}: expected one of {', '.join(SAMPLING_METHODS)}.")
        if method != "deterministic" and recipe["latents"]["store"] == "mean":
            raise UserError(
                f"latent_sampling_method={method!r}: {self.storage.root} holds means only. "
                "Use 'deterministic', or encode with --store mean+std."
            )
        if not 0 <= self.flip_p <= 1:
            raise UserError(f"flip_p={self.flip_p}: a probability, expected 0 to 1.")
        if self.flip_p and "flipped" not in views:
            raise UserError(f"flip_p={self.flip_p}: {self.storage.root} holds no mirrored views. Encode with --flip.")
        if self.use_weight not in (True, False, "raw"):
            raise UserError(f"use_weight={self.use_weight!r}: expected True, False or 'raw'.")
        if self.repeats < 1:
            raise UserError(f"repeats={self.repeats}: expected at least 1.")
        if self.manifest.num_images == 0:
            raise UserError(f"{self.storage.root}: the cache is empty, there is nothing to train on.")

    @property
    def num_images(self) -> int:
        return int(self._starts[-1])

    def __len__(self) -> int:
        return self.num_images * self.repeats

    def set_epoch(self, epoch: int) -> None:
        """The epoch that flips and random draws depend on; LatentLoader sets it."""
        self._epoch.fill_(epoch)

    def rows_of_bucket(self, bucket: int) -> np.ndarray:
        """Images, [N] int64, of a bucket by its place in `buckets`."""
        own = np.flatnonzero(self._bucket_of_group == bucket)
        return np.concatenate([np.arange(self._starts[g], self._starts[g + 1]) for g in own])

    def key(self, index: int) -> str:
        """Path of an image relative to the folder that was encoded."""
        ((group, row),) = self._locate(np.array([index]))
        return group.key[row]

    def caption(self, index: int) -> list[str]:
        """The captions of an image."""
        ((group, row),) = self._locate(np.array([index]))
        return group.caption[row]

    def uncond(self) -> dict[str, Tensor] | None:
        """Cond of the empty prompt, name -> [1,T,D] float32, for classifier-free guidance; None with --no-cond."""
        if not self.storage.exists(UNCOND_NAME):
            return None
        return {name: value.float() for name, value in open_uncond(self.storage)[1].items()}

    def _locate(self, indices: np.ndarray) -> list[tuple[OpenGroup, int]]:
        """The group and the image in it, of each index."""
        outside = indices[(indices < -len(self)) | (indices >= len(self))]
        if len(outside):
            raise IndexError(f"index {outside[0]} of a dataset of {len(self)}")
        images = indices % len(self) % self.num_images
        groups = np.searchsorted(self._starts, images, side="right") - 1
        rows = images - self._starts[groups]
        for group in self._rows.keys() & set(groups.tolist()):
            own = groups == group
            rows[own] = self._rows[group][rows[own]]
        return [(self._group(group), row) for group, row in zip(groups.tolist(), rows.tolist(), strict=True)]

    def _group(self, number: int) -> OpenGroup:
        """A group, its files memory-mapped on first touch."""
        group = self._open.get(number)
        if group is None:
            shard, own = self._groups[number]
            entry = self.manifest.shards[shard]
            latents = open_latents(self.storage, entry.unit, entry.groups)
            group = OpenGroup(latents, open_text(self.storage, entry.unit, entry.text, entry.groups), own)
            self._check_group(group, latents.name)
            self._open[number] = group
        return group

    def _check_group(self, group: OpenGroup, name: str) -> None:
        """Raise UserError where a shard is not what the manifest, and the shards read before, promise of it."""
        recipe = self.manifest.recipe["latents"]
        promised = (len(self.manifest.latent["views"]), recipe["store_dtype"], recipe["store"] != "mean")
        found = (group.num_views, str(group.mean.dtype).removeprefix("torch."), group.std is not None)
        cond = {key: (value.dtype, value.shape[1:]) for key, value in group.cond.items()}
        if self._cond is None and bool(cond) == (self.manifest.uncond_file is not None):
            self._cond = cond
        if found != promised or cond != self._cond:
            raise UserError(
                f"{self.storage.locate(name)}: this shard and its text do not fit the others, or cache.json "
                "(views, dtype, std or cond). Run latentprep verify."
            )

    def __getitem__(self, index: int) -> LatentBatch:
        return self.__getitems__([index])

    def __getitems__(self, indices: list[int]) -> LatentBatch:
        chosen = np.asarray(indices, np.int64)
        located = self._locate(chosen)
        shapes = {group.shape for group, _ in located}
        if len(shapes) > 1:
            raise UserError(
                f"a batch of {len(indices)} indices mixes latents of {len(shapes)} shapes. "
                "Read with LatentLoader, or give DataLoader a BucketBatchSampler."
            )
        epoch, counters = int(self._epoch), chosen % len(self)
        view = np.zeros(len(chosen), np.int64)
        if self.flip_p:
            draws = mix(self.seed, FLIP, epoch, counters) >> np.uint64(11)
            view = (draws * 2.0**-53 < self.flip_p).astype(np.int64)
        rows = [(group, n * group.num_views + v) for (group, n), v in zip(located, view.tolist(), strict=True)]
        draws = mix(self.seed, PROMPT, epoch, counters).tolist()
        prompts = [
            (group, group.prompt_of[n, draw % group.prompt_of.shape[1]].item())
            for (group, n), draw in zip(located, draws, strict=True)
        ]
        is_drawn = self.latent_sampling_method != "deterministic"
        return LatentBatch(
            index=torch.from_numpy(chosen),
            latent_mean=torch.stack([group.mean[row] for group, row in rows]),
            latent_std=torch.stack([group.std[row] for group, row in rows if group.std is not None])
            if is_drawn
            else None,
            noise_seed=self._noise_seeds(located, epoch, counters) if is_drawn else None,
            scaling_factor=self.scaling_factor,
            shift_factor=self.shift_factor,
            stored_cond=self._gather_cond(prompts),
            cond_text=[group.prompt[number] for group, number in prompts],
            weight=self._gather_weight(rows) if self.use_weight else None,
            original_size=torch.from_numpy(np.array([group.original_size[n] for group, n in located])),
            resized_size=torch.from_numpy(np.array([group.resized_size[row] for group, row in rows])),
            crop=torch.from_numpy(np.array([group.crop[row] for group, row in rows])),
            flipped=torch.from_numpy(view == 1),
        )

    def _noise_seeds(self, located: list[tuple[OpenGroup, int]], epoch: int, counters: np.ndarray) -> Tensor:
        """[B] int64. "once" counts by the image's content, so that a cache may grow without changing its draws."""
        if self.latent_sampling_method == "once":
            counters, epoch = np.array([group.digest[n] for group, n in located]), 0
        return torch.from_numpy((mix(self.seed, NOISE, epoch, counters) >> np.uint64(1)).astype(np.int64))

    def _gather_cond(self, prompts: list[tuple[OpenGroup, int]]) -> dict[str, Tensor] | None:
        names = prompts[0][0].cond
        if not self.include_cond or not names:
            return None
        return {name: torch.stack([group.cond[name][number] for group, number in prompts]) for name in names}

    def _gather_weight(self, rows: list[tuple[OpenGroup, int]]) -> Tensor:
        ones = torch.ones(rows[0][0].shape[1:])
        maps = [ones if group.weight is None else group.weight[row].float() for group, row in rows]
        weight = torch.stack(maps)[:, None]
        return weight if self.use_weight == "raw" else rescale_weight(weight)

    @staticmethod
    def collate(batch: "LatentBatch | list[LatentBatch]") -> LatentBatch:
        """For DataLoader's collate_fn: __getitems__ has made the batch already."""
        if isinstance(batch, LatentBatch):
            return batch
        if len(batch) == 1:
            return batch[0]
        raise UserError("collate: DataLoader did not fetch a whole batch at once. Use LatentLoader.")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # memory maps are opened anew in each process


def rescale_weight(weight: Tensor) -> Tensor:
    """Weight maps [B,1,h,w] with a minimum of 0 and a mean of 1 each; ones where a map is constant.

    stable-diffusion-webui's rule, which divided by zero for constant maps.
    """
    weight = weight - weight.amin(dim=(1, 2, 3), keepdim=True)
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(mean > 0, weight / mean.clamp(min=torch.finfo(weight.dtype).tiny), torch.ones_like(weight))
