"""PersonalizedBase: the entries of stable-diffusion-webui's dataset, read from a latent cache."""

import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from secrets import randbits
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, get_worker_info

from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.human import shortened
from latentprep.options import EncodeOptions, ImageOptions, TextOptions
from latentprep.personalized.entries import DatasetEntry, LatentDist, OnTouch
from latentprep.personalized.models import DTYPES, make_live_vae
from latentprep.personalized.update import Interrupted, check_without_models, keywords_for_options, update_cache
from latentprep.prompts import load_template, vary_tags
from latentprep.read.arguments import (
    SamplingMethod,
    check_flags,
    check_int,
    check_kind,
    check_location,
    check_sampling_method,
    check_share,
)
from latentprep.read.counters import hash_numbers
from latentprep.read.dataset import LatentDataset
from latentprep.read.order import EpochIndices


class PersonalizedBase(Dataset[DatasetEntry]):
    """The ancestor's dataset: an entry for each image of a folder, `repeats` times in an epoch.

    data_root: folder of images; width, height: every image is stretched to this size, with bicubic filtering; with
    varsize each keeps its own, cut to the VAE's factor.

    repeats: "number of times to repeat the dataset per epoch", each time with draws, tags and a flip of its own.
    flip_p: "probability of random horizontal flip", 0..1. The ancestor took both and forgot them: in effect it trained
    with repeats=1, flip_p=0. Pass these to have its numbers.

    model: a diffusers AutoencoderKL, a pipeline that has one, or the ancestor's kind of object (encode_first_stage and
    get_first_stage_encoding), in half precision under autocast as there. cond_model: a pipeline of Stable Diffusion 1
    or 2, or a callable from a list of prompts to [B,T,D], which is called with one prompt at a time. At every start
    their weights are hashed, if they show any, and each is run on one small image or prompt, so that a different model
    or CLIP skip is noticed: another VAE is refused, another text encoder makes its cond anew. Two changes are missed: a
    small one (under 0.5% to 3%, by dtype) of a function that shows no weights, and one that only other prompts show,
    such as a new embedding. Then change `version`, any text, to have everything encoded again. Without both models a
    cache is read as it is.

    cache: where the cache goes, by default beside the folder, in a name that holds the size. store_dtype: float16,
    bfloat16 or float32, of the stored latents. overwrite, allow_gone: as in `latentprep encode`. interrupted: called
    between images and prompts while they are encoded; once it gives True the encoding ends with a UserError, and the
    next start goes on from there. seed: what order and draws start from; without it they differ from start to start.
    The line of the template that an image takes depends on the seed only (0 without one), unless tags are shuffled or
    dropped: then it is drawn each time. Of several processes, one is to start first, and make the cache. Raises
    UserError.

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
        latent_sampling_method: SamplingMethod = "once",
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
        if cache is not None:
            check_location(cache)
        width, height = check_int("width", width, 1), check_int("height", height, 1)
        batch_size, gradient_step = check_int("batch_size", batch_size, 1), check_int("gradient_step", gradient_step, 1)
        repeats = check_int("repeats", repeats, 1)
        flip_p, tag_drop_out = check_share("flip_p", flip_p), check_share("tag_drop_out", tag_drop_out)
        check_flags(
            include_cond=include_cond, shuffle_tags=shuffle_tags, varsize=varsize, use_weight=use_weight,
            overwrite=overwrite, allow_gone=allow_gone,
        )  # fmt: skip
        for name, text in (("placeholder_token", placeholder_token), ("version", version)):
            check_kind(name, text, (str,), "a text")
        check_sampling_method(latent_sampling_method)
        if interrupted is not None and not callable(interrupted):
            raise UserError(f"interrupted={interrupted!r}: expected a function that gives True or False.")
        if cond_model is not None and not (callable(cond_model) or hasattr(cond_model, "encode_prompt")):
            raise UserError(f"cond_model: a {type(cond_model).__name__}, expected a pipeline or a callable.")
        root = str(data_root).rstrip("/") or "/"
        makes_prompts = bool(shuffle_tags or tag_drop_out)
        include_cond = include_cond and not makes_prompts  # the ancestor's rule: the training loop makes it then
        self.data_root = root
        size = "varsize" if varsize else f"{width}x{height}"
        self.cache = str(cache) if cache is not None else default_cache(root, size)
        self.is_seeded = seed is not None
        self.seed = check_int("seed", seed) if seed is not None else randbits(63)
        with keywords_for_options():
            lines = load_template(str(template_file)) if template_file is not None else None
            options = EncodeOptions(
                Path(root), self.cache,
                Geometry.from_options(resolution="native") if varsize
                else Geometry.from_options(width=width, height=height, fit="stretch", filter="bicubic"),
                TextOptions(lines, placeholder_token, filename_word_regex, filename_join_string, bool(include_cond)),
                ImageOptions(background="keep", draft=False),  # the ancestor's pixels
                model=type(model).__name__, flip=flip_p > 0, store_dtype=store_dtype,
                seed=self.seed if self.is_seeded else 0, overwrite=bool(overwrite), allow_gone=bool(allow_gone),
            )  # fmt: skip
            if model is not None:
                vae, autocast = make_live_vae(model, device)
                options = replace(options, device=str(vae.device), dtype=DTYPES[vae.dtype])
                update_cache(options, vae, cond_model, autocast, version, interrupted)
            elif cond_model is not None:
                raise UserError("cond_model= without model=: give both, or neither to read a cache as it is.")
            else:
                check_without_models(options)
            self.data = LatentDataset(
                self.cache, latent_sampling_method=latent_sampling_method, repeats=repeats, flip_p=flip_p,
                include_cond=include_cond, use_weight=bool(use_weight), seed=self.seed, shuffle_tags=shuffle_tags,
                tag_drop_out=tag_drop_out, template=template_file if makes_prompts else None,
                placeholder_token=placeholder_token if makes_prompts and template_file is not None else "",
            )  # fmt: skip
        if include_cond and self.data.uncond() is None:
            raise UserError(f"include_cond=True: {self.cache} holds no cond. Give model= and cond_model= to make it.")
        self.placeholder_token, self.shuffle_tags, self.tag_drop_out = placeholder_token, shuffle_tags, tag_drop_out
        self.width, self.height, self.varsize = width, height, varsize
        self.lines = list(lines or ())
        self.length = len(self.data)
        self.batch_size = min(batch_size, self.length)
        self.gradient_step = min(gradient_step, self.length // self.batch_size)
        self.latent_sampling_method = latent_sampling_method
        self._num_reads = 0  # of this process, by loaders that know of no epochs

    def __len__(self) -> int:
        return self.length

    def __repr__(self) -> str:
        return f"PersonalizedBase({shortened(self.data_root, 200)}, {self.data!r})"

    def __getitem__(self, index: int) -> DatasetEntry:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[DatasetEntry]:
        """Entries of images; drawn afresh at every call, except for PersonalizedDataLoader's epochs."""
        if isinstance(indices, EpochIndices):
            return self._read(indices, indices.epoch)
        if len(self.data.buckets) == 1:
            return self._read(indices, self._next_draw())
        return [entry for index in indices for entry in self._read([index], self._next_draw())]  # of any size

    def _read(self, indices: list[int], epoch: int) -> list[DatasetEntry]:
        """Entries of images of one size; `epoch` decides their draws."""
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
                cond=None if cond is None else cond[n, : None if lengths is None else int(lengths[n])],
                cond_text=batch.cond_text[n],
                weight=weight[n].expand_as(samples[n]) if weight is not None else None,
            )
            for n, index in enumerate(indices)
        ]

    def _next_draw(self) -> int:
        """A number for the draws of one call: another one for each, in each worker and each of its starts."""
        worker = get_worker_info()
        self._num_reads += 1
        return int(hash_numbers(worker.seed if worker is not None else 0, self._num_reads) >> np.uint64(1))

    def _posterior(self, mean: Tensor, std: Tensor | None, n: int) -> LatentDist | None:
        if self.latent_sampling_method != "random" or std is None:
            return None
        return LatentDist(mean.float()[None], std[n].float()[None])

    def _path(self, index: int) -> str:
        return os.path.join(self.data_root, self.data.key(index))

    def create_text(self, filename_text: str) -> str:
        """A prompt of a caption: its tags dropped and shuffled, in a line of the template that is drawn each time."""
        random = np.random.default_rng([self.seed % 2**64, self._next_draw()])
        caption = vary_tags(filename_text, random, self.shuffle_tags, self.tag_drop_out, 0)
        line = self.lines[int(random.integers(len(self.lines)))] if self.lines else "[filewords]"
        return line.replace("[filewords]", caption).replace("[name]", self.placeholder_token)

    @property
    def dataset(self) -> OnTouch[DatasetEntry]:
        """An entry for each image; each is read, and drawn anew, whenever it is touched."""
        return OnTouch(self.data.num_images, self.__getitem__)

    @property
    def image_paths(self) -> OnTouch[str]:
        """The path of each image, in the order of `dataset`."""
        return OnTouch(self.data.num_images, self._path)

    @cached_property
    def groups(self) -> list[list[int]]:
        """For each size of image its indices, repetitions included."""
        counts = self.data.sizes_of_buckets()
        return [self.data.samples_of_bucket(n, np.arange(count)).tolist() for n, count in enumerate(counts)]


def default_cache(root: str, size: str) -> str:
    """Beside the folder, also if that is "." or "..". Raises UserError for the root of a disk."""
    folder = Path(root)
    if folder.name in ("", ".."):
        folder = folder.resolve()
    if not folder.name:
        raise UserError(f"data_root {root}: the cache cannot lie beside it. Say where it goes: cache=.")
    return f"{folder}.{size}.latents"
