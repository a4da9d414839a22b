"""What a plan must know of a VAE, and the folder it is loaded from: its encoder alone, the decoder never runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentprep.cache.normalization import Normalization, normalization_of_config
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.files import (
    VAE_WEIGHTS,
    blame,
    check_numbers,
    check_shapes,
    check_whole,
    digest_model,
    find_weights,
    hash_files,
    read_header,
    read_json,
    read_weights,
    rename_attention,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL

ENCODER_PARTS = ("encoder.", "quant_conv.")
# Fields of an AutoencoderKL's config that decide how much is built -> the least and the most that is believed.
LIMITS = {
    "in_channels": (3, 3),  # RGB
    "out_channels": (1, 1024),
    "latent_channels": (1, 4096),
    "layers_per_block": (1, 64),
    "norm_num_groups": (1, 4096),
}
MAX_LEVELS, MAX_CHANNELS = 10, 2**14


@dataclass(frozen=True)
class VaeFacts:
    """What a plan must know of a VAE."""

    digest: str  # of weights and config
    factor: int  # pixels per latent, each way
    latent_channels: int
    normalization: Normalization  # from its latents to what the denoiser sees
    force_upcast: bool  # its config says that it overflows in float16; in some families pipelines heed that


class VaeSource(Protocol):
    """Where a VAE's weights are: a folder or a single file."""

    @property
    def factor(self) -> int: ...
    def load(self, dtype: "torch.dtype") -> "AutoencoderKL": ...


@dataclass(frozen=True)
class VaeFolder(VaeFacts):
    """A folder with an AutoencoderKL's config.json and weights."""

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]  # the files that were hashed

    def open(
        self, device: "torch.device", dtype: "torch.dtype", *, tiling: int | None = None, compile: bool = False
    ) -> Any:
        from latentprep.prepare.models.vae_encoder import VaeEncoder

        return VaeEncoder(self, device, dtype, tiling=tiling, compile=compile)

    def load(self, dtype: "torch.dtype") -> "AutoencoderKL":
        """The encoder of the VAE, on the CPU. Raises UserError where weights are missing or not finite."""
        vae = build_encoder(self.config, str(self.path))
        tensors = {
            rename_attention(name): tensor
            for name, tensor in read_weights(self.weights, ENCODER_PARTS, "--model").items()
        }
        check_whole(self.path, "diffusers", vae.state_dict().keys() - tensors.keys())
        fill(vae, {name: tensors[name] for name in vae.state_dict()}, dtype, str(self.path))
        return vae


def open_vae(folder: Path, option: str = "--model") -> VaeFolder:
    """The VAE of a pipeline folder or of a VAE-only folder. Raises UserError."""
    path, config = read_vae_config(folder, option)
    numbers = vae_numbers(config, f"{option} {path}")
    weights = find_weights(path, VAE_WEIGHTS, option, index_first=True)
    shapes = {rename_attention(name): shape for name, shape in read_header(weights, option).items()}
    wanted = shapes_of(build_encoder(config, str(path)).state_dict())
    check_whole(path, "diffusers", wanted.keys() - shapes.keys())
    check_shapes(wanted, shapes, str(path), "VAE")
    return VaeFolder(
        digest_model(config, hash_files(weights)), **numbers, path=path, config=config, weights=tuple(weights)
    )


def read_vae_config(folder: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Where in a pipeline folder or VAE-only folder the VAE is, and its config. Raises UserError."""
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(path / "config.json", option)
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"{option} {path}: its VAE is {shortened(str(kind))}, expected AutoencoderKL.")
    return path, config


def vae_numbers(config: dict[str, Any], where: str) -> dict[str, Any]:
    """All of VaeFacts but the digest, from the config.json of an AutoencoderKL. Raises UserError."""
    return read_numbers(build_vae(config, where).config, where)


def read_numbers(config: Any, where: str) -> dict[str, Any]:
    """All of VaeFacts but the digest, from diffusers' own config object, in which defaults are filled in.

    Raises UserError for numbers with which no latents can be made.
    """
    channels = config["latent_channels"]
    try:
        normalization = normalization_of_config(config, channels)
    except ValueError as error:
        raise UserError(f"{where}: its config's {error}. Mend config.json, or download it again.") from None
    return {
        "factor": 2 ** (len(config["block_out_channels"]) - 1),
        "latent_channels": channels,
        "normalization": normalization,
        "force_upcast": bool(config["force_upcast"]),
    }


def build_vae(config: dict[str, Any], where: str) -> "AutoencoderKL":
    """An AutoencoderKL without weights, on the meta device. Raises UserError for configs that make none."""
    import torch
    from diffusers import AutoencoderKL

    _check_config(config, where)
    fields = {name: value for name, value in config.items() if not name.startswith("_")}
    with blame(f"{where}: its config.json makes no AutoencoderKL"), torch.device("meta"):
        return AutoencoderKL.from_config(fields)


def build_encoder(config: dict[str, Any], where: str) -> "AutoencoderKL":
    """Like build_vae, without the decoder: half of the weights, and never run."""
    vae = build_vae(config, where)
    vae.decoder = vae.post_quant_conv = None
    return vae


def fill(vae: "AutoencoderKL", tensors: "Mapping[str, torch.Tensor]", dtype: "torch.dtype", where: str) -> None:
    """Give a VAE on the meta device its weights. Raises UserError for other shapes, and numbers that are not finite."""
    check_shapes(shapes_of(vae.state_dict()), shapes_of(tensors), where, "VAE")
    check_numbers(tensors, where)
    vae.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)


def shapes_of(tensors: "Mapping[str, torch.Tensor]") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _check_config(config: dict[str, Any], where: str) -> None:
    """Raise UserError for fields of other types, and sizes that no memory holds."""
    advice = "Mend config.json, or download it again."
    for name in ("block_out_channels", "latent_channels"):
        if name not in config:
            raise UserError(f"{where}: its config.json has no {name}. Save the model again.")
    for name, (low, high) in LIMITS.items():
        value = config.get(name, low)
        if type(value) is not int or not low <= value <= high:
            raise UserError(
                f"{where}: its config's {name} is {shortened(repr(value))}, expected {low} to {high}. {advice}"
            )
    channels = config["block_out_channels"]
    is_list = isinstance(channels, list) and all(type(n) is int and 1 <= n <= MAX_CHANNELS for n in channels)
    if not is_list or not 1 <= len(channels) <= MAX_LEVELS:
        raise UserError(
            f"{where}: its config's block_out_channels is {shortened(repr(channels))}, expected 1 to {MAX_LEVELS} "
            f"numbers of 1 to {MAX_CHANNELS}. {advice}"
        )
    for name in ("down_block_types", "up_block_types"):
        if name in config and (not isinstance(config[name], list) or len(config[name]) != len(channels)):
            raise UserError(
                f"{where}: its config's {name} is {shortened(repr(config[name]))}, expected {len(channels)} names, one "
                f"per number of block_out_channels. {advice}"
            )
