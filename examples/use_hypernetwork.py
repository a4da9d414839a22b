"""Draws an image with a hypernetwork, of examples/train_hypernetwork.py or of a web UI, and a diffusers pipeline.

    python examples/use_hypernetwork.py hypernetwork/hypernetwork.pt "a photo of sks dog" \\
        --model stable-diffusion-v1-5/stable-diffusion-v1-5 --multiplier 0.8
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from hypernetwork import FileError, list_widths, load_hypernetwork


def main(
    file: Annotated[Path, typer.Argument(help="A .pt or .safetensors file.")],
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    model: Annotated[str, typer.Option(help="Hub id or folder of the pipeline it was trained for.")],
    multiplier: Annotated[float, typer.Option(help="Strength; 0: as without it, 1: as trained.")] = 1.0,
    steps: Annotated[int, typer.Option(help="Steps of the sampler.")] = 30,
    side: Annotated[int | None, typer.Option(help="Of the image, in pixels.", show_default="the model's")] = None,
    out: Annotated[Path, typer.Option(help="The image.")] = Path("hypernetwork.png"),
    seed: Annotated[int, typer.Option(help="Of the first noise.")] = 0,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        hypernetwork = load_hypernetwork(file)
    except FileError as error:
        raise typer.BadParameter(str(error)) from None
    dtype = torch.float16 if device == "cuda" else torch.float32
    pipeline = DiffusionPipeline.from_pretrained(model, use_safetensors=True).to(device, dtype)
    there, known = list_widths(pipeline.unet), list(map(int, hypernetwork.pairs))
    if not set(there) & set(known):
        raise typer.BadParameter(f"{file}: is for contexts of width {known}, the UNet of {model} has {there}.")
    hypernetwork.to(device, dtype).attach(pipeline.unet, multiplier)
    generator = torch.Generator().manual_seed(seed)
    pipeline(prompt, num_inference_steps=steps, height=side, width=side, generator=generator).images[0].save(out)
    print(f"saved {out}")


if __name__ == "__main__":
    typer.run(main)
