"""What a plan must know of a VAE, and the folder it is loaded from."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from latentprep.errors import UserError
from latentprep.prepare.models.files import (
    VAE_WEIGHTS,
    check_keys,
    check_whole,
    digest_model,
    find_weights,
    hash_files,
    read_json,
)

if TYPE_CHECKING:
    import torch
    from diffusers import AutoencoderKL


@dataclass(frozen=True)
class VaeFacts:
    """What a plan must know of a VAE."""

    digest: str  # of weights and config
    factor: int  # pixels per latent, each way
    latent_channels: int
    scaling_factor: float
    shift_factor: float
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

    def load(self, dtype: "torch.dtype") -> "AutoencoderKL":
        """The whole VAE, on the CPU. Raises UserError where weights are missing."""
        from diffusers import AutoencoderKL

        vae, info = AutoencoderKL.from_pretrained(
            self.path, use_safetensors=True, torch_dtype=dtype, output_loading_info=True
        )
        check_whole(self.path, "diffusers", info["missing_keys"])
        return vae


def open_vae(folder: Path, option: str = "--model") -> VaeFolder:
    """The VAE of a pipeline folder or of a VAE-only folder. Raises UserError."""
    path, config = read_vae_config(folder, option)
    digest = digest_model(config, hash_files(find_weights(path, VAE_WEIGHTS, option)))
    return VaeFolder(digest, **vae_numbers(config), path=path)


def read_vae_config(folder: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Where in a pipeline folder or VAE-only folder the VAE is, and its config. Raises UserError."""
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(path / "config.json", option)
    kind = config.get("_class_name")
    if kind != "AutoencoderKL":
        raise UserError(f"{option} {path}: its VAE is {kind}, expected AutoencoderKL.")
    check_keys(config, ("block_out_channels", "latent_channels"), path, option)
    return path, config


def vae_numbers(config: dict[str, Any]) -> dict[str, Any]:
    """All of VaeFacts but the digest, from an AutoencoderKL's config."""
    return {
        "factor": 2 ** (len(config["block_out_channels"]) - 1),
        "latent_channels": config["latent_channels"],
        "scaling_factor": float(config.get("scaling_factor") or 1.0),
        "shift_factor": float(config.get("shift_factor") or 0.0),
        "force_upcast": bool(config.get("force_upcast", False)),
    }
