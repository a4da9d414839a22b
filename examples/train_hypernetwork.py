"""Trains a hypernetwork, as stable-diffusion-webui's: small MLPs on the keys and values of every cross-attention.

    latentprep encode ./photos --model stable-diffusion-v1-5/stable-diffusion-v1-5 --flip \\
        --template hypernetwork --placeholder "sks dog"
    python examples/train_hypernetwork.py ./photos.latents --model stable-diffusion-v1-5/stable-diffusion-v1-5

Training reads the cache alone: no VAE, no text encoder, no images. Stopped at any step it goes on where it was, in the
middle of an epoch, and ends with the same weights. Both files it writes are safetensors:

    hypernetwork.safetensors    the MLPs
    state.safetensors           the optimizer's state, the step, and the loader's place in its epoch
"""

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import UNet2DConditionModel
from diffusion import FOR_REAL, loss_of, open_unet, step_generator
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from latentprep import LatentDataset, LatentLoader
from latentprep.records import is_flipped


class HypernetworkModule(nn.Module):
    """x + MLP(x), with the ancestor's layer structure 1, 2, 1 and its start near zero."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width))
        for layer in (self.linear[0], self.linear[2]):
            nn.init.normal_(layer.weight, mean=0.0, std=0.01)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x)


def add_hypernetwork(unet: UNet2DConditionModel) -> nn.ModuleDict:
    """Put an MLP before the key and the value projection of every cross-attention (attn2); returns the MLPs."""
    found: dict[str, nn.Module] = {}
    for name, attention in list(unet.named_modules()):
        if not name.endswith("attn2"):
            continue
        for part in ("to_k", "to_v"):
            projection = getattr(attention, part)
            module = HypernetworkModule(projection.in_features)
            setattr(attention, part, nn.Sequential(module, projection))
            found[f"{name}.{part}".replace(".", "/")] = module
    return nn.ModuleDict(found)


def save(folder: Path, hypernetwork: nn.Module, optimizer: torch.optim.Optimizer, place: dict[str, Any]) -> None:
    """Both files; each is written aside first, so that a kill leaves the old ones."""
    state = optimizer.state_dict()["state"]
    tensors = {f"{number}/{name}": value for number, values in state.items() for name, value in values.items()}
    for name, content, metadata in (
        ("hypernetwork", hypernetwork.state_dict(), {"format": "latentprep hypernetwork", "layers": "1,2,1"}),
        ("state", tensors, {"place": json.dumps(place)}),
    ):
        aside = folder / f"{name}.tmp"
        save_file({key: value.contiguous().cpu() for key, value in content.items()}, aside, metadata)
        aside.rename(folder / f"{name}.safetensors")


def load(folder: Path, hypernetwork: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take up what save() left; returns the place in the data."""
    hypernetwork.load_state_dict(load_file(folder / "hypernetwork.safetensors"))
    with safe_open(folder / "state.safetensors", "pt") as file:
        place: dict[str, Any] = json.loads(file.metadata()["place"])
        state: dict[int, dict[str, Tensor]] = {}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            number, name = key.split("/")
            state.setdefault(int(number), {})[name] = file.get_tensor(key)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return place


def main(
    cache: Annotated[str, typer.Argument(help="A cache of latentprep.")],
    out: Annotated[Path, typer.Option(help="Folder of the two files.")] = Path("hypernetwork"),
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a pipeline with a UNet.")] = None,
    steps: Annotated[int, typer.Option(help="Optimizer steps, of earlier runs too.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images the UNet sees at once.")] = 4,
    gradient_step: Annotated[int, typer.Option(help="Batches for one optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-5,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = LatentDataset(cache)
    flip_p = 0.5 if any(map(is_flipped, probe.manifest.latent["views"])) else 0.0
    data = LatentDataset(cache, latent_sampling_method="random", flip_p=flip_p, use_weight=True, seed=seed)
    loader = LatentLoader(data, batch_size, gradient_step=gradient_step, seed=seed)
    if model is None:
        name = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        print(FOR_REAL.format(model=name, script="examples/train_hypernetwork.py"))
    unet, schedule = open_unet(model, data)
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    hypernetwork = add_hypernetwork(unet)
    unet.to(device)
    optimizer = torch.optim.AdamW(hypernetwork.parameters(), learning_rate)
    out.mkdir(parents=True, exist_ok=True)
    step, batches = 0, 0
    if (out / "state.safetensors").exists():
        place = load(out, hypernetwork, optimizer)
        step, batches = place["step"], place["batches"]
        loader.load_state_dict(place["loader"])
        print(f"going on at step {step}, epoch {loader.epoch}")
    size = sum(parameter.numel() for parameter in hypernetwork.parameters())
    print(f"{len(data)} images, {len(hypernetwork)} MLPs of {size:,} parameters together, on {device}")

    losses: list[float] = []
    while step < steps:
        for batch in loader:
            loss = loss_of(batch.to(device, non_blocking=True), unet, schedule, step_generator(seed, batches))
            (loss / loader.gradient_step).backward()
            losses.append(loss.item())
            batches += 1
            if batches % loader.gradient_step:
                continue
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % save_every == 0 or step == steps:
                save(out, hypernetwork, optimizer, {"step": step, "batches": batches, "loader": loader.state_dict()})
                print(f"step {step:>6}  epoch {loader.epoch}  loss {sum(losses) / len(losses):.4f}")
                losses = []
            if step == steps:
                break
    print(f"saved {out / 'hypernetwork.safetensors'}")


if __name__ == "__main__":
    typer.run(main)
