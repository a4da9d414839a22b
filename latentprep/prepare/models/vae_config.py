"""An untrusted config.json of a VAE -> diffusers' object without weights, within bounds that are the same for all
classes: sizes that are believed, and an end to what is built.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.files import blame, class_of
from latentprep.prepare.models.vaes import VaeClass, find_vae

if TYPE_CHECKING:
    import torch

# Fields that decide how much is built, by their names in any class -> the least and the most that is believed.
LIMITS = {
    "out_channels": (1, 1024),
    "latent_channels": (1, 4096),
    "z_dim": (1, 4096),
    "base_dim": (1, 2**14),
    "decoder_base_dim": (1, 2**14),
    "attention_head_dim": (1, 2**14),
    "spatial_compression_ratio": (1, 1024),
    "layers_per_block": (1, 64),
    "num_res_blocks": (1, 64),
    "norm_num_groups": (1, 4096),
}
INPUTS = ("in_channels", "input_channels")  # what an image has: count_inputs
PATCHES = (1, 64)
# Of fields that are lists, with a number for each level; CHANNELS: of all whose names end in block_out_channels.
MAX_LEVELS, CHANNELS = 10, (1, 2**14)
LISTS = {
    "dim_mult": (1, 64),
    "encoder_layers_per_block": (0, 64),
    "decoder_layers_per_block": (0, 64),
    "num_encoder_blocks": (1, 64),
    "num_decoder_blocks": (1, 64),
}
# Of all other fields:
MAX_INT, MAX_LIST, MAX_TEXT, MAX_DEPTH = 2**20, 4096, 100, 3
# Of what is built, wherever it comes from; the largest VAE known here has 500 modules and 0.7 billion numbers.
MAX_MODULES, MAX_NUMBERS = 20_000, 2**32
# Parts that encoding, or decoding, needs no weights of. The statistics of a batch norm are in the normalization.
ENCODER_PARTS, DECODER_PARTS = ("encoder", "quant_conv"), ("decoder", "post_quant_conv")
NORM = ("bn",)
ADVICE = "Mend config.json, or download it again."


def build_vae(config: dict[str, Any], where: str) -> Any:
    """A VAE without weights, on the meta device. Raises UserError for configs that make none."""
    import diffusers
    import torch

    row = find_vae(config.get("_class_name"))
    assert row is not None  # read_vae_config refuses others
    kind = class_of(diffusers, row.name)
    if kind is None:
        raise UserError(
            f"{where}: its VAE is {row.name}, which diffusers {diffusers.__version__} does not have. Upgrade diffusers."
        )
    known = inspect.signature(kind.__init__).parameters
    fields = {name: value for name, value in config.items() if name in known and not name.startswith("_")}
    check_config(row, fields, where)
    with bounded(where), blame(f"{where}: its config.json makes no {row.name}"), torch.device("meta"):
        return kind.from_config(fields)


def keep_encoder(vae: Any) -> Any:
    """The same VAE without what encoding does not need: half of the weights."""
    return leave_out(vae, (*DECODER_PARTS, *NORM))


def keep_decoder(vae: Any) -> Any:
    """The same VAE without what decoding does not need."""
    return leave_out(vae, (*ENCODER_PARTS, *NORM))


def leave_out(vae: Any, parts: Iterable[str]) -> Any:
    import torch

    for name in parts:
        if hasattr(vae, name):  # empty and not None: AutoencoderKLQwenImage counts the layers of its decoder
            setattr(vae, name, torch.nn.Identity())
    return vae


def check_config(row: VaeClass, config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for fields of other types, and sizes that no memory holds."""
    for name in row.required:
        if name not in config:
            raise UserError(f"{where}: its config.json has no {name}. Save the model again.")
        if config[name] is None:
            _refuse(name, None, "a value", where)
    inputs = count_inputs(row, config)
    for name, value in config.items():
        if value is None:  # as if it were not there: decoder_block_out_channels of FLUX.2
            continue
        if name in INPUTS and (type(value) is not int or value != inputs):
            _refuse(name, value, f"{inputs}", where)
        if name in LIMITS and not _is_within(value, LIMITS[name]):
            _refuse(name, value, "{} to {}".format(*LIMITS[name]), where)
        limits = CHANNELS if name.endswith("block_out_channels") else LISTS.get(name)
        if limits is not None and not _are_within(value, limits):
            _refuse(name, value, "1 to {} numbers of {} to {}".format(MAX_LEVELS, *limits), where)
    channels = config.get("block_out_channels")
    for name in ("down_block_types", "up_block_types"):
        if channels is None or name not in config:
            continue
        if not isinstance(config[name], (list, tuple)) or len(config[name]) != len(channels):
            _refuse(name, config[name], f"{len(channels)} names, one per number of block_out_channels", where)
    for name, value in config.items():
        if not _is_small(value):
            _refuse(name, value, f"lists of at most {MAX_LIST}, and numbers of at most {MAX_INT:,}", where)


