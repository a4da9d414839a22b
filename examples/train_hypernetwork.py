"""Trains a hypernetwork, as stable-diffusion-webui's: pairs of small MLPs on the keys and values of every attention.

    latentprep encode ./photos --model stable-diffusion-v1-5/stable-diffusion-v1-5 --flip \\
        --template hypernetwork --placeholder "sks dog"
    python examples/train_hypernetwork.py ./photos.latents --model stable-diffusion-v1-5/stable-diffusion-v1-5

Training reads the cache alone: no VAE, no text encoder, no images. Stopped at any step it goes on where it was, in the
middle of an epoch, and ends with the same weights. It writes

    NAME.pt              for web UIs: put it into their models/hypernetworks
    NAME.safetensors     the same without a pickle; examples/use_hypernetwork.py takes both
    state.safetensors    what a further start goes on from: weights, the optimizer's state, the place in the epoch
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusion import FOR_REAL, loss_of, open_unet, step_generator
from hypernetwork import Hypernetwork, Structure, list_widths, save_pt, save_safetensors
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from latentprep import LatentDataset, LatentLoader
from latentprep.records import is_flipped


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Write a file aside first, so that a kill leaves the old one."""
    aside = path.with_name(f"{path.name}.tmp")
    save(aside)
    aside.replace(path)


def save_state(path: Path, hypernetwork: Hypernetwork, optimizer: torch.optim.Optimizer, place: dict[str, Any]) -> None:
    """All that a further start needs, in one file, so that no two of different steps meet."""
    state = optimizer.state_dict()["state"]
    tensors = {f"optimizer/{n}/{name}": value for n, values in state.items() for name, value in values.items()}
    tensors |= {f"weights/{name}": value for name, value in hypernetwork.state_dict().items()}
    place = {**place, "structure": hypernetwork.structure.__dict__}
    save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, path, {"place": json.dumps(place)})


