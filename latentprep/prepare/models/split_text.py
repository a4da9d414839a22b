"""Text encoders that are given by themselves: which encoder of a model each is for."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import printable
from latentprep.prepare.models.checkpoint import Shapes, read_dtypes, recognise
from latentprep.prepare.models.family import Family, is_there
from latentprep.prepare.models.files import read_json
from latentprep.prepare.models.fit_text import BESIDE, PROJECTION, fit
from latentprep.prepare.models.load_text import KINDS, check_text_config, known_class
from latentprep.prepare.models.text_places import Place, Weights, kinds_of, named_kind

QUANTIZED = re.compile(
    r"scaled_fp8|scale_weight|scale_input|comfy_quant|weight_scale|input_scale|quant_state|quant_map|absmax"
    r"|\.(SCB|qweight|qzeros|scales|zeros)$"
)
FLOATS, EIGHT_BITS = ("F64", "F32", "F16", "BF16"), {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
IN_CHECKPOINTS = re.compile(r"^text_encoders\.[^.]+\.transformer\.")  # of Stable Diffusion 3, FLUX and newer ones


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
    config, tokenizer = folder / part, folder / family.tokenizer_of(part)
    if not (config / "config.json").is_file():
        if not weights.path.is_dir():
            return f"{config} has no config.json"
        config, tokenizer = weights.path, tokenizer if tokenizer.is_dir() else weights.path
    if not is_there(index.get(part)) or config == weights.path:
        allowed = kinds_of(part, family)
        kind = find_kind(allowed, read_json(config / "config.json", weights.option))
        if kind is None:
            return f"is no {' or '.join(allowed)}"
    else:
        kind = named_kind(part, family, index, f"{option} {folder}")
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
