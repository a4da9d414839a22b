"""Files of a model's folder: configs read, weights found and hashed. Nothing here knows what kind of model it is."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import printable, shortened
from latentprep.prepare.devices import is_out_of_memory
from latentprep.recipe import digest_of

if TYPE_CHECKING:
    import torch

VAE_WEIGHTS = "diffusion_pytorch_model"
TEXT_WEIGHTS = "model"
# Says nothing about the numbers, and changes when a model is merely saved again.
CONFIG_NOISE = frozenset("_name_or_path _diffusers_version transformers_version torch_dtype dtype _commit_hash".split())


MAX_SIZE = 2**20  # of a model's config: layers, widths, tokens
MAX_JSON = 64 * 2**20  # bytes; the largest tokenizer.json known here has 17 MB, an index less than one
# Names of attention in VAE files that diffusers saved before its version 0.15.
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
IMPORTING = Lock()
AGAIN = "Compare its size with the original's: a download may have been cut short."


def read_json(path: Path, option: str) -> dict[str, Any]:
    """The JSON object in a file of a model's folder. Raises UserError."""
    if path.exists() and not path.is_file():
        raise UserError(f"{option}: {path} is no regular file. Download the model again.")
    try:
        if path.stat().st_size > MAX_JSON:
            raise UserError(f"{option}: {path} has over {MAX_JSON:,} bytes, which no config has.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{option} {path.parent}: not a diffusers folder, it has no {path.name}.") from None
    except RecursionError:
        raise UserError(f"{option}: {path} cannot be read (nested too deep). Download it again.") from None
    except OSError as error:
        raise UserError(f"{option} {path}: {error.strerror}. Mend that, and run the same command again.") from None
    except ValueError as error:
        raise UserError(f"{option}: {path} cannot be read ({_one_line(error)}). Download it again.") from None
    if not isinstance(value, dict):
        raise UserError(f"{option}: {path} is not a JSON object. Download it again.")
    return value


def check_sizes(config: dict[str, Any], names: Iterable[str], path: Path, option: str) -> None:
    """Raise UserError where a config.json lacks a size that must be known of a model, or has none that is believed."""
    for name in names:
        if name not in config:
            raise UserError(f"{option} {path}: its config.json has no {name}. Save the model again.")
        if type(config[name]) is not int or not 1 <= config[name] <= MAX_SIZE:
            raise UserError(
                f"{option} {path}: its config's {name} is {shortened(repr(config[name]))}, expected 1 to {MAX_SIZE:,}. "
                "Mend config.json, or download it again."
            )


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Turn what a library raises about a stranger's model into one line: `what`, and the library's reason.

    Only a call into the library stands within it. Libraries raise anything here, down to bare Exceptions of Rust code.
    A full memory is not the model's fault, and the caller's to know.
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        raise UserError(
            f"{what} ({type(error).__name__}: {_one_line(error)}). Download the model again, or save it again."
        ) from error


def _one_line(error: Exception) -> str:
    return shortened(" ".join(str(error).split()), 200)


def find_weights(path: Path, stem: str, option: str, *, index_first: bool) -> list[Path]:
    """The safetensors files that a folder's model is loaded from: one, or those that its index names.

    If it has both, diffusers takes the index (ModelMixin.from_pretrained), transformers the whole file
    (PreTrainedModel.from_pretrained). Raises UserError.
    """
    whole, index = path / f"{stem}.safetensors", path / f"{stem}.safetensors.index.json"
    if index.exists() and (index_first or not whole.exists()):
        found = _list_shards(index, option)
    elif whole.exists():
        found = [whole]
    else:
        others = [printable(p.name) for p in path.glob("*") if p.suffix in (".bin", ".ckpt", ".pt", ".safetensors")]
        raise UserError(
            f"{option} {path}: no {stem}.safetensors (found {', '.join(sorted(others)) or 'no weights'}). "
            "Save the model again with save_pretrained; pickled weights are not loaded. Weights in a file of their own "
            f"are {'--text-encoder' if stem == TEXT_WEIGHTS else '--vae'} FILE."
        )
    for file in found:
        if not file.is_file():
            problem = "is no regular file" if file.exists() else "is missing"
            raise UserError(f"{option} {path}: its {file.name} {problem}. Download the model again.")
        read_header([file], option)
    return found


