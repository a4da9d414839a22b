"""A VAE on a device, as a recipe asks for it."""

from typing import TYPE_CHECKING

from latentprep.cache.schema import TORCH_DTYPES
from latentprep.errors import UserError
from latentprep.prepare.devices import is_out_of_memory
from latentprep.recipe import LatentsRecipe

if TYPE_CHECKING:
    from latentprep.prepare.models.doors import ImageEncoder, VaeModel


def open_encoder(vae: "VaeModel", recipe: LatentsRecipe, device: str, compile: bool = False) -> "ImageEncoder":  # noqa: A002
    """Load a VAE. Raises UserError if the device's memory does not hold it."""
    import torch

    try:
        return vae.open(torch.device(device), TORCH_DTYPES[recipe.dtype], tiling=recipe.tiling, compile=compile)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    raise UserError(f"--device {device}: its memory is too small for the VAE. Free some of it, or give another device.")
