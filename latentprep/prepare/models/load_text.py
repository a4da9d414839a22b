"""Text encoders, tokenizers and the pipeline around them, each by a class that is known here.

Nothing in a model's folder decides which code runs: no name of a class in it is looked up, and no file but weights,
configs and vocabularies is handed to a library.
"""

import inspect
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.families import Family
from latentprep.prepare.models.files import blame, check_shapes, check_sizes, class_of, read_json

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """How a class of text encoders is loaded."""

    config: str  # class of its config
    tokenizers: tuple[str, ...]  # classes of its tokenizer, of which a model must name one
    vocabularies: tuple[frozenset[str], ...]  # files of which one set must be there: else a tokenizer may start empty
    width: str = "hidden_size"  # the field of its config that says how many values a token has


_BPE = (frozenset({"tokenizer.json"}), frozenset({"vocab.json", "merges.txt"}))
_CLIP = Kind("CLIPTextConfig", ("CLIPTokenizer", "CLIPTokenizerFast"), _BPE)
_QWEN3 = Kind("Qwen3Config", ("Qwen2Tokenizer", "Qwen2TokenizerFast"), _BPE)
# Class of a text encoder in transformers -> how it is loaded. No other class ever is.
KINDS = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": Kind(
        "T5Config",
        ("T5Tokenizer", "T5TokenizerFast"),
        (frozenset({"tokenizer.json"}), frozenset({"spiece.model"})),
        width="d_model",
    ),
    "Qwen3Model": _QWEN3,
    "Qwen3ForCausalLM": _QWEN3,
}
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"  # transformers runs it in a sandbox: it reaches no file and no code
MAX_TEMPLATE = 2**16  # bytes; Qwen3's has 4,000
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "special_tokens_map.json", "added_tokens.json",
    CHAT_TEMPLATE,
)  # fmt: skip
SIZES = (
    "hidden_size", "d_model", "num_attention_heads", "num_heads", "intermediate_size", "d_ff", "d_kv", "vocab_size",
    "max_position_embeddings", "projection_dim", "num_hidden_layers", "num_layers", "head_dim", "num_key_value_heads",
)  # fmt: skip
MAX_LAYERS = 1000
# Of a config, what would have transformers fetch or run something, or says what the caller decides.
UNUSED = ("auto_map", "torch_dtype", "dtype", "attn_implementation", "experts_implementation")


def check_text_config(config: dict[str, Any], folder: Path, option: str) -> None:
    """Raise UserError for sizes that no text encoder has, and for weights that need another library."""
    check_sizes(config, [name for name in SIZES if name in config], folder, option)
    for name in ("num_hidden_layers", "num_layers"):
        if config.get(name, 0) > MAX_LAYERS:
            raise UserError(f"{option} {folder}: its config's {name} is {config[name]}, expected 1 to {MAX_LAYERS}.")
    if config.get("quantization_config") is not None:
        raise UserError(f"{option} {folder}: its weights are quantized, which is not supported. Give the full model.")


def check_class(index: Mapping[str, Any], part: str, allowed: tuple[str, ...], where: str) -> str:
    """The class that model_index.json names for a part. Raises UserError unless it is one of those allowed."""
    named = index.get(part)
    for name in allowed:
        if named == ["transformers", name]:
            return name
    raise UserError(
        f"{where}: its model_index.json says that {part} is {shortened(str(named))}, expected transformers' "
        f"{' or '.join(allowed)}. Other classes are never loaded."
    )


def transformers_class(name: str) -> Any:
    """A class of transformers. Raises UserError if this transformers has none."""
    import transformers

    found = class_of(transformers, name)
    if found is None:
        raise UserError(
            f"--model: its text encoder needs {name}, which transformers {transformers.__version__} does not have. "
            "Upgrade transformers, or --no-cond."
        )
    return found


