"""What a plan must know of a VAE, and the folder it is loaded from: its encoder alone, or for a preview its decoder."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.files import (
    VAE_WEIGHTS,
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
from latentprep.prepare.models.tiles import can_tile
from latentprep.prepare.models.vae_config import build_vae, keep_encoder
from latentprep.prepare.models.vaes import Numbers, numbers_of, probe, vae_names

if TYPE_CHECKING:
    import torch

    from latentprep.prepare.models.doors import ImageEncoder

Keep = Callable[[Any], Any]  # keep_encoder, keep_decoder
STATISTICS = ("bn.running_mean", "bn.running_var")  # buffers that a normalization is made of (vaes.normalization_of)


@dataclass(frozen=True, kw_only=True)
class VaeFacts(Numbers):
    """What a plan must know of a VAE."""

    digest: str  # of weights and config


class VaeFiles(VaeFacts, ABC):
    """A VAE on disk, described by paths and config alone: small, and it can be sent to another process."""

    config: dict[str, Any]

    @abstractmethod
    def load(self, dtype: "torch.dtype", keep: Keep = keep_encoder) -> Any:
        """The encoder of the VAE, or what else `keep` leaves of it, on the CPU.

        Raises UserError if weights are missing or not finite.
        """

    def open(
        self,
        device: "torch.device",
        dtype: "torch.dtype",
        *,
        tiling: int | None = None,
        compile: bool = False,  # noqa: A002
    ) -> "ImageEncoder":
        """The VAE at work, on its device. Raises UserError like load and check_modes."""
        from latentprep.prepare.models.vae_encoder import VaeEncoder

        self.check_modes(tiling, compile)
        return VaeEncoder(self, device, dtype, tiling=tiling, compile=compile)

    def check_modes(self, tiling: int | None, compile: bool) -> None:  # noqa: A002
        """Raise UserError for modes that the VAE's class does not have."""
        name = self.config["_class_name"]
        if tiling is not None and not can_tile(build_vae(self.config, name).eval(), self.factor):
            raise UserError(
                f"--tiling {tiling}: not for {name}, for which diffusers {version('diffusers')} has no tiles that join "
                "exactly. Leave it out."
            )
        if compile and self.has_time:
            raise UserError(f"--compile: not for {name}, which takes videos. Leave it out.")


@dataclass(frozen=True, kw_only=True)
class VaeFolder(VaeFiles):
    """A folder with a VAE's config.json and weights."""

    path: Path
    config: dict[str, Any]
    weights: tuple[Path, ...]  # the files that were hashed

    def load(self, dtype: "torch.dtype", keep: Keep = keep_encoder) -> Any:
        vae = keep(build_vae(self.config, str(self.path)))
        tensors = read_tensors(self.weights, vae.state_dict().keys(), "--model")
        check_whole(self.path, "diffusers", vae.state_dict().keys() - tensors.keys())
        fill(vae, tensors, dtype, str(self.path))
        return vae


def open_vae(folder: Path, option: str = "--model", norm_eps: float | None = None) -> VaeFolder:
    """The VAE of a pipeline folder or of a VAE-only folder; norm_eps as in normalization_of. Raises UserError."""
    path, config = read_vae_config(folder, option)
    where = f"{option} {path}"
    vae = build_vae(config, where)
    wanted = statistics_of(vae)
    weights = find_weights(path, VAE_WEIGHTS, option, index_first=True)
    shapes = {rename_attention(name): shape for name, shape in read_header(weights, option).items()}
    check_whole(path, "diffusers", wanted.keys() - shapes.keys())
    check_shapes(wanted, shapes, str(path), "VAE")
    give_statistics(vae, read_tensors(weights, wanted.keys(), option), str(path))
    numbers = read_numbers(vae, where, norm_eps)
    needed = shapes_of(keep_encoder(vae).state_dict())
    check_whole(path, "diffusers", needed.keys() - shapes.keys())
    check_shapes(needed, shapes, str(path), "VAE")
    digest = digest_model(config, hash_files(weights))
    return VaeFolder(**fields_of(numbers), digest=digest, path=path, config=config, weights=tuple(weights))


