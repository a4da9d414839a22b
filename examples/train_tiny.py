"""Trains `tiny`, latentprep's built-in model: a miniature Stable Diffusion folder with a VAE that really works.

    pip install scikit-image scikit-learn
    python examples/train_tiny.py latentprep/tiny

The VAE (diffusers' AutoencoderKL, factor 8, 4 latent channels) learns from random crops of the photos that
scikit-image and scikit-learn ship, except the three in HELD_OUT, on which its PSNR is measured at the end.
The text encoder is a small CLIPTextModel with a byte-level CLIPTokenizer and is left *untrained*: its embeddings
have the right shapes and depend on every token, but carry no meaning.
"""

import copy
import json
import math
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

TRAINED_ON = (
    "skimage/data/brick.png skimage/data/camera.png skimage/data/coins.png "
    "skimage/data/color.png skimage/data/grass.png skimage/data/gravel.png skimage/data/hubble_deep_field.jpg "
    "skimage/data/ihc.png skimage/data/moon.png skimage/data/motorcycle_left.png skimage/data/page.png "
    "skimage/data/retina.jpg skimage/data/rocket.jpg "
    "sklearn/datasets/images/china.jpg sklearn/datasets/images/flower.jpg"
).split()
HELD_OUT = ("skimage/data/astronaut.png", "skimage/data/chelsea.png", "skimage/data/coffee.png")

# Sides of the training crops in pixels: small ones first, which teach fastest, then larger ones too. Group norm sees
# the whole picture, so a VAE that only ever saw small crops gets the colours of large, even surfaces wrong.
CROPS_FIRST, CROPS_LAST, LAST_PART = (64,), (64, 64, 128, 128, 256), 0.4
KL_WEIGHT = 1e-6  # as in the latent diffusion paper's KL-regularised autoencoders


def open_photo(name: str) -> Image.Image:
    """A photo of an installed package, as RGB; `name` is package/path."""
    package, _, rest = name.partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise typer.BadParameter(f"{package} is not installed: pip install scikit-image scikit-learn")
    return Image.open(Path(spec.origin).parent / rest).convert("RGB")


def to_pixels(image: Image.Image) -> torch.Tensor:
    """[3,H,W] float32 in [-1,1]."""
    return torch.from_numpy(np.asarray(image, np.float32).transpose(2, 0, 1) / 127.5 - 1)


def make_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=512,
    )


