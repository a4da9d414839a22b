"""From the VAE's latents to what a denoiser sees: (latent - shift) * scale, with one number each or one per channel."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Numbers = tuple[float, ...]
SHIFT_LIMIT = 1e6  # of either sign
SCALE_LIMITS = (1e-6, 1e6)


@dataclass(frozen=True)
class Normalization:
    """How latents are shifted and scaled. Raises ValueError for numbers that no VAE has."""

    shift: Numbers  # one number, or one per channel
    scale: Numbers  # the same

    def __post_init__(self) -> None:
        for name, low, high in (("shift", -SHIFT_LIMIT, SHIFT_LIMIT), ("scale", *SCALE_LIMITS)):
            for number in getattr(self, name):
                if not low <= number <= high:  # NaN and infinities too
                    raise ValueError(f"{name} is {number}, expected {low:g} to {high:g}")

    def apply(self, latents: "Tensor") -> "Tensor":
        """[B,C,h,w] float32, unscaled => the same, as the denoiser sees it."""
        return (latents - _spread(self.shift, latents)) * _spread(self.scale, latents)

    def to_json(self) -> dict[str, list[float]]:
        return {"shift": list(self.shift), "scale": list(self.scale)}


def normalization_from_json(data: Any, channels: int) -> Normalization:
    """A Normalization as to_json gave it, for latents of so many channels. Raises ValueError."""
    if not isinstance(data, dict) or data.keys() != {"shift", "scale"}:
        raise ValueError(f"normalization is {data!r:.80}, expected shift and scale")
    for name, numbers in data.items():
        is_list = isinstance(numbers, list) and all(type(number) in (int, float) for number in numbers)
        if not is_list or len(numbers) not in (1, channels):
            raise ValueError(f"normalization.{name} is {numbers!r:.80}, expected 1 or {channels} numbers")
    return Normalization(tuple(data["shift"]), tuple(data["scale"]))


def check_channels(normalization: Normalization, channels: int) -> None:
    """Raise ValueError unless there is one number for all channels, or one for each."""
    for name in ("shift", "scale"):
        if len(getattr(normalization, name)) not in (1, channels):
            raise ValueError(
                f"normalization.{name} has {len(getattr(normalization, name))} numbers, expected 1 or {channels}"
            )


def normalization_of_config(config: Any, channels: int) -> Normalization:
    """What a VAE's config asks for; `config` is diffusers' own, in which defaults are filled in. Raises ValueError.

    As diffusers does: of a VAE with latents_mean and latents_std the shift_factor is not looked at
    (diffusers, pipeline_stable_diffusion_xl.py), of all others it is subtracted, where there is one
    (pipeline_stable_diffusion_3.py, pipeline_flux.py).
    """
    factor = _number("scaling_factor", config["scaling_factor"])
    if not SCALE_LIMITS[0] <= factor <= SCALE_LIMITS[1]:
        raise ValueError(f"scaling_factor is {factor}, expected {SCALE_LIMITS[0]:g} to {SCALE_LIMITS[1]:g}")
    shift = config.get("shift_factor")
    shift = 0.0 if shift is None else _number("shift_factor", shift)
    if not abs(shift) <= SHIFT_LIMIT:
        raise ValueError(f"shift_factor is {shift}, expected {-SHIFT_LIMIT:g} to {SHIFT_LIMIT:g}")
    means, stds = config.get("latents_mean"), config.get("latents_std")
    if means is None and stds is None:
        return Normalization((shift,), (factor,))
    means, stds = _numbers("latents_mean", means, channels), _numbers("latents_std", stds, channels)
    for std in stds:
        if not 0 < std <= SHIFT_LIMIT:
            raise ValueError(f"latents_std has {std}, expected numbers above 0")
    return Normalization(means, tuple(factor / std for std in stds))


def _numbers(name: str, values: Any, channels: int) -> Numbers:
    if not isinstance(values, (list, tuple)) or len(values) != channels:
        raise ValueError(f"{name} is {values!r:.80}, expected {channels} numbers, one per channel")
    return tuple(_number(name, value) for value in values)


def _number(name: str, value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError(f"{name} is {value!r:.80}, expected a number")
    return float(value)


def _spread(numbers: Numbers, latents: "Tensor") -> "Tensor | float":
    """One number as it is, several as [C,1,1] float32 on the device of the latents."""
    if len(numbers) == 1:
        return numbers[0]
    import torch

    return torch.tensor(numbers, dtype=torch.float32, device=latents.device)[:, None, None]
