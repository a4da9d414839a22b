"""stable-diffusion-webui's hypernetworks: MLPs before the keys and values of attention, and the files that hold them.

There is one pair of MLPs for each width that an attention's context has: 768 for the text of SD 1 (1024 for SD 2), and
320, 640 and 1280 for the image itself, in self-attention. All attentions of one width share their pair. Layers, order,
start and the keys of the `.pt` file follow the web UI's modules/hypernetworks/hypernetwork.py.
"""

import json
import pickle
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

DROPOUT = 0.3  # the web UI has no other, unless a file has a dropout_structure
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "linear": nn.Identity, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "swish": nn.Hardswish,
    "tanh": nn.Tanh, "sigmoid": nn.Sigmoid, "mish": nn.Mish, "softsign": nn.Softsign, "celu": nn.CELU, "gelu": nn.GELU,
    "glu": nn.GLU, "hardshrink": nn.Hardshrink, "hardsigmoid": nn.Hardsigmoid, "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh, "logsigmoid": nn.LogSigmoid, "prelu": nn.PReLU, "relu6": nn.ReLU6, "rrelu": nn.RReLU,
    "selu": nn.SELU, "silu": nn.SiLU, "softplus": nn.Softplus, "softshrink": nn.Softshrink, "tanhshrink": nn.Tanhshrink,
}  # fmt: skip
WEIGHT_INITS = ("Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal")


class FileError(Exception):
    """A file that holds no hypernetwork; the text says what and where."""


@dataclass(frozen=True)
class Structure:
    """What an MLP is made of; the fields are named as in the web UI's file, the defaults are its own."""

    layer_structure: tuple[float, ...] = (1, 2, 1)  # widths of the layers, in widths of the context
    activation_func: str = "linear"
    weight_initialization: str = "Normal"
    is_layer_norm: bool = False
    use_dropout: bool = False
    activate_output: bool = False  # the activation behind the last layer too
    last_layer_dropout: bool = True  # dropout before the last layer too
    dropout_structure: tuple[float, ...] | None = None  # the dropout behind each width, as later web UIs save it

    def __post_init__(self) -> None:
        layers = self.layer_structure
        if len(layers) < 2 or layers[0] != 1 or layers[-1] != 1 or min(layers) <= 0:
            raise ValueError(f"layers {','.join(map(str, layers))}: expected 1 at both ends, such as 1,2,1")
        dropout = self.dropout_structure
        if dropout is not None and (len(dropout) != len(layers) or not all(0 <= share < 1 for share in dropout)):
            raise ValueError(
                f"dropout structure {dropout}: expected a share of 0 to 1 for each of {len(layers)} widths"
            )
        if self.activation_func not in ACTIVATIONS:
            raise ValueError(f"activation {self.activation_func!r}: expected one of {', '.join(ACTIVATIONS)}")
        if self.weight_initialization not in WEIGHT_INITS:
            raise ValueError(f"weight init {self.weight_initialization!r}: expected one of {', '.join(WEIGHT_INITS)}")


class HypernetworkModule(nn.Module):
    """x [B,T,width] => x + MLP(x) * multiplier, of the same shape."""

    def __init__(self, width: int, structure: Structure) -> None:
        super().__init__()
        self.multiplier = 1.0
        self.linear = nn.Sequential(*list_layers(width, structure))
        for layer in self.linear:
            if isinstance(layer, nn.Linear | nn.LayerNorm):
                init_weights(layer, structure)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.linear(x) * self.multiplier


def list_layers(width: int, structure: Structure) -> list[nn.Module]:
    """Linear, activation, layer norm, dropout, and again; the last layer has no dropout, and an activation if asked."""
    layers: list[nn.Module] = []
    sides = [int(width * factor) for factor in structure.layer_structure]
    last = len(sides) - 2
    for n in range(last + 1):
        layers.append(nn.Linear(sides[n], sides[n + 1]))
        if structure.activation_func != "linear" and (n < last or structure.activate_output):
            layers.append(ACTIVATIONS[structure.activation_func]())
        if structure.is_layer_norm:
            layers.append(nn.LayerNorm(sides[n + 1]))
        if (share := dropout_behind(n, last, structure)) > 0:
            layers.append(nn.Dropout(share))
    return layers


def dropout_behind(n: int, last: int, structure: Structure) -> float:
    """The share of values that are left out behind layer n."""
    if structure.dropout_structure is not None:
        return structure.dropout_structure[n + 1]
    has_dropout = structure.use_dropout and n < (last if structure.last_layer_dropout else last - 1)
    return DROPOUT if has_dropout else 0.0


def init_weights(layer: nn.Linear | nn.LayerNorm, structure: Structure) -> None:
    """First weights: near zero, so that training starts at the model as it is; a layer norm's too, as in the web UI."""
    kind = structure.weight_initialization
    nn.init.zeros_(layer.bias)
    if kind == "Normal" or isinstance(layer, nn.LayerNorm):
        nn.init.normal_(layer.weight, mean=0.0, std=0.01)
    elif kind.startswith("Xavier"):
        {"XavierUniform": nn.init.xavier_uniform_, "XavierNormal": nn.init.xavier_normal_}[kind](layer.weight)
    else:
        kaiming = {"KaimingUniform": nn.init.kaiming_uniform_, "KaimingNormal": nn.init.kaiming_normal_}[kind]
        kaiming(layer.weight, nonlinearity="leaky_relu" if structure.activation_func == "leakyrelu" else "relu")


