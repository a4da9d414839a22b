"""Where models come from: a hub id, a diffusers folder, or the built-in `tiny`. Reads configs, loads no weights."""

import hashlib
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.config import digest_of
from latentprep.errors import UserError

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

TINY = "tiny"
VAE_WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
# Of a hub repository only these are downloaded: no UNet, no pickles, no second precision.
HUB_FILES = [
    "model_index.json",
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


@dataclass(frozen=True)
class VaeFolder(VaeFacts):
    """A folder with an AutoencoderKL's config.json and weights."""

    path: Path

    def load(self, dtype: "torch.dtype") -> "AutoencoderKL":
        """The whole VAE, on the CPU."""
        from diffusers import AutoencoderKL

        return AutoencoderKL.from_pretrained(self.path, use_safetensors=True, torch_dtype=dtype)


@dataclass(frozen=True)
class TextFacts:
    """What a plan must know of a text encoder."""

    digest: str  # of weights, configs and tokenizers
    max_tokens: int
    width: int  # values per token, all encoders together


@dataclass(frozen=True)
class TextFolder(TextFacts):
    """A pipeline folder whose text encoders and tokenizers are to be used."""

    path: Path
    pipeline: str  # class name in model_index.json


def find_model(name: str, option: str = "--model", say: Callable[[str], None] = lambda line: None) -> Path:
    """The local folder of a model; downloads a hub id that is not here yet, and says so. Raises UserError."""
    if name == TINY:
        return Path(str(files("latentprep"))) / "tiny"
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise UserError(
            f"{option} {name}: a file, expected a folder in diffusers layout or a hub id such as owner/name."
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise UserError(
            f"{option} {name}: no such folder. Give a diffusers folder, a hub id such as owner/name, or tiny."
        )
    return _find_on_hub(name, option, say)


def _find_on_hub(name: str, option: str, say: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES, local_files_only=True))
        if _is_complete(folder):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass  # nothing of it is here
    try:
        say(f"download {name} from the hub: VAE, text encoder and tokenizer")
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except GatedRepoError:
        reason = (
            f"access is gated. Accept its terms on the hub and run: hf auth login; or point {option} at a local folder."
        )
    except RepositoryNotFoundError:
        reason = f"the hub has no such model. Check the name, or point {option} at a local folder."
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError):
        reason = (
            f"not on this machine, and the hub cannot be reached. Download it where there is a network "
            f"(hf download {name}), point {option} at a diffusers folder, or try latentprep out with --model tiny."
        )
    raise UserError(f"{option} {name}: {reason}")


def _is_complete(folder: Path) -> bool:
    """Whether a download of HUB_FILES came to its end: a folder of the hub's cache may hold a part of them."""
    if not (folder / "model_index.json").is_file():
        return any(folder.glob(f"{VAE_WEIGHTS}*.safetensors"))
    parts = _read_json(folder / "model_index.json", "--model")
    weights = {"vae": VAE_WEIGHTS, "text_encoder": TEXT_WEIGHTS, "text_encoder_2": TEXT_WEIGHTS}
    return all(any((folder / part).glob(f"{weights[part]}*.safetensors")) for part in weights.keys() & parts.keys())


def open_vae(folder: Path, option: str = "--model") -> VaeFolder:
    """The VAE of a pipeline folder or of a VAE-only folder. Raises UserError."""
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    config = _read_json(path / "config.json", option)
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"{option} {path}: its VAE is {kind}, expected AutoencoderKL.")
    weights = _weights(path, VAE_WEIGHTS, option)
    return VaeFolder(
        path=path,
        digest=_digest(config, weights),
        factor=2 ** (len(config["block_out_channels"]) - 1),
        latent_channels=config["latent_channels"],
        scaling_factor=float(config.get("scaling_factor") or 1.0),
        shift_factor=float(config.get("shift_factor") or 0.0),
    )


def open_text(folder: Path, option: str = "--model") -> TextFolder:
    """The text encoders of a pipeline folder. Raises UserError."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{option} {folder}: has no model_index.json, so no text encoder. Give a pipeline folder, or --no-cond."
        )
    pipeline = _read_json(folder / "model_index.json", option).get("_class_name")
    if pipeline not in PIPELINES:
        raise UserError(
            f"{option} {folder}: a {pipeline}, expected {' or '.join(PIPELINES)}. Or encode with --no-cond."
        )
    encoders = sorted(path for path in folder.glob("text_encoder*") if path.is_dir())
    tokenizers = sorted(path for path in folder.glob("tokenizer*") if path.is_dir())
    if not encoders or not tokenizers:
        raise UserError(f"{option} {folder}: has no text_encoder and tokenizer folders. Complete it, or --no-cond.")
    configs = [_read_json(path / "config.json", option) for path in encoders]
    weights = [file for path in encoders for file in _weights(path, TEXT_WEIGHTS, option)]
    vocabularies = sorted(file for path in tokenizers for file in path.iterdir() if file.is_file())
    return TextFolder(
        path=folder,
        pipeline=pipeline,
        digest=_digest([pipeline, *configs], weights + vocabularies),
        max_tokens=max(config.get("max_position_embeddings", 77) for config in configs),
        width=sum(config.get("hidden_size", 768) for config in configs),
    )


def _read_json(path: Path, option: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{option} {path.parent}: not a diffusers folder, it has no {path.name}.") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{option}: {path} cannot be read ({error}).") from None
    if not isinstance(value, dict):
        raise UserError(f"{option}: {path} is not a JSON object.")
    return value


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


def _digest(config: Any, weights: list[Path]) -> str:
    """Digest of configs and files; the same for a copy of the model under another name or in another place."""
    hashes = []
    for path in weights:
        with path.open("rb") as file:
            hashes.append([path.name, hashlib.file_digest(file, "sha256").hexdigest()])
    return digest_of([_without_noise(config), hashes])


def _without_noise(config: Any) -> Any:
    if isinstance(config, dict):
        return {key: _without_noise(value) for key, value in config.items() if key not in CONFIG_NOISE}
    if isinstance(config, list):
        return [_without_noise(value) for value in config]
    return config
