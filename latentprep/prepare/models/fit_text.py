"""Whether tensors are those of a text encoder, by their names and shapes alone: its config makes a model that has them.

Files have the names of transformers, with another beginning here and there.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from latentprep.human import shortened
from latentprep.prepare.models.checkpoint import Shapes
from latentprep.prepare.models.load_text import build_encoder, short_name

# Tensors that an encoder is not made of: tables of numbers that are computed, heads, halves that see images or write
# text, and vocabularies that ComfyUI puts beside the weights.
BESIDE = re.compile(
    r"(^|\.)(position_ids|inv_freq|logit_scale|text_projection(\.weight)?|lm_head\.weight|spiece_model|tekken_model)$"
    r"|^(decoder|vision_model|visual_projection)\."
)
HEAD = "lm_head.weight"  # what comes behind the layers that prompts are encoded by; never used
PROJECTION = "text_projection.weight"


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
