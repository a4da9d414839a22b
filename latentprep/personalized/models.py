"""Models that are in memory already: a VAE and a text encoder as training code holds them, and how to know them again.

They may be diffusers objects or stable-diffusion-webui's own kind. What they do is probed at every start, since a
setting outside the weights (CLIP skip, another encoder behind the same function) changes it as well.
"""

import hashlib
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from itertools import chain
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.normalization import Normalization
from latentprep.cache.ragged import Conds, Ragged
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.models.families import FAMILIES
from latentprep.prepare.models.text_folder import TextFacts
from latentprep.prepare.models.vae_encoder import Pixels, Posterior, VaeEncoder
from latentprep.prepare.models.vae_folder import VaeFacts, fields_of
from latentprep.prepare.models.vaes import Numbers, numbers_of
from latentprep.read.counters import mix
from latentprep.recipe import digest_of

DTYPES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16"}
# What the names of a VAE's weights begin with that its latents come from; bn is FLUX.2's normalization.
ENCODER_PARTS = ("encoder.", "quant_conv.", "bn.")
HALVES = (torch.float16, torch.bfloat16)

PROBE_SIDE = 64  # pixels
# two windows of CLIP, with commas and weights: a changed setting of the web UI changes what becomes of these
SHORT_PROMPT = "(masterpiece:1.5), [sketch], a photo of a cat"  # for pipelines, which cut at one window
PROBE_PROMPT = f"{SHORT_PROMPT}, " + ", ".join(f"tag number {n}" for n in range(30))
BATCH = 32  # prompts that a pipeline encodes at once
NUM_PROBED = 8  # numbers that are kept of what a probe gives
# Largest relative distance of two probes of one model, by the dtype it computes in: that of rounding on other devices
SAME = {torch.float32: 0.005, torch.float16: 0.01, torch.bfloat16: 0.03}


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


