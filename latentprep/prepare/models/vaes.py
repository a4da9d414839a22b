"""The VAEs that latents are made with: a table of diffusers classes, and the one way in which all of them are asked.

What is known of a VAE comes from the library's own object: the size of its latents from a run on the meta device, where
no number is computed, and the normalization from its config and its buffers.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from latentprep.cache.normalization import Normalization, normalization_of_config
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.files import blame

if TYPE_CHECKING:
    from torch import Tensor

PROBE_SIDE = 1024  # pixels of the image that is encoded on the meta device; at least four latents of any VAE
MAX_PATCH = 2  # latents that are laid side by side, each way


@dataclass(frozen=True)
class VaeClass:
    """A row of VAES: nothing but these classes is ever built, whatever a model's files say."""

    name: str  # of the class in diffusers
    required: tuple[str, ...]  # fields of config.json without which diffusers would build some other VAE
    colors: int = 3  # RGB; 4: it takes RGBA, and what it is given is opaque


VAES = (
    VaeClass("AutoencoderKL", required=("block_out_channels", "latent_channels")),
    VaeClass("AutoencoderKLFlux2", required=("block_out_channels", "latent_channels")),
    VaeClass("AutoencoderKLQwenImage", required=("base_dim", "z_dim", "latents_mean", "latents_std")),
    VaeClass("AutoencoderKLQwenImage21", required=("base_dim", "z_dim", "latents_mean", "latents_std"), colors=4),
    VaeClass("AutoencoderKLWan", required=("base_dim", "z_dim", "latents_mean", "latents_std")),
    VaeClass("AutoencoderDC", required=("encoder_block_out_channels", "latent_channels", "scaling_factor")),
    VaeClass(
        "AutoencoderKLHunyuanImage",
        required=("block_out_channels", "latent_channels", "spatial_compression_ratio", "scaling_factor"),
    ),
    VaeClass("AutoencoderTiny", required=("encoder_block_out_channels", "num_encoder_blocks", "latent_channels")),
)


def find_vae(class_name: object) -> VaeClass | None:
    """The row of a VAE class; None if there is none."""
    return next((row for row in VAES if row.name == class_name), None)


def vae_names() -> tuple[str, ...]:
    """The classes of all rows."""
    return tuple(row.name for row in VAES)


def is_video(vae: Any) -> bool:
    """Whether a VAE takes images as videos of one frame: its convolutions have a time axis.

    Those of AutoencoderKLQwenImage21 have lost it; its images still have one, and its fields are a video VAE's.
    """
    import torch

    if not isinstance(vae, torch.nn.Module):
        return False
    return hasattr(vae, "temperal_downsample") or any(isinstance(part, torch.nn.Conv3d) for part in vae.modules())


def posterior_of(vae: Any, images: "Tensor", has_time: bool) -> "tuple[Tensor, Tensor | None]":
    """What a VAE says of images.

    images [N,3,H,W] in -1..1, in the VAE's dtype => mean and std [N,C,h,w], unscaled; std is None if it gives none.
    """
    import torch

    row = find_vae(type(vae).__name__)
    if row is not None and row.colors == 4:
        images = torch.cat([images, torch.ones_like(images[:, :1])], dim=1)
    output = vae.encode(images[:, :, None] if has_time else images)
    found = getattr(output, "latent_dist", None)
    if found is not None:
        mean, std = found.mean, found.std
    else:  # AutoencoderDC calls it latent, AutoencoderTiny latents
        mean, std = output.latent if hasattr(output, "latent") else output.latents, None
    if has_time:
        mean, std = mean.squeeze(2), std.squeeze(2) if std is not None else None
    return mean, std


