"""PersonalizedBase and PersonalizedDataLoader: stable-diffusion-webui's dataset over a latent cache.

Old training code moves over with one changed import. The images are encoded once, into a cache beside them, and from
the second start on no model is run. What the ancestor got wrong is not repeated: the README says what that is.
"""

import hashlib
import os
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from latentprep.cache.lock import hold
from latentprep.cache.manifest import find_manifest
from latentprep.cache.normalization import Normalization, normalization_from_json
from latentprep.cache.storage import Storage
from latentprep.config import EncodeOptions, Geometry, ImageOptions, TextOptions, digest_of
from latentprep.errors import UserError
from latentprep.prepare.encode import encode
from latentprep.prepare.models.families import FAMILIES
from latentprep.prepare.models.model_set import Models
from latentprep.prepare.models.text_folder import TextFacts
from latentprep.prepare.models.vae_folder import VaeFacts, read_numbers
from latentprep.prepare.survey import prepare
from latentprep.prepare.text import TextEncoder
from latentprep.prepare.vae import VaeEncoder
from latentprep.prompts import load_template
from latentprep.read.dataset import LatentDataset
from latentprep.read.sampler import BucketBatchSampler

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}


@dataclass
class DatasetEntry:
    """One image, as the ancestor handed it out."""

    filename: str
    filename_text: str  # its caption
    latent_sample: Tensor  # [C,h,w] float32, scaled for the UNet
    cond: Tensor | None = None  # [T,D]
    cond_text: str | None = None  # its prompt
    weight: Tensor | None = None  # [C,h,w], minimum 0 and mean 1


