"""examples/hypernetwork.py: its files do in the web UI what they do here; the layers are those of the web UI."""

import importlib
import pickle
import zipfile

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import typer
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from tests.conftest import TINY
from tests.test_examples import EXAMPLES

SD1_WIDTHS = [320, 640, 768, 1280]
STRUCTURES = {
    "linear": {},
    "relu": {"activation_func": "relu"},
    "swish, norm": {"activation_func": "swish", "is_layer_norm": True, "weight_initialization": "XavierNormal"},
    "dropout": {"layer_structure": (1, 2, 1.5, 1), "activation_func": "tanh", "use_dropout": True},
    "all": {
        "layer_structure": (1, 2, 2, 1), "activation_func": "leakyrelu", "is_layer_norm": True, "use_dropout": True,
        "activate_output": True, "last_layer_dropout": False, "weight_initialization": "KaimingUniform",
    },
    "later": {"layer_structure": (1, 2, 2, 1), "activation_func": "gelu", "dropout_structure": (0, 0, 0.15, 0)},
}  # fmt: skip
FUNCTIONS = {"relu": F.relu, "swish": F.hardswish, "tanh": torch.tanh, "leakyrelu": F.leaky_relu, "gelu": F.gelu}


@pytest.fixture
def hyper(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    return importlib.import_module("hypernetwork")


@pytest.fixture(scope="module")
def unet():
    """A miniature of SD 1's: widths 16 and 32 of images, 24 of text."""
    torch.manual_seed(0)
    return make_unet(24).eval()


def make_unet(text_width):
    return UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), norm_num_groups=8,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), layers_per_block=1, attention_head_dim=8,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=text_width,
    )  # fmt: skip


def make_trained(hyper, widths, **structure):
    """A hypernetwork as after training: of weights that matter."""
    torch.manual_seed(1)
    made = hyper.Hypernetwork(widths, hyper.Structure(**structure))
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return made.eval()


def mlp_of_web_ui(x, weights, content, multiplier):
    """The web UI's forward pass, from the keys and fields of its file: numbers count every layer, dropout too."""
    y, number, structure = x, 0, content["layer_structure"]
    for n in range(len(structure) - 1):
        y = F.linear(y, weights[f"linear.{number}.weight"], weights[f"linear.{number}.bias"])
        number += 1
        is_last = n == len(structure) - 2
        if content["activation_func"] != "linear" and (not is_last or content["activate_output"]):
            y = FUNCTIONS[content["activation_func"]](y)
            number += 1
        if content["is_layer_norm"]:
            y = F.layer_norm(y, y.shape[-1:], weights[f"linear.{number}.weight"], weights[f"linear.{number}.bias"])
            number += 1
        dropped = len(structure) - (2 if content["last_layer_dropout"] else 3)
        shares = content.get("dropout_structure")  # of later web UIs: the share behind each width
        number += int(content["use_dropout"] and n < dropped) if shares is None else int(shares[n + 1] > 0)
    return x + y * multiplier


