"""A real training loop: a small UNet with cross-attention learns from the cache alone."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel

from latentprep import LatentDataset, LatentLoader, encode
from latentprep.demo import draw_folder


@pytest.mark.slow
def test_a_unets_loss_falls_clearly_on_the_demo_images(tmp_path):
    draw_folder(tmp_path / "images")
    options = {"model": "tiny", "resolution": 128, "bucket_step": 32, "min_side": 32, "flip": True}
    assert encode(tmp_path / "images", tmp_path / "cache", **options, progress=False).ok

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=64,
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=2e-3)
    data = LatentDataset(str(tmp_path / "cache"), latent_sampling_method="random", flip_p=0.5, use_weight=True)
    loader = LatentLoader(data, batch_size=4, seed=0)
    losses, shapes = [], set()
    for epoch in range(10):
        shapes = set()
        for batch in loader:
            shapes.add(tuple(batch.latent_sample.shape[1:]))
            noise = torch.randn(batch.latent_sample.shape)
            timesteps = torch.randint(0, 1000, (len(batch),))
            noisy = scheduler.add_noise(batch.latent_sample, noise, timesteps)
            predicted = unet(noisy, timesteps, batch.cond["prompt_embeds"]).sample
            loss = (batch.weight * F.mse_loss(predicted, noise, reduction="none")).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert loader.epoch == epoch + 1
    assert len(shapes) >= 3  # buckets of different shapes in one epoch
    assert len(losses) >= 60
    first, last = sum(losses[:8]) / 8, sum(losses[-8:]) / 8
    assert last < 0.6 * first, (first, last)
