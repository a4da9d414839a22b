"""Pixels -> posterior, through a VAE of diffusers.

Raw pixels (uint8, 0..255) => VAE input (float, -1..1) => posterior (float32, unscaled). A reader scales.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.ragged import finite_rows
from latentprep.errors import UserError
from latentprep.prepare.devices import BatchLimit, OutOfMemoryError, empty_cache, is_out_of_memory
from latentprep.prepare.models.tiles import set_tiling
from latentprep.prepare.models.vaes import is_video, posterior_of

# k/127.5 - 1 for every byte k, rounded once from double: the same floats as numpy's in the ancestor
LEVELS = (torch.arange(256, dtype=torch.float64) / 127.5 - 1).float()

Pixels = np.ndarray | Tensor  # [N,H,W,3] uint8


@dataclass(frozen=True, eq=False)
class Posterior:
    """VAE posterior of N images. Not finite where even float32 overflowed."""

    mean: Tensor  # [N,C,H/f,W/f] float32 on the CPU; what VaeEncoder.start gives: in the VAE's dtype
    std: Tensor | None  # the same; None: the VAE gives none
    is_there: "torch.cuda.Event | None" = None  # of start: when its numbers have come from a CUDA device
    too_large: str = ""  # of finish: why memory did not suffice to encode in float32 what is not finite

    def wait(self) -> None:
        """Wait until the numbers are there; other threads have the core meanwhile."""
        if self.is_there is not None:
            self.is_there.synchronize()


class VaeSource(Protocol):
    """Where a VAE's weights are: a folder or a single file."""

    @property
    def factor(self) -> int: ...
    def load(self, dtype: torch.dtype) -> Any: ...