class WebUiAttention:
    """Its CrossAttention.forward as a processor of diffusers: a pair is found by the width of the context."""

    def __init__(self, content, multiplier):
        self.content, self.multiplier = content, multiplier
        self.seen = set()

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        pair = self.content.get(context.shape[2])
        context_k = context_v = context
        if pair is not None:
            self.seen.add(context.shape[2])
            context_k, context_v = (mlp_of_web_ui(context, own, self.content, self.multiplier) for own in pair)
        q, k, v = attn.to_q(hidden_states), attn.to_k(context_k), attn.to_v(context_v)
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
        weights = (q @ k.transpose(2, 3) * attn.scale).softmax(dim=3)
        return attn.to_out[0]((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("multiplier", [1.0, 0.6])
@pytest.mark.parametrize("name", STRUCTURES)
def test_the_file_does_in_the_web_ui_what_it_does_here(hyper, unet, tmp_path, name, multiplier):
    torch.manual_seed(2)
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), torch.randn(2, 77, 24)
    made = make_trained(hyper, hyper.list_widths(unet), **STRUCTURES[name])
    hyper.save_pt(tmp_path / "h.pt", made, "h", step=5)
    hyper.save_safetensors(tmp_path / "h.safetensors", made, "h", step=5)
    theirs = WebUiAttention(torch.load(tmp_path / "h.pt", weights_only=True), multiplier)
    with torch.no_grad():
        plain = unet(*inputs).sample
        before = unet.attn_processors
        unet.set_attn_processor(theirs)
        wanted = unet(*inputs).sample
        unet.set_attn_processor(before)
        for file in ("h.pt", "h.safetensors"):
            own = make_unet(24).eval()
            own.load_state_dict(unet.state_dict())
            hyper.load_hypernetwork(tmp_path / file).attach(own, multiplier)
            assert torch.allclose(own(*inputs).sample, wanted, atol=1e-5), file
    assert theirs.seen == {16, 24, 32}  # self-attention of both widths, and the text
    assert (wanted - plain).abs().max() > 0.01


class OnlyTensors(pickle.Unpickler):
    """What the web UI lets into itself (modules/safe.py); tensors are not made."""

    def persistent_load(self, found):
        assert found[0] == "storage"
        return found[0]

    def find_class(self, module, name):
        assert (module, name) in {
            ("collections", "OrderedDict"), ("torch._utils", "_rebuild_tensor_v2"), ("torch", "FloatStorage")
        }  # fmt: skip
        return dict if name == "OrderedDict" else lambda *_: "tensor"


def test_the_web_uis_check_of_files_lets_it_through(hyper, tmp_path):
    hyper.save_pt(tmp_path / "h.pt", make_trained(hyper, [16]), "my name", step=7, checkpoint="some/model")
    assert not zipfile.is_zipfile(tmp_path / "h.pt")  # torch's zip files have entries that are refused there
    with (tmp_path / "h.pt").open("rb") as file:
        content = [OnlyTensors(file).load() for _ in range(5)][3]
    pair = {f"linear.{n}.{kind}": "tensor" for n in (0, 1) for kind in ("weight", "bias")}
    assert content == {
        16: (pair, pair), "step": 7, "name": "my name", "layer_structure": [1, 2, 1], "activation_func": "linear",
        "weight_initialization": "Normal", "is_layer_norm": False, "use_dropout": False, "activate_output": False,
        "last_layer_dropout": True, "sd_checkpoint": None, "sd_checkpoint_name": "some/model",
    }  # fmt: skip


@pytest.mark.parametrize(("widths", "config"), [(SD1_WIDTHS, 768), ([320, 640, 1024, 1280], 1024)])
def test_widths_are_those_of_stable_diffusion(hyper, widths, config):
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=config)  # diffusers' defaults are SD 1's UNet
    assert hyper.list_widths(unet) == widths


@pytest.mark.parametrize("init", ["Normal", "XavierUniform", "XavierNormal", "KaimingUniform", "KaimingNormal"])
def test_first_weights_are_the_web_uis(hyper, init):
    torch.manual_seed(0)
    structure = hyper.Structure(weight_initialization=init, is_layer_norm=True, activation_func="leakyrelu")
    first, _, norm, *_ = hyper.HypernetworkModule(256, structure).linear
    gain = {"N": None, "X": 2 / (256 + 512), "K": 2 / (1 + 0.01**2) / 256}[init[0]]
    wanted = 0.01 if gain is None else gain**0.5
    assert float(first.weight.std()) == pytest.approx(wanted, rel=0.02)
    assert (float(first.weight.abs().max()) < 1.74 * wanted) == init.endswith("Uniform")
    assert float(norm.weight.std()) == pytest.approx(0.01, rel=0.2)
    assert float(first.bias.abs().max()) == float(norm.bias.abs().max()) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layer_structure": (1, 2)}, "expected 1 at both ends"),
        ({"layer_structure": (1,)}, "expected 1 at both ends"),
        ({"layer_structure": (1, 0, 1)}, "expected 1 at both ends"),
        ({"activation_func": "cubic"}, "'cubic': expected one of linear, relu"),
        ({"weight_initialization": "Zero"}, "'Zero': expected one of Normal"),
    ],
)
def test_a_structure_that_the_web_ui_refuses_is_refused(hyper, options, message):
    with pytest.raises(ValueError, match=message):
        hyper.Structure(**options)


