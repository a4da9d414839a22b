"""Where models come from: a hub id, a diffusers folder, a single file, or the built-in `tiny`.

Finds them and reads the configs of folders, as single_file.py does of files; weights are loaded once a run needs them.
"""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentprep.config import digest_of
from latentprep.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL, DiffusionPipeline

TINY = "tiny"
VAE_WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
WEIGHTS = {"vae": VAE_WEIGHTS, **dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), TEXT_WEIGHTS)}
SINGLE_FILE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")
# Of a hub repository only these are downloaded: no UNet, no pickles, no second precision. A transformer's config alone
# says how wide the cond of a text encoder is that was left out (Stable Diffusion 3 without T5).
HUB_FILES = [
    "model_index.json",
    "transformer/config.json",
    "tokenizer*/*",
    *(
        folder + name
        for folder, weights in (("", VAE_WEIGHTS), ("vae/", VAE_WEIGHTS), ("text_encoder*/", TEXT_WEIGHTS))
        for name in (
            "config.json",
            f"{weights}.safetensors",
            f"{weights}.safetensors.index.json",
            f"{weights}-*-of-*.safetensors",
        )
    ),
]
# Pipeline class -> names of what its encode_prompt returns, in order; None is not kept (the negative prompt's).
PIPELINES: dict[str, tuple[str | None, ...]] = {
    "StableDiffusionPipeline": ("prompt_embeds", None),
    "StableDiffusionXLPipeline": ("prompt_embeds", None, "pooled_prompt_embeds", None),
}
# Of a pipeline these are not needed to encode prompts.
PARTS_LEFT_OUT = ("unet", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder")
# Says nothing about the numbers, and changes when a model is merely saved again.
CONFIG_NOISE = frozenset("_name_or_path _diffusers_version transformers_version torch_dtype dtype _commit_hash".split())


@dataclass(frozen=True)
class VaeFacts:
    """What a plan must know of a VAE."""

    digest: str  # of weights and config
    factor: int  # pixels per latent, each way
    latent_channels: int
    scaling_factor: float
    shift_factor: float


class VaeSource(Protocol):
    """Where a VAE's weights are: a folder or a single file."""

    def load(self, dtype: "torch.dtype") -> "AutoencoderKL": ...


@dataclass(frozen=True)
class VaeFolder(VaeFacts):
    """A folder with an AutoencoderKL's config.json and weights."""

    path: Path

    def load(self, dtype: "torch.dtype") -> "AutoencoderKL":
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.path, use_safetensors=True, torch_dtype=dtype)


@dataclass(frozen=True)
class TextFacts:
    """What a plan must know of a text encoder."""

    digest: str  # of weights, configs and tokenizers
    max_tokens: int
    width: int  # values per token, all encoders together


class TextSource(Protocol):
    """Where text encoders and tokenizers are: a pipeline folder or a single file."""

    @property
    def pipeline(self) -> str: ...

    def load_pipeline(self, dtype: "torch.dtype") -> "DiffusionPipeline": ...


@dataclass(frozen=True)
class TextFolder(TextFacts):
    """A pipeline folder whose text encoders and tokenizers are to be used."""

    path: Path
    pipeline: str  # class name in model_index.json

    def load_pipeline(self, dtype: "torch.dtype") -> "DiffusionPipeline":
        from diffusers import DiffusionPipeline

        left_out: dict[str, Any] = dict.fromkeys(PARTS_LEFT_OUT)
        return DiffusionPipeline.from_pretrained(self.path, use_safetensors=True, torch_dtype=dtype, **left_out)


def find_model(
    name: str,
    option: str = "--model",
    say: Callable[[str], None] = lambda line: None,
    revision: str | None = None,
) -> Path:
    """The local folder or single file of a model. Raises UserError.

    Downloads a hub id that is not here yet, and says so; `revision` is its branch, tag or commit.
    """
    path = Path(str(files("latentprep"))) / "tiny" if name == TINY else Path(name).expanduser()
    if revision is not None and path.exists():
        raise UserError(f"--revision {revision}: is for models of the hub, and {option} {name} is on this machine.")
    if path.is_dir():
        return path
    if path.is_file():
        _check_single_file(path, name, option)
        return path
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(
            f"{option} {name}: no such folder or file. "
            "Give a diffusers folder, a .safetensors checkpoint, a hub id such as owner/name, or tiny."
        )
    return _find_on_hub(name, option, say, revision)


def _check_single_file(path: Path, name: str, option: str) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{option} {name}: a pickle, and loading one can run any code, so it is not loaded. In a program that you "
            "trust, save its tensors as .safetensors, or make a folder of it with diffusers' "
            "convert_original_stable_diffusion_to_diffusers.py --to_safetensors."
        )
    if suffix != SINGLE_FILE:
        raise UserError(
            f"{option} {name}: a file of another kind, expected a .safetensors checkpoint, a folder in diffusers "
            "layout, or a hub id such as owner/name."
        )


def commit_of(path: Path) -> str | None:
    """The commit that a model of the hub's cache stands at; None for other folders and files."""
    return path.name if path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", path.name) else None


def _find_on_hub(name: str, option: str, say: Callable[[str], None], revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f" --revision {revision}" if revision is not None else ""
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, local_files_only=True))
        if _is_complete(folder):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass  # nothing of it is here
    try:
        say(f"download {name}{asked} from the hub: VAE, text encoder and tokenizer")
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES))
    except GatedRepoError:
        reason = (
            f"access is gated. Accept its terms on the hub and run: hf auth login; or point {option} at a local folder."
        )
    except RevisionNotFoundError:
        reason = "the hub's model has no such branch, tag or commit."
    except RepositoryNotFoundError:
        reason = f"the hub has no such model. Check the name, or point {option} at a local folder."
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        reason = (
            f"not on this machine, and the hub cannot be reached. Download it where there is a network (hf download "
            f"{name}{asked}), point {option} at a diffusers folder, or try latentprep out with --model tiny."
        )
    raise UserError(f"{option} {name}{asked}: {reason}")


