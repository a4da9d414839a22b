"""What a model in memory is known by: its weights, and what it makes of one small image and one prompt.

What it does is probed at every start, since a setting outside the weights (CLIP skip, another encoder behind the same
function) changes it as well.
"""

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.read.counters import hash_numbers
from latentprep.recipe import digest_of

# What the names of a VAE's weights begin with that its latents come from. FLUX.2's bn is known by the normalization.
ENCODER_PARTS = ("encoder.", "quant_conv.")
PROBE_SIDE = 64  # pixels
# two windows of CLIP, with commas and weights: a changed setting of the web UI changes what becomes of these
SHORT_PROMPT = "(masterpiece:1.5), [sketch], a photo of a cat"  # for pipelines, which cut at one window
PROBE_PROMPT = f"{SHORT_PROMPT}, " + ", ".join(f"tag number {n}" for n in range(30))
NUM_PROBED = 8  # numbers that are kept of what a probe gives
# Largest relative distance of two probes of one model, by the dtype it computes in: that of rounding on other devices
SAME = {torch.float32: 0.005, torch.float16: 0.01, torch.bfloat16: 0.03}


def probe_image() -> np.ndarray:
    """[1,64,64,3] uint8: slopes, edges and a little noise."""
    y, x, c = np.meshgrid(*map(np.arange, (PROBE_SIDE, PROBE_SIDE, 3)), indexing="ij")
    return ((2 * x + 3 * y + 60 * c + 90 * ((x // 16 + y // 16) % 2) + (x * y * 7) % 13) % 256).astype(np.uint8)[None]


@contextmanager
def one_seed(device: torch.device) -> Iterator[None]:
    """The same random numbers each time, for a model that draws; those of the caller go on undisturbed."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def fingerprint(known: list[Any], version: str, probed: Tensor) -> str:
    """Digests of what is known of a model and of the caller's version, and NUM_PROBED float32 sums of its output.

    Each sum takes all of the output, with signs that look random: so a change anywhere moves all sums, by about the
    same share of their size as it changes the whole (Johnson and Lindenstrauss, 1984).
    """
    values = probed.double().flatten().numpy()
    places = np.arange(len(values))
    signs = [1 - 2 * (hash_numbers(0, n, places) >> np.uint64(63)).astype(np.float64) for n in range(NUM_PROBED)]
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
