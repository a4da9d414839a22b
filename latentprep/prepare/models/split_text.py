"""Weights of text encoders that are given by themselves: which encoder of a model they are for, and their tensors.

A file is known by the names and shapes of its tensors: it is for the encoder whose config makes a model that has them.
ComfyUI's files have the names of transformers, with another beginning here and there.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import printable, shortened
from latentprep.prepare.models.checkpoint import Shapes, hash_tensors, read_dtypes, read_tensors, recognise
from latentprep.prepare.models.family import Family, tokenizer_of
from latentprep.prepare.models.files import (
    TEXT_WEIGHTS,
    check_numbers,
    find_weights,
    hash_files,
    read_header,
    read_json,
)
from latentprep.prepare.models.load_text import (
    KINDS,
    build_encoder,
    check_class,
    check_text_config,
    known_class,
    load_encoder,
    short_name,
    text_config,
)
from latentprep.prepare.models.load_tokenizer import TOKENIZER_CONFIG, TOKENIZER_FILES
from latentprep.prepare.models.single_file import check_loaded

if TYPE_CHECKING:
    import torch

OPTION = "--text-encoder"
# Tensors that an encoder is not made of: tables of numbers that are computed, heads, halves that see images or write
# text, and vocabularies that ComfyUI puts beside the weights.
BESIDE = re.compile(
    r"(^|\.)(position_ids|inv_freq|logit_scale|text_projection(\.weight)?|lm_head\.weight|spiece_model|tekken_model)$"
    r"|^(decoder|vision_model|visual_projection)\."
)
HEAD = "lm_head.weight"  # what comes behind the layers that prompts are encoded by; never used
PROJECTION = "text_projection.weight"
QUANTIZED = re.compile(
    r"scaled_fp8|scale_weight|scale_input|comfy_quant|weight_scale|input_scale|quant_state|quant_map|absmax"
    r"|\.(SCB|qweight|qzeros|scales|zeros)$"
)
FLOATS, EIGHT_BITS = ("F64", "F32", "F16", "BF16"), {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
IN_CHECKPOINTS = re.compile(r"^text_encoders\.[^.]+\.transformer\.")  # of Stable Diffusion 3, FLUX and newer ones


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

    def fit(self) -> "Fit":
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
        """The text encoder of a file, on the CPU. Raises UserError for weights that do not fit, or are no numbers."""
        import torch

        path = self.weights.path
        tensors = read_tensors(path, self.names_in_file())
        check_numbers(tensors, str(path))
        config = self.read_config()
        if PROJECTION in self.identity and PROJECTION not in tensors:
            made = text_config(self.kind, config, str(self.config))
            tensors[PROJECTION] = torch.eye(made.projection_dim, made.hidden_size)
        what = f"{path}: the tensors of its {part} are not those of its config"
        model, info = load_encoder(self.kind, config, tensors, dtype, what)
        check_loaded(path, part, set(info["missing_keys"]) - {HEAD}, info["unexpected_keys"])
        return model


@dataclass(frozen=True)
class Fit:
    """How a file's tensors go with a model that a config makes."""

    names: Mapping[str, str] = field(default_factory=dict)  # name in the model -> name in the file
    problem: str = ""  # why they do not


def fit(kind: str, config: dict[str, Any], shapes: Shapes, folder: Path, identity: Collection[str] = ()) -> Fit:
    """Whether tensors of these names and shapes are those of a text encoder. Raises UserError for a config of none."""
    state = build_encoder(kind, config, folder).state_dict(keep_vars=True)
    found = {short_name(name): name for name in shapes}
    tied: dict[int, list[str]] = {}  # names of one weight, of which a file has one or all
    for name, tensor in state.items():
        tied.setdefault(id(tensor), []).append(name)
    names, missing, wrong = {}, [], []
    for group in tied.values():
        there = next((found[short_name(name)] for name in group if short_name(name) in found), None)
        if there is None:
            missing += [name for name in group[:1] if name != HEAD and name not in identity]
            continue
        names.update(dict.fromkeys(group, there))
        if shapes[there] != tuple(state[group[0]].shape):
            wrong.append(f"{there} is {list(shapes[there])}, expected {list(state[group[0]].shape)}")
    extra = [name for name in shapes if name not in names.values() and not BESIDE.search(name)]
    return Fit(names, describe(missing, wrong, extra))


def describe(missing: Sequence[str], wrong: Sequence[str], extra: Sequence[str]) -> str:
    """What is wrong with a file's tensors, "" if nothing is."""
    problems = [f"{len(wrong)} of another shape: {wrong[0]}"] if wrong else []
    problems += [f"{len(missing)} missing, such as {missing[0]}"] if missing else []
    problems += [f"{len(extra)} too many, such as {extra[0]}"] if extra else []
    return shortened("; ".join(problems), 200)