class FirstStage:
    """stable-diffusion-webui's kind of model, with the interface of a diffusers VAE.

    Its VAE in half precision takes float32 images, under autocast, as the ancestor called it.
    """

    dtype = torch.float32  # of the images that it takes

    def __init__(self, model: Any, module: torch.nn.Module | None, autocast: "Autocast") -> None:
        self.model, self.module, self.autocast = model, module, autocast

    def encode(self, images: Tensor) -> SimpleNamespace:
        with self.autocast():
            posterior = self.model.encode_first_stage(images.contiguous())  # channels_last has other last digits
        if isinstance(posterior, Tensor):  # a VAE that gives no spread
            posterior = SimpleNamespace(mean=posterior, std=torch.zeros_like(posterior))
        return SimpleNamespace(latent_dist=posterior)

    def in_float32(self) -> "FirstStage":
        """The same in float32: its weights are that for the time of each call."""
        return FirstStageInFloat32(self.model, self.module, nullcontext)

    def numbers(self, mean: Tensor) -> Numbers:
        """What is known of it, from the latents of the probe, [1,C,h,w]. Raises UserError.

        The scale is what get_first_stage_encoding multiplies by.
        """
        device = next((tensor.device for tensor in tensors_of(self.module)), torch.device("cpu"))
        scale = float(self.model.get_first_stage_encoding(torch.ones_like(mean, device=device)).float().mean())
        try:
            normalization = Normalization((0.0,), (scale,))
        except ValueError as error:
            raise UserError(f"model: get_first_stage_encoding of ones gives a {error}.") from None
        return Numbers(factor=PROBE_SIDE // mean.shape[2], latent_channels=mean.shape[1], normalization=normalization)


class FirstStageInFloat32(FirstStage):
    def encode(self, images: Tensor) -> SimpleNamespace:
        with self._float32():
            return super().encode(images)

    @contextmanager
    def _float32(self) -> Iterator[None]:
        """Weights are float32 inside the block; afterwards their exact 16-bit values are back."""
        before = [(tensor, tensor.dtype) for tensor in tensors_of(self.module) if tensor.is_floating_point()]
        try:
            for tensor, _ in before:
                tensor.data = tensor.data.float()
            yield
        finally:
            for tensor, dtype in before:
                tensor.data = tensor.data.to(dtype)


Autocast = Callable[[], AbstractContextManager[Any]]


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


def choose_autocast(dtype: torch.dtype, device: torch.device) -> tuple[Autocast, torch.dtype]:
    """The context in which the ancestor ran models with weights of a dtype, and the dtype that they compute in.

    The caller's own autocast counts, if there is one.
    """
    if is_autocast_on(device):
        dtype = torch.get_autocast_dtype(device.type)
    if dtype in HALVES:
        return lambda: torch.autocast(device.type, dtype=dtype), dtype
    return nullcontext, dtype


def is_autocast_on(device: torch.device) -> bool:
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


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
        return TextFacts(digest, FAMILIES[0], window=77, num_layers=12, width=cond.shape[-1], pooled=0)


@contextmanager
def one_seed(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, for a model that draws; those of the caller go on undisturbed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


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


def tiling_of(vae: Any) -> Any:
    """How a diffusers VAE cuts large images into tiles, which a probe is too small to show; None if it does not."""
    return vae.tile_sample_min_size if getattr(vae, "use_tiling", False) else None


def probe_image() -> np.ndarray:
    """[1,64,64,3] uint8: slopes, edges and a little noise."""
    y, x, c = np.meshgrid(*map(np.arange, (PROBE_SIDE, PROBE_SIDE, 3)), indexing="ij")
    return ((2 * x + 3 * y + 60 * c + 90 * ((x // 16 + y // 16) % 2) + (x * y * 7) % 13) % 256).astype(np.uint8)[None]


def fingerprint(known: list[Any], version: str, probed: Tensor) -> str:
    """Digests of what is known of a model and of the caller's version, and NUM_PROBED float32 sums of its output.

    Each sum takes all of the output, with signs that look random: so a change anywhere moves all sums, by about the
    same share of their size as it changes the whole (Johnson and Lindenstrauss, 1984).
    """
    values = probed.double().flatten().numpy()
    places = np.arange(len(values))
    signs = [1 - 2 * (mix(0, n, places) >> np.uint64(63)).astype(np.float64) for n in range(NUM_PROBED)]
    numbers = np.array([(values * sign).sum() for sign in signs], "<f4") / np.float32(len(values) ** 0.5)
    return f"{digest_of(known)[:16]}.{digest_of(version)[:8]}.{numbers.astype('<f4').tobytes().hex()}"


def is_fingerprint(digest: object) -> bool:
    """Whether this is a fingerprint's form, and no hash of files."""
    return isinstance(digest, str) and digest.count(".") == 2


def recognize(digest: str, known: Iterable[str | None], dtype: torch.dtype | None) -> str:
    """The one of the known fingerprints that is of the same model, or else the fingerprint itself."""
    for other in known:
        if isinstance(other, str) and is_same(digest, other, dtype):
            return other
    return digest


def is_other_version(one: str, other: str, dtype: torch.dtype | None) -> bool:
    """Whether two fingerprints differ by the caller's version alone."""
    parts, other_parts = one.split("."), other.split(".")
    if len(parts) != 3 or len(other_parts) != 3 or parts[1] == other_parts[1]:
        return False
    return is_same(one, ".".join([other_parts[0], parts[1], other_parts[2]]), dtype)


def is_same(one: str, other: str, dtype: torch.dtype | None = None) -> bool:
    """Whether two fingerprints could come from one model on two devices; dtype sets how much rounding is allowed."""
    (name, _, numbers), (other_name, _, other_numbers) = one.rpartition("."), other.rpartition(".")
    if name != other_name or len(numbers) != len(other_numbers):
        return False
    try:
        a, b = (np.frombuffer(bytes.fromhex(text), "<f4").astype(np.float64) for text in (numbers, other_numbers))
    except ValueError:
        return False
    return float(np.linalg.norm(a - b)) <= SAME.get(dtype or torch.float32, 0.0) * float(np.linalg.norm(b))


def hash_weights(modules: list[torch.nn.Module], of_vae: bool = False) -> list[Any]:
    """Names, shapes and hashes of the weights; of a VAE only those of its encoder, where they have the usual names."""
    hashes = []
    for module in modules:
        state = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
        if of_vae and any(name.startswith(ENCODER_PARTS) for name in state):
            state = {name: value for name, value in state.items() if name.startswith(ENCODER_PARTS)}
        for name, value in sorted(state.items()):
            data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
            hashes.append([name, list(value.shape), hashlib.blake2b(data).hexdigest()])
    return hashes


def text_modules(cond_model: Any) -> list[torch.nn.Module]:
    """What of a conditioner has weights: itself, what it is a method of, or the text encoders of a pipeline.

    A function shows none.
    """
    cond_model = getattr(cond_model, "__self__", cond_model)
    if isinstance(cond_model, torch.nn.Module):
        return [cond_model]
    components = getattr(cond_model, "components", None)
    parts = components.items() if isinstance(components, dict) else ()
    return [part for name, part in parts if name.startswith("text_encoder") and isinstance(part, torch.nn.Module)]


def tensors_of(module: torch.nn.Module | None) -> Iterator[Tensor]:
    return iter(()) if module is None else chain(module.parameters(), module.buffers())
