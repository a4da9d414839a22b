"""Trains a LoRA for Stable Diffusion 1.x, 2.x or SDXL with diffusers and peft, from a latent cache.

    pip install peft
    latentprep encode ./photos --model stabilityai/stable-diffusion-xl-base-1.0 --resolution 1024 --flip
    python examples/train_lora.py ./photos.latents --model stabilityai/stable-diffusion-xl-base-1.0

The result is loaded with pipeline.load_lora_weights(out).
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from diffusion import FOR_REAL, loss_of, open_unet, step_generator
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict

from latentprep import LatentDataset, LatentLoader


def main(
    cache: Annotated[str, typer.Argument(help="A cache of latentprep.")],
    out: Annotated[Path, typer.Option(help="Folder of the LoRA.")] = Path("lora"),
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a pipeline with a UNet.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images the UNet sees at once.")] = 4,
    rank: Annotated[int, typer.Option(help="Of the LoRA.")] = 16,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    caption_dropout: Annotated[float, typer.Option(help="How often the empty prompt is taken.")] = 0.1,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = LatentDataset(
        cache, latent_sampling_method="random", use_weight=True, caption_dropout=caption_dropout, seed=seed
    )
    loader = LatentLoader(data, batch_size, seed=seed)
    cond = data[0].cond
    is_sdxl = cond is not None and "pooled_prompt_embeds" in cond
    if model is None:
        name = "stabilityai/stable-diffusion-xl-base-1.0" if is_sdxl else "stable-diffusion-v1-5/stable-diffusion-v1-5"
        print(FOR_REAL.format(model=name, script="examples/train_lora.py"))
    unet, schedule = open_unet(model, data)
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    unet.to(device)
    parameters = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, learning_rate)
    print(f"{len(data)} images, a LoRA of {sum(map(torch.Tensor.numel, parameters)):,} parameters, on {device}")

    step, losses = 0, []
    while step < steps:
        for batch in loader:
            loss = loss_of(batch.to(device, non_blocking=True), unet, schedule, step_generator(seed, step))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            losses.append(loss.item())
            if step % 50 == 0 or step == steps:
                print(f"step {step:>6}  epoch {loader.epoch}  loss {sum(losses) / len(losses):.4f}")
                losses = []
            if step == steps:
                break
    pipeline = StableDiffusionXLPipeline if is_sdxl else StableDiffusionPipeline
    layers = convert_state_dict_to_diffusers(get_peft_model_state_dict(unet))
    pipeline.save_lora_weights(out, unet_lora_layers=layers, safe_serialization=True)
    print(f"saved {out}; pipeline.load_lora_weights({str(out)!r}) loads it")


if __name__ == "__main__":
    typer.run(main)
