"""stable-diffusion-webui's kind of model behind the interface of a diffusers VAE, and the autocast that it runs in."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from latentprep.cache.normalization import Normalization
from latentprep.errors import UserError
from latentprep.personalized.fingerprint import PROBE_SIDE, tensors_of
from latentprep.prepare.models.vaes import Numbers

HALVES = (torch.float16, torch.bfloat16)
Autocast = Callable[[], AbstractContextManager[Any]]


class FirstStage:
    """stable-diffusion-webui's kind of model, with the interface of a diffusers VAE.

    Its VAE in half precision takes float32 images, under autocast, as the ancestor called it.
    """

    dtype = torch.float32  # of the images that it takes

    def __init__(self, model: Any, module: torch.nn.Module | None, autocast: Autocast) -> None:
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