def list_in_checkpoint(path: Path, shapes: Shapes, option: str) -> list[Weights]:
    """The text encoders that a checkpoint has beside its denoiser."""
    prefixes = {match[0] for name in shapes if (match := IN_CHECKPOINTS.match(name))}
    return [Weights(path, option, prefix) for prefix in sorted(prefixes)]


def find_places(
    given: Sequence[Weights], folder: Path, family: Family, index: Mapping[str, Any], option: str
) -> dict[str, Place]:
    """Encoder -> where it comes from, for those that were given by themselves. Raises UserError.

    `folder` is the model's, with configs and tokenizers, and `index` its model_index.json.
    """
    places: dict[str, Place] = {}
    for weights in given:
        if not is_whole_folder(weights.path):
            raise UserError(
                f"{weights.option} {weights.path}: has no config.json, expected a folder of transformers, or a "
                ".safetensors file. Give the file in it."
            )
        shapes = weights.read_shapes()
        eight_bits = check_dtypes(weights)
        fitting, problems = {}, []
        for part in family.encoders(index):
            found = find_place(part, weights, folder, family, index, option)
            problem = found if isinstance(found, str) else fit_place(found, shapes)
            if isinstance(found, Place) and not problem:
                fitting[part] = found
            problems.append(f"{part} ({problem})")
        if len(fitting) != 1:
            refuse(weights, folder, shapes, list(fitting), problems)
        ((part, place),) = fitting.items()
        if part in places:
            raise UserError(
                f"{weights.option} {weights}: is for {part} of {folder}, and so is {places[part].weights}. "
                "Give one of them."
            )
        places[part] = replace(place, eight_bits=eight_bits)
    return places


def is_whole_folder(path: Path) -> bool:
    return not path.is_dir() or (path / "config.json").is_file()


def refuse(weights: Weights, folder: Path, shapes: Shapes, fitting: Sequence[str], problems: Sequence[str]) -> None:
    """Raise UserError for weights that fit no encoder of a model, or several."""
    where = f"{weights.option} {weights}"
    if fitting:
        raise UserError(
            f"{where}: fits {' and '.join(fitting)} of {folder}, expected one of them. "
            f"Save it as {folder / fitting[0] / 'model.safetensors'}, or where it belongs."
        )
    raise UserError(
        f"{where}: seems to be {recognise(shapes).what}, and fits no text encoder of {folder}: "
        f"{', '.join(problems)}. Give the one that goes with it."
    )


def fit_place(place: Place, shapes: Shapes) -> str:
    """Why weights are not those of an encoder; "" if they are. Raises UserError for a config that makes none."""
    return fit(place.kind, place.read_config(), shapes, place.config, place.identity if place.is_file else ()).problem


def find_place(
    part: str, weights: Weights, folder: Path, family: Family, index: Mapping[str, Any], option: str
) -> Place | str:
    """Where an encoder would come from, if these were its weights; or why they cannot be. Raises UserError.

    Config and tokenizer are those of the model's folder. If it has none, they are those beside the weights.
    """
    allowed = family.classes[part] if family.classes else tuple(KINDS)
    config, tokenizer = folder / part, folder / tokenizer_of(part)
    if not (config / "config.json").is_file():
        if not weights.path.is_dir():
            return f"{config} has no config.json"
        config, tokenizer = weights.path, tokenizer if tokenizer.is_dir() else weights.path
    if index.get(part) in (None, [], [None, None]) or config == weights.path:
        kind = find_kind(allowed, read_json(config / "config.json", weights.option))
        if kind is None:
            return f"is no {' or '.join(allowed)}"
    else:
        kind = check_class(index, part, allowed, f"{option} {folder}", KINDS[allowed[0]].library)
    check_text_config(read_json(config / "config.json", option), config, option)
    return Place(kind, config, tokenizer, weights, identity=(PROJECTION,) * (part in family.identity_projection))


def find_kind(allowed: Sequence[str], config: Mapping[str, Any]) -> str | None:
    """The class that a config without a model_index.json is of; None if it is of none of those allowed."""
    for kind in allowed:
        if known_class(KINDS[kind].config, KINDS[kind].module).model_type == config.get("model_type"):
            return kind
    return None


def check_dtypes(weights: Weights) -> str:
    """The type of 8-bit floats that are among the weights, "" if none are. Raises UserError for quantized weights."""
    dtypes: dict[str, str] = {}
    for file in weights.list_files():
        dtypes |= {name: dtype for name, dtype in read_dtypes(file).items() if name.startswith(weights.prefix)}
    for name, dtype in dtypes.items():
        short = name.removeprefix(weights.prefix)
        is_number = dtype in FLOATS or dtype in EIGHT_BITS
        if QUANTIZED.search(short) or not (is_number or BESIDE.search(short)):
            raise UserError(
                f"{weights.option} {weights}: its weights are quantized ({printable(name)} is {dtype}), which is not "
                "supported. Give the file in bfloat16, float16 or float32, or in plain 8-bit floats."
            )
    return next((EIGHT_BITS[dtype] for dtype in dtypes.values() if dtype in EIGHT_BITS), "")