def image_of(vae: Any, latents: "Tensor", has_time: bool) -> "Tensor":
    """What a VAE makes of latents: latents [N,C,h,w], unscaled, in the VAE's dtype => [N,3,H,W] in about -1..1."""
    found = vae.decode(latents[:, :, None] if has_time else latents).sample
    return (found.squeeze(2) if has_time else found)[:, :3]  # of RGBA the colours


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What is known of a VAE beside its weights; a plan needs it."""

    factor: int  # pixels per latent, each way
    latent_channels: int
    normalization: Normalization  # from its latents to what the denoiser sees
    force_upcast: bool = False  # its config says that it overflows in float16; in some families pipelines heed that
    has_std: bool = True  # False: it gives one latent, and no spread to draw from
    has_time: bool = False  # whether it takes images as videos of one frame


def probe(vae: Any, where: str) -> dict[str, Any]:
    """factor, latent_channels, has_std and has_time of a VAE on the meta device. Raises UserError."""
    import torch

    with blame(f"{where}: its config.json makes no VAE that encodes an image"), torch.no_grad():
        images = torch.zeros(1, 3, PROBE_SIDE, PROBE_SIDE, device="meta")
        mean, std = posterior_of(vae, images, is_video(vae))
    shape = list(mean.shape)
    if len(shape) != 4 or shape[2] != shape[3] or not 1 <= shape[2] <= PROBE_SIDE or PROBE_SIDE % shape[2]:
        raise UserError(
            f"{where}: its VAE makes latents {shape} of an image of {PROBE_SIDE}x{PROBE_SIDE}, expected [1,C,h,h]. "
            "Mend config.json, or download it again."
        )
    return {
        "factor": PROBE_SIDE // shape[2],
        "latent_channels": shape[1],
        "has_std": std is not None,
        "has_time": is_video(vae),
    }


def normalization_of(vae: Any, channels: int, norm_eps: float | None = None) -> Normalization:
    """What becomes of a VAE's latents before the denoiser sees them. Raises ValueError for numbers that no VAE has.

    FLUX.2's lays 2x2 latents side by side and takes the statistics of its batch norm, buffers that were trained
    (diffusers, pipeline_flux2.py, _encode_vae_image); all others say it in their config. norm_eps is what is added to
    the variance of a batch norm, if it is not the config's (Family.norm_eps).
    """
    import torch

    norm, config = getattr(vae, "bn", None), vae.config
    if not isinstance(norm, torch.nn.BatchNorm2d) or norm.running_mean is None or norm.running_var is None:
        return normalization_of_config(config, channels)
    patch, eps = config.get("patch_size"), config.get("batch_norm_eps") if norm_eps is None else norm_eps
    if not isinstance(patch, (list, tuple)) or len(patch) != 2 or any(type(n) is not int for n in patch):
        raise ValueError(f"patch_size is {shortened(repr(patch))}, expected two numbers")
    if patch[0] != patch[1] or not 1 <= patch[0] <= MAX_PATCH:
        raise ValueError(f"patch_size is {shortened(repr(patch))}, expected the same twice, up to {MAX_PATCH}")
    if type(eps) not in (int, float) or not 0 <= eps <= 1:
        raise ValueError(f"batch_norm_eps is {shortened(repr(eps))}, expected 0 to 1")
    mean, variance = norm.running_mean.detach().float().cpu(), norm.running_var.detach().float().cpu()
    std = torch.sqrt(variance + eps)  # in float32, as the pipeline computes it
    if not bool((std > 0).all()):
        raise ValueError(f"batch_norm_eps is {eps}, and with it bn.running_var has numbers that are not above 0")
    return Normalization(tuple(mean.tolist()), tuple(1 / value for value in std.tolist()), patch[0])


def numbers_of(vae: Any, probed: dict[str, Any], where: str, norm_eps: float | None = None) -> Numbers:
    """What is known of a VAE of which a probe has told the sizes. Raises UserError for numbers that no VAE has."""
    try:
        normalization = normalization_of(vae, probed["latent_channels"], norm_eps)
    except ValueError as error:
        raise UserError(f"{where}: its config's {error}. Mend config.json, or download it again.") from None
    return Numbers(**probed, normalization=normalization, force_upcast=bool(vae.config.get("force_upcast", False)))
