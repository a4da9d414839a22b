"""Loss weights of a batch: alpha as it is stored, with a floor, or rescaled."""

import torch
from torch import Tensor

from latentprep.read.rows import OpenRows


def take_weight(rows: OpenRows, use_weight: bool | str | float) -> Tensor:
    """[B,1,h,w] float32. use_weight: True rescales, "raw" is alpha in 0..1, a number is the minimum weight."""
    weight = rows.take("weight")[:, None].float()
    if use_weight is True:
        return rescale_weight(weight)
    return weight if use_weight == "raw" else weight.clamp(min=float(use_weight))


def rescale_weight(weight: Tensor) -> Tensor:
    """Weight maps [B,1,h,w] with a minimum of 0 and a mean of 1 each; ones where a map is constant.

    stable-diffusion-webui's rule, which divided by zero for constant maps.
    """
    weight = weight - weight.amin(dim=(1, 2, 3), keepdim=True)
    mean = weight.mean(dim=(1, 2, 3), keepdim=True)
    return torch.where(mean > 0, weight / mean.clamp(min=torch.finfo(weight.dtype).tiny), torch.ones_like(weight))