def statistics_of(vae: Any) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the buffers of a VAE that its normalization is made of."""
    return {name: shape for name, shape in shapes_of(vae.state_dict()).items() if name in STATISTICS}


def give_statistics(vae: Any, tensors: "Mapping[str, torch.Tensor]", where: str) -> None:
    """Put the buffers that its normalization is made of into a VAE on the meta device.

    Raises UserError for numbers that are none, and for a variance below 0: the config is not at fault for these.
    """
    check_numbers(tensors, where)
    for name, tensor in tensors.items():
        if name.endswith("running_var") and bool((tensor < 0).any()):
            raise UserError(f"{where}: its weight {name} has numbers below 0, and is a variance. Download it again.")
    for name, tensor in tensors.items():
        setattr(vae.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2], tensor)


def read_vae_config(folder: Path, option: str) -> tuple[Path, dict[str, Any]]:
    """Where in a pipeline folder or VAE-only folder the VAE is, and its config. Raises UserError."""
    path = folder / "vae" if (folder / "vae").is_dir() else folder
    config = read_json(path / "config.json", option)
    kind = config.get("_class_name")
    if kind not in vae_names():
        raise UserError(f"{option} {path}: its VAE is {shortened(str(kind))}, expected {_one_of(vae_names())}.")
    if path != folder:
        check_index(folder, str(kind), option)
    return path, config


def check_index(folder: Path, kind: str, option: str) -> None:
    """Raise UserError if model_index.json names another class of diffusers for the VAE than vae/config.json.

    A pipeline loads the one that model_index.json names, with the fields of config.json (diffusers,
    DiffusionPipeline.from_pretrained). Classes of other libraries are nothing here: they are code of the folder's own.
    """
    file = folder / "model_index.json"
    named = read_json(file, option).get("vae") if file.is_file() else None
    if isinstance(named, list) and named[:1] == ["diffusers"] and named[1:] != [kind]:
        raise UserError(
            f"{option} {folder}: its model_index.json says that vae is {shortened(str(named))}, and vae/config.json "
            f"that it is {kind}. Mend the one that is wrong, or download the model again."
        )


def _one_of(names: tuple[str, ...]) -> str:
    return " or ".join(part for part in (", ".join(names[:-1]), names[-1]) if part)


def read_numbers(vae: Any, where: str, norm_eps: float | None = None) -> Numbers:
    """What is known of a VAE on the meta device, whose statistics are there. Raises UserError."""
    return numbers_of(vae, probe(vae.eval(), where), where, norm_eps)


def fields_of(numbers: Numbers) -> dict[str, Any]:
    """The fields of Numbers, for a class that has more."""
    return {field.name: getattr(numbers, field.name) for field in fields(numbers)}


def read_tensors(paths: "tuple[Path, ...] | list[Path]", names: Any, option: str) -> "dict[str, torch.Tensor]":
    """The tensors of these names as diffusers has them today. Raises UserError."""
    parts = tuple({f"{name.partition('.')[0]}." for name in names})
    found = {rename_attention(name): tensor for name, tensor in read_weights(paths, parts, option).items()}
    return {name: found[name] for name in names if name in found}


def fill(vae: Any, tensors: "Mapping[str, torch.Tensor]", dtype: "torch.dtype", where: str) -> None:
    """Give a VAE on the meta device its weights. Raises UserError for other shapes, and numbers that are not finite."""
    check_shapes(shapes_of(vae.state_dict()), shapes_of(tensors), where, "VAE")
    check_numbers(tensors, where)
    vae.load_state_dict({name: tensor.to(dtype) for name, tensor in tensors.items()}, assign=True)


def shapes_of(tensors: "Mapping[str, torch.Tensor]") -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
