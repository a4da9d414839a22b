"""From the VAE's latents to what a denoiser sees: (patchify(latent) - shift) * scale.

With one shift and scale for all channels, or one per channel after patching.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Numbers = tuple[float, ...]
SHIFT_LIMIT = 1e6  # of either sign
SCALE_LIMITS = (1e-6, 1e6)
PATCHES = (1, 2)


@dataclass(frozen=True)
class Normalization:
    """How latents are patched, shifted and scaled. Raises ValueError for numbers that no VAE has."""

    shift: Numbers  # one number, or one per channel of what the denoiser sees
    scale: Numbers  # the same
    patch: int = 1  # patch x patch latent pixels become one pixel with patch * patch times as many channels

    def __post_init__(self) -> None:
        if self.patch not in PATCHES:
            raise ValueError(f"patch is {self.patch}, expected {' or '.join(map(str, PATCHES))}")
        for name, low, high in (("shift", -SHIFT_LIMIT, SHIFT_LIMIT), ("scale", *SCALE_LIMITS)):
            for number in getattr(self, name):
                if not low <= number <= high:  # NaN and infinities too
                    raise ValueError(f"{name} is {number}, expected {low:g} to {high:g}")

    def apply(self, latents: "Tensor", in_place: bool = False) -> "Tensor":
        """[B,C,h,w] float32, unscaled => [B,C*patch*patch,h/patch,w/patch] float32, as the denoiser sees it.

        in_place: the latents may be overwritten.

        A single scale is multiplied. With one scale for each channel the code divides by 1 / scale, as pipelines divide
        by the std of each channel (diffusers, pipeline_flux2.py): so the result is theirs to the bit.
        """
        found = patchify(latents, self.patch)
        if not in_place:
            found = found.clone()
        if any(self.shift):
            found -= _spread(self.shift, latents)
        if len(self.scale) == 1:
            found *= self.scale[0]
        else:
            found /= _spread(tuple(1 / number for number in self.scale), latents)
        return found

    def patch_weight(self, weight: "Tensor", channels: int) -> "Tensor":
        """Loss weights [B,1,h,w] => in a shape that can be multiplied with what the denoiser sees.

        Without patches: [B,1,h,w], unchanged. With patches: [B,C*patch*patch,h/patch,w/patch]; C: `channels`, those of
        the latents.
        """
        return weight if self.patch == 1 else patchify(weight.expand(-1, channels, -1, -1), self.patch)

    def to_json(self) -> dict[str, Any]:
        return {"patch": self.patch, "shift": list(self.shift), "scale": list(self.scale)}


def patchify(latents: "Tensor", patch: int) -> "Tensor":
    """[B,C,h,w] => [B,C*patch*patch,h/patch,w/patch], in the order of FLUX.2 (Flux2Pipeline._patchify_latents)."""
    if patch == 1:
        return latents
    parts = latents.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # [B,C,h/p,p,w/p,p]
    return parts.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def check_channels(normalization: Normalization, channels: int) -> None:
    """Raise ValueError unless there is one number for all channels, or one for each of what the denoiser sees."""
    channels *= normalization.patch**2
    for name in ("shift", "scale"):
        count = len(getattr(normalization, name))
        if count not in (1, channels):
            raise ValueError(f"normalization.{name} has {count} numbers, expected 1 or {channels}")


def normalization_of_config(config: Any, channels: int) -> Normalization:
    """The normalization of a VAE's config; `config` is diffusers' own object, which has all defaults.

    As in diffusers: if a VAE has latents_mean and latents_std, its shift_factor is ignored
    (pipeline_stable_diffusion_xl.py). Otherwise the shift_factor, if there is one, is subtracted
    (pipeline_stable_diffusion_3.py, pipeline_flux.py). Raises ValueError for numbers that no VAE has.
    """
    factor = _number("scaling_factor", config.get("scaling_factor", 1.0))  # some classes have none
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