class Hypernetwork(nn.Module):
    """A pair of MLPs, for keys and for values, for each width."""

    def __init__(self, widths: list[int], structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.pairs = nn.ModuleDict(
            {
                str(width): nn.ModuleDict({part: HypernetworkModule(width, structure) for part in "kv"})
                for width in widths
            }
        )

    def attach(self, unet: nn.Module, multiplier: float = 1.0) -> None:
        """Put the pairs before to_k and to_v of every attention of the UNet whose context has their width."""
        for module in self.modules():
            if isinstance(module, HypernetworkModule):
                module.multiplier = multiplier
        for attention in list_attentions(unet):
            width = str(attention.to_k.in_features)
            if width in self.pairs:
                for part, mlp in self.pairs[width].items():
                    # a hook: the UNet's own modules and their names stay as they are
                    getattr(attention, f"to_{part}").register_forward_pre_hook(lambda _, x, mlp=mlp: (mlp(x[0]),))


def list_attentions(unet: nn.Module) -> list[Any]:
    """The self-attentions (attn1) and cross-attentions (attn2) of a diffusers UNet."""
    return [module for name, module in unet.named_modules() if name.endswith(("attn1", "attn2"))]


def list_widths(unet: nn.Module) -> list[int]:
    """The widths of all contexts of a UNet; 320, 640, 768 and 1280 for SD 1."""
    return sorted({attention.to_k.in_features for attention in list_attentions(unet)})


def save_pt(path: Path, hypernetwork: Hypernetwork, name: str, step: int, checkpoint: str | None = None) -> None:
    """The web UI's file: width -> (weights of keys, weights of values), and the structure beside them.

    In torch's older layout: the web UI refuses a zip file with the entries that torch has added to it since 2.1
    (its modules/safe.py).
    """
    content: dict[int | str, Any] = {}
    for width, pair in hypernetwork.pairs.items():
        content[int(width)] = tuple(
            {key: value.detach().cpu().clone() for key, value in pair[part].state_dict().items()} for part in "kv"
        )
    settings = {key: value for key, value in asdict(hypernetwork.structure).items() if value is not None}
    settings |= {key: list(value) for key, value in settings.items() if isinstance(value, tuple)}
    content |= settings | {"step": step, "name": name, "sd_checkpoint": None, "sd_checkpoint_name": checkpoint}
    torch.save(content, path, _use_new_zipfile_serialization=False)


def save_safetensors(path: Path, hypernetwork: Hypernetwork, name: str, step: int) -> None:
    """The same without a pickle: `320.k.linear.0.weight` and so on; the structure as JSON in the metadata."""
    tensors = {key.removeprefix("pairs."): value.contiguous().cpu() for key, value in hypernetwork.state_dict().items()}
    structure = json.dumps(asdict(hypernetwork.structure))
    save_file(tensors, path, {"format": "pt", "structure": structure, "name": name, "step": str(step)})


def load_hypernetwork(path: Path) -> Hypernetwork:
    """A hypernetwork from a .safetensors or a .pt file, the web UI's own ones too. Raises FileError.

    No code in a file runs: a pickle may hold tensors and plain values only.
    """
    try:
        settings, weights = read_safetensors(path) if path.suffix == ".safetensors" else read_pt(path)
        if not weights:
            raise ValueError("no pair of MLPs in it")
        for name in ("layer_structure", "dropout_structure"):
            if settings.get(name) is not None:
                settings[name] = tuple(settings[name])
        hypernetwork = Hypernetwork(sorted({int(key.split(".")[0]) for key in weights}), Structure(**settings))
        hypernetwork.load_state_dict({f"pairs.{key}": value for key, value in weights.items()})
    # what torch, pickle and safetensors raise for damaged, hostile and foreign files, and ours for odd fields
    except (
        OSError, EOFError, LookupError, TypeError, ValueError, AttributeError, RuntimeError, pickle.UnpicklingError,
        SafetensorError,
    ) as error:  # fmt: skip
        raise FileError(f"{path}: holds no hypernetwork ({' '.join(str(error).split())[:200]!r}).") from None
    return hypernetwork.eval()


def read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, "pt") as file:
        settings = json.loads((file.metadata() or {})["structure"])
        return settings, {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def read_pt(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    # what the first web UIs did not save, as the later ones take it
    settings: dict[str, Any] = {"layer_structure": (1, 2, 1), "activate_output": True, "last_layer_dropout": False}
    settings |= {name: content[name] for name in Structure.__dataclass_fields__ if content.get(name) is not None}
    weights: dict[str, Tensor] = {}
    for width, pair in content.items():
        if isinstance(width, int):
            for part, own in zip("kv", pair, strict=True):
                for key, value in own.items():
                    new = key.replace("linear1.", "linear.0.").replace("linear2.", "linear.1.")  # the very first ones
                    weights[f"{width}.{part}.{new}"] = value
    return settings, weights