def _list_shards(index: Path, option: str) -> list[Path]:
    names = read_json(index, option).get("weight_map")
    names = sorted(set(map(str, names.values()))) if isinstance(names, dict) else []
    if not names or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in names):
        raise UserError(
            f"{option}: the weight_map of {index} names no files (got {shortened(', '.join(names))!r}). "
            "Download the model again."
        )
    return [index.parent / name for name in names]


def read_header(paths: Iterable[Path], option: str) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all tensors of files; no number is read. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    shapes: dict[str, tuple[int, ...]] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError, ValueError) as error:
            raise _unread(path, option, error) from None
    return shapes


def _unread(path: Path, option: str, error: Exception) -> UserError:
    """Why weights cannot be read: safetensors says "no such file" of one that it may not open, too."""
    try:
        path.open("rb").close()
    except OSError as reason:
        return UserError(f"{option} {path}: {reason.strerror}. Mend that, and run the same command again.")
    return UserError(f"{option} {path}: cannot be read as safetensors ({_one_line(error)}). {AGAIN}")


def read_weights(paths: Iterable[Path], prefixes: tuple[str, ...], option: str) -> "dict[str, torch.Tensor]":
    """The tensors of files whose names begin with one of the prefixes. Raises UserError."""
    from safetensors import SafetensorError, safe_open

    tensors: dict[str, torch.Tensor] = {}
    for path in paths:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
                tensors |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError, ValueError) as error:
            raise _unread(path, option, error) from None
    return tensors


def rename_attention(name: str) -> str:
    """A tensor's name as diffusers has it today (ModelMixin._fix_state_dict_keys_on_load)."""
    return re.sub(r"(?<=\.)(query|key|value|proj_attn)(?=\.(weight|bias)$)", lambda m: OLD_ATTENTION[m[1]], name)


def check_shapes(
    wanted: Mapping[str, tuple[int, ...]], found: Mapping[str, tuple[int, ...]], where: str, part: str
) -> None:
    """Raise UserError where weights have other shapes than a model's config asks for."""
    wrong = [name for name, shape in wanted.items() if name in found and found[name] != shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{where}: the tensors of its {part} are not those of its config ({len(wrong)} of another shape, such as "
            f"{printable(name)}: {list(found[name])}, expected {list(wanted[name])}). "
            "Download the model again."
        )


def check_numbers(tensors: "Mapping[str, torch.Tensor]", where: str) -> None:
    """Raise UserError where a weight is NaN or infinite, or no floating point number at all."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not is_finite(tensor):
            problem = "holds NaN or infinite numbers" if tensor.is_floating_point() else f"is {tensor.dtype}"
            raise UserError(f"{where}: its weight {printable(name)} {problem}. Download the model again.")


def is_finite(tensor: "torch.Tensor") -> bool:
    """Whether all numbers of a weight are finite. aminmax gives NaN if there is one, 50 times as fast as isfinite."""
    if not tensor.numel():
        return True
    values = tensor if tensor.itemsize > 1 else tensor.float()  # aminmax knows no 8-bit floats
    return all(bool(value.isfinite()) for value in values.aminmax())


def check_whole(path: Path, library: str, missing: Collection[str]) -> None:
    """Raise UserError where a model was loaded without some of its weights: these are random, and nobody says so.

    So transformers 4 loads a CLIPTextModel that transformers 5 has saved, since the names of its weights differ.
    """
    if missing:
        raise UserError(
            f"{path}: {len(missing)} of its weights were not found, such as {printable(min(missing))}. {library} "
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


def class_of(library: Any, name: str) -> Any:
    """A class of diffusers or transformers; None if it has none.

    These import a class when it is first asked for, and tell a second thread that asks meanwhile that there is none.
    """
    with IMPORTING:
        return getattr(library, name, None)
