"""Pixels -> posterior, through diffusers' AutoencoderKL.

Raw pixels (uint8, 0..255) => VAE input (float, -1..1) => posterior (float32, unscaled). A reader scales.
"""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from latentprep.errors import UserError
from latentprep.prepare.devices import BatchLimit
from latentprep.prepare.models.vae_folder import VaeSource

# k/127.5 - 1 for every byte k, rounded once from double: the same floats as numpy's in the ancestor
LEVELS = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float()


@dataclass(frozen=True, eq=False)
class Posterior:
    """VAE posterior of N images, on the CPU. Not finite where even float32 overflowed."""

    mean: Tensor  # [N,C,H/f,W/f] float32
    std: Tensor  # the same


class VaeEncoder:
    """The encoder half of a VAE, on its device in its dtype."""

    def __init__(
        self,
        source: VaeSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        tiling: int | None = None,
        compile: bool = False,  # noqa: A002
    ) -> None:
        self.source = source
        self.device = device
        self.dtype = dtype
        self.tiling = tiling  # side of a tile in pixels; None: every image is encoded whole
        self.num_retried = 0  # images encoded again in float32, because half precision overflowed
        self.limit = BatchLimit()
        self.levels = LEVELS.to(device)
        self.vae = self._load(dtype)
        self.vae_float32: AutoencoderKL | None = self.vae if dtype == torch.float32 else None
        if compile:
            self.vae.encoder = CompiledEncoder(self.vae.encoder)

    def _load(self, dtype: torch.dtype) -> AutoencoderKL:
        vae = self.source.load(dtype)
        if self.tiling is not None:
            set_tiling(vae, self.tiling, self.source.factor)
        # channels_last: 1.05 (256x256) to 1.13 times (512x512) as fast as NCHW on 2 CPU cores: benchmarks/encode.py
        return vae.eval().requires_grad_(False).to(self.device, memory_format=torch.channels_last)

    @torch.inference_mode()
    def encode(self, pixels: np.ndarray) -> Posterior:
        """VAE posterior of a batch.

        pixels [N,H,W,3] uint8 sRGB; H, W multiples of the VAE's factor
        => mean, std, each [N,C,H/f,W/f] float32; unscaled (no scale, no shift).
        Images whose numbers overflow in half precision are encoded again in float32, and on a CPU those that are one
        latent wide.
        Where memory does not suffice, the batch is halved. Raises OutOfMemoryError where it does not for one image.
        """
        return self._encode_in_parts(pixels)

    def start(self, pixels: np.ndarray) -> Posterior:
        return self.encode(pixels)

    def finish(self, posterior: Posterior, pixels: np.ndarray) -> Posterior:
        return posterior

    def _encode_in_parts(self, pixels: np.ndarray) -> Posterior:
        parts = self.limit.run(self._encode, pixels)
        return Posterior(torch.cat([part.mean for part in parts]), torch.cat([part.std for part in parts]))

    def _encode(self, pixels: np.ndarray) -> Posterior:
        levels = self.levels[torch.from_numpy(pixels).to(self.device).int()]
        images = levels.permute(0, 3, 1, 2)  # NHWC in memory already is channels_last
        mean, std = self._posterior(self.vae, images)
        again = ~(_is_finite(mean) & _is_finite(std))
        if self.device.type == "cpu" and 1 in mean.shape[2:]:
            again[:] = True  # torch 2.13 convolves 16-bit numbers to one row or column wrongly (pytorch#163347)
        if self.dtype != torch.float32 and bool(again.any()):
            self.num_retried += int(again.sum())
            if self.vae_float32 is None:
                self.vae_float32 = self._load(torch.float32)
            mean[again], std[again] = self._posterior(self.vae_float32, images[again])
        return Posterior(mean.cpu(), std.cpu())

    def _posterior(self, vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
        distribution = vae.encode(images.to(vae.dtype)).latent_dist
        return distribution.mean.float(), distribution.std.float()


def set_tiling(vae: AutoencoderKL, side: int, factor: int) -> None:
    """Have diffusers encode what is larger than `side` pixels in tiles: a quarter overlaps, where mean and log variance
    are blended. Numbers differ all over the image, since group norm and attention see a tile of it.

    `side` is a multiple of 4 * factor: tiles of other sides would not join exactly. diffusers' own choice is the
    sample_size of the VAE's config: 512 for SD 1.5, 1024 for SDXL and FLUX.
    """
    vae.enable_tiling()
    vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // factor


class CompiledEncoder(torch.nn.Module):
    """A VAE's encoder under torch.compile: one program for single images and one for batches, for all sizes.

    Each is made when it is first needed, which takes a minute or so, and always from empty images of one shape: so
    the programs, and with them the last digits, hardly depend on which images come first.
    """

    SHAPE = (3, 192, 256)  # of unequal sides: torch would make equal ones a condition of the program

    def __init__(self, encoder: torch.nn.Module) -> None:
        super().__init__()
        self.encoder = torch.compile(encoder, dynamic=True)
        self.made: set[int] = set()  # 1: the program for single images, 2: the one for batches

    def forward(self, images: Tensor) -> Tensor:
        """images [N,3,H,W] in the VAE's dtype => moments [N,2C,H/f,W/f]. Raises UserError where compiling fails."""
        count = min(len(images), 2)
        if count not in self.made:
            self._run(images.new_zeros(count, *self.SHAPE))
            self.made.add(count)
        return self._run(images)

    def _run(self, images: Tensor) -> Tensor:
        from torch._dynamo.exc import TorchDynamoException

        try:
            # a program is for one memory layout, and a tile is a view into its image
            return self.encoder(images.contiguous(memory_format=torch.channels_last))
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--compile: torch.compile fails here ({reason}). It needs a C++ compiler such as g++, on CUDA Triton "
                "too. Install what is missing, or leave --compile out."
            ) from error


def _is_finite(values: Tensor) -> Tensor:
    """[N] bool: whether all numbers of each row are finite."""
    return values.isfinite().flatten(1).all(dim=1)