class Evil:
    def __reduce__(self):
        return exec, ("raise SystemExit('code ran')",)


@pytest.mark.parametrize("kind", ["missing", "text", "code", "empty dict", "cut", "other shape", "safetensors"])
def test_a_file_that_holds_no_hypernetwork_is_one_line(hyper, tmp_path, kind):
    path = tmp_path / ("h.safetensors" if kind == "safetensors" else "h.pt")
    if kind in ("text", "safetensors"):
        path.write_text("not a file of tensors")
    elif kind == "cut":
        hyper.save_pt(path, make_trained(hyper, [16]), "h", 1)
        path.write_bytes(path.read_bytes()[:-900])
    elif kind == "other shape":
        torch.save({16: ({"linear.0.weight": torch.ones(3, 3)}, {})}, path)
    elif kind != "missing":
        torch.save(Evil() if kind == "code" else {}, path)
    with pytest.raises(hyper.FileError) as caught:
        hyper.load_hypernetwork(path)
    assert str(caught.value).startswith(f"{path}: holds no hypernetwork (")
    assert "\n" not in str(caught.value)


def test_files_of_the_first_web_uis_load(hyper, tmp_path):
    shapes = {"linear1.weight": (16, 8), "linear1.bias": (16,), "linear2.weight": (8, 16), "linear2.bias": (8,)}
    one = {key: torch.ones(shape) for key, shape in shapes.items()}
    torch.save({8: (one, one), "step": 3, "name": "old"}, tmp_path / "old.pt")
    made = hyper.load_hypernetwork(tmp_path / "old.pt")
    # x + W2 (W1 x + 1) + 1, of ones: 1 + 16 * (8 + 1) + 1
    assert torch.equal(made.pairs["8"]["k"](torch.ones(1, 1, 8)), torch.full((1, 1, 8), 146.0))


def test_it_is_used_for_inference_with_a_diffusers_pipeline(hyper, tmp_path, capfd):
    torch.manual_seed(0)
    encoder = CLIPTextModel.from_pretrained(TINY / "text_encoder").float()
    pipeline = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(TINY / "vae"), text_encoder=encoder,
        tokenizer=CLIPTokenizer.from_pretrained(TINY / "tokenizer"), unet=make_unet(encoder.config.hidden_size),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "model")
    hyper.save_pt(tmp_path / "h.pt", make_trained(hyper, hyper.list_widths(pipeline.unet)), "h", 1)
    use = importlib.import_module("use_hypernetwork").main
    drawn = {}
    for multiplier in (0.0, 0.5, 1.0):
        out = tmp_path / f"{multiplier}.png"
        use(tmp_path / "h.pt", "a cat", str(tmp_path / "model"), multiplier, steps=2, side=32, out=out)
        assert f"saved {out}" in capfd.readouterr().out
        drawn[multiplier] = np.array(Image.open(out), int)
    plain = pipeline("a cat", num_inference_steps=2, height=32, width=32, generator=torch.Generator().manual_seed(0))
    assert np.abs(drawn[0.0] - np.array(plain.images[0], int)).max() <= 1
    assert np.abs(drawn[1.0] - drawn[0.0]).max() > 1
    assert np.abs(drawn[1.0] - drawn[0.5]).max() > 1
    hyper.save_pt(tmp_path / "xl.pt", make_trained(hyper, [8]), "h", 1)
    with pytest.raises(typer.BadParameter, match=r"is for contexts of width \[8\], the UNet of .* has \[16, "):
        use(tmp_path / "xl.pt", "a cat", str(tmp_path / "model"))
