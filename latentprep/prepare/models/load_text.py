"""Text encoders and the pipeline around them, each by a class that is known here.

Nothing in a model's folder decides which code runs: no name of a class in it is looked up, and no file but weights,
configs and vocabularies is handed to a library.
"""

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.family import Family
from latentprep.prepare.models.files import blame, check_numbers, check_shapes, check_sizes, class_of

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Kind:
    """How a class of text encoders is loaded."""

    config: str  # class of its config
    tokenizers: tuple[str, ...]  # classes of its tokenizer, of which a model must name one
    vocabularies: tuple[frozenset[str], ...]  # files of which one set must be there: else a tokenizer may start empty
    module: str = "transformers"  # where its class and that of its config are
    library: str = "transformers"  # what model_index.json says that they are of


_JSON = frozenset({"tokenizer.json"})
_BPE = (_JSON, frozenset({"vocab.json", "merges.txt"}))
_CLIP = Kind("CLIPTextConfig", ("CLIPTokenizer", "CLIPTokenizerFast"), _BPE)
_QWEN = ("Qwen2Tokenizer", "Qwen2TokenizerFast")
_QWEN3, _QWEN3_VL = Kind("Qwen3Config", _QWEN, _BPE), Kind("Qwen3VLConfig", _QWEN, _BPE)
_T5, _SPIECE = ("T5Tokenizer", "T5TokenizerFast"), (_JSON, frozenset({"spiece.model"}))
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast")
_FAST = ("PreTrainedTokenizerFast", "TokenizersBackend")  # its names up to transformers 4, and from 5 on
_GEMMA = ("GemmaTokenizer", "GemmaTokenizerFast")
_GEMMA2 = Kind("Gemma2Config", _GEMMA, (_JSON,))
# Class of a text encoder -> how it is loaded. No other class ever is.
KINDS = {
    "CLIPTextModel": _CLIP,
    "CLIPTextModelWithProjection": _CLIP,
    "T5EncoderModel": Kind("T5Config", (*_T5, "ByT5Tokenizer"), _SPIECE),
    "UMT5EncoderModel": Kind("UMT5Config", (*_T5, *_LLAMA), (*_SPIECE, frozenset({"tokenizer.model"}))),
    "BertModel": Kind("BertConfig", ("BertTokenizer", "BertTokenizerFast"), (_JSON, frozenset({"vocab.txt"}))),
    "Qwen3Model": _QWEN3,
    "Qwen3ForCausalLM": _QWEN3,
    "Qwen2_5_VLForConditionalGeneration": Kind("Qwen2_5_VLConfig", (*_QWEN, "Qwen2VLProcessor"), _BPE),
    "Qwen3VLModel": _QWEN3_VL,
    "Gemma2Model": _GEMMA2,
    "Gemma2ForCausalLM": _GEMMA2,
    "T5GemmaEncoder": Kind(
        "T5GemmaModuleConfig",
        (*_GEMMA, *_T5),
        (_JSON,),
        module="transformers.models.t5gemma.modeling_t5gemma",
        library="transformers prx",
    ),
    "LlamaForCausalLM": Kind("LlamaConfig", (*_FAST, *_LLAMA), (_JSON,)),
    "GlmModel": Kind("GlmConfig", _FAST, (_JSON,)),
    # of a processor the tokenizer alone is loaded by its class; what prompts with images need is in processor.py
    "Mistral3ForConditionalGeneration": Kind("Mistral3Config", ("PixtralProcessor", *_FAST, *_LLAMA), (_JSON,)),
    "Mistral3Model": Kind("Mistral3Config", (*_FAST, *_LLAMA), (_JSON,)),
    "ChatGLMModel": Kind(
        "ChatGLMConfig",
        ("ChatGLMTokenizer",),
        (frozenset({"tokenizer.model"}),),
        module="diffusers.pipelines.kolors.text_encoder",
        library="kolors",
    ),
}
SIZES = (
    "hidden_size", "d_model", "num_attention_heads", "num_heads", "intermediate_size", "d_ff", "d_kv", "vocab_size",
    "max_position_embeddings", "projection_dim", "num_hidden_layers", "num_layers", "head_dim", "num_key_value_heads",
    "depth", "out_hidden_size", "ffn_hidden_size", "kv_channels",
)  # fmt: skip
MAX_LAYERS = 1000
LOADING = Lock()  # transformers changes torch's default dtype and its initializers while it loads, for all threads
# Of a config, what would have transformers fetch or run something, or says what the caller decides.
UNUSED = ("auto_map", "torch_dtype", "dtype", "attn_implementation", "experts_implementation")


def check_text_config(config: dict[str, Any], folder: Path, option: str) -> None:
    """Raise UserError for sizes that no text encoder has, or none, and for weights that need another library."""
    halves = {name: config[name] for name in ("text_config", "vision_config", "encoder") if name in config}
    for half in [config, *(half for half in halves.values() if isinstance(half, dict))]:
        check_sizes(half, [name for name in SIZES if name in half], folder, option)
        for name in ("num_hidden_layers", "num_layers", "depth"):
            if half.get(name, 0) > MAX_LAYERS:
                raise UserError(f"{option} {folder}: its config's {name} is {half[name]}, expected 1 to {MAX_LAYERS}.")
    text = halves.get("text_config") or halves.get("encoder")  # of models that see images too, and of T5Gemma
    check_named(text if isinstance(text, dict) else config, folder)
    if config.get("quantization_config") is not None:
        raise UserError(f"{option} {folder}: its weights are quantized, which is not supported. Give the full model.")


