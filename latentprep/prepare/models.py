"""Where models come from: a hub id, a diffusers folder, or the built-in `tiny`. Reads configs, loads no weights."""

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from latentprep.config import TextOptions, digest_of
from latentprep.errors import UserError
from latentprep.prepare.families import FAMILIES, Family, find_family, tokenizer_of

if TYPE_CHECKING:
    import torch

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
# Of a pipeline these are not needed to encode prompts.
PARTS_LEFT_OUT = (
    "unet", "transformer", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
)  # fmt: skip
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


@dataclass(frozen=True)
class TextFacts:
    """What a plan must know of the text encoders of a model."""

    digest: str  # of weights, configs and tokenizers
    family: Family
    window: int  # tokens that its CLIP takes at once, start and end included
    num_layers: int  # of its CLIP
    width: int  # values of a token in prompt_embeds
    pooled: int  # values of pooled_prompt_embeds; 0: there is none

    def settings(self, options: TextOptions) -> dict[str, Any]:
        """What the options change about cond. Raises UserError for what these encoders cannot do."""
        return self.family.settings(options, self.window, self.num_layers)

    def num_values(self, options: TextOptions) -> int:
        """Numbers that are stored of one prompt, all tensors together."""
        num_tokens = self.family.num_tokens(options.max_tokens, self.window)
        per_token = self.width + (3 if "text_ids" in self.family.returns else 0)
        return self.family.stored_tokens(num_tokens, self.window) * per_token + self.pooled


@dataclass(frozen=True)
class TextFolder(TextFacts):
    """A pipeline folder whose text encoders and tokenizers are to be used."""

    path: Path
    left_out: tuple[str, ...]  # encoders that the family has, and this model does without

    def load_pipeline(self, dtype: "torch.dtype") -> Any:
        """The base pipeline of its family, on the CPU, with nothing but text encoders and tokenizers.

        The weights are read in `dtype`, and not cast later: so transformers keeps the layers in float32 that
        overflow in float16 (T5's wo), and a large encoder is in memory once.
        """
        import diffusers

        parts = [*PARTS_LEFT_OUT, *self.left_out, *map(tokenizer_of, self.left_out)]
        pipeline = getattr(diffusers, self.family.pipeline).from_pretrained(
            self.path, torch_dtype=dtype, use_safetensors=True, **dict.fromkeys(parts)
        )
        if self.family.t5 in self.left_out:  # then encode_prompt asks the transformer how many zeros stand for its T5
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=self.width))
        return pipeline


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


def family_of(folder: Path) -> Family | None:
    """The family of a pipeline folder; None where it is of no known one, or a VAE alone."""
    if not (folder / "model_index.json").is_file():
        return None
    return find_family(_read_json(folder / "model_index.json", "--model").get("_class_name"))


def open_text(folder: Path, option: str = "--model") -> TextFolder:
    """The text encoders of a pipeline folder. Raises UserError."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{option} {folder}: has no model_index.json, so no text encoder. Give a pipeline folder, or --no-cond."
        )
    index = _read_json(folder / "model_index.json", option)
    family = family_of(folder)
    if family is None:
        names = ", ".join(family.name for family in FAMILIES)
        raise UserError(
            f"{option} {folder}: a {index.get('_class_name')}, expected a pipeline of {names}. "
            "Or encode with --no-cond."
        )
    left_out = tuple(part for part in family.encoders if _is_left_out(folder, part, index, family))
    encoders = [part for part in family.encoders if part not in left_out]
    for part in encoders:
        if not (folder / part).is_dir() or not (folder / tokenizer_of(part)).is_dir():
            raise UserError(
                f"{option} {folder}: has no {part} and {tokenizer_of(part)} folders. Complete it, or --no-cond."
            )
    configs = {part: _read_json(folder / part / "config.json", option) for part in encoders}
    clip = configs[next(part for part in encoders if part != family.t5)]
    hashed: list[Any] = [family.pipeline, *configs.values()]
    if family.t5 in left_out:
        width = _joint_attention_dim(folder, option)
        hashed.append(width)
    else:
        width = _add_up(family.width, configs, folder, option)
    weights = [file for part in encoders for file in _weights(folder / part, TEXT_WEIGHTS, option)]
    vocabularies = [
        file for part in encoders for file in sorted((folder / tokenizer_of(part)).iterdir()) if file.is_file()
    ]
    return TextFolder(
        digest=_digest(hashed, weights + vocabularies),
        family=family,
        window=clip.get("max_position_embeddings", 77),
        num_layers=clip.get("num_hidden_layers", 12),
        width=width,
        pooled=_add_up(family.pooled, configs, folder, option),
        path=folder,
        left_out=left_out,
    )


def _is_left_out(folder: Path, part: str, index: dict[str, Any], family: Family) -> bool:
    """Whether a model does without an encoder: it says so, or nobody has downloaded its T5, the largest part of all."""
    if part not in family.optional:
        return False
    says_so = not any(index.get(part) or [])  # not named, or [null, null]
    return says_so or (part == family.t5 and not (folder / part).is_dir())


def _joint_attention_dim(folder: Path, option: str) -> int:
    """Values of a token where there is no T5 that tells."""
    path = folder / "transformer" / "config.json"
    found = _read_json(path, option).get("joint_attention_dim") if path.is_file() else None
    if not isinstance(found, int):
        raise UserError(
            f"{option} {folder}: has no T5, so {path} must say joint_attention_dim. Add that file, or --no-cond."
        )
    return found


def _add_up(fields: Mapping[str, str], configs: dict[str, dict[str, Any]], folder: Path, option: str) -> int:
    """The sum of a field of each encoder's config, of those that are there."""
    for part, name in fields.items():
        if part in configs and not isinstance(configs[part].get(name), int):
            raise UserError(f"{option}: {folder / part / 'config.json'} says no {name}, expected a text encoder's.")
    return sum(configs[part][name] for part, name in fields.items() if part in configs)


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