class PersonalizedBase(Dataset[DatasetEntry]):
    """The ancestor's dataset: an entry for each image of a folder.

    data_root: folder of images; width, height: every image is stretched to this size, with bicubic filtering; with
    varsize each keeps its own, cut to the VAE's factor. `repeats` is for old calls and, as in the ancestor, unused.

    model: a diffusers AutoencoderKL, a pipeline that has one, or the ancestor's kind of object (encode_first_stage and
    get_first_stage_encoding). cond_model: a pipeline, or a callable from a list of prompts to [B,T,D]. Either may be
    left out once the cache is there and nothing has changed.

    cache: where the cache goes, by default beside the folder, in a name that holds the size. flip_p mirrors that part
    of the images; the ancestor took 0.5 and never applied it, so here it is 0 unless asked for. Raises UserError.

    Attributes: batch_size and gradient_step, clamped to the data; latent_sampling_method; length; dataset, the entries.
    """

    def __init__(
        self,
        data_root: str | Path,
        width: int = 512,
        height: int = 512,
        repeats: int = 100,
        flip_p: float = 0.0,
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
        seed: int = 0,
    ) -> None:
        root = str(data_root).rstrip("/")
        size = "varsize" if varsize else f"{width}x{height}"
        self.cache = str(cache) if cache is not None else f"{root}.{size}.latents"
        makes_prompts = bool(shuffle_tags or tag_drop_out)
        lines = load_template(str(template_file)) if template_file is not None else None
        geometry = (
            Geometry.from_options(resolution="native")
            if varsize
            else Geometry.from_options(width=width, height=height, fit="stretch", filter="bicubic")
        )
        include_cond = (
            include_cond and not makes_prompts
        )  # the ancestor's rule: then cond is the training loop's to make
        text = TextOptions(lines, placeholder_token, filename_word_regex, filename_join_string, include_cond)
        vae = make_models_vae(model, device) if model is not None else None
        images = ImageOptions(background="keep", draft=False)  # the ancestor's pixels, to the last bit
        options = EncodeOptions(
            Path(data_root), self.cache, geometry, text, images, model=type(model).__name__, flip=flip_p > 0,
            device=str(vae.device) if vae is not None else "auto",
            dtype=DTYPES[vae.dtype] if vae is not None else "auto", seed=seed,
        )  # fmt: skip
        if vae is not None:
            update_cache(options, vae, cond_model)
        self.data = LatentDataset(
            self.cache, latent_sampling_method=latent_sampling_method, flip_p=flip_p, include_cond=include_cond,
            use_weight=use_weight, seed=seed, shuffle_tags=shuffle_tags, tag_drop_out=float(tag_drop_out),
            template=template_file if makes_prompts else None,
            placeholder_token=placeholder_token if makes_prompts and template_file is not None else "",
        )  # fmt: skip
        if include_cond and self.data.uncond() is None:
            raise UserError(f"include_cond=True: {self.cache} holds no cond. Give model= and cond_model= to make it.")
        self.data_root = root
        self.placeholder_token, self.shuffle_tags, self.tag_drop_out = placeholder_token, shuffle_tags, tag_drop_out
        self.lines = list(lines or ())
        self.length = len(self.data)
        self.batch_size = min(batch_size, self.length)
        self.gradient_step = min(gradient_step, self.length // self.batch_size)
        self.latent_sampling_method = latent_sampling_method

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> DatasetEntry:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[DatasetEntry]:
        """Entries of images of one size."""
        batch = self.data.__getitems__(indices)
        samples, cond, weight = batch.latent_sample, batch.cond, batch.weight
        embeds = cond["prompt_embeds"] if cond is not None else None
        return [
            DatasetEntry(
                filename=os.path.join(self.data_root, self.data.key(index)),
                filename_text=self.data.caption(index)[0],
                latent_sample=samples[n],
                cond=embeds[n] if embeds is not None else None,
                cond_text=batch.cond_text[n],
                weight=weight[n].expand_as(samples[n]) if weight is not None else None,
            )
            for n, index in enumerate(indices)
        ]

    @property
    def dataset(self) -> list[DatasetEntry]:
        """All entries; read anew at every access."""
        return [self[index] for index in range(len(self))]


class BatchLoader:
    """A batch, as the ancestor stacked it."""

    def __init__(self, data: list[DatasetEntry]) -> None:
        self.cond_text = [entry.cond_text for entry in data]
        self.cond = [entry.cond for entry in data]
        self.latent_sample = torch.stack([entry.latent_sample for entry in data])  # [B,C,h,w]
        weights = [entry.weight for entry in data if entry.weight is not None]
        self.weight = torch.stack(weights) if len(weights) == len(data) else None  # [B,C,h,w]

    def pin_memory(self) -> "BatchLoader":
        self.latent_sample = self.latent_sample.pin_memory()
        if self.weight is not None:
            self.weight = self.weight.pin_memory()
        return self


class PersonalizedDataLoader(DataLoader[BatchLoader]):
    """Batches of images of one size; every image once an epoch, in an order of its own. A `for` is an epoch.

    latent_sampling_method is kept for old calls: the dataset's is what counts.
    """

    def __init__(
        self,
        dataset: PersonalizedBase,
        latent_sampling_method: str = "once",
        batch_size: int = 1,
        pin_memory: bool = False,
    ) -> None:
        self.epoch = 0
        super().__init__(
            dataset,  # type: ignore[arg-type]
            batch_sampler=BucketBatchSampler(dataset.data, batch_size, seed=dataset.data.seed),
            collate_fn=BatchLoader,
            pin_memory=pin_memory,
        )

    def __iter__(self) -> Iterator[BatchLoader]:  # type: ignore[override]
        assert isinstance(self.batch_sampler, BucketBatchSampler)
        self.batch_sampler.set_epoch(self.epoch)
        self.epoch += 1
        return super().__iter__()


def update_cache(options: EncodeOptions, vae: "LiveVae", cond_model: Any) -> None:
    """Encode what is new or has changed; runs no model where nothing has."""
    if options.text.include_cond and cond_model is None:
        raise UserError("include_cond=True: give cond_model=, a pipeline or a callable from prompts to [B,T,D].")
    storage = Storage(options.out)
    text = LiveText(cond_model, vae.device) if options.text.include_cond else None
    with hold(storage):
        manifest = find_manifest(storage)
        facts = vae.facts(manifest.latent if manifest is not None else None)
        models = Models(
            facts,
            live_facts(cond_model) if text is not None else None,
            patch=1,
            is_upcast=False,
            make_vae=lambda device, dtype: vae,
            make_text=(lambda device, dtype: text) if text is not None else None,
        )
        prepared = prepare(options, lambda line: None, models)
        if prepared.is_done:
            return
        print("Preparing dataset...")
        from tqdm import tqdm

        outcome = encode(prepared, lambda total, stage: tqdm(total=total, desc=stage, unit="img", disable=not total))
        if outcome.failures:
            raise UserError(f"{options.source}: {'; '.join(outcome.failures)}")


class LiveVae(VaeEncoder):
    """A VAE that is in memory already, and stays as and where it is."""

    def __init__(self, model: Any, vae: Any, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.live = model, vae
        super().__init__(None, device, dtype)  # type: ignore[arg-type]

    def _load(self, dtype: torch.dtype) -> Any:
        return self.live if dtype == self.dtype else deepcopy(self.live).to(dtype)

    def facts(self, latent: dict[str, Any] | None) -> VaeFacts:
        """What a plan must know; of an object without a config from the cache, or else from encoding an empty image."""
        config = getattr(self.live, "config", None)
        digest = digest_of_model(self.live if config is not None else self.model)
        if config is not None:
            return VaeFacts(digest, **{**read_numbers(config, "VAE"), "force_upcast": False})
        if latent is not None:
            return VaeFacts(
                digest,
                latent["factor"],
                latent["channels"],
                normalization_from_json(latent["normalization"], latent["channels"]),
                force_upcast=False,
            )
        mean = self.encode(np.zeros((1, 64, 64, 3), np.uint8)).mean
        ones = torch.ones_like(mean).to(self.device)
        scale = float(self.model.get_first_stage_encoding(ones).mean())
        try:
            normalization = Normalization((0.0,), (scale,))
        except ValueError as error:
            raise UserError(f"model: get_first_stage_encoding of ones gives a {error}.") from None
        return VaeFacts(digest, 64 // mean.shape[2], mean.shape[1], normalization, force_upcast=False)


class FirstStage:
    """The ancestor's kind of model, with the interface of a diffusers VAE."""

    dtype = torch.float32

    def __init__(self, model: Any) -> None:
        self.model = model

    def encode(self, images: Tensor) -> SimpleNamespace:
        posterior = self.model.encode_first_stage(images)
        if isinstance(posterior, Tensor):  # a VAE that gives no spread
            posterior = SimpleNamespace(mean=posterior, std=torch.zeros_like(posterior))
        return SimpleNamespace(latent_dist=posterior)


def make_models_vae(model: Any, device: torch.device | str | None) -> LiveVae:
    """The VAE of what was given as `model`. Raises UserError where it has none."""
    if hasattr(model, "encode_first_stage"):
        return LiveVae(model, FirstStage(model), torch.device(device or "cpu"), torch.float32)
    vae = getattr(model, "vae", model)
    if not (hasattr(vae, "encode") and hasattr(vae, "config")):
        raise UserError(
            f"model: a {type(model).__name__}, expected a diffusers AutoencoderKL, a pipeline with one, "
            "or an object with encode_first_stage and get_first_stage_encoding."
        )
    return LiveVae(vae, vae, torch.device(vae.device), vae.dtype)


class LiveText(TextEncoder):
    """A text encoder that is in memory already: a pipeline, or a callable from prompts to [B,T,D]."""

    def __init__(self, cond_model: Any, device: torch.device) -> None:
        self.cond_model, self.device = cond_model, device
        self.names = ("prompt_embeds",)
        self.batch_size = 32
        self.max_tokens = None

    def _encode_batch(self, prompts: list[str]) -> dict[str, Tensor]:
        if hasattr(self.cond_model, "encode_prompt"):
            result = self.cond_model.encode_prompt(
                prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )[0]
        else:
            result = self.cond_model(prompts)
        if not isinstance(result, Tensor) or len(result) != len(prompts):
            raise UserError(f"cond_model: gave {type(result).__name__} for {len(prompts)} prompts, expected [B,T,D].")
        return {"prompt_embeds": result.float().cpu()}

    def count_tokens(self, prompts: list[str]) -> None:
        """A callable does not tell."""


def live_facts(cond_model: Any) -> TextFacts:
    """What a plan must know; of an object without configs the sizes are a guess, by which shards are cut."""
    return TextFacts(digest_of_model(cond_model), FAMILIES[0], window=77, num_layers=12, width=1024, pooled=0)


def digest_of_model(model: Any) -> str:
    """Hash of an object's weights; of one that shows none, of its name: then a change within it goes unnoticed."""
    modules = [model] if isinstance(model, torch.nn.Module) else list(getattr(model, "components", {}).values())
    weights = [module.state_dict() for module in modules if isinstance(module, torch.nn.Module)]
    hashes = [
        [name, list(value.shape), hashlib.blake2b(value.cpu().flatten().view(torch.uint8).numpy()).hexdigest()]
        for state in weights
        for name, value in sorted(state.items())
    ]
    named = model if hasattr(model, "__qualname__") else type(model)
    return digest_of([f"{named.__module__}.{named.__qualname__}", hashes])