def count_inputs(row: VaeClass, config: Mapping[str, Any]) -> int:
    """The channels that a VAE's encoder takes: colours, and in Wan 2.2 those of patch_size * patch_size pixels."""
    patch: Any = config.get("patch_size")
    # a list: FLUX.2, which lays latents side by side, and no pixels
    return row.colors * (patch**2 if _is_within(patch, PATCHES) else 1)


def _is_within(value: Any, limits: tuple[int, int]) -> bool:
    return type(value) is int and limits[0] <= value <= limits[1]


def _are_within(values: Any, limits: tuple[int, int]) -> bool:
    is_list = isinstance(values, (list, tuple)) and 1 <= len(values) <= MAX_LEVELS
    return is_list and all(_is_within(value, limits) for value in values)


def _refuse(name: str, value: Any, expected: str, where: str) -> None:
    raise UserError(f"{where}: its config's {name} is {shortened(repr(value))}, expected {expected}. {ADVICE}")


def _is_small(value: Any, depth: int = 0) -> bool:
    """Whether a value of a config is one of those that VAEs have: numbers, short texts, and lists of these."""
    if isinstance(value, (list, tuple)):
        return depth < MAX_DEPTH and len(value) <= MAX_LIST and all(_is_small(part, depth + 1) for part in value)
    if isinstance(value, str):
        return len(value) <= MAX_TEXT
    if type(value) is int:
        return abs(value) <= MAX_INT
    return value is None or isinstance(value, (bool, float))


@dataclass(eq=False)
class Made:
    """How much has been made inside a block."""

    where: str
    modules: int = 0
    numbers: int = 0

    def count(self, modules: int = 0, numbers: int = 0) -> None:
        """Raise UserError for more than a VAE has."""
        self.modules += modules
        self.numbers += numbers
        for what, most in (("modules", MAX_MODULES), ("numbers", MAX_NUMBERS)):
            if getattr(self, what) > most:
                raise UserError(
                    f"{self.where}: its config.json asks for more than {most:,} {what}, which no VAE has. {ADVICE}"
                )


MADE: ContextVar[Made | None] = ContextVar("made", default=None)  # each thread has its own
WATCHING = Lock()


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Raise UserError as soon as more modules or numbers are made inside the block than a VAE can have.

    Sizes multiply: a config may be modest in every field and still ask for more than any memory or patience holds.
    """
    with WATCHING:
        watch_modules()
    token = MADE.set(Made(where))
    try:
        yield
    finally:
        MADE.reset(token)


@cache
def watch_modules() -> None:
    """Have torch tell of all modules and parameters that are made, for good.

    Its tables of hooks are those of the whole process: one that changed them would stop threads that build modules.
    """
    from torch.nn.modules import module as hooks

    def add_module(parent: Any, name: str, part: Any) -> None:
        if (made := MADE.get()) is not None and part is not None:
            made.count(modules=1)

    def add_parameter(parent: Any, name: str, parameter: "torch.Tensor | None") -> None:
        if (made := MADE.get()) is not None and parameter is not None:
            made.count(numbers=parameter.numel())

    hooks.register_module_module_registration_hook(add_module)
    hooks.register_module_parameter_registration_hook(add_parameter)