def load_state(path: Path, hypernetwork: Hypernetwork, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Take up what save_state() left; returns the place in the data."""
    weights: dict[str, Tensor] = {}
    state: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        place: dict[str, Any] = json.loads((file.metadata() or {}).get("place", "{}"))
        if place.get("structure") != json.loads(json.dumps(hypernetwork.structure.__dict__)):
            raise typer.BadParameter(f"{path}: of other layers. Give the same options, or another --out.")
        for key in file.keys():  # noqa: SIM118 (not a dict)
            kind, _, rest = key.partition("/")
            if kind == "weights":
                weights[rest] = file.get_tensor(key)
            else:
                number, name = rest.split("/")
                state.setdefault(int(number), {})[name] = file.get_tensor(key)
    hypernetwork.load_state_dict(weights)
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return place


def make_structure(
    layers: str, activation: str, weight_init: str, layer_norm: bool, dropout: bool, activate_output: bool
) -> Structure:
    """The options as a Structure. Raises typer.BadParameter."""
    try:
        return Structure(
            tuple(map(float, layers.split(","))), activation, weight_init, layer_norm, dropout, activate_output
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def main(
    cache: Annotated[str, typer.Argument(help="A cache of latentprep.")],
    out: Annotated[Path, typer.Option(help="Folder of the three files.")] = Path("hypernetwork"),
    name: Annotated[str, typer.Option(help="Of the hypernetwork.")] = "hypernetwork",
    model: Annotated[str | None, typer.Option(help="Hub id or folder of a pipeline with a UNet.")] = None,
    layers: Annotated[str, typer.Option(help="Widths of the MLPs' layers, in widths of their input.")] = "1,2,1",
    activation: Annotated[str, typer.Option(help="linear, relu, leakyrelu, elu, swish, tanh, ...")] = "linear",
    weight_init: Annotated[str, typer.Option(help="Normal, or Xavier or Kaiming with Uniform or Normal.")] = "Normal",
    layer_norm: Annotated[bool, typer.Option(help="A layer norm behind each layer.")] = False,
    dropout: Annotated[bool, typer.Option(help="0.3 between layers; wants four layers at least.")] = False,
    activate_output: Annotated[bool, typer.Option(help="The activation behind the last layer too.")] = False,
    steps: Annotated[int, typer.Option(help="Optimizer steps, of earlier runs too.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Images the UNet sees at once.")] = 4,
    gradient_step: Annotated[int, typer.Option(help="Batches for one optimizer step.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Of AdamW.")] = 1e-4,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 100,
    seed: Annotated[int, typer.Option(help="Of everything that is drawn.")] = 0,
) -> None:
    structure = make_structure(layers, activation, weight_init, layer_norm, dropout, activate_output)
    if name == "state" or Path(name).name != name:
        raise typer.BadParameter(f"--name {name}: expected the name of a file, and not 'state'.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    probe = LatentDataset(cache)
    flip_p = 0.5 if any(map(is_flipped, probe.manifest.latent.views)) else 0.0
    data = LatentDataset(cache, latent_sampling_method="random", flip_p=flip_p, use_weight=True, seed=seed)
    loader = LatentLoader(data, batch_size, gradient_step=gradient_step, seed=seed)
    if model is None:
        real = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        print(FOR_REAL.format(model=real, script="examples/train_hypernetwork.py"))
    unet, schedule = open_unet(model, data)
    unet.requires_grad_(False)
    torch.manual_seed(seed)
    hypernetwork = Hypernetwork(list_widths(unet), structure)
    hypernetwork.attach(unet)
    for part in (unet, hypernetwork):
        part.to(device)
    optimizer = torch.optim.AdamW(hypernetwork.parameters(), learning_rate)
    out.mkdir(parents=True, exist_ok=True)
    step, batches = 0, 0
    if (out / "state.safetensors").exists():
        place = load_state(out / "state.safetensors", hypernetwork, optimizer)
        step, batches = place["step"], place["batches"]
        loader.load_state_dict(place["loader"])
        print(f"going on at step {step}, epoch {loader.epoch}")
    size = sum(parameter.numel() for parameter in hypernetwork.parameters())
    widths = ", ".join(hypernetwork.pairs)
    print(f"{len(data)} images, pairs of MLPs for the widths {widths}: {size:,} parameters, on {device}")

    fixed = next(iter(LatentLoader(probe, batch_size, seed=seed))).to(device)

    @torch.no_grad()
    def measure() -> float:
        """The loss with the same images, noise and times each time; that of one step goes up and down with them."""
        hypernetwork.eval()
        found = [loss_of(fixed, unet, schedule, step_generator(-1, n)).item() for n in range(8)]
        hypernetwork.train()
        return sum(found) / len(found)

    print(f"step {step:>6}  epoch {loader.epoch}  fixed loss {measure():.5f}")
    losses: list[float] = []
    if step >= steps:
        print(f"nothing to do: --steps {steps}, and it is at step {step}")
        return
    while step < steps:
        for batch in loader:
            torch.manual_seed(seed * 1_000_003 + batches)  # dropout's, so that a resumed run repeats it
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
                where = {"step": step, "batches": batches, "loader": loader.state_dict()}
                write(out / "state.safetensors", lambda path, w=where: save_state(path, hypernetwork, optimizer, w))
                write(out / f"{name}.pt", lambda path, n=step: save_pt(path, hypernetwork, name, n, model))
                write(out / f"{name}.safetensors", lambda path, n=step: save_safetensors(path, hypernetwork, name, n))
                mean = sum(losses) / len(losses)
                print(f"step {step:>6}  epoch {loader.epoch}  loss {mean:.4f}  fixed loss {measure():.5f}")
                losses = []
            if step == steps:
                break
    print(f"saved {out / name}.pt and {out / name}.safetensors")


if __name__ == "__main__":
    typer.run(main)
