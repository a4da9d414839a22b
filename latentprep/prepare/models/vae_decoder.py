"""Latents -> pixels, through the decoder of a VAE: for a person to look at, never for a cache."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.devices import empty_cache, is_out_of_memory
from latentprep.prepare.models.files import blame
from latentprep.prepare.models.vae_config import keep_decoder
from latentprep.prepare.models.vae_folder import VaeFiles
from latentprep.prepare.models.vaes import image_of

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 2**22  # of an image that is decoded; Stable Diffusion's decoder takes about 10 GB for these


@dataclass(frozen=True, eq=False)
class VaeDecoder:
    """The decoder half of a VAE, in float32 on its device."""

    vae: Any
    device: str
    factor: int
    has_time: bool

    def decode(self, latents: "torch.Tensor") -> np.ndarray:
        """latents [C,h,w], unscaled => [H,W,3] uint8. Raises UserError if it cannot be decoded, or not here."""
        import torch

        height, width = (side * self.factor for side in latents.shape[1:])
        if height * width > MAX_PIXELS:
            raise UserError(f"{width}x{height} is too large to decode, expected at most {MAX_PIXELS:,} pixels")
        try:
            with blame("the VAE cannot decode it"), torch.inference_mode():
                found = image_of(self.vae, latents[None].float().to(self.device), self.has_time)[0]
                pixels = found.float().nan_to_num(nan=-1.0).clamp(-1, 1).add(1).mul(127.5).round().byte()
                decoded: np.ndarray = pixels.permute(1, 2, 0).cpu().numpy()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        else:
            if decoded.shape != (height, width, 3):
                raise UserError(f"the VAE makes {list(decoded.shape)} of it, expected [{height}, {width}, 3]")
            return decoded
        empty_cache()
        raise UserError(f"{width}x{height} does not fit into the memory of {self.device}")


def open_decoder(vae: VaeFiles, where: str, device: str) -> VaeDecoder:
    """Load the decoder of a VAE. Raises UserError if it has none that is known, or memory does not hold it."""
    import torch

    try:
        loaded = vae.load(torch.float32, keep_decoder)
        return VaeDecoder(loaded.eval().requires_grad_(False).to(device), device, vae.factor, vae.has_time)
    except UserError as error:
        raise UserError(f"{shortened(where)}: no decoder can be read of it: {error}") from None
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise UserError(
        f"--device {device}: its memory is too small for the VAE's decoder. Free some of it, or give another."
    )
