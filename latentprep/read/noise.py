"""Normal noise from counters: on every device the same numbers for a seed, and a batch at a time."""

from functools import cache

import numpy as np
import torch
from torch import Tensor

LEVELS = 2**16  # equally likely values of a number: 16 of the 64 bits of a word
WORDS_AT_ONCE = 2**16  # on a CPU, so that they stay in its cache


def draw_sample(mean: Tensor, std: Tensor, seeds: Tensor) -> Tensor:
    """mean + std * noise, [B,...] float32; the seed of a row decides its noise. seeds: [B] int64, on mean's device."""
    if mean.device.type != "cpu":
        return draw_noise(seeds, mean).mul_(std).add_(mean)
    sample = torch.empty(mean.shape, dtype=torch.float32, device=mean.device)
    step = max(1, 4 * WORDS_AT_ONCE // mean[0].numel())
    for own in (slice(first, first + step) for first in range(0, len(mean), step)):
        draw_noise(seeds[own], mean[own], out=sample[own]).mul_(std[own]).add_(mean[own])
    return sample


def draw_noise(seeds: Tensor, like: Tensor, out: Tensor | None = None) -> Tensor:
    """Standard normal noise [B,...] float32 in like's shape.

    seeds: [B] int64, on like's device. Words of splitmix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number
    Generators, 2014) choose among LEVELS quantiles of the normal distribution, which end at 4.3 standard deviations.
    """
    count = like[0].numel()
    words = make_words(seeds, -(-count // 4))
    if like.device.type != "cpu":
        indices = words.view(torch.int16)[:, :count].int() & (LEVELS - 1)
        return quantiles(like.device).index_select(0, indices.flatten()).view(like.shape)
    found = torch.empty(like.shape, dtype=torch.float32, device=like.device) if out is None else out
    numbers = words.numpy().view(np.uint16)[:, :count]  # torch takes no indices of 16 bits
    np.take(
        quantiles(like.device).numpy(), numbers, out=found.flatten(1).numpy(), mode="clip"
    )  # in range: nothing is clipped
    return found


def make_words(seeds: Tensor, count: int) -> Tensor:
    """[B,count] int64: splitmix64's words for seeds [B] int64, all bits of each random."""
    words = seeds[:, None] + torch.arange(1, count + 1, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    shifted = torch.empty_like(words)
    for bits, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        torch.bitwise_right_shift(words, bits, out=shifted)
        shifted &= 2 ** (64 - bits) - 1  # torch's shift fills up with the sign
        words ^= shifted
        if factor != 1:
            words *= _signed(factor)
    return words


def _signed(number: int) -> int:
    """64 bits as a signed int64: torch has no arithmetic on unsigned ones."""
    return number - 2**64 if number >= 2**63 else number


@cache
def quantiles(device: torch.device) -> Tensor:
    """[LEVELS] float32: quantiles of the normal distribution at (n + 0.5) / LEVELS, scaled to variance 1."""
    middles = torch.special.ndtri((torch.arange(LEVELS, dtype=torch.float64, device="cpu") + 0.5) / LEVELS)
    return (middles / middles.square().mean().sqrt()).float().to(device)
