"""Checkpoints in one .safetensors file, in the layout of the original code (LDM): Stable Diffusion 1.x, 2.x and XL.

A file has weights and no configs: these come from architectures/, which the tensors tell, or from a diffusers folder.
Only the tensors of the VAE and of the text encoders are ever read: never the UNet's. The conversion is diffusers' own.
"""

import math
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, NoReturn

from latentprep.errors import UserError
from latentprep.human import printable, shortened
from latentprep.prepare.models.checkpoint import (
    TITLES,
    Shapes,
    hash_tensors,
    read_shapes,
    read_tensors,
    recognise,
    text_names,
    text_parts,
    vae_names,
    vae_prefix,
)
from latentprep.prepare.models.clip_tokenizer import MERGES, load_tokenizer
from latentprep.prepare.models.families import find_family, tokenizer_of
from latentprep.prepare.models.files import blame, check_sizes, digest_model, hash_files, read_json, rename_attention
from latentprep.prepare.models.load_text import (
    KINDS,
    check_class,
    check_encoder,
    check_text_config,
    check_tokenizer,
    load_encoder,
    load_tokenizer_of,
    make_pipeline,
)
from latentprep.prepare.models.text_folder import TextFiles, text_numbers
from latentprep.prepare.models.vae_config import build_vae, keep_encoder
from latentprep.prepare.models.vae_folder import VaeFiles, fields_of, fill, read_numbers, read_vae_config

if TYPE_CHECKING:
    import torch
    from transformers import CLIPTextModel

ARCHITECTURES = Path(str(files("latentprep"))) / "prepare" / "models" / "architectures"
EXPECTED = "Expected a Stable Diffusion 1.x, 2.x or XL checkpoint, or a VAE"
PIPELINES_OF_PARTS = {
    ("text_encoder",): "StableDiffusionPipeline",
    ("text_encoder", "text_encoder_2"): "StableDiffusionXLPipeline",
}
VAE_CLASS = "AutoencoderKL"  # the one that the original code saves
TEXT_CLASSES = ("CLIPTextModel", "CLIPTextModelWithProjection")


@dataclass(frozen=True, kw_only=True)
class VaeFile(VaeFiles):
    """A VAE in a single file, alone or in a checkpoint."""

    path: Path
    config: dict[str, Any]

    def load(self, dtype: "torch.dtype") -> Any:
        """The encoder on the CPU. Raises UserError if its tensors are not those that its config asks for."""
        from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

        tensors = read_tensors(self.path, vae_names(read_shapes(self.path, "VAE")))
        if any(name.startswith("encoder.down.") for name in tensors):
            with blame(f"{self.path}: the tensors of its VAE are not those of its config"):
                converted = convert_ldm_vae_checkpoint(tensors, self.config)
            if len(converted) < len(tensors):
                _refuse_weights(self.path, "VAE", f"{len(tensors) - len(converted)} of no layer that diffusers knows")
            tensors = converted
        tensors = {rename_attention(name): tensor for name, tensor in tensors.items()}
        vae = keep_encoder(build_vae(self.config, str(self.path)))
        names = vae.state_dict().keys()
        _check_loaded(self.path, "VAE", names - tensors.keys(), tensors.keys() - names)
        fill(vae, tensors, dtype, str(self.path))
        return vae


@dataclass(frozen=True)
class TextFile(TextFiles):
    """The text encoders of a checkpoint, and the folder of their configs and tokenizers."""

    path: Path
    configs: Path

    def load_pipeline(self, dtype: "torch.dtype") -> Any:
        """A pipeline on the CPU of which there is what encode_prompt needs. Raises UserError like VaeFile.load."""
        shapes = read_shapes(self.path, "text encoder")
        parts: dict[str, Any] = {}
        for part, prefix in text_parts(shapes).items():
            parts[part] = load_text_encoder(self.path, shapes, prefix, self.configs / part, dtype)
            parts[tokenizer_of(part)] = self._load_tokenizer(part)
        return make_pipeline(self.family, parts)

    def check(self) -> None:
        """Raise UserError for configs and tokenizers that would fail when they are loaded."""
        for part in text_parts(read_shapes(self.path, "text encoder")):
            config = read_text_config(self.configs / part)
            check_encoder(config["architectures"][0], config, {}, self.configs / part, part)
            self._load_tokenizer(part)

    def _load_tokenizer(self, part: str) -> Any:
        folder = self.configs / tokenizer_of(part)
        if is_built_in(self.configs):
            return load_tokenizer(folder)
        index = read_json(self.configs / "model_index.json", "--config")
        kind = check_class(index, folder.name, KINDS[TEXT_CLASSES[0]].tokenizers, f"--config {self.configs}")
        check_tokenizer(folder, TEXT_CLASSES[0], "--config")
        return load_tokenizer_of(folder, kind, read_text_config(self.configs / part)["vocab_size"])


def find_configs(path: Path, option: str) -> Path | None:
    """The folder of configs that a file goes with, by its tensors; None where they do not tell. Raises UserError."""
    architecture = recognise(read_shapes(path, option)).architecture
    return ARCHITECTURES / architecture if architecture is not None else None


def is_built_in(configs: Path) -> bool:
    return configs.parent == ARCHITECTURES


