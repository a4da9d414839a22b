"""Where models come from: a hub id, a diffusers folder, a single file, or the built-in `tiny` -> its folder or file."""

import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from latentprep.errors import UserError
from latentprep.human import expand_user
from latentprep.prepare.models.files import TEXT_WEIGHTS, VAE_WEIGHTS, read_json

TINY = "tiny"
WEIGHTS = {"vae": VAE_WEIGHTS, **dict.fromkeys((f"text_encoder{n}" for n in ("", "_2", "_3", "_4")), TEXT_WEIGHTS)}
SINGLE_FILE = ".safetensors"
PICKLES = (".ckpt", ".pt", ".pth", ".bin")


def _weights(folder: str, stem: str) -> list[str]:
    names = ("config.json", f"{stem}.safetensors", f"{stem}.safetensors.index.json", f"{stem}-*-of-*.safetensors")
    return [folder + name for name in names]


# Of a hub repository only these are downloaded: no UNet, no pickles, no second precision.
VAE_FILES = ["model_index.json", *_weights("", VAE_WEIGHTS), *_weights("vae/", VAE_WEIGHTS)]
# What tokenizers are loaded from; never a .py, which a repository may hold.
TOKENIZER_FILES = [
    f"{folder}/*.{suffix}" for folder in ("tokenizer*", "processor") for suffix in ("json", "txt", "model", "jinja")
]
# A transformer's config says how wide the cond of a text encoder is that was left out (Stable Diffusion 3 without T5).
TEXT_FILES = [*TOKENIZER_FILES, *_weights("text_encoder*/", TEXT_WEIGHTS), "transformer/config.json"]


def find_model(
    name: str,
    option: str = "--model",
    say: Callable[[str], None] = lambda line: None,
    revision: str | None = None,
    with_text: bool = True,
    may_download: bool = True,
) -> Path:
    """The local folder or single file of a model. Raises UserError.

    Downloads of a hub id what is not here yet, and says so; `revision` is its branch, tag or commit. Without text
    encoders, which may be 10 GB, where only a VAE is wanted.
    """
    path = Path(str(files("latentprep"))) / "tiny" if name == TINY else expand_user(name)
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
    return _find_on_hub(name, option, say, revision, with_text, may_download)


def find_encoder(name: str) -> Path:
    """The file or folder of --text-encoder. Raises UserError."""
    path = expand_user(name)
    expected = "a .safetensors file of weights, or a folder of transformers with config.json, weights and tokenizer"
    if path.is_file():
        _check_single_file(path, name, "--text-encoder", expected)
    elif not path.is_dir():
        raise UserError(f"--text-encoder {name}: no such file or folder. Give {expected}.")
    return path


CHECKPOINTS = "a .safetensors checkpoint, a folder in diffusers layout, or a hub id such as owner/name"


def _check_single_file(path: Path, name: str, option: str, expected: str = CHECKPOINTS) -> None:
    suffix = path.suffix.lower()
    if suffix in PICKLES:
        raise UserError(
            f"{option} {name}: a pickle, and loading one can run any code, so it is not loaded. In a program that you "
            "trust, save its tensors as .safetensors, or make a folder of it with diffusers' "
            "convert_original_stable_diffusion_to_diffusers.py --to_safetensors."
        )
    if suffix != SINGLE_FILE:
        raise UserError(f"{option} {name}: a file of another kind, expected {expected}.")


def commit_of(path: Path) -> str | None:
    """The commit that a model of the hub's cache stands at; None for other folders and files."""
    return path.name if path.parent.name == "snapshots" and re.fullmatch("[0-9a-f]{40}", path.name) else None


def _find_on_hub(
    name: str, option: str, say: Callable[[str], None], revision: str | None, with_text: bool, may_download: bool
) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    asked = f" --revision {revision}" if revision is not None else ""
    wanted = [*VAE_FILES, *(TEXT_FILES if with_text else [])]
    try:
        folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted, local_files_only=True))
        if _is_complete(folder, with_text):
            return folder
    except (LocalEntryNotFoundError, OSError):
        pass  # nothing of it is here
    if not may_download:
        raise UserError(f"{option} {name}: is not on this machine. Give it as {option}, and it is downloaded.")
    try:
        say(f"download {name}{asked} from the hub: VAE{', text encoder and tokenizer' if with_text else ' alone'}")
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
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


def _is_complete(folder: Path, with_text: bool) -> bool:
    """Whether a download came to its end: a folder of the hub's cache may hold a part of what is wanted."""
    if not (folder / "model_index.json").is_file():
        return _has_weights(folder, VAE_WEIGHTS)
    index = read_json(folder / "model_index.json", "--model")
    parts = {name for name, kind in index.items() if isinstance(kind, list) and kind != [None, None]}
    if not with_text:
        parts &= {"vae"}
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
