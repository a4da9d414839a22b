"""A .safetensors file of weights: its tensors' names and shapes, what it seems to be, and its tensors.

Everything is read through safe_open: the header first, then no tensor but those that are asked for.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.human import printable
from latentprep.prepare.models.files import read_header

if TYPE_CHECKING:
    import torch

Shapes = Mapping[str, tuple[int, ...]]  # name of a tensor -> its shape

SD1, SD2, SDXL = "sd1", "sd2", "sdxl"  # folders of architectures/
TITLES = {SD1: "Stable Diffusion 1.x", SD2: "Stable Diffusion 2.x", SDXL: "Stable Diffusion XL"}
# Width of the cond that a UNet's cross-attention takes -> its architecture.
COND_WIDTHS = {768: SD1, 1024: SD2, 2048: SDXL}
CROSS_ATTENTION = re.compile(r"^model\.diffusion_model\..*\.attn2\.to_k\.weight$")
VAE_PREFIXES = ("first_stage_model.", "vae.", "")
# First layers of VAEs, as diffusers calls them, or the original code of Stable Diffusion, Wan and DC-AE.
FIRST_LAYERS = (
    "encoder.conv_in.weight", "encoder.conv_in.conv.weight", "encoder.layers.0.weight", "encoder.conv1.weight",
    "encoder.project_in.conv.weight",
)  # fmt: skip
VAE_PARTS = re.compile(r"(encoder|quant_conv|conv1)\.|bn\.running_(mean|var)$")  # what encodes, and is hashed
DECODER_PARTS = re.compile(r"(decoder|post_quant_conv|conv2)\.")  # what a preview decodes with
TAESD = ("0.weight", "1.conv.0.weight")  # of an encoder alone in a file, whose layers have numbers and no other name

# What the names of a text encoder's tensors begin with -> the part of a pipeline that it becomes.
TEXT_PREFIXES = {
    "cond_stage_model.transformer.": "text_encoder",  # Stable Diffusion 1.x
    "cond_stage_model.model.": "text_encoder",  # 2.x
    "conditioner.embedders.0.transformer.": "text_encoder",  # XL
    "conditioner.embedders.1.model.": "text_encoder_2",
}
PENULTIMATE = "cond_stage_model.model."  # 2.x takes what the last layer but one gives: the last is left out


@dataclass(frozen=True)
class Kind:
    """What a file seems to be; architecture is one of TITLES where its configs are built in."""

    what: str
    architecture: str | None = None
    needs_config: bool = False  # a checkpoint whose configs are not built in


# What a tensor's name gives away; the first row counts that fits any name in the file.
KINDS = {
    r"^edm_mean$": Kind("a Playground v2.5 checkpoint", SDXL),  # SDXL's names, and latents that are scaled otherwise
    r"^conditioner\.embedders\.1\.model\.": Kind("a Stable Diffusion XL checkpoint", SDXL),
    r"^conditioner\.embedders\.0\.model\.": Kind("a refiner of Stable Diffusion XL"),
    r"^cond_stage_model\.model\.": Kind("a Stable Diffusion 2.x checkpoint", SD2),
    r"^cond_stage_model\.transformer\.": Kind("a Stable Diffusion 1.x checkpoint", SD1),
    r"(^|\.)joint_blocks\.": Kind("a Stable Diffusion 3 checkpoint", needs_config=True),
    r"(^|\.)double_blocks\.|^single_transformer_blocks\.": Kind("a FLUX checkpoint", needs_config=True),
    r"(^|[._])lora_|\.(hada|lokr)_w": Kind("a LoRA"),
    r"^control_model\.|^controlnet_|^input_hint_block\.": Kind("a ControlNet"),
    r"^(emb_params|clip_[lg])$|^string_to_param": Kind("a textual inversion"),
    r"^(input_blocks|down_blocks\.\d+\.(resnets|attentions))\.": Kind("a UNet alone"),
    r"^(text_model|transformer\.resblocks|encoder\.block)\.": Kind("a text encoder alone"),
}


def read_shapes(path: Path, option: str) -> dict[str, tuple[int, ...]]:
    """Shapes of a file's tensors, from its header alone. Raises UserError."""
    return read_header([path], option)


