"""Pixels -> posterior, through diffusers' AutoencoderKL.

Raw pixels (uint8, 0..255) => VAE input (float, -1..1) => posterior (float32, unscaled). A reader scales.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latentprep.prepare.devices import BatchLimit
from latentprep.prepare.vae_folder import VaeSource

# k/127.5 - 1 for every byte k, rounded once from double: the same floats as numpy's in the ancestor
LEVELS = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float()


@dataclass(frozen=True, eq=False)
class Posterior:
    """VAE posterior of N images, on the CPU. Not finite where even float32 overflowed."""

    mean: Tensor  # [N,C,H/f,W/f] float32
    std: Tensor  # the same


class VaeEncoder:
    """The encoder half of a VAE, on its device in its dtype."""

    def __init__(self, source: VaeSource, device: torch.device, dtype: torch.dtype) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.num_retried = 0  # images encoded again in float32, because half precision overflowed
        self.limit = BatchLimit()
        self.levels = LEVELS.to(device)
        self.vae = self._load(dtype)
        self.vae_float32: AutoencoderKL | None = self.vae if dtype == torch.float32 else None

    def _load(self, dtype: torch.dtype) -> AutoencoderKL:
        vae = self.source.load(dtype)
        del vae.decoder, vae.post_quant_conv
        # channels_last: 1.05 (256x256) to 1.13 times (512x512) as fast as NCHW on 2 CPU cores: benchmarks/encode.py
        return vae.eval().requires_grad_(False).to(self.device, dtype, memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Posterior:
        """VAE posterior of a batch.

        pixels [N,H,W,3] uint8 sRGB; H, W multiples of the VAE's factor
        => mean, std, each [N,C,H/f,W/f] float32; unscaled (no scaling_factor, no shift).
        Images whose numbers overflow in half precision are encoded again in float32.
        Where memory does not suffice, the batch is halved. Raises OutOfMemoryError where it does not for one image.
        """
        parts = self.limit.run(self._encode, pixels)
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    def _encode(self, pixels: np.ndarray) -> Posterior:
        levels = self.levels[torch.from_numpy(pixels).to(self.device).int()]
        images = levels.permute(0, 3, 1, 2)  # NHWC in memory already is channels_last
        mean, std = self._posterior(self.vae, images)
        again = ~(_is_finite(mean) & _is_finite(std))
        if self.dtype != torch.float32 and bool(again.any()):
            self.num_retried += int(again.sum())
            if self.vae_float32 is None:
                self.vae_float32 = self._load(torch.float32)
            mean[again], std[again] = self._posterior(self.vae_float32, images[again])
        return Posterior(mean.cpu(), std.cpu())

    def _posterior(self, vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
        distribution = vae.encode(images.to(vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()


def _is_finite(values: Tensor) -> Tensor:
    """[N] bool: whether all numbers of each row are finite."""
    return values.isfinite().flatten(1).all(dim=1)
