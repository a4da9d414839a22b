"""The VAE of a checkpoint in one .safetensors file, or alone in a file, under the names of its original code.

A file has weights and no configs: these come from architectures/, which the tensors tell, or from a diffusers folder.
Only the tensors of the VAE and of the text encoders are ever read: never the UNet's.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from latentprep.errors import UserError
from latentprep.human import printable, shortened
from latentprep.prepare.models.checkpoint import (
    DECODER_PARTS,
    TITLES,
    VAE_PARTS,
    Shapes,
    hash_tensors,
    read_shapes,
    read_tensors,
    recognise,
    vae_names,
    vae_prefix,
)
from latentprep.prepare.models.files import blame, check_numbers, check_shapes, digest_model
from latentprep.prepare.models.vae_config import build_vae, keep_encoder
from latentprep.prepare.models.vae_folder import (
    STATISTICS,
    Keep,
    VaeFiles,
    fields_of,
    fill,
    give_statistics,
    read_numbers,
    read_vae_config,
    shapes_of,
    statistics_of,
)
from latentprep.prepare.models.vae_layouts import convert_vae

if TYPE_CHECKING:
    import torch

ARCHITECTURES = Path(str(files("latentprep"))) / "prepare" / "models" / "architectures"
EXPECTED = "Expected a checkpoint of Stable Diffusion or FLUX, or a VAE"
LDM_CLASS = "AutoencoderKL"  # what the original code of Stable Diffusion saves


@dataclass(frozen=True, kw_only=True)
class VaeFile(VaeFiles):
    """A VAE in a single file, alone or in a checkpoint."""

    path: Path
    config: dict[str, Any]

    def load(self, dtype: "torch.dtype", keep: Keep = keep_encoder) -> Any:
        """The encoder on the CPU, or what `keep` leaves; only the encoder is in the digest.

        Raises UserError if its tensors are not those that its config asks for.
        """
        vae = build_vae(self.config, str(self.path))
        parts = VAE_PARTS if keep is keep_encoder else DECODER_PARTS
        names = vae_names(read_shapes(self.path, "VAE"), parts)
        tensors = read_tensors(self.path, {new: old for new, old in names.items() if new not in STATISTICS})
        tensors = convert_vae(self.path, tensors, vae)
        keep(vae)
        check_names(self.path, vae, tensors)
        fill(vae, tensors, dtype, str(self.path))
        return vae


def check_names(path: Path, vae: Any, tensors: "Mapping[str, torch.Tensor]") -> None:
    """Raise UserError unless tensors are those that are left of a VAE, by their names."""
    names = vae.state_dict().keys()
    check_loaded(path, "VAE", names - tensors.keys(), tensors.keys() - names)


def find_configs(path: Path, option: str) -> Path | None:
    """The folder of configs that a file goes with, by its tensors; None where they do not tell. Raises UserError."""
    architecture = recognise(read_shapes(path, option)).architecture
    return ARCHITECTURES / architecture if architecture is not None else None


def is_built_in(configs: Path) -> bool:
    return configs.parent == ARCHITECTURES


def open_vae_file(path: Path, option: str, configs: Path | None, norm_eps: float | None = None) -> VaeFile:
    """The VAE of a checkpoint, or that is alone in a file; `configs` is a diffusers folder. Raises UserError.

    norm_eps as in vaes.normalization_of.
    """
    shapes = read_shapes(path, option)
    kind = recognise(shapes)
    if vae_prefix(shapes) is None:
        is_checkpoint = kind.architecture is not None or kind.needs_config
        advice = "Give one with --vae." if is_checkpoint and option != "--vae" else f"{EXPECTED}."
        raise UserError(f"{option} {path}: has no VAE, it seems to be {kind.what}. {advice}")
    if configs is None:
        raise UserError(
            f"{option} {path}: seems to be {kind.what}, whose tensors do not tell its config and scaling_factor. "
            "Give a diffusers folder that has them with --config, or give it as --vae of a --model that has them."
        )
    where, config = read_vae_config(configs, "--config")
    config = add_edm(config, path, shapes, option)
    names = vae_names(shapes)
    vae = build_vae(config, f"--config {where}")
    statistics = statistics_of(vae)
    check_loaded(path, "VAE", statistics.keys() - names.keys(), [])
    check_shapes(statistics, {new: shapes[name] for new, name in names.items()}, str(path), "VAE")
    give_statistics(vae, read_tensors(path, {name: names[name] for name in statistics}), str(path))
    numbers = read_numbers(vae, f"--config {where}", norm_eps)
    if config["_class_name"] == LDM_CLASS:
        found, expected = describe_vae(shapes), describe_config(config)
        if found != expected:
            raise UserError(
                f"{option} {path}: its VAE has {found}, but {expected} in the config of {title_of(configs)}. "
                "Give the folder that it goes with as --config."
            )
    else:
        check_header(path, vae, {new: shapes[name] for new, name in names.items() if new not in STATISTICS})
    hashes = [["tensors", hash_tensors(path, names)]]
    return VaeFile(**fields_of(numbers), digest=digest_model(config, hashes), path=path, config=config)


def check_header(path: Path, vae: Any, shapes: Shapes) -> None:
    """Raise UserError unless tensors of these names and shapes are those of a VAE's encoder; no number is read."""
    import torch

    with blame(f"{path}: the tensors of its VAE are not those of its config"):
        tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    tensors = convert_vae(path, tensors, vae)
    keep_encoder(vae)
    check_names(path, vae, tensors)
    check_shapes(shapes_of(vae.state_dict()), shapes_of(tensors), str(path), "VAE")


