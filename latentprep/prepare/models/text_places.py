"""Where each text encoder of a model comes from: config, tokenizer and weights, in folders or a file of their own."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.checkpoint import hash_tensors, read_tensors
from latentprep.prepare.models.family import Family, is_there
from latentprep.prepare.models.files import (
    TEXT_WEIGHTS,
    check_whole,
    find_weights,
    hash_files,
    read_header,
    read_json,
    read_weights,
)
from latentprep.prepare.models.fit_text import HEAD, PROJECTION, Fit, fit
from latentprep.prepare.models.load_text import KINDS, check_class, load_encoder, text_config
from latentprep.prepare.models.load_tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES
from latentprep.prepare.models.single_file import check_loaded

if TYPE_CHECKING:
    import torch

OPTION = "--text-encoder"


@dataclass(frozen=True)
class Weights:
    """Weights of one text encoder: a .safetensors file, or a folder of transformers."""

    path: Path
    option: str = OPTION
    prefix: str = ""  # what the names of its tensors begin with, in a checkpoint

    def list_files(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path]
        return find_weights(self.path, TEXT_WEIGHTS, self.option, index_first=False)

    def read_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name without its prefix -> shape of the tensors. Raises UserError."""
        found = read_header(self.list_files(), self.option)
        return {name.removeprefix(self.prefix): shape for name, shape in found.items() if name.startswith(self.prefix)}

    def __str__(self) -> str:
        return f"{self.path}" + (f" ({self.prefix}*)" if self.prefix else "")


@dataclass(frozen=True)
class Place:
    """Where one text encoder of a model comes from."""

    kind: str  # its class
    config: Path  # folder of its config.json
    tokenizer: Path  # folder
    weights: Weights
    eight_bits: str = ""  # the type of its 8-bit floats, if it has some
    identity: tuple[str, ...] = ()  # names of weights that a file may leave out: they are the identity

    @property
    def is_file(self) -> bool:
        return not self.weights.path.is_dir()

    def read_config(self) -> dict[str, Any]:
        return read_json(self.config / "config.json", self.weights.option)

    def fit(self) -> Fit:
        """How the tensors of its file go with its config. Raises UserError."""
        return fit(self.kind, self.read_config(), self.weights.read_shapes(), self.config, self.identity)

    def hash_weights(self, part: str) -> list[list[str]]:
        """Hashes of what it is loaded from: of a folder its files, of a file the tensors that are used."""
        if not self.is_file:
            return hash_files(self.weights.list_files())
        return [[part, hash_tensors(self.weights.path, self.names_in_file())]]

    def names_in_file(self) -> dict[str, str]:
        return {own: self.weights.prefix + name for own, name in self.fit().names.items()}

    def list_vocabulary(self) -> list[Path]:
        """The files of its tokenizer; of a folder that has weights too, no others."""
        files = sorted(path for path in self.tokenizer.iterdir() if path.is_file())
        known = (*TOKENIZER_FILES, TOKENIZER_CONFIG)
        return [file for file in files if self.tokenizer != self.weights.path or file.name in known]

    def load(self, part: str, dtype: "torch.dtype") -> Any:
        """The text encoder on the CPU. Raises UserError for weights that are missing, do not fit, or are no numbers."""
        return self._load_file(part, dtype) if self.is_file else self._load_folder(dtype)

    def _load_folder(self, dtype: "torch.dtype") -> Any:
        folder = self.weights.path
        tensors = read_weights(self.weights.list_files(), ("",), self.weights.option)
        what = f"{folder}: the weights and config.json make no {self.kind}"
        model, info = load_encoder(self.kind, self.read_config(), tensors, dtype, str(folder), what)
        check_whole(folder, "transformers", info["missing_keys"])
        return model

    def _load_file(self, part: str, dtype: "torch.dtype") -> Any:
        import torch

        path = self.weights.path
        tensors = read_tensors(path, self.names_in_file())
        config = self.read_config()
        if PROJECTION in self.identity and PROJECTION not in tensors:
            made = text_config(self.kind, config, str(self.config))
            tensors[PROJECTION] = torch.eye(made.projection_dim, made.hidden_size)
        what = f"{path}: the tensors of its {part} are not those of its config"
        model, info = load_encoder(self.kind, config, tensors, dtype, str(path), what)
        check_loaded(path, part, set(info["missing_keys"]) - {HEAD}, info["unexpected_keys"])
        return model


def own_place(folder: Path, part: str, family: Family, index: Mapping[str, Any], option: str) -> Place:
    """The place of an encoder in a pipeline folder itself. Raises UserError."""
    if not (folder / part).is_dir() or not (folder / family.tokenizer_of(part)).is_dir():
        raise UserError(
            f"{option} {folder}: has no {part} and {family.tokenizer_of(part)} folders. Complete it, give the "
            "encoder's own folder with --text-encoder, or --no-cond."
        )
    may_go = part in family.optional and part == family.sequence
    if may_go and not [file for file in (folder / part).iterdir() if file.suffix in (".safetensors", ".bin")]:
        raise UserError(
            f"{option} {folder / part}: has no weights. Give them with --text-encoder, or do without: remove that "
            "folder."
        )
    kind = named_kind(part, family, index, f"{option} {folder}")
    return Place(kind, folder / part, folder / family.tokenizer_of(part), Weights(folder / part, option))


def kinds_of(part: str, family: Family) -> tuple[str, ...]:
    """The classes that an encoder may be of."""
    return family.classes[part] if family.classes else tuple(KINDS)


def named_kind(part: str, family: Family, index: Mapping[str, Any], where: str) -> str:
    """The class that model_index.json names for an encoder. Raises UserError for one that it may not be of."""
    allowed = kinds_of(part, family)
    return check_class(index, part, allowed, where, KINDS[allowed[0]].library)


def find_tokenizer(place: Place, index: Mapping[str, Any], name: str, where: str) -> str:
    """The class of a tokenizer: that of model_index.json, or of the folder that it is in. Raises UserError."""
    kind = KINDS[place.kind]
    if is_there(index.get(name)):
        return check_class(index, name, kind.tokenizers, where, kind.library)
    path = place.tokenizer / TOKENIZER_CONFIG
    own = read_json(path, place.weights.option).get("tokenizer_class") if path.is_file() else kind.tokenizers[0]
    if own not in kind.tokenizers:
        raise UserError(
            f"{place.weights.option}: {path} says that its tokenizer is {shortened(str(own))}, expected "
            f"{' or '.join(kind.tokenizers)}. Other classes are never loaded."
        )
    return str(own)
