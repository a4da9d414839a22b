"""Models that are in memory already: a VAE and a text encoder as training code holds them.

They may be diffusers objects or stable-diffusion-webui's own kind.
"""

import inspect
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from latentprep.cache.ragged import Conds, Ragged
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.personalized.fingerprint import (
    PROBE_PROMPT,
    PROBE_SIDE,
    SHORT_PROMPT,
    fingerprint,
    hash_weights,
    one_seed,
    probe_image,
    tensors_of,
    text_modules,
)
from latentprep.personalized.first_stage import Autocast, FirstStage, choose_autocast
from latentprep.prepare.models.families import FAMILIES
from latentprep.prepare.models.text_folder import TextFacts
from latentprep.prepare.models.tiles import tiling_of
from latentprep.prepare.models.vae_encoder import Pixels, Posterior, VaeEncoder
from latentprep.prepare.models.vae_folder import VaeFacts, fields_of
from latentprep.prepare.models.vaes import numbers_of

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
BATCH = 32  # prompts that a pipeline encodes at once


@dataclass(frozen=True, eq=False)
class LiveWeights:
    """Where a VAE in memory is: it is handed out as it is, and in another dtype as a copy."""

    vae: Any
    dtype: torch.dtype
    factor: int = 0  # is not asked for: it is never set to tiles

    def load(self, dtype: torch.dtype) -> Any:
        if dtype == self.dtype:
            return self.vae
        return self.vae.in_float32() if isinstance(self.vae, FirstStage) else deepcopy(self.vae).to(dtype)


class LiveVae:
    """A VAE that is in memory already, and stays as and where it is: a doors.ImageEncoder."""

    def __init__(self, vae: Any, device: torch.device, dtype: torch.dtype) -> None:
        if dtype not in DTYPES:
            raise UserError(f"model: its weights are {dtype}, expected one of {', '.join(DTYPES.values())}.")
        self.live, self.device, self.dtype = vae, device, dtype
        self.encoder = VaeEncoder(LiveWeights(vae, dtype), device, dtype, is_live=True)
        self.limit = self.encoder.limit

    @property
    def num_retried(self) -> int:
        return self.encoder.num_retried

    def start(self, pixels: Pixels) -> Posterior:
        return self.encoder.start(pixels)

    def finish(self, started: Posterior, pixels: Pixels) -> Posterior:
        return self.encoder.finish(started, pixels)

    def encode(self, pixels: Pixels) -> Posterior:
        return self.encoder.encode(pixels)

    def facts(self, version: str) -> VaeFacts:
        """What a plan must know. Runs the VAE on one small image. Raises UserError if that gives no finite latents."""
        with one_seed(self.device):
            posterior = self.encode(probe_image())
        mean, std = posterior.mean, posterior.std
        probed = mean if std is None else torch.cat([mean, std], dim=1)
        if not probed.isfinite().all():
            raise UserError("model: gives no finite latents for a plain image. Is it loaded rightly?")
        if isinstance(self.live, FirstStage):
            numbers = self.live.numbers(mean)
            weights: Any = getattr(self.live.model, "first_stage_model", None)
        else:
            factor = PROBE_SIDE // mean.shape[2]
            sizes = {"factor": factor, "latent_channels": mean.shape[1], "has_std": std is not None}
            numbers = replace(numbers_of(self.live, sizes, "VAE"), force_upcast=False)
            weights = self.live
        hashed = hash_weights([weights] if isinstance(weights, torch.nn.Module) else [], of_vae=True)
        tiles = tiling_of(self.live) if not isinstance(self.live, FirstStage) else None
        known = [hashed, numbers.normalization.to_json(), numbers.factor, tiles]
        return VaeFacts(**fields_of(numbers), digest=fingerprint(known, version, probed))


def make_live_vae(model: Any, device: torch.device | str | None) -> tuple[LiveVae, Autocast]:
    """The VAE of what was given as `model`, and the context that its half precision wants. Raises UserError."""
    if hasattr(model, "encode_first_stage"):
        module = getattr(model, "first_stage_model", None)
        if not isinstance(module, torch.nn.Module):
            module = model if isinstance(model, torch.nn.Module) else None
        weights = next((tensor for tensor in tensors_of(module) if tensor.is_floating_point()), torch.zeros(()))
        place = as_device(device) if device is not None else weights.device
        autocast, dtype = choose_autocast(weights.dtype, place)
        return LiveVae(FirstStage(model, module, autocast), place, dtype), autocast
    vae = getattr(model, "vae", model)
    if not (hasattr(vae, "encode") and hasattr(vae, "config")):
        raise UserError(
            f"model: a {type(model).__name__}, expected a diffusers AutoencoderKL, a pipeline with one, "
            "or an object with encode_first_stage and get_first_stage_encoding."
        )
    return LiveVae(vae, torch.device(vae.device), vae.dtype), nullcontext