def recognise(shapes: Shapes) -> Kind:
    """What a file seems to be, by its tensors' names and shapes."""
    for pattern, kind in KINDS.items():
        if any(re.search(pattern, name) for name in shapes):
            return kind
    has_vae = vae_prefix(shapes) is not None
    for name, shape in shapes.items():
        if CROSS_ATTENTION.match(name) and shape and shape[-1] in COND_WIDTHS:
            architecture = COND_WIDTHS[shape[-1]]
            return Kind(f"a {TITLES[architecture]} UNet {'and VAE' if has_vae else 'alone'}", architecture)
    if has_vae:
        return Kind("a VAE alone")
    return Kind(f"no model known here ({printable(', '.join(sorted(shapes)[:2])) or 'no tensors'})")


def vae_prefix(shapes: Shapes) -> str | None:
    """What the names of a VAE's tensors begin with; None where there is none."""
    if is_taesd(shapes):
        return ""
    return next((prefix for prefix in VAE_PREFIXES if any(f"{prefix}{name}" in shapes for name in FIRST_LAYERS)), None)


def is_taesd(shapes: Shapes) -> bool:
    """Whether a file is the encoder of a TAESD in its original layout."""
    return all(name in shapes for name in TAESD) and shapes[TAESD[0]][1:] == (3, 3, 3)


def vae_names(shapes: Shapes, parts: re.Pattern[str] = VAE_PARTS) -> dict[str, str]:
    """Name without its prefix -> name in the file, of the VAE's tensors: of its encoder, or other parts."""
    if is_taesd(shapes):
        return {f"encoder.layers.{name}": name for name in shapes}
    prefix = vae_prefix(shapes)
    if prefix is None:
        return {}
    names = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
    return {short: name for short, name in names.items() if parts.match(short)}


def text_parts(shapes: Shapes) -> dict[str, str]:
    """Part of a pipeline -> prefix of its tensors' names, for the text encoders that a file has."""
    return {part: prefix for prefix, part in TEXT_PREFIXES.items() if any(name.startswith(prefix) for name in shapes)}


def text_names(shapes: Shapes, prefix: str, config: dict[str, Any]) -> dict[str, str]:
    """Name without its prefix -> name in the file, of the tensors that a text encoder is loaded from.

    Left out are tensors that are no weights, and layers of Stable Diffusion 2.x beyond the last one that is used.
    """
    names = {name.removeprefix(prefix): name for name in shapes if name.startswith(prefix)}
    if prefix.endswith("transformer."):  # some merged checkpoints leave text_model. out
        names = {"text_model." + short.removeprefix("text_model."): name for short, name in names.items()}
    skipped = [r"(^|\.)(position_ids|logit_scale|attn_mask)$"]
    if prefix == PENULTIMATE:
        skipped += [rf"^transformer\.resblocks\.{config['num_hidden_layers']}\.", r"^text_projection$"]
    return {short: name for short, name in names.items() if not re.search("|".join(skipped), short)}


def read_dtypes(path: Path) -> dict[str, str]:
    """Types of a file's tensors, by the names that safetensors has for them: F16, F8_E4M3."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118


def read_tensors(path: Path, names: Mapping[str, str]) -> "dict[str, torch.Tensor]":
    """The tensors that `names` lists as new name -> name in the file."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        return {new: file.get_tensor(name) for new, name in names.items()}


def hash_tensors(path: Path, names: Mapping[str, str]) -> str:
    """SHA-256 of names, dtypes, shapes and bytes, whatever the file's order and prefixes; one tensor at a time."""
    import torch
    from safetensors import safe_open

    digest = hashlib.sha256()
    with safe_open(path, framework="pt") as file:
        for new in sorted(names):
            tensor = file.get_tensor(names[new])
            digest.update(f"{new} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
