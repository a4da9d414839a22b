"""What the training examples share: the UNet to train, and the loss of a batch of latents."""

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from torch import Tensor

from latentprep import LatentBatch, LatentDataset

FOR_REAL = """\
no --model, so a small UNet with random weights learns here, for trying out. For the real thing, on a GPU:
  latentprep encode ./photos --model {model} --flip
  python {script} ./photos.latents --model {model}
(`hf download {model}` first, where there is no network later)
"""


def open_unet(model: str | None, data: LatentDataset) -> tuple[UNet2DConditionModel, DDPMScheduler]:
    """The UNet and noise schedule of a pipeline (hub id or folder); without one a small UNet that fits the cache."""
    if model is not None:
        return (
            UNet2DConditionModel.from_pretrained(model, subfolder="unet", use_safetensors=True),
            DDPMScheduler.from_pretrained(model, subfolder="scheduler"),
        )
    torch.manual_seed(0)
    cond = data[0].cond
    assert cond is not None, "the cache has no cond: encode without --no-cond"
    sdxl = {}
    if "pooled_prompt_embeds" in cond:  # as SDXL's: 256 features for each of six numbers, beside the pooled text
        pooled = cond["pooled_prompt_embeds"].shape[1]
        sdxl = {
            "addition_embed_type": "text_time", "addition_time_embed_dim": 32,
            "projection_class_embeddings_input_dim": pooled + 6 * 32,
        }  # fmt: skip
    channels = data.buckets[0][0]
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=channels, out_channels=channels, block_out_channels=(32, 64), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1, attention_head_dim=8, cross_attention_dim=cond["prompt_embeds"].shape[2], **sdxl,
    )  # fmt: skip
    # Stable Diffusion's own schedule
    schedule = DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    return unet, schedule


def loss_of(
    batch: LatentBatch, unet: UNet2DConditionModel, schedule: DDPMScheduler, generator: torch.Generator
) -> Tensor:
    """Mean squared error of the predicted noise (or velocity), weighted pixel by pixel.

    Noise and times come from `generator`, on the CPU: with one seed for each step a resumed run repeats them.
    """
    latents = batch.latent_sample  # [B,C,h,w] float32, scaled for the UNet
    cond = batch.cond
    assert cond is not None
    noise = torch.randn(latents.shape, generator=generator).to(latents.device)
    times = torch.randint(0, schedule.config.num_train_timesteps, (len(batch),), generator=generator)
    times = times.to(latents.device)
    noisy = schedule.add_noise(latents, noise, times)
    added = None
    if "pooled_prompt_embeds" in cond:
        added = {"text_embeds": cond["pooled_prompt_embeds"], "time_ids": batch.time_ids}
    predicted = unet(noisy, times, cond["prompt_embeds"], added_cond_kwargs=added).sample
    wanted = noise if schedule.config.prediction_type == "epsilon" else schedule.get_velocity(latents, noise, times)
    loss = F.mse_loss(predicted.float(), wanted, reduction="none")
    return (loss if batch.weight is None else batch.weight * loss).mean()


def step_generator(seed: int, step: int) -> torch.Generator:
    """The random numbers of one step."""
    return torch.Generator().manual_seed(seed * 1_000_003 + step)
