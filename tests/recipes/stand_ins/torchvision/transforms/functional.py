"""The same as functions."""

from PIL import Image
from torch import Tensor

from torchvision.transforms import CenterCrop, InterpolationMode, Normalize, ToTensor, resample


def resize(image: Image.Image, size: list[int], interpolation: InterpolationMode) -> Image.Image:
    return image.resize((size[1], size[0]), resample(interpolation))


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    return CenterCrop(size[0])(image)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


def to_tensor(image: Image.Image) -> Tensor:
    return ToTensor()(image)


def normalize(pixels: Tensor, mean: list[float], std: list[float]) -> Tensor:
    return Normalize(mean, std)(pixels)
