"""A miniature of every family's denoiser, with random weights; its parts fit tests/miniatures.py."""

from collections.abc import Callable
from typing import Any

import diffusers
import torch


def make_unet(**config: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        block_out_channels=(8, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, attention_head_dim=4, norm_num_groups=8,
        **config,
    )  # fmt: skip


def make_sized_unet(pooled: int, **config: Any) -> Any:
    """SDXL's kind: it takes pooled embeddings and six numbers of sizes, too."""
    return make_unet(
        addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + pooled, **config,
    )  # fmt: skip


def make_qwen(**config: Any) -> Any:
    return diffusers.QwenImageTransformer2DModel(
        in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(4, 6, 6), **config,
    )  # fmt: skip


def make_sana(**config: Any) -> Any:
    return diffusers.SanaTransformer2DModel(
        in_channels=8, out_channels=8, num_layers=1, num_attention_heads=2, attention_head_dim=8, caption_channels=32,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, sample_size=2, **config,
    )  # fmt: skip


def make_pixart(**config: Any) -> Any:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_layers=1, cross_attention_dim=24, caption_channels=80,
        **config,
    )  # fmt: skip


def make_flux2(guidance_embeds: bool) -> Any:
    return diffusers.Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, timestep_guidance_channels=16, axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=guidance_embeds,
    )  # fmt: skip


# Stem of a family -> what makes its denoiser.
DENOISERS: dict[str, Callable[[], Any]] = {
    "StableDiffusion": lambda: make_unet(cross_attention_dim=32),
    "StableDiffusionXL": lambda: make_sized_unet(48, cross_attention_dim=80),
    "Kolors": lambda: make_sized_unet(
        32, cross_attention_dim=16, encoder_hid_dim=32, encoder_hid_dim_type="text_proj"
    ),
    "StableDiffusion3": lambda: diffusers.SD3Transformer2DModel(
        sample_size=8, num_layers=2, attention_head_dim=4, num_attention_heads=2, joint_attention_dim=80,
        caption_projection_dim=8, pooled_projection_dim=80, pos_embed_max_size=8,
    ),
    "Flux": lambda: diffusers.FluxTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=80,
        pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 6, 6),
    ),
    "Flux2": lambda: make_flux2(True),
    "Flux2Klein": lambda: make_flux2(False),
    "QwenImage": make_qwen,
    "QwenImageEdit": make_qwen,
    "QwenImageEditPlus": lambda: make_qwen(zero_cond_t=True),  # as 2511 has it
    "Krea2": lambda: diffusers.Krea2Transformer2DModel(
        in_channels=16, num_layers=1, attention_head_dim=16, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, timestep_embed_dim=16, text_hidden_dim=32, num_text_layers=3, text_num_attention_heads=2,
        text_num_key_value_heads=2, text_intermediate_size=32, num_layerwise_text_blocks=1, num_refiner_text_blocks=1,
        axes_dims_rope=(4, 6, 6),
    ),
    "ZImage": lambda: diffusers.ZImageTransformer2DModel(
        dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32, axes_dims=[4, 6, 6],
        axes_lens=[1024, 32, 32],
    ),
    "Chroma": lambda: diffusers.ChromaTransformer2DModel(
        num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=80,
        axes_dims_rope=(4, 6, 6), approximator_num_channels=16, approximator_hidden_dim=16, approximator_layers=1,
    ),
    "HiDreamImage": lambda: diffusers.HiDreamImageTransformer2DModel(
        patch_size=2, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        caption_channels=[80, 32], text_emb_dim=80, num_routed_experts=2, num_activated_experts=1,
        axes_dims_rope=(2, 2, 4), max_resolution=(16, 16), llama_layers=[0, 2], force_inference_output=True,
    ),
    "Sana": make_sana,
    "SanaSprint": lambda: make_sana(guidance_embeds=True, qk_norm="rms_norm_across_heads"),
    "Lumina2": lambda: diffusers.Lumina2Transformer2DModel(
        sample_size=8, hidden_size=24, num_layers=1, num_refiner_layers=1, num_attention_heads=2, num_kv_heads=1,
        multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(300, 32, 32), cap_feat_dim=32,
    ),
    "ErnieImage": lambda: diffusers.ErnieImageTransformer2DModel(
        hidden_size=32, num_attention_heads=2, num_layers=1, ffn_hidden_size=48, in_channels=16, out_channels=16,
        text_in_dim=32, rope_axes_dim=(4, 6, 6),
    ),
    "HunyuanImage": lambda: diffusers.HunyuanImageTransformer2DModel(
        in_channels=16, out_channels=16, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, text_embed_dim=32, text_embed_2_dim=80, rope_axes_dim=(8, 8),
    ),
    "CogView4": lambda: diffusers.CogView4Transformer2DModel(
        num_layers=2, attention_head_dim=16, num_attention_heads=2, text_embed_dim=32, time_embed_dim=16,
        condition_dim=8, pos_embed_max_size=16, sample_size=8, rope_axes_dim=(16, 16),
    ),
    "AuraFlow": lambda: diffusers.AuraFlowTransformer2DModel(
        sample_size=8, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=80, caption_projection_dim=16, pos_embed_max_size=64,
    ),
    "PRX": lambda: diffusers.PRXTransformer2DModel(
        context_in_dim=32, hidden_size=32, num_heads=2, depth=1, axes_dim=[8, 8]
    ),
    "PixArtAlpha": lambda: make_pixart(sample_size=128),
    "PixArtSigma": lambda: make_pixart(sample_size=128, use_additional_conditions=False),
    "HunyuanDiT": lambda: diffusers.HunyuanDiT2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, patch_size=2, sample_size=8, hidden_size=32,
        num_layers=2, cross_attention_dim=32, cross_attention_dim_t5=80, pooled_projection_dim=16,
    ),
}  # fmt: skip


def make_denoiser(stem: str) -> Any:
    """A family's denoiser, with weights that are larger than at the start of training, and none that are zero.

    So prompts, masks and positions have an effect that is larger than rounding.
    """
    torch.manual_seed(0)
    model = DENOISERS[stem]()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not parameter.any() or name.endswith("pad_token"):  # Z-Image's come as memory was
                parameter.normal_(std=0.3)
            elif parameter.ndim > 1:
                parameter.mul_(2)
    return model.eval()
