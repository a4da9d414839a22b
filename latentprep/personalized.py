"""PersonalizedBase and PersonalizedDataLoader: stable-diffusion-webui's dataset over a latent cache.

Old training code moves over with one changed import. The images are encoded once, into a cache beside them, and from
the second start on only what is new. What is different from the ancestor stands in the README.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from secrets import randbits
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, get_worker_info

from latentprep.config import EncodeOptions, Geometry, ImageOptions, TextOptions
from latentprep.errors import UserError
from latentprep.live import DTYPES, make_live_vae
from latentprep.live_encode import Interrupted, update_cache, words_of_python
from latentprep.prompts import load_template
from latentprep.read.counters import check_int, mix
from latentprep.read.dataset import LatentDataset
from latentprep.read.sampler import BucketBatchSampler


@dataclass
class LatentDist:
    """The posterior of one image, unscaled, as the ancestor's entries held it."""

    mean: Tensor  # [1,C,h,w] float32
    std: Tensor  # the same

    def sample(self) -> Tensor:
        return self.mean + self.std * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        return self.mean


@dataclass
class DatasetEntry:
    """One image, as the ancestor handed it out."""

    filename: str
    filename_text: str  # its caption
    latent_dist: LatentDist | None = None  # with latent_sampling_method "random"
    latent_sample: Tensor | None = None  # [C,h,w] float32, scaled for the UNet
    cond: Tensor | None = None  # [T,D]; T is the prompt's own
    cond_text: str | None = None  # its prompt
    weight: Tensor | None = None  # [C,h,w], minimum 0 and mean 1


class Planned(list[int]):
    """The indices of a batch of PersonalizedDataLoader: its epoch decides the draws. Other lists draw afresh."""

    def __init__(self, indices: list[int], epoch: int) -> None:
        super().__init__(indices)
        self.epoch = epoch


