"""Files of a model's folder: configs read, weights found and hashed. Nothing here knows what kind of model it is."""

import hashlib
import json
from collections.abc import Collection
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentprep.config import digest_of
from latentprep.errors import UserError

VAE_WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
# Says nothing about the numbers, and changes when a model is merely saved again.
CONFIG_NOISE = frozenset("_name_or_path _diffusers_version transformers_version torch_dtype dtype _commit_hash".split())


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


def find_weights(path: Path, stem: str, option: str) -> list[Path]:
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


def check_whole(path: Path, library: str, missing: Collection[str]) -> None:
    """Raise UserError where a model was loaded without some of its weights: these are random, and nobody says so.

    So transformers 4 loads a CLIPTextModel that transformers 5 has saved, since the names of its weights differ.
    """
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its weights were not found, such as {min(missing)}. {library} "
            f"{version(library)} may not know the names that another version gave them: upgrade it, or save the model "
            "again with this one."
        )


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