def check_encoder(
    kind: str, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path, part: str
) -> None:
    """Raise UserError, before a weight is read, where a config makes no model or weights have other shapes."""
    import torch

    with blame(f"{folder}: its config.json makes no {kind}"), torch.device("meta"):
        model = transformers_class(kind)(make_config(kind, config))
    wanted = {_short(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(wanted, {_short(name): shape for name, shape in shapes.items()}, str(folder), part)


def _short(name: str) -> str:
    """A tensor's name without what transformers adds and leaves out as it loads.

    CLIP's begin with text_model. up to transformers 4; Qwen3's with model. where they were saved with a head.
    """
    return name.removeprefix("text_model.").removeprefix("model.")


def make_config(kind: str, config: dict[str, Any]) -> Any:
    """transformers' config object of a text encoder; whatever a library raises about it is the caller's to blame."""
    fields = {name: value for name, value in config.items() if not name.startswith("_") and name not in UNUSED}
    return transformers_class(KINDS[kind].config).from_dict(fields)


def load_encoder(
    kind: str, config: dict[str, Any], tensors: "Mapping[str, torch.Tensor]", dtype: "torch.dtype", what: str
) -> tuple[Any, dict[str, Any]]:
    """A text encoder on the CPU, and what transformers says of names it did not find.

    Raises UserError, which begins with `what`, for weights that do not fit.

    The weights are given in `dtype`, and not cast later: so transformers keeps the layers in float32 that overflow in
    float16 (T5's wo).
    """
    with blame(what):
        made = make_config(kind, config)
        model, info = transformers_class(kind).from_pretrained(
            None, config=made, state_dict=dict(tensors), torch_dtype=dtype, output_loading_info=True
        )
    return model, info


def check_tokenizer(folder: Path, kind: str, option: str) -> None:
    """Raise UserError where the vocabulary of a text encoder's tokenizer is missing."""
    there = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    wanted = KINDS[kind].vocabularies
    if not any(names <= there for names in wanted):
        expected = " or ".join(" and ".join(sorted(names)) for names in wanted)
        raise UserError(f"{option} {folder}: has no vocabulary, expected {expected}. Download the model again.")
    for name in there:
        if name.endswith(".json"):
            read_json(folder / name, option)
    if CHAT_TEMPLATE in there and (folder / CHAT_TEMPLATE).stat().st_size > MAX_TEMPLATE:
        raise UserError(f"{option}: {folder / CHAT_TEMPLATE} has over {MAX_TEMPLATE:,} bytes, which no template has.")


def load_tokenizer_of(folder: Path, kind: str, config: Mapping[str, Any]) -> Any:
    """A tokenizer by its class, from its known files alone, for the text encoder of this config. Raises UserError.

    It sees a copy of these, since from_pretrained would also look at a config.json and the auto_map in it.
    """
    vocab_size, own = config.get("vocab_size"), {}
    with TemporaryDirectory() as copy:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        if (folder / TOKENIZER_CONFIG).exists():
            found = read_json(folder / TOKENIZER_CONFIG, "--model")
            own = {key: value for key, value in found.items() if key not in UNUSED and not key.endswith("_file")}
        if kind in _CLIP.tokenizers:
            own["model_max_length"] = clip_length(folder, own, config)
        (Path(copy) / TOKENIZER_CONFIG).write_text(json.dumps(own), encoding="utf-8")
        with blame(f"{folder}: its files make no {kind}"):
            tokenizer = transformers_class(kind).from_pretrained(copy, local_files_only=True)
            tokenizer(["a photo"], padding="max_length", max_length=8, truncation=True)
            size = len(tokenizer)
    tokenizer.apply_chat_template = blamed(
        tokenizer.apply_chat_template, f"{folder}: its files make no chat of a prompt"
    )
    if vocab_size is not None and size > vocab_size:
        raise UserError(f"{folder}: has {size:,} tokens, but its text encoder knows {vocab_size:,}. Download it again.")
    return tokenizer


def clip_length(folder: Path, tokenizer: Mapping[str, Any], config: Mapping[str, Any]) -> int:
    """The tokens that a CLIP takes at once, which pipelines ask its tokenizer for: those of the text encoder.

    A tokenizer that was saved from its vocabulary alone says 10**30 or nothing. Raises UserError for one that says
    less: a pipeline would cut prompts there.
    """
    window, said = config.get("max_position_embeddings", 77), tokenizer.get("model_max_length")
    if type(said) is int and 0 < said < window:
        raise UserError(
            f"--model {folder / TOKENIZER_CONFIG}: model_max_length is {said}, but its text encoder takes {window} "
            f"tokens. Set it to {window}."
        )
    return int(window)


def blamed(call: Callable[..., Any], what: str) -> Callable[..., Any]:
    """A call of a library into what a model brings along, such as its chat template, with its errors as one line."""

    def checked(*arguments: Any, **options: Any) -> Any:
        with blame(what):
            return call(*arguments, **options)

    return checked


def chat_of(tokenizer: Any, prompt: str, arguments: Mapping[str, Any]) -> str:
    """A prompt as the pipeline writes it before it is tokenized: one message of a user."""
    found: str = tokenizer.apply_chat_template([{"role": "user", "content": prompt}], tokenize=False, **arguments)
    return found


def pipeline_class(family: Family) -> Any:
    """The class of diffusers that encodes a family's prompts. Raises UserError if this diffusers has none."""
    import diffusers

    kind = class_of(diffusers, family.pipeline)
    if kind is None:
        raise UserError(
            f"--model: {family.name} needs {family.pipeline}, which diffusers {diffusers.__version__} does not have. "
            "Upgrade diffusers, or --no-cond."
        )
    return kind


def make_pipeline(family: Family, parts: dict[str, Any]) -> Any:
    """The base pipeline of a family, with these parts and nothing else."""
    kind = pipeline_class(family)
    parameters = inspect.signature(kind.__init__).parameters
    arguments: dict[str, Any] = {
        name: None for name, p in parameters.items() if p.default is p.empty and name != "self"
    }
    if "requires_safety_checker" in parameters:
        arguments["requires_safety_checker"] = False
    return kind(**{**arguments, **parts})
