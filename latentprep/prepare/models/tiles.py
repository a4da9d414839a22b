"""Tiles: how each class of VAEs is told to encode large images in parts that overlap, and whether diffusers can."""

from typing import Any

from latentprep.prepare.models.vaes import is_video, posterior_of

OVERLAP = 0.25  # of a tile's side, which it shares with the next


def set_tiling(vae: Any, side: int, factor: int) -> None:
    """Have diffusers encode images in tiles of `side` pixels: a quarter overlaps, where what the encoder gives is
    blended. Numbers differ all over the image, since norms and attention see a tile of it.

    `side` is a multiple of 4 * factor: tiles of other sides would not join exactly. diffusers' own choice for an
    AutoencoderKL is the sample_size of its config: 512 for SD 1.5, 1024 for SDXL and FLUX.
    """
    if hasattr(vae, "tile_sample_stride_height"):
        length = side // patch_of(vae)
        stride = int(length * (1 - OVERLAP))
        vae.enable_tiling(length, length, stride, stride)  # height and width of a tile, and how far the next one is
    else:
        vae.enable_tiling()
        vae.tile_sample_min_size, vae.tile_latent_min_size = side, side // factor


def patch_of(vae: Any) -> int:
    """Pixels, each way, that become one before a VAE cuts tiles: 2 in Wan 2.2, whose tiles are counted in these."""
    patch = vae.config.get("patch_size")
    return patch if type(patch) is int and patch > 0 else 1


def can_tile(vae: Any, factor: int) -> bool:
    """Whether diffusers encodes in such tiles, and they join. The VAE is on the meta device, and is not used again.

    It is tried with the smallest tiles. AutoencoderTiny is left out: its tiles share an eighth, and are blended in
    another way, for four channels only (diffusers 0.42).
    """
    import torch

    if not hasattr(vae, "tile_sample_stride_height") and getattr(vae, "tile_overlap_factor", None) != OVERLAP:
        return False
    side = 4 * factor
    images = torch.zeros(1, 3, side + side // 2, side + side // 2, device="meta")
    try:
        set_tiling(vae, side, factor)
        mean, _ = posterior_of(vae, images, is_video(vae))
    except Exception:  # any: in diffusers 0.42 AutoencoderKLHunyuanImage.tiled_encode unpacks five sizes of four
        return False
    return mean.shape[2:] == (6, 6)


def tiling_of(vae: Any) -> Any:
    """How a VAE cuts large images into tiles, which an image of a tile's size does not show; None if it does not."""
    if not getattr(vae, "use_tiling", False):
        return None
    fields = {name: value for name, value in vars(vae).items() if name.startswith("tile_sample_")}
    return fields.get("tile_sample_min_size") or fields
