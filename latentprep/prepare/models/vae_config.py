"""An untrusted config.json of a VAE -> diffusers' object without weights, within bounds that are the same for all
classes: sizes that are believed, and an end to what is built.
"""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.files import blame, class_of
from latentprep.prepare.models.vaes import VaeClass, find_vae

if TYPE_CHECKING:
    import torch

# Fields that decide how much is built, by their names in any class -> the least and the most that is believed.
LIMITS = {
    "in_channels": (3, 3),  # RGB
    "input_channels": (3, 3),
    "out_channels": (1, 1024),
    "latent_channels": (1, 4096),
    "z_dim": (1, 4096),
    "base_dim": (1, 2**14),
    "layers_per_block": (1, 64),
    "num_res_blocks": (1, 64),
    "norm_num_groups": (1, 4096),
}
MAX_LEVELS, MAX_CHANNELS = 10, 2**14
# Of all other fields:
MAX_INT, MAX_LIST, MAX_TEXT, MAX_DEPTH = 2**20, 4096, 100, 3
# Of what is built, wherever it comes from; the largest VAE known here has 500 modules and 0.7 billion numbers.
MAX_MODULES, MAX_NUMBERS = 20_000, 2**32
# Parts that encoding needs no weights of. The statistics of a batch norm are in the normalization.
UNUSED_PARTS = ("decoder", "post_quant_conv", "bn")
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
    import torch

    for name in UNUSED_PARTS:
        if hasattr(vae, name):  # empty and not None: AutoencoderKLQwenImage counts the layers of its decoder
            setattr(vae, name, torch.nn.Identity())
    return vae


def check_config(row: VaeClass, config: Mapping[str, Any], where: str) -> None:
    """Raise UserError for fields of other types, and sizes that no memory holds."""
    for name in row.required:
        if name not in config:
            raise UserError(f"{where}: its config.json has no {name}. Save the model again.")
    for name in LIMITS.keys() & config.keys():
        low, high = LIMITS[name]
        value = config[name]
        if type(value) is not int or not low <= value <= high:
            expected = f"{low} to {high}" if low < high else f"{low}"
            _refuse(name, value, expected, where)
    for name in config:
        if name.endswith("block_out_channels") and (config[name] is not None or name in row.required):
            _check_channels(name, config[name], where)
    channels = config.get("block_out_channels")
    for name in ("down_block_types", "up_block_types"):
        if channels is None or name not in config:
            continue
        if not isinstance(config[name], (list, tuple)) or len(config[name]) != len(channels):
            _refuse(name, config[name], f"{len(channels)} names, one per number of block_out_channels", where)
    for name, value in config.items():
        if not _is_small(value):
            _refuse(name, value, f"lists of at most {MAX_LIST}, and numbers of at most {MAX_INT:,}", where)


def _check_channels(name: str, channels: Any, where: str) -> None:
    is_list = isinstance(channels, (list, tuple)) and all(type(n) is int and 1 <= n <= MAX_CHANNELS for n in channels)
    if not is_list or not 1 <= len(channels) <= MAX_LEVELS:
        _refuse(name, channels, f"1 to {MAX_LEVELS} numbers of 1 to {MAX_CHANNELS}", where)


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


@contextmanager
def bounded(where: str) -> Iterator[None]:
    """Raise UserError as soon as more modules or numbers are made inside the block than a VAE can have.

    Sizes multiply: a config may be modest in every field and still ask for more than any memory or patience holds.
    """
    from torch.nn.modules import module as hooks

    counts = {"modules": 0, "numbers": 0}

    def count(what: str, more: int, most: int) -> None:
        counts[what] += more
        if counts[what] > most:
            raise UserError(f"{where}: its config.json asks for more than {most:,} {what}, which no VAE has. {ADVICE}")

    def add_module(parent: Any, name: str, part: Any) -> None:
        count("modules", part is not None, MAX_MODULES)

    def add_parameter(parent: Any, name: str, parameter: "torch.Tensor | None") -> None:
        count("numbers", parameter.numel() if parameter is not None else 0, MAX_NUMBERS)

    registered = [
        hooks.register_module_module_registration_hook(add_module),
        hooks.register_module_parameter_registration_hook(add_parameter),
    ]
    try:
        yield
    finally:
        for hook in registered:
            hook.remove()