class VaeEncoder:
    """The encoder half of a VAE, on its device in its dtype: a doors.ImageEncoder."""

    def __init__(
        self,
        source: VaeSource,
        device: torch.device,
        dtype: torch.dtype,
        *,
        tiling: int | None = None,
        compile: bool = False,  # noqa: A002
        is_live: bool = False,  # the caller's own model, which stays as and where it is
    ) -> None:
        self.source = source
        self.is_live = is_live
        # a tensor that a model caches within inference_mode could not be trained later
        self.no_gradients: Callable[[], AbstractContextManager[Any]] = (
            torch.no_grad if is_live else torch.inference_mode
        )
        self.device = device
        self.dtype = dtype
        self.tiling = tiling  # side of a tile in pixels; None: every image is encoded whole
        self.num_retried = 0  # encodings done again in float32, because half precision overflowed
        self.limit = BatchLimit()
        self.limit_float32 = self.limit if dtype == torch.float32 else BatchLimit()  # of what is encoded again
        # channels_last: 1.05 (256x256) to 1.13 times (512x512) as fast as NCHW on 2 CPU cores: benchmarks/encode.py
        self.layout = torch.channels_last if device.type == "cpu" else torch.contiguous_format
        self.levels = LEVELS.to(device)
        self.copies = torch.cuda.Stream(device) if device.type == "cuda" else None  # what carries pixels there
        self.vae = self._load(dtype)
        self.has_time = is_video(self.vae)
        self.vae_float32: Any = self.vae if dtype == torch.float32 else None
        if compile:
            self.vae.encoder = CompiledEncoder(self.vae.encoder, self.layout)

    def _load(self, dtype: torch.dtype) -> Any:
        vae = self.source.load(dtype)
        if self.is_live:
            return vae
        if self.tiling is not None:
            set_tiling(vae, self.tiling, self.source.factor)
        vae = vae.eval().requires_grad_(False).to(self.device)
        return vae if is_video(vae) else vae.to(memory_format=self.layout)

    def encode(self, pixels: Pixels) -> Posterior:
        """VAE posterior of a batch.

        pixels [N,H,W,3] uint8 sRGB; H, W multiples of the VAE's factor
        => mean, std, each [N,C,H/f,W/f] float32 on the CPU; unscaled (no scale, no shift).
        Images whose numbers overflow in half precision are encoded again in float32, and on a CPU those that are one
        latent wide.
        If memory does not suffice, the batch is halved. Raises OutOfMemoryError if it does not for one image.
        """
        posterior = self.finish(self.start(pixels), pixels)
        if posterior.too_large:
            raise OutOfMemoryError(posterior.too_large)
        return posterior

    def start(self, pixels: Pixels) -> Posterior:
        """The first half of encode: what the device does. It is asked for, and not waited for.

        On CUDA pinned pixels are copied there beside the batch before, and the numbers are on their way to pinned
        memory; `finish` waits for them.
        """
        with self.no_gradients():
            parts = self.limit.run(self._start, pixels)
            mean = torch.cat([mean for mean, _ in parts]) if len(parts) > 1 else parts[0][0]
            stds = [std for _, std in parts if std is not None]
            std = None if not stds else torch.cat(stds) if len(stds) > 1 else stds[0]
            if self.device.type != "cuda":
                return Posterior(mean, std)
            mean, std = send(mean), send(std) if std is not None else None
            event = torch.cuda.Event(blocking=True)
            event.record(torch.cuda.current_stream(self.device))
            return Posterior(mean, std, event)

    def finish(self, started: Posterior, pixels: Pixels) -> Posterior:
        """The second half of encode: the numbers are fetched and looked at, and those that overflowed are made anew.

        Where memory does not suffice for that they stay not finite, and `too_large` says so.
        """
        with self.no_gradients():
            started.wait()
            mean = fetch(started.mean)
            std = fetch(started.std) if started.std is not None else None
            again = ~finite_rows(mean)
            if std is not None:
                again |= ~finite_rows(std)
            if self.dtype == torch.float32:
                return Posterior(mean, std)
            self.num_retried += int(again.sum())
            if self.device.type == "cpu" and 1 in mean.shape[2:]:
                again[:] = True  # torch 2.13 convolves 16-bit numbers to one row or column wrongly (pytorch#163347)
            if not bool(again.any()):
                return Posterior(mean, std)
            try:
                parts = self._encode_again(pixels[again if isinstance(pixels, Tensor) else again.numpy()])
            except OutOfMemoryError as error:
                return Posterior(mean, std, too_large=str(error))
            mean[again] = torch.cat([fetch(part) for part, _ in parts])
            if std is not None:
                std[again] = torch.cat([fetch(part) for _, part in parts if part is not None])
            return Posterior(mean, std)

    def _encode_again(self, pixels: Pixels) -> list[tuple[Tensor, Tensor | None]]:
        """Parts of a posterior, in float32. Raises OutOfMemoryError."""
        if self.vae_float32 is None:
            try:
                self.vae_float32 = self._load(torch.float32)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        if self.vae_float32 is None:  # not above: the exception holds what did not fit
            empty_cache()
            raise OutOfMemoryError("the device's memory is too small for the VAE in float32 too")
        parts = self.limit_float32.run(self._start_float32, pixels)
        self.limit.said = self.limit.said or self.limit_float32.said
        return parts

    def _start(self, pixels: Pixels) -> tuple[Tensor, Tensor | None]:
        return self._posterior(self.vae, self._to_images(pixels))

    def _start_float32(self, pixels: Pixels) -> tuple[Tensor, Tensor | None]:
        return self._posterior(self.vae_float32, self._to_images(pixels))

    def _posterior(self, vae: Any, images: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.tiling is not None:  # what is no larger than a tile is encoded whole by all classes
            vae.use_tiling = max(images.shape[2:]) > self.tiling
        return posterior_of(vae, images.to(vae.dtype), self.has_time)

    def _to_images(self, pixels: Pixels) -> Tensor:
        """[N,3,H,W] float32 in -1..1 on the device; NHWC in memory is channels_last already."""
        values = pixels if isinstance(pixels, Tensor) else torch.from_numpy(pixels)
        return to_levels(self._send(values), self.levels).permute(0, 3, 1, 2).contiguous(memory_format=self.layout)

    def _send(self, pixels: Tensor) -> Tensor:
        """Pixels on the device; on CUDA in a stream of their own, which the batch that is in work does not hold up."""
        if self.copies is None:
            return pixels.to(self.device)
        current = torch.cuda.current_stream(self.device)
        with torch.cuda.stream(self.copies):
            there = pixels.to(self.device, non_blocking=True)
        current.wait_stream(self.copies)
        there.record_stream(current)  # its memory is free for the next copy once the VAE has seen it
        return there


def to_levels(pixels: Tensor, levels: Tensor) -> Tensor:
    """uint8 of any shape => float32 in -1..1: the numbers of LEVELS, which `levels` holds on the device.

    On a CPU 2k - 255 is exact and its division by 255 is rounded once, so that each number is the same, at a tenth of
    the time of a look-up. CUDA multiplies by 1/255, which is rounded twice.
    """
    if pixels.device.type == "cpu":
        return pixels.float().mul_(2).sub_(255).div_(255)
    return levels[pixels.int()]


def send(values: Tensor) -> Tensor:
    """A tensor of a CUDA device on its way to pinned memory."""
    return torch.empty(values.shape, dtype=values.dtype, pin_memory=True).copy_(values, non_blocking=True)


def fetch(values: Tensor) -> Tensor:
    """A tensor of any device and dtype as float32 on the CPU, and of its own: what is cut from another is copied."""
    return values.to("cpu").float().clone(memory_format=torch.contiguous_format)


class CompiledEncoder(torch.nn.Module):
    """A VAE's encoder under torch.compile: one program for single images and one for batches, for all sizes.

    Each is made when it is first needed, which takes a minute or so, and always from empty images of one shape: so
    the programs, and with them the last digits, hardly depend on which images come first.
    """

    SHAPE = (3, 192, 256)  # of unequal sides: torch would make equal ones a condition of the program

    def __init__(self, encoder: torch.nn.Module, layout: torch.memory_format) -> None:
        super().__init__()
        self.layout = layout
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
            return self.encoder(images.contiguous(memory_format=self.layout))
        except TorchDynamoException as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(
                f"--compile: torch.compile fails here ({reason}). It needs a C++ compiler such as g++, on CUDA Triton "
                "too. Install what is missing, or leave --compile out."
            ) from error