def _is_complete(folder: Path) -> bool:
    """Whether a download of HUB_FILES came to its end: a folder of the hub's cache may hold a part of them."""
    if not (folder / "model_index.json").is_file():
        return _has_weights(folder, VAE_WEIGHTS)
    index = read_json(folder / "model_index.json", "--model")
    parts = {name for name, kind in index.items() if isinstance(kind, list) and kind != [None, None]}
    return all(_has_weights(folder / part, WEIGHTS[part]) for part in WEIGHTS.keys() & parts) and (
        "transformer" not in parts or (folder / "transformer" / "config.json").is_file()
    )


def _has_weights(folder: Path, stem: str) -> bool:
    """Whether a model's safetensors are all there, in one file or in the several that its index names."""
    if (folder / f"{stem}.safetensors").is_file():
        return True
    index = folder / f"{stem}.safetensors.index.json"
    names = set(read_json(index, "--model").get("weight_map", {}).values()) if index.is_file() else set()
    return bool(names) and all((folder / name).is_file() for name in names)


def open_vae(folder: Path, option: str = "--model") -> VaeFolder:
    """The VAE of a pipeline folder or of a VAE-only folder. Raises UserError."""
    path, config = read_vae_config(folder, option)
    digest = digest_model(config, hash_files(_weights(path, VAE_WEIGHTS, option)))
    return VaeFolder(digest, *vae_numbers(config), path)


def read_vae_config(folder: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Where in a pipeline folder or VAE-only folder the VAE is, and its config. Raises UserError."""
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(path / "config.json", option)
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"{option} {path}: its VAE is {kind}, expected AutoencoderKL.")
    check_keys(config, ("block_out_channels", "latent_channels"), path, option)
    return path, config


def vae_numbers(config: dict[str, Any]) -> tuple[int, int, float, float]:
    """factor, latent_channels, scaling_factor, shift_factor of VaeFacts, from an AutoencoderKL's config."""
    return (
        2 ** (len(config["block_out_channels"]) - 1),
        config["latent_channels"],
        float(config.get("scaling_factor") or 1.0),
        float(config.get("shift_factor") or 0.0),
    )


def open_text(folder: Path, option: str = "--model") -> TextFolder:
    """The text encoders of a pipeline folder. Raises UserError."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{option} {folder}: has no model_index.json, so no text encoder. Give a pipeline folder, or --no-cond."
        )
    pipeline = read_json(folder / "model_index.json", option).get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(
            f"{option} {folder}: a {pipeline}, expected {' or '.join(PIPELINES)}. Or encode with --no-cond."
        )
    encoders = sorted(path for path in folder.glob("text_encoder*") if path.is_dir())
    tokenizers = sorted(path for path in folder.glob("tokenizer*") if path.is_dir())
    if not encoders or not tokenizers:
        raise UserError(f"{option} {folder}: has no text_encoder and tokenizer folders. Complete it, or --no-cond.")
    configs = [read_json(path / "config.json", option) for path in encoders]
    weights = [file for path in encoders for file in _weights(path, TEXT_WEIGHTS, option)]
    vocabularies = sorted(file for path in tokenizers for file in path.iterdir() if file.is_file())
    digest = digest_model([pipeline, *configs], hash_files(weights + vocabularies))
    return TextFolder(digest, *text_numbers(configs), folder, pipeline)


def text_numbers(configs: list[dict[str, Any]]) -> tuple[int, int]:
    """max_tokens and width of TextFacts, from the text encoders' configs."""
    return (
        max(config.get("max_position_embeddings", 77) for config in configs),
        sum(config.get("hidden_size", 768) for config in configs),
    )


def read_json(path: Path, option: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{option} {path.parent}: not a diffusers folder, it has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {path} cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{option}: {path} is not a JSON object.")
    return value


def check_keys(config: dict[str, Any], names: tuple[str, ...], path: Path, option: str) -> None:
    """Raise UserError where a config.json lacks what must be known of a model."""
    for name in names:
        if name not in config:
            raise UserError(f"{option} {path}: its config.json has no {name}. Save the model again.")


def _weights(path: Path, stem: str, option: str) -> list[Path]:
    """The safetensors files that from_pretrained would load from a folder."""
    whole = path / f"{stem}.safetensors"
    found = [whole] if whole.is_file() else sorted(path.glob(f"{stem}-*-of-*.safetensors"))
    if not found:
        others = [p.name for p in path.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".safetensors")]
        raise UserError(
            f"{option} {path}: no {stem}.safetensors (found {', '.join(sorted(others)) or 'no weights'}). "
            "Save the model again with save_pretrained; pickled weights are not loaded."
        )
    return found


def hash_files(paths: list[Path]) -> list[list[str]]:
    """[name, SHA-256] of each file; the same for a copy in another place."""
    hashes = []
    for path in paths:
        with path.open("rb") as file:
            hashes.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return hashes


def digest_model(config: Any, hashes: list[list[str]]) -> str:
    """Digest of a model's configs and of the hashes of what it is loaded from."""
    return digest_of([_without_noise(config), hashes])


def _without_noise(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_noise(value) for key, value in config.items() if key not in CONFIG_NOISE}
    if isinstance(config, list):
        return [_without_noise(value) for value in config]
    return config
