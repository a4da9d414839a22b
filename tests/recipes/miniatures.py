"""Miniatures of the pipelines that the recipes are for, denoisers included."""

import diffusers
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel, UNet2DConditionModel
from transformers import Qwen3Model

from tests.miniatures import PARTS, make_qwen_tokenizer, make_vae
from tests.test_zimage import make_qwen3

SMALL_UNET = {
    "sample_size": 8, "block_out_channels": (8, 16), "norm_num_groups": 8, "layers_per_block": 1,
    "attention_head_dim": 4, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip


def make_pipeline(name, folder):
    """A miniature with random weights, all of which differ from 0."""
    torch.manual_seed(0)
    if name == "text_to_image_lora":
        parts = {**PARTS["StableDiffusion"](folder), "unet": UNet2DConditionModel(cross_attention_dim=32, **SMALL_UNET)}
        pipeline = diffusers.StableDiffusionPipeline(scheduler=DDPMScheduler(), **parts)
    elif name == "text_to_image_lora_sdxl":
        unet = UNet2DConditionModel(
            cross_attention_dim=80, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=48 + 6 * 8, **SMALL_UNET,
        )  # fmt: skip
        pipeline = diffusers.StableDiffusionXLPipeline(
            scheduler=DDPMScheduler(), **{**PARTS["StableDiffusionXL"](folder), "unet": unet}
        )
    elif name == "dreambooth_lora_flux":
        transformer = FluxTransformer2DModel(
            in_channels=64, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=80, pooled_projection_dim=32, guidance_embeds=True, axes_dims_rope=(4, 4, 8),
        )  # fmt: skip
        parts = {**PARTS["Flux"](folder), "transformer": transformer}
        pipeline = diffusers.FluxPipeline(scheduler=FlowMatchEulerDiscreteScheduler(), **parts)
    else:
        tokenizer = make_qwen_tokenizer(folder.with_name("vocabulary"))
        transformer = diffusers.ZImageTransformer2DModel(
            in_channels=16, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
            axes_dims=[4, 4, 8], axes_lens=[600, 64, 64],
        )  # fmt: skip
        pipeline = diffusers.ZImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(), tokenizer=tokenizer, transformer=transformer,
            vae=make_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=make_qwen3(Qwen3Model, len(tokenizer)),
        )  # fmt: skip
    denoiser = getattr(pipeline, "unet", None) or pipeline.transformer
    with torch.no_grad():
        for parameter in denoiser.parameters():
            if not parameter.any():
                parameter.normal_(0, 0.05)
    pipeline.save_pretrained(folder)