def open_vae_file(path: Path, option: str, configs: Path | None) -> VaeFile:
    """The VAE of a checkpoint, or that is alone in a file; `configs` is a diffusers folder. Raises UserError."""
    shapes = read_shapes(path, option)
    kind = recognise(shapes)
    if vae_prefix(shapes) is None:
        advice = "Give one with --vae." if kind.architecture and option != "--vae" else f"{EXPECTED}."
        raise UserError(f"{option} {path}: has no VAE, it seems to be {kind.what}. {advice}")
    if configs is None:
        raise UserError(
            f"{option} {path}: seems to be {kind.what}, whose tensors do not tell its config and scaling_factor. "
            "Give a diffusers folder that has them with --config, or give it as --vae of a --model that has them."
        )
    where, config = read_vae_config(configs, "--config", (VAE_CLASS,))
    config = add_edm(config, path, shapes, option)
    numbers = read_numbers(build_vae(config, f"--config {where}"), f"--config {where}")
    found, expected = describe_vae(shapes), describe_config(config)
    if found != expected:
        raise UserError(
            f"{option} {path}: its VAE has {found}, but {expected} in the config of {_name(configs)}. "
            "Give the folder that it goes with as --config."
        )
    hashes = [["tensors", hash_tensors(path, vae_names(shapes))]]
    return VaeFile(**fields_of(numbers), digest=digest_model(config, hashes), path=path, config=config)


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


def open_text_file(path: Path, option: str, configs: Path | None) -> TextFile:
    """The text encoders of a checkpoint; `configs` is a diffusers folder with tokenizers too. Raises UserError."""
    shapes = read_shapes(path, option)
    kind, parts = recognise(shapes), text_parts(shapes)
    family = find_family(PIPELINES_OF_PARTS.get(tuple(parts)))
    if family is None:
        lacks = f"of its text encoders only {', '.join(parts)}" if parts else "no text encoder"
        raise UserError(
            f"{option} {path}: has {lacks}, it seems to be {kind.what}. "
            "Give a checkpoint or a pipeline folder that has them, or --no-cond."
        )
    if configs is None:
        raise UserError(
            f"{option} {path}: seems to be {kind.what}. Give its diffusers folder as --config, or --no-cond."
        )
    index = read_json(configs / "model_index.json", "--config")
    wanted = tuple(sorted(part for part in index if part.startswith("text_encoder") and index[part] != [None, None]))
    if wanted != tuple(parts):
        raise UserError(
            f"{option} {path}: has {' and '.join(parts)}, but {' and '.join(wanted) or 'none'} in {configs}. "
            "Give the folder that it goes with as --config."
        )
    encoders = {part: read_text_config(configs / part) for part in parts}
    names = {part: text_names(shapes, prefix, encoders[part]) for part, prefix in parts.items()}
    for part, config in encoders.items():
        found, expected = vocabulary_shape(shapes, names[part]), (config["vocab_size"], config["hidden_size"])
        if found != expected:
            raise UserError(
                f"{option} {path}: the token_embedding of its {part} is {list(found)}, but {list(expected)} in the "
                f"config of {_name(configs)}. Give the folder that it goes with as --config."
            )
    hashes = [[part, hash_tensors(path, names[part])] for part in parts]
    vocabularies = sorted(file for file in configs.glob("tokenizer*/*") if file.is_file())
    if not vocabularies:
        raise UserError(f"--config {configs}: has no tokenizer folder. Complete it, or --no-cond.")
    hashes += hash_files([*vocabularies, MERGES] if is_built_in(configs) else vocabularies)
    digest = digest_model([family.pipeline, *encoders.values()], hashes)
    return TextFile(
        digest,
        family,
        **text_numbers(family, family.classes, encoders, configs, "--config"),
        path=path,
        configs=configs,
    )


def vocabulary_shape(shapes: Shapes, names: dict[str, str]) -> tuple[int, ...]:
    """(tokens, width) of a text encoder, by its tensors."""
    return next((shapes[name] for short, name in names.items() if short.endswith("token_embedding.weight")), ())


def read_text_config(folder: Path) -> dict[str, Any]:
    """The config of a CLIP text encoder. Raises UserError."""
    config = read_json(folder / "config.json", "--config")
    kind = config.get("architectures")
    if kind not in [[name] for name in TEXT_CLASSES]:
        raise UserError(f"--config {folder}: is {kind}, expected {' or '.join(TEXT_CLASSES)}.")
    check_sizes(config, ("vocab_size", "hidden_size", "num_hidden_layers"), folder, "--config")
    check_text_config(config, folder, "--config")
    return config


def load_text_encoder(path: Path, shapes: Shapes, prefix: str, configs: Path, dtype: "torch.dtype") -> "CLIPTextModel":
    """A text encoder of a checkpoint, on the CPU. Raises UserError like VaeFile.load."""
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    config = read_text_config(configs)
    tensors = read_tensors(path, text_names(shapes, prefix, config))
    (kind,) = config["architectures"]
    with blame(f"{path}: the tensors of its {configs.name} are not those of its config"):
        if prefix.endswith("model."):  # OpenCLIP's names; of the first argument only config.hidden_size is read
            sizes = SimpleNamespace(config=SimpleNamespace(hidden_size=config["hidden_size"]))
            tensors = convert_open_clip_checkpoint(sizes, tensors, prefix="")
    model, info = load_encoder(
        kind, config, tensors, dtype, f"{path}: the tensors of its {configs.name} are not those of its config"
    )
    _check_loaded(path, configs.name, info["missing_keys"], info["unexpected_keys"])
    return model


def _check_loaded(path: Path, part: str, missing: Any, unexpected: Any) -> None:
    """Raise UserError where names were left without weights, or weights without a name."""
    problems = [
        f"{len(names)} {problem}, such as {printable(min(names))}"
        for problem, names in (("missing", missing), ("too many", unexpected))
        if names
    ]
    if problems:
        _refuse_weights(path, part, "; ".join(problems))


def _refuse_weights(path: Path, part: str, why: str) -> NoReturn:
    raise UserError(f"{path}: the tensors of its {part} are not those of its config ({' '.join(why.split())}).")


def _name(configs: Path) -> str:
    return TITLES[configs.name] if is_built_in(configs) else str(configs)