def make_pyramids(names: list[str]) -> list[list[torch.Tensor]]:
    """Every photo at full and half size, so that crops show texture as well as composition."""
    pyramids = []
    for name in names:
        photo = open_photo(name)
        sizes = [(photo.width // k, photo.height // k) for k in (1, 2)]
        pyramids.append([to_pixels(photo.resize(s, Image.Resampling.LANCZOS)) for s in sizes if min(s) >= 64])
    return pyramids


def draw_batch(
    pyramids: list[list[torch.Tensor]], size: int, sides: tuple[int, ...], generator: torch.Generator
) -> torch.Tensor:
    """Random square crops, as many pixels as `size` crops of 64x64: mirrored, turned, and in other colours.

    Swapped colour channels matter: there is little blue in the photos, and a VAE that saw none turns it to green.
    """

    def below(n: int) -> int:
        return int(torch.randint(n, (), generator=generator))

    side = sides[below(len(sides))]
    large_enough = [photo for levels in pyramids for photo in levels if min(photo.shape[1:]) >= side]
    crops = []
    for _ in range(max(1, size * 64 * 64 // side**2)):
        photo = large_enough[below(len(large_enough))]
        top, left = below(photo.shape[1] - side + 1), below(photo.shape[2] - side + 1)
        crop = photo[:, top : top + side, left : left + side].rot90(below(4), (1, 2))
        if below(2):
            crop = crop.flip(2)
        if below(2):
            crop = crop[torch.randperm(3, generator=generator)]
        gain = 0.85 + 0.3 * torch.rand((3, 1, 1), generator=generator)
        shift = 0.2 * torch.rand((), generator=generator) - 0.1
        crops.append((crop * gain + shift).clamp(-1, 1))
    return torch.stack(crops)


def train_vae(vae: AutoencoderKL, steps: int, batch_size: int, seed: int, out: Path) -> None:
    """Write the moving average of the weights to `out`: L1 + MSE + 1e-6 KL, AdamW, one cosine, bfloat16."""
    generator = torch.Generator().manual_seed(seed)
    pyramids = make_pyramids(TRAINED_ON)
    average = AveragedModel(vae, multi_avg_fn=get_ema_multi_avg_fn(0.998))
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.99), weight_decay=1e-3)
    rates = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1, (step + 1) / 200) * (0.01 + 0.99 * (0.5 + 0.5 * math.cos(math.pi * step / steps))),
    )
    started = time.perf_counter()
    vae.train().to(memory_format=torch.channels_last)
    for step in range(1, steps + 1):
        sides = CROPS_FIRST if step <= (1 - LAST_PART) * steps else CROPS_LAST
        pixels = draw_batch(pyramids, batch_size, sides, generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(pixels).latent_dist
            restored = vae.decode(posterior.sample(generator=generator)).sample.float()
        loss = F.l1_loss(restored, pixels) + F.mse_loss(restored, pixels) + KL_WEIGHT * posterior.kl().float().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        rates.step()
        average.update_parameters(vae)
        if step % 500 == 0 or step == steps:
            save_vae(average.module, out)
            psnr = " / ".join(f"{p:.1f}" for p in measure_psnr(average.module))
            print(
                f"step {step}  loss {loss.item():.4f}  held-out PSNR {psnr} dB  {time.perf_counter() - started:.0f} s",
                flush=True,
            )


@torch.no_grad()
def measure_psnr(vae: AutoencoderKL) -> list[float]:
    """PSNR in dB of decode(posterior mean) of each held-out photo, cut to a multiple of 8."""
    vae.eval()
    result = []
    for name in HELD_OUT:
        photo = open_photo(name)
        pixels = to_pixels(photo.crop((0, 0, photo.width // 8 * 8, photo.height // 8 * 8)))[None]
        restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        result.append(-10 * math.log10(F.mse_loss(restored / 2, pixels / 2).item()))
    return result


@torch.no_grad()
def measure_latent_std(vae: AutoencoderKL) -> float:
    """Standard deviation of the sampled latents of the training photos; 1 over it is the scaling_factor."""
    samples = []
    for name in TRAINED_ON:
        photo = open_photo(name)
        pixels = to_pixels(photo.crop((0, 0, photo.width // 8 * 8, photo.height // 8 * 8)))[None]
        samples.append(vae.encode(pixels).latent_dist.sample(torch.Generator().manual_seed(0)).flatten())
    return torch.cat(samples).std().item()


def save_vae(vae: AutoencoderKL, out: Path) -> None:
    vae = copy.deepcopy(vae)
    vae.register_to_config(scaling_factor=round(1 / measure_latent_std(vae), 4))
    vae.half().save_pretrained(out)


def byte_letters() -> list[str]:
    """The 256 printable stand-ins for bytes, in the order of OpenAI CLIP's simple_tokenizer.bytes_to_unicode."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(b) for b in printable] + [chr(256 + n) for n in range(256 - len(printable))]


def make_text_encoder(seed: int) -> tuple[CLIPTokenizer, CLIPTextModel]:
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer(vocab={word: n for n, word in enumerate(words)}, merges=[], model_max_length=77)
    torch.manual_seed(seed)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=64,
            intermediate_size=256,
            projection_dim=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=77,
            bos_token_id=len(words) - 2,
            eos_token_id=len(words) - 1,
            pad_token_id=len(words) - 1,
        )
    )
    return tokenizer, text_encoder.eval()


def save_text_encoder(text_encoder: CLIPTextModel, out: Path) -> None:
    """With the names of transformers 4, which 5 reads too; 4 finds none of the names of 5, and says nothing."""
    text_encoder.half().save_pretrained(out)
    weights = load_file(out / "model.safetensors")
    names = {name: f"text_model.{name.removeprefix('text_model.')}" for name in weights}
    save_file({names[name]: tensor for name, tensor in weights.items()}, out / "model.safetensors", {"format": "pt"})


def save_tokenizer(tokenizer: CLIPTokenizer, out: Path) -> None:
    """tokenizer.json, and the files that transformers 4 reads in its place."""
    tokenizer.save_pretrained(out)
    vocabulary = dict(sorted(tokenizer.get_vocab().items(), key=lambda word: word[1]))
    (out / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    (out / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write the model to.")],
    steps: Annotated[int, typer.Option(help="Training steps.")] = 5_500,
    batch_size: Annotated[int, typer.Option(help="Pixels per step, in crops of 64x64.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed of the weights and the crops.")] = 0,
) -> None:
    """Train the VAE, make the text encoder, write both as a diffusers folder in float16."""
    torch.manual_seed(seed)
    train_vae(make_vae(), steps, batch_size, seed, out / "vae")
    tokenizer, text_encoder = make_text_encoder(seed)
    save_text_encoder(text_encoder, out / "text_encoder")
    save_tokenizer(tokenizer, out / "tokenizer")
    index = {
        "_class_name": "StableDiffusionPipeline",
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    print("held-out PSNR in float16 weights:", measure_psnr(AutoencoderKL.from_pretrained(out / "vae").float()))


if __name__ == "__main__":
    typer.run(main)