def check_named(config: Mapping[str, Any], folder: Path) -> None:
    """Raise UserError if a config names no size: transformers would build another model, and say nothing."""
    for names in (("hidden_size", "d_model"), ("num_hidden_layers", "num_layers")):
        if not any(name in config for name in names):
            raise UserError(f"{folder / 'config.json'} says no {names[0]}, expected a text encoder's. Save it again.")


def check_class(
    index: Mapping[str, Any], part: str, allowed: tuple[str, ...], where: str, libraries: str = "transformers"
) -> str:
    """The class that model_index.json names for a part. Raises UserError unless it is one of those allowed."""
    named = index.get(part)
    for name in allowed:
        if named in [[library, name] for library in libraries.split()]:
            return name
    raise UserError(
        f"{where}: its model_index.json says that {part} is {shortened(str(named))}, expected {libraries.split()[0]}' "
        f"{' or '.join(allowed)}. Other classes are never loaded."
    )


def known_class(name: str, module: str = "transformers") -> Any:
    """A class of transformers, or of one of its modules. Raises UserError if this transformers has none."""
    import transformers

    try:
        found = class_of(import_module(module), name)
    except ImportError:
        found = None
    if found is None:
        raise UserError(
            f"--model: its text encoder needs {name}, which transformers {transformers.__version__} does not have. "
            "Upgrade transformers, or --no-cond."
        )
    return found


def encoder_class(kind: str) -> Any:
    """The class of a text encoder. Raises UserError like known_class."""
    return known_class(kind, KINDS[kind].module)


def check_encoder(
    kind: str, config: dict[str, Any], shapes: Mapping[str, tuple[int, ...]], folder: Path, part: str
) -> None:
    """Raise UserError, before a weight is read, where a config makes no model or weights have other shapes."""
    model = build_encoder(kind, config, folder)
    wanted = {short_name(name): tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    check_shapes(wanted, {short_name(name): shape for name, shape in shapes.items()}, str(folder), part)


def build_encoder(kind: str, config: dict[str, Any], folder: Path) -> Any:
    """A text encoder without weights, on the meta device. Raises UserError for a config that makes none."""
    import torch

    with blame(f"{folder}: its config.json makes no {kind}"), torch.device("meta"):
        return encoder_class(kind)(make_config(kind, config))


def short_name(name: str) -> str:
    """A tensor's name without what transformers adds and leaves out as it loads.

    CLIP's begin with text_model. up to transformers 4; Qwen3's with model. where they were saved with a head; those of
    models that see images with model.language_model., language_model.model. or model., by the version.
    """
    return re.sub(r"^((text_model|language_model|model)\.)+", "", name)


def make_config(kind: str, config: dict[str, Any]) -> Any:
    """transformers' config object of a text encoder; whatever a library raises about it is the caller's to blame."""
    own = config.get("encoder", config) if kind == "T5GemmaEncoder" else config  # of both halves, or of this alone
    fields = {name: value for name, value in own.items() if not name.startswith("_") and name not in UNUSED}
    return known_class(KINDS[kind].config, KINDS[kind].module).from_dict(fields)


def made_config(kind: str, config: dict[str, Any], where: str) -> Any:
    """The same, checked. Raises UserError for what makes none."""
    with blame(f"{where}: its config.json makes no {kind}"):
        return make_config(kind, config)


def text_config(kind: str, config: dict[str, Any], where: str) -> Any:
    """That of what reads text, in a model that may see images too. Raises UserError for what makes none."""
    made = made_config(kind, config, where)
    with blame(f"{where}: its config.json makes no {kind}"):
        return made.get_text_config()


def load_encoder(
    kind: str,
    config: dict[str, Any],
    tensors: "Mapping[str, torch.Tensor]",
    dtype: "torch.dtype",
    where: str,
    what: str,
) -> tuple[Any, dict[str, Any]]:
    """A text encoder on the CPU, and what transformers says of names it did not find.

    Raises UserError for weights that do not fit, which begins with `what`, and for those that are no finite numbers,
    which begins with `where`.

    The weights are given in `dtype`, and not cast later: so transformers keeps the layers in float32 that overflow in
    float16 (T5's wo).
    """
    with blame(what):
        made = make_config(kind, config)
        with LOADING:
            model, info = encoder_class(kind).from_pretrained(
                None, config=made, state_dict=dict(tensors), torch_dtype=dtype, output_loading_info=True
            )
    own = {short_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    check_numbers({name: tensor for name, tensor in tensors.items() if short_name(name) in own}, where)
    return model, info


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


def make_pipeline(family: Family, parts: Mapping[str, Any]) -> Any:
    """The base pipeline of a family, with these parts and settings and nothing else."""
    kind = pipeline_class(family)
    parameters = inspect.signature(kind.__init__).parameters
    arguments: dict[str, Any] = {
        name: None for name, p in parameters.items() if p.default is p.empty and name != "self"
    }
    if "requires_safety_checker" in parameters:
        arguments["requires_safety_checker"] = False
    return kind(**{**arguments, **parts})


def pipeline_default(family: Family, name: str) -> Any:
    """What a setting of a pipeline is where model_index.json does not say it."""
    return getattr(make_pipeline(family, {}), name)