def add_edm(config: dict[str, Any], path: Path, shapes: Shapes, option: str) -> dict[str, Any]:
    """A VAE's config with what a file of Playground v2.5 says itself: mean and std of each latent channel.

    The scaling_factor is then 0.5, as diffusers has it (create_vae_diffusers_config_from_ldm). Raises UserError.
    """
    there = [name for name in ("edm_mean", "edm_std") if name in shapes]
    if not there:
        return config
    if len(there) < 2:
        raise UserError(f"{option} {path}: has {there[0]} alone, expected edm_mean and edm_std. Download it again.")
    for name in there:
        if math.prod(shapes[name]) != config.get("latent_channels"):
            raise UserError(
                f"{option} {path}: its {name} is {list(shapes[name])}, expected one number for each of "
                f"{shortened(str(config.get('latent_channels')))} latent channels. Download it again."
            )
    tensors = read_tensors(path, {name: name for name in there})
    check_numbers(tensors, str(path))
    if not bool((tensors["edm_std"] > 0).all()):
        raise UserError(f"{option} {path}: its edm_std has numbers that are not above 0. Download it again.")
    mean, std = (tensors[name].double().flatten().tolist() for name in there)
    return {**config, "latents_mean": mean, "latents_std": std, "scaling_factor": 0.5}


def describe_vae(shapes: Shapes) -> str:
    """The size of an AutoencoderKL, by its tensors; a VAE of another kind is described as having none."""
    prefix = vae_prefix(shapes)
    first = shapes.get(f"{prefix}encoder.conv_in.weight", ())
    last = shapes.get(f"{prefix}encoder.conv_out.weight", ())
    levels = {match[1] for name in shapes if (match := re.match(rf"{prefix}encoder\.down(?:_blocks)?\.(\d+)\.", name))}
    if len(first) != 4 or len(last) != 4:
        return "no layers of an AutoencoderKL"
    return f"{len(levels)} levels of {first[0]} to {last[1]} channels and {last[0] // 2} latent channels"


def describe_config(config: dict[str, Any]) -> str:
    channels = config["block_out_channels"]
    return (
        f"{len(channels)} levels of {channels[0]} to {channels[-1]} channels and "
        f"{config['latent_channels']} latent channels"
    )


def check_loaded(path: Path, part: str, missing: Any, unexpected: Any) -> None:
    """Raise UserError where names were left without weights, or weights without a name."""
    problems = [
        f"{len(names)} {problem}, such as {printable(min(names))}"
        for problem, names in (("missing", missing), ("too many", unexpected))
        if names
    ]
    if problems:
        refuse_weights(path, part, "; ".join(problems))


def refuse_weights(path: Path, part: str, why: str) -> NoReturn:
    raise UserError(f"{path}: the tensors of its {part} are not those of its config ({' '.join(why.split())}).")


def title_of(configs: Path) -> str:
    return TITLES[configs.name] if is_built_in(configs) else str(configs)