def as_device(device: torch.device | str) -> torch.device:
    """The device of an argument. Raises UserError if torch has none of that name here."""
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"device={device!r}: expected a device of torch, such as cuda, cuda:1, mps or cpu.") from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device!r}: torch finds no CUDA device here.")
    return found


class LiveText:
    """A text encoder that is in memory already, a doors.PromptEncoder: a pipeline, or a callable to [B,T,D].

    A callable is asked prompt by prompt, as the ancestor asked it: the web UI's gives all prompts of a call the length
    of the longest. So each prompt has its own number of tokens.
    """

    def __init__(
        self, cond_model: Any, device: torch.device, autocast: Autocast, check: Callable[[], None] = lambda: None
    ) -> None:
        """`check` is called between prompts; what it raises ends the encoding."""
        self.cond_model, self.device, self.autocast, self.check = cond_model, device, autocast, check
        self.is_pipeline = hasattr(cond_model, "encode_prompt")
        if self.is_pipeline:
            check_pipeline(cond_model)
        self.max_tokens: int | None = None
        self.batch_limit = ""
        self.dtype = torch.float32  # of what it gives

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> Conds:
        if not self.is_pipeline:
            return {"prompt_embeds": Ragged.of([self._encode_one(prompt) for prompt in prompts])}
        parts = [self._encode_batch(prompts[n : n + BATCH]) for n in range(0, len(prompts), BATCH)]
        return {"prompt_embeds": torch.cat([part["prompt_embeds"] for part in parts])}

    def _encode_batch(self, prompts: list[str]) -> dict[str, Tensor]:
        self.check()
        result = self.cond_model.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )[0]
        self.dtype = result.dtype
        return {"prompt_embeds": result.float().cpu()}

    def _encode_one(self, prompt: str) -> Tensor:
        """[T,D] float32."""
        self.check()
        with self.autocast():
            result = self.cond_model([prompt])
        if not isinstance(result, Tensor) or result.ndim != 3 or len(result) != 1 or 0 in result.shape:
            kind = f"a tensor {list(result.shape)}" if isinstance(result, Tensor) else type(result).__name__
            raise UserError(f"cond_model: gave {kind} for 1 prompt, expected a tensor [1,T,D].")
        self.dtype = result.dtype
        return result[0].float().cpu()

    def count_tokens(self, prompts: list[str]) -> None:
        """None: a callable does not report its tokens."""

    def facts(self, version: str) -> TextFacts:
        """What a plan must know; the sizes are a guess, by which shards are cut. Runs it on one prompt."""
        with one_seed(self.device):
            cond = self.encode([SHORT_PROMPT if self.is_pipeline else PROBE_PROMPT])["prompt_embeds"][0]
        if not cond.isfinite().all():
            raise UserError("cond_model: gives numbers that are not finite for a plain prompt. Is it loaded rightly?")
        known = [hash_weights(text_modules(self.cond_model)), list(cond.shape), self.is_pipeline]
        digest = fingerprint(known, version, cond)
        widths = {"prompt_embeds": cond.shape[-1]}
        return TextFacts(digest, FAMILIES[0], window=77, num_layers=12, widths=widths, pipeline_settings={})


@dataclass(frozen=True, kw_only=True)
class LiveVaeModel(VaeFacts):
    """A doors.VaeModel that is open already."""

    live: LiveVae

    def open(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        tiling: int | None = None,
        compile: bool = False,  # noqa: A002
    ) -> LiveVae:
        """The VAE where and as it is, whatever device and dtype are asked for."""
        return self.live


@dataclass(frozen=True)
class LiveTextModel(TextFacts):
    """A doors.TextModel that is open already."""

    live: LiveText
    where: str = "cond_model"

    def open(self, device: torch.device, dtype: torch.dtype, options: TextOptions | None = None) -> LiveText:
        """The encoder where and as it is, whatever device and dtype are asked for."""
        return self.live


def check_pipeline(pipeline: Any) -> None:
    """Raise UserError unless a pipeline makes cond as those of Stable Diffusion 1 and 2 do: one tensor of a prompt."""
    names = inspect.signature(pipeline.encode_prompt).parameters
    wanted = {"prompt", "device", "num_images_per_prompt", "do_classifier_free_guidance"}
    if not wanted <= names.keys() or "prompt_2" in names:
        raise UserError(
            f"cond_model: a {type(pipeline).__name__}, expected a pipeline of Stable Diffusion 1 or 2, or a callable "
            "from prompts to [B,T,D]. For other models, encode with latentprep encode."
        )