class PersonalizedBase(Dataset[DatasetEntry]):
    """The ancestor's dataset: an entry for each image of a folder, `repeats` times in an epoch.

    data_root: folder of images; width, height: every image is stretched to this size, with bicubic filtering; with
    varsize each keeps its own, cut to the VAE's factor.

    repeats: "number of times to repeat the dataset per epoch", each time with draws, tags and a flip of its own.
    flip_p: "probability of random horizontal flip", 0..1. The ancestor took both and forgot them: in effect it trained
    with repeats=1, flip_p=0, and passing these gives its numbers.

    model: a diffusers AutoencoderKL, a pipeline that has one, or the ancestor's kind of object (encode_first_stage and
    get_first_stage_encoding), in half precision under autocast as there. cond_model: a pipeline, or a callable from a
    list of prompts to [B,T,D], which is called with one prompt at a time. At every start each is probed with one small
    image or prompt, so that another one is noticed, or another CLIP skip. `version`: any text that you change to have
    everything encoded again. Either model may be left out once the cache is there and nothing has changed.

    cache: where the cache goes, by default beside the folder, in a name that holds the size. store_dtype: float16,
    bfloat16 or float32, of the stored latents. overwrite, allow_gone: as in `latentprep encode`. interrupted: called
    between images while they are encoded; once it gives True the encoding ends with a UserError, and the next start
    goes on from there. seed: what order and draws start from; without it they differ from start to start. Each image
    keeps the line of the template that it has: the seed, or 0, chooses it. Raises UserError.

    Attributes: length, which is images times repeats; batch_size and gradient_step, clamped to it;
    latent_sampling_method; dataset, an entry for each image; image_paths; groups, the indices of each size of image.
    """

    def __init__(
        self,
        data_root: str | Path,
        width: int = 512,
        height: int = 512,
        repeats: int = 100,
        flip_p: float = 0.5,
        placeholder_token: str = "*",
        model: Any = None,
        cond_model: Any = None,
        device: torch.device | str | None = None,
        template_file: str | Path | None = None,
        include_cond: bool = False,
        batch_size: int = 1,
        gradient_step: int = 1,
        shuffle_tags: bool = False,
        tag_drop_out: float = 0,
        latent_sampling_method: str = "once",
        varsize: bool = False,
        use_weight: bool = False,
        *,
        cache: str | Path | None = None,
        filename_word_regex: str = "",
        filename_join_string: str = " ",
        store_dtype: str = "float16",
        version: str = "",
        overwrite: bool = False,
        allow_gone: bool = False,
        interrupted: Interrupted | None = None,
        seed: int | None = None,
    ) -> None:
        if not str(data_root or ""):
            raise UserError("data_root: is empty, expected a folder of images.")
        root = str(data_root).rstrip("/") or "/"
        makes_prompts = bool(shuffle_tags or tag_drop_out)
        include_cond = include_cond and not makes_prompts  # the ancestor's rule: the training loop makes it then
        self.data_root = root
        self.cache = (
            str(cache) if cache is not None else f"{root}.{'varsize' if varsize else f'{width}x{height}'}.latents"
        )
        self.is_seeded = seed is not None
        self.seed = check_int("seed", seed) if seed is not None else randbits(63)
        with words_of_python():
            lines = load_template(str(template_file)) if template_file is not None else None
            if model is not None:
                vae, autocast = make_live_vae(model, device)
                options = EncodeOptions(
                    Path(root), self.cache,
                    Geometry.from_options(resolution="native") if varsize
                    else Geometry.from_options(width=width, height=height, fit="stretch", filter="bicubic"),
                    TextOptions(lines, placeholder_token, filename_word_regex, filename_join_string, include_cond),
                    ImageOptions(background="keep", draft=False),  # the ancestor's pixels, to the last bit
                    model=type(model).__name__, flip=flip_p > 0, device=str(vae.device), dtype=DTYPES[vae.dtype],
                    store_dtype=store_dtype, seed=seed or 0, overwrite=overwrite, allow_gone=allow_gone,
                )  # fmt: skip
                update_cache(options, vae, cond_model, autocast, version, interrupted)
            self.data = LatentDataset(
                self.cache, latent_sampling_method=latent_sampling_method, repeats=repeats, flip_p=flip_p,
                include_cond=include_cond, use_weight=use_weight, seed=self.seed, shuffle_tags=shuffle_tags,
                tag_drop_out=float(tag_drop_out), template=template_file if makes_prompts else None,
                placeholder_token=placeholder_token if makes_prompts and template_file is not None else "",
            )  # fmt: skip
        if include_cond and self.data.uncond() is None:
            raise UserError(f"include_cond=True: {self.cache} holds no cond. Give model= and cond_model= to make it.")
        self.placeholder_token, self.shuffle_tags, self.tag_drop_out = placeholder_token, shuffle_tags, tag_drop_out
        self.width, self.height, self.varsize = width, height, varsize
        self.lines = list(lines or ())
        self.length = len(self.data)
        self.batch_size = min(check_int("batch_size", batch_size, 1), self.length)
        self.gradient_step = min(check_int("gradient_step", gradient_step, 1), self.length // self.batch_size)
        self.latent_sampling_method = latent_sampling_method
        self._num_reads = 0  # of this process, by loaders that know of no epochs

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> DatasetEntry:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[DatasetEntry]:
        """Entries of images of one size; drawn afresh at every call, except for PersonalizedDataLoader's epochs."""
        epoch = indices.epoch if isinstance(indices, Planned) else self._next_draw()
        batch = self.data.read(indices, epoch)
        samples, weight = batch.latent_sample, batch.weight
        cond = batch.cond["prompt_embeds"] if batch.cond is not None else None
        lengths = batch.cond_lengths.get("prompt_embeds")
        return [
            DatasetEntry(
                filename=self._path(index),
                filename_text=self.data.caption(index)[0],
                latent_dist=self._posterior(batch.latent_mean[n], batch.latent_std, n),
                latent_sample=samples[n],
                cond=None if cond is None else cond[n] if lengths is None else cond[n, : int(lengths[n])],
                cond_text=batch.cond_text[n],
                weight=weight[n].expand_as(samples[n]) if weight is not None else None,
            )
            for n, index in enumerate(indices)
        ]

    def _next_draw(self) -> int:
        """A number for the draws of one call: another one for each, in each worker and each of its starts."""
        worker = get_worker_info()
        self._num_reads += 1
        return int(mix(worker.seed if worker is not None else 0, self._num_reads) >> np.uint64(1))

    def _posterior(self, mean: Tensor, std: Tensor | None, n: int) -> LatentDist | None:
        if self.latent_sampling_method != "random" or std is None:
            return None
        return LatentDist(mean.float()[None], std[n].float()[None])

    def _path(self, index: int) -> str:
        return os.path.join(self.data_root, self.data.key(index))

    @property
    def dataset(self) -> list[DatasetEntry]:
        """An entry for each image; read anew at every access."""
        return [self[index] for index in range(self.data.num_images)]

    @property
    def image_paths(self) -> list[str]:
        """The path of each image, in the order of `dataset`."""
        return [self._path(index) for index in range(self.data.num_images)]

    @cached_property
    def groups(self) -> list[list[int]]:
        """For each size of image its indices, repetitions included."""
        counts = [self.data.count_of_bucket(bucket) * self.data.repeats for bucket in range(len(self.data.buckets))]
        return [self.data.samples_of_bucket(n, np.arange(count)).tolist() for n, count in enumerate(counts)]


class BatchLoader:
    """A batch, as the ancestor stacked it."""

    def __init__(self, data: list[DatasetEntry]) -> None:
        self.cond_text = [entry.cond_text for entry in data]
        self.cond = [entry.cond for entry in data]
        self.latent_sample = torch.stack([entry.latent_sample for entry in data if entry.latent_sample is not None])
        weights = [entry.weight for entry in data if entry.weight is not None]
        self.weight = torch.stack(weights) if len(weights) == len(data) else None  # [B,C,h,w]

    def pin_memory(self) -> "BatchLoader":
        self.latent_sample = self.latent_sample.pin_memory()
        if self.weight is not None:
            self.weight = self.weight.pin_memory()
        return self


class PersonalizedDataLoader(DataLoader[BatchLoader]):
    """Batches of images of one size; every sample once an epoch, in an order of its own. A `for` is an epoch.

    latent_sampling_method is kept for old calls: the dataset's is what counts. state_dict and load_state_dict go on in
    mid-epoch with the batches that remained, also in another process.
    """

    def __init__(
        self,
        dataset: PersonalizedBase,
        latent_sampling_method: str = "once",
        batch_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.epoch = 0  # of the next `for`
        self._running, self._used = 0, 0  # the epoch of the last `for`, and how many of its batches it was given
        self._resume_at = 0  # the batch that the next `for` starts with
        self.batches = PlannedBatches(dataset.data, batch_size, seed=dataset.seed)
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=self.batches,
            collate_fn=BatchLoader,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[BatchLoader]:  # type: ignore[override]
        self._running, self._used = self.epoch, self._resume_at
        self.epoch, self._resume_at = self.epoch + 1, 0
        self.batches.epoch, self.batches.start = self._running, self._used
        for batch in super().__iter__():
            self._used += 1
            yield batch

    def state_dict(self) -> dict[str, Any]:
        """Where the loop stands, to be saved with a checkpoint."""
        return {**self.batches.state_dict(self._used), "epoch": self._running}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where state_dict was taken. Takes over its seed, unless the dataset was given one. Raises UserError."""
        dataset: PersonalizedBase = self.dataset  # type: ignore[assignment]
        if not dataset.is_seeded:
            dataset.seed = dataset.data.seed = self.batches.seed = check_int("load_state_dict: seed", state.get("seed"))
        self.batches.load_state_dict(state)
        is_over = state["next_batch"] == len(self.batches)
        self.epoch, self._resume_at = state["epoch"] + is_over, 0 if is_over else state["next_batch"]
        self._running, self._used = self.epoch, self._resume_at


class PlannedBatches(BucketBatchSampler):
    """A BucketBatchSampler whose batches carry their epoch, and leave the dataset's alone."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = check_int("epoch", epoch, 0)

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch
        for indices in super().__iter__():
            yield Planned(indices, epoch)
