"""Names that the tensors of a VAE have in files of its original code -> those of diffusers.

The conversions are diffusers' own, where the library has one. They are of encoders; a decoder is read for a preview, if
its names are known here too.
"""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.prepare.models.files import blame, class_of, rename_attention

if TYPE_CHECKING:
    import torch

    Tensors = dict[str, torch.Tensor]

Convert = Callable[["Tensors", Mapping[str, Any]], "Tensors"]  # tensors and config -> tensors under diffusers' names

HUNYUAN_NAMES = {
    r"^encoder\.mid\.block_(\d)\.": lambda match: f"encoder.mid_block.resnets.{int(match[1]) - 1}.",
    r"^encoder\.mid\.attn_1\.([qkv])\.": r"encoder.mid_block.attentions.0.to_\1.",
    r"^encoder\.mid\.attn_1\.proj_out\.": "encoder.mid_block.attentions.0.proj.",
    r"^encoder\.mid\.attn_1\.": "encoder.mid_block.attentions.0.",
}
WAN_2_2_NAMES = {
    r"^(encoder\.down_blocks\.\d+)\.downsamples\.\d+\.(resample|time_conv)\.": r"\1.downsampler.\2.",
    r"^(encoder\.down_blocks\.\d+)\.downsamples\.(\d+)\.": r"\1.resnets.\2.",
}


def diffusers_function(name: str) -> Callable[..., Any]:
    """A function of diffusers that converts. Raises UserError if this diffusers has none."""
    import diffusers
    from diffusers.loaders import single_file_utils

    found: Callable[..., Any] | None = class_of(single_file_utils, name)
    if found is None:
        raise UserError(
            f"--vae: the names of its tensors need {name}, which diffusers {diffusers.__version__} does not have. "
            "Upgrade diffusers, or give the VAE as a folder."
        )
    return found


def convert_ldm(tensors: "Tensors", config: Mapping[str, Any]) -> "Tensors":
    """Of Stable Diffusion and FLUX.1."""
    converted: Tensors = diffusers_function("convert_ldm_vae_checkpoint")(tensors, config)
    return converted


def convert_flux2(tensors: "Tensors", config: Mapping[str, Any]) -> "Tensors":
    """Of FLUX.2: those of FLUX.1, and a convolution within encoder and decoder (convert_flux2_to_diffusers.py)."""
    inner = r"^(?:encoder|decoder)\.((?:post_)?quant_conv\.)"
    return convert_ldm({re.sub(inner, r"\1", name): tensor for name, tensor in tensors.items()}, config)


def convert_hunyuan(tensors: "Tensors", config: Mapping[str, Any]) -> "Tensors":
    """Of HunyuanImage 2.1, whose levels diffusers lays end to end (convert_hunyuan_image_to_diffusers.py)."""
    layer = re.compile(r"^encoder\.down\.(\d+)\.(?:block\.(\d+)|downsample(?=\.conv\.))\.")
    found = {match[0]: match for name in tensors if (match := layer.match(name))}
    last = len(tensors)  # behind the blocks of its level
    order = sorted(found, key=lambda name: (int(found[name][1]), int(found[name][2] or last)))
    places = {name: f"encoder.down_blocks.{place}." for place, name in enumerate(order)}
    converted = {}
    for name, tensor in tensors.items():
        match = layer.match(name)
        new = places[match[0]] + name.removeprefix(match[0]) if match else rename(name, HUNYUAN_NAMES)
        converted[new] = tensor.squeeze(2) if tensor.ndim == 5 else tensor
    return converted


def convert_wan(tensors: "Tensors", config: Mapping[str, Any]) -> "Tensors":
    """Of Wan 2.1, Qwen-Image, and Wan 2.2, of which diffusers' function leaves the blocks within its levels."""
    converted: Tensors = diffusers_function("convert_wan_vae_to_diffusers")(tensors)
    return {rename(name, WAN_2_2_NAMES): tensor for name, tensor in converted.items()}


def convert_dc(tensors: "Tensors", config: Mapping[str, Any]) -> "Tensors":
    """Of DC-AE, the VAE of SANA."""
    converted: Tensors = diffusers_function("convert_autoencoder_dc_checkpoint_to_diffusers")(dict(tensors))
    return converted


# Class of diffusers -> names that tell that its tensors are named as its original code has them, and what is done.
# Decoders of the others are not known here.
LAYOUTS: dict[str, tuple[tuple[str, ...], Convert]] = {
    "AutoencoderKL": (("encoder.down.", "decoder.up."), convert_ldm),
    "AutoencoderKLFlux2": (("encoder.down.", "decoder.up."), convert_flux2),
    "AutoencoderKLHunyuanImage": (("encoder.down.",), convert_hunyuan),
    "AutoencoderKLWan": (("encoder.downsamples.",), convert_wan),
    "AutoencoderKLQwenImage": (("encoder.downsamples.",), convert_wan),
    "AutoencoderDC": (("encoder.stages.",), convert_dc),
}


def rename(name: str, table: Mapping[str, Any]) -> str:
    """A name after the first pattern that fits it."""
    for pattern, new in table.items():
        renamed, count = re.subn(pattern, new, name)
        if count:
            return renamed
    return name


def convert_vae(path: Path, tensors: "Tensors", vae: Any) -> "Tensors":
    """The tensors of a file under the names that they have in `vae`, which its config has made. Raises UserError."""
    begins, convert = LAYOUTS.get(type(vae).__name__, ((), None))
    if convert is not None and any(name.startswith(begins) for name in tensors):
        problem = f"{path}: the tensors of its VAE are not those of its config"
        with blame(problem):
            converted = convert(tensors, vae.config)
        if len(converted) < len(tensors):
            raise UserError(f"{problem} ({len(tensors) - len(converted)} of no layer that diffusers knows).")
        tensors = converted
    return {rename_attention(name): tensor for name, tensor in tensors.items()}
