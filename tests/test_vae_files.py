"""VAEs in files under the names of their original code: the same numbers as from their folders, bit for bit.

The names are written here, by tables from diffusers to the original code that are the tests' own.
"""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from latentprep.errors import UserError
from latentprep.prepare.models.single_file import open_vae_file
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.models.vae_layouts import LAYOUTS
from tests.miniatures import make_miniature
from tests.test_single_file import contiguous, ldm_vae, opened, rename
from tests.test_vaes import FILE, MINIATURES, check_same, random_pixels

CPU = torch.device("cpu")
WAN_BLOCK = [
    (r"\.norm1\.", ".residual.0."), (r"\.conv1\.", ".residual.2."), (r"\.norm2\.", ".residual.3."),
    (r"\.conv2\.", ".residual.6."), (r"\.conv_shortcut\.", ".shortcut."),
]  # fmt: skip
WAN_NAMES = [
    (r"^encoder\.mid_block\.resnets\.(\d)", lambda m: f"encoder.middle.{2 * int(m[1])}"),
    (r"^encoder\.mid_block\.attentions\.0", "encoder.middle.1"),
    (r"^encoder\.down_blocks\.(\d+)\.resnets\.(\d+)", r"encoder.downsamples.\1.downsamples.\2"),
    (r"^encoder\.down_blocks\.(\d+)\.downsampler", r"encoder.downsamples.\1.downsamples.1"),  # behind its one block
    (r"^encoder\.down_blocks\.", "encoder.downsamples."),
    (r"^encoder\.norm_out\.", "encoder.head.0."),
    (r"^encoder\.conv_out\.", "encoder.head.2."),
]
DC_NAMES = [
    (r"^encoder\.conv_in\.", "encoder.project_in.conv."),
    (r"^encoder\.conv_out\.", "encoder.project_out.main.op_list.0.conv."),
    (r"\.(\d+)\.conv(\d)\.", r".\1.main.conv\2.conv."),
    (r"\.(\d+)\.norm\.", r".\1.main.conv2.norm."),
    (r"\.(\d+)\.conv\.", r".\1.main.conv.conv."),
    (r"\.attn\.to_qkv_multiscale\.0\.proj_in\.", ".context_module.main.aggreg.0.0."),
    (r"\.attn\.to_qkv_multiscale\.0\.proj_out\.", ".context_module.main.aggreg.0.1."),
    (r"\.attn\.to_out\.", ".context_module.main.proj.conv."),
    (r"\.attn\.norm_out\.", ".context_module.main.proj.norm."),
    (r"\.conv_out\.conv_(inverted|depth|point)\.", r".local_module.main.\1_conv.conv."),
    (r"\.conv_out\.norm\.", ".local_module.main.point_conv.norm."),
    (r"^encoder\.down_blocks\.(\d+)\.", r"encoder.stages.\1.op_list."),
]
HUNYUAN_NAMES = [  # a block and, but for the last of six levels, what halves the sides
    (r"^encoder\.down_blocks\.(\d+)\.conv\.", lambda m: f"encoder.down.{int(m[1]) // 2}.downsample.conv."),
    (r"^encoder\.down_blocks\.(\d+)\.", lambda m: f"encoder.down.{int(m[1]) // 2}.block.0."),
    (r"^encoder\.mid_block\.resnets\.(\d)", lambda m: f"encoder.mid.block_{int(m[1]) + 1}"),
    (r"^encoder\.mid_block\.attentions\.0\.to_", "encoder.mid.attn_1."),
    (r"^encoder\.mid_block\.attentions\.0\.proj\.", "encoder.mid.attn_1.proj_out."),
    (r"^encoder\.mid_block\.attentions\.0\.", "encoder.mid.attn_1."),
]


def without_decoder(vae):
    return {name: t for name, t in vae.state_dict().items() if not name.startswith(("decoder", "post_quant"))}


def ldm(vae):
    return {name: t for name, t in ldm_vae(vae).items() if not name.startswith(("decoder", "post_quant"))}


def flux2(vae):
    return {re.sub(r"^quant_conv", "encoder.quant_conv", name): tensor for name, tensor in ldm(vae).items()}


def wan(vae):
    tensors = {}
    for name, tensor in without_decoder(vae).items():
        new = rename(name, WAN_NAMES)
        if "downsamples" in new or "middle" in new:
            new = rename(new, WAN_BLOCK)
        new = re.sub(r"^quant_conv\.", "conv1.", new.replace("encoder.conv_in.", "encoder.conv1."))
        tensors[new] = tensor
    return tensors


def dc(vae):
    own, tensors = without_decoder(vae), {}
    for name, tensor in own.items():
        if name.endswith("attn.to_q.weight"):
            joined = torch.cat([own[name.replace("to_q", f"to_{part}")] for part in "qkv"])
            place = re.sub(r"\.attn\.to_q\.", ".context_module.main.qkv.conv.", name)
            tensors[rename(place, DC_NAMES)] = joined[..., None, None]
        elif not re.search(r"attn\.to_[kv]\.weight$", name):
            is_projection = name.endswith("attn.to_out.weight")
            tensors[rename(name, DC_NAMES)] = tensor[..., None, None] if is_projection else tensor
    return tensors


def hunyuan(vae):
    tensors = {rename(name, HUNYUAN_NAMES): tensor for name, tensor in without_decoder(vae).items()}
    return {name: t[:, :, None] if t.ndim == 4 and "attn" in name else t for name, t in tensors.items()}


def taesd(vae):
    return {name.removeprefix("encoder.layers."): tensor for name, tensor in without_decoder(vae).items()}


# Name of a miniature -> its tensors under the names of the original code, and one of these
ORIGINALS = {
    "SDXL": (ldm, "encoder.down.0.block.0.conv1.weight"),
    "FLUX.1": (ldm, "encoder.mid.attn_1.q.weight"),
    "FLUX.2": (flux2, "encoder.quant_conv.weight"),
    "Qwen-Image": (wan, "encoder.downsamples.0.residual.2.weight"),
    "Wan 2.1": (wan, "encoder.middle.2.residual.6.weight"),
    "Wan 2.2": (wan, "encoder.downsamples.1.downsamples.1.time_conv.weight"),
    "SANA": (dc, "encoder.stages.4.op_list.0.context_module.main.qkv.conv.weight"),
    "HunyuanImage 2.1": (hunyuan, "encoder.down.1.downsample.conv.weight"),
    "TAESD": (taesd, "3.conv.2.weight"),
    "TAEF1": (taesd, "3.conv.2.weight"),
}
EACH = pytest.mark.parametrize("name", ORIGINALS)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Name of a miniature -> its folder, a folder of its config alone, and its file in the original layout."""
    known = {}

    def make(name):
        if name not in known:
            folder = tmp_path_factory.mktemp("vae")
            MINIATURES[name].save(folder / "vae")
            (folder / "configs").mkdir()
            shutil.copy(folder / "vae" / "config.json", folder / "configs")
            tensors = contiguous(ORIGINALS[name][0](MINIATURES[name].make()))
            assert ORIGINALS[name][1] in tensors
            save_file(tensors, folder / "vae.safetensors")
            known[name] = folder / "vae", folder / "configs", folder / "vae.safetensors"
        return known[name]

    return make


def refusal(*arguments):
    with pytest.raises(UserError) as error:
        open_vae_file(*arguments)
    assert str(error.value).isprintable()
    return str(error.value)


def test_every_class_with_a_layout_of_its_own_is_tried():
    assert {MINIATURES[name].kind for name in ORIGINALS} >= LAYOUTS.keys()


@EACH
@pytest.mark.parametrize("layout", ["original", "with a prefix", "diffusers"])
def test_a_file_gives_what_the_folder_gives(name, layout, made, tmp_path):
    folder, configs, file = made(name)
    if layout == "diffusers":
        file = folder / FILE
    elif layout == "with a prefix":
        if name in ("TAESD", "TAEF1"):
            pytest.skip("its layers have numbers alone")
        save_file({f"vae.{key}": t for key, t in load_file(file).items()}, tmp_path / "x.safetensors")
        file = tmp_path / "x.safetensors"
    vae, whole = open_vae_file(file, "--vae", configs), open_vae(folder)
    for field in ("factor", "latent_channels", "normalization", "has_std", "has_time", "force_upcast"):
        assert getattr(vae, field) == getattr(whole, field)
    side = 2 * vae.factor
    pixels = random_pixels(side, side + vae.factor, 2).numpy()
    wanted = whole.open(CPU, torch.float32).encode(pixels)
    check_same(vae.open(CPU, torch.float32).encode(pixels), (wanted.mean, wanted.std))


@EACH
def test_a_prefix_changes_no_digest_and_a_number_does(name, made, tmp_path):
    _, configs, file = made(name)
    tensors = load_file(file)
    digest = open_vae_file(file, "--vae", configs).digest
    other = tmp_path / "other.safetensors"
    if "TAE" not in name:
        save_file({f"first_stage_model.{key}": tensor for key, tensor in tensors.items()}, other)
        assert open_vae_file(other, "--vae", configs).digest == digest
    save_file({**tensors, ORIGINALS[name][1]: tensors[ORIGINALS[name][1]] + 1}, other)
    assert open_vae_file(other, "--vae", configs).digest != digest
    if name == "FLUX.2":  # what its latents are normalized by
        save_file({**tensors, "bn.running_mean": tensors["bn.running_mean"] + 1}, other)
        assert open_vae_file(other, "--vae", configs).digest != digest


@pytest.mark.parametrize("name", [name for name in ORIGINALS if MINIATURES[name].kind != "AutoencoderKL"])
def test_files_that_do_not_fit_are_refused_before_a_number_is_read(name, made, tmp_path):
    """Those of AutoencoderKL are in tests/test_single_file.py."""
    _, configs, file = made(name)
    tensors, one, other = load_file(file), ORIGINALS[name][1], tmp_path / "x.safetensors"
    begins = f"{other}: the tensors of its VAE are not those of its config ("
    save_file({key: tensor for key, tensor in tensors.items() if key != one}, other)
    assert refusal(other, "--vae", configs).startswith(begins)
    save_file({**tensors, one: torch.zeros(3, *tensors[one].shape[1:])}, other)
    assert refusal(other, "--vae", configs).startswith(begins)
    more = one.replace("encoder.", "encoder.more.") if "encoder." in one else "99.weight"
    save_file({**tensors, more: torch.zeros(3)}, other)
    assert refusal(other, "--vae", configs).startswith(begins)


@EACH
def test_numbers_that_are_none_are_never_loaded(name, made, tmp_path):
    _, configs, file = made(name)
    tensors = load_file(file)
    tensors[ORIGINALS[name][1]].view(-1)[0] = float("nan")
    save_file(tensors, tmp_path / "x.safetensors")
    vae = open_vae_file(tmp_path / "x.safetensors", "--vae", configs)
    with pytest.raises(UserError, match="holds NaN or infinite numbers"):
        vae.load(torch.float32)


def test_statistics_that_are_none_are_refused(made, tmp_path):
    _, configs, file = made("FLUX.2")
    other, tensors = tmp_path / "x.safetensors", load_file(file)
    for value, message in (
        (None, "are not those of its config (1 missing, such as bn.running_var)"),
        (torch.ones(3), "1 of another shape, such as bn.running_var: [3], expected [16]"),
        (torch.full((16,), float("nan")), f"{tmp_path / 'x.safetensors'}: its weight bn.running_var holds NaN"),
        (torch.full((16,), -1.0), f"{tmp_path / 'x.safetensors'}: its weight bn.running_var has numbers below 0"),
    ):
        changed = {name: tensor for name, tensor in tensors.items() if name != "bn.running_var"}
        save_file(changed | ({"bn.running_var": value} if value is not None else {}), other)
        assert message in refusal(other, "--vae", configs)


def test_a_file_of_another_vae_is_refused(made):
    assert "missing, such as" in refusal(made("FLUX.1")[2], "--vae", made("Qwen-Image")[1])
    assert "its VAE has no layers of an AutoencoderKL, but 4 levels" in refusal(
        made("Wan 2.1")[2], "--vae", made("FLUX.1")[1]
    )
    assert "too many" in refusal(made("TAESD")[2], "--vae", made("SANA")[1])


def test_a_decoder_of_a_taesd_is_no_vae(made, tmp_path):
    save_file(
        {"1.weight": torch.zeros(8, 4, 3, 3), "3.conv.0.weight": torch.zeros(8, 8, 3, 3)}, tmp_path / "x.safetensors"
    )
    assert "has no VAE, it seems to be no model known here" in refusal(
        tmp_path / "x.safetensors", "--vae", made("TAESD")[1]
    )


def test_the_models_folder_needs_no_weights(tmp_path, images, run):
    """--vae FILE beside a folder of configs; the number that ERNIE-Image's pipeline adds to the variance counts too."""
    pipeline = make_miniature("ErnieImage", tmp_path / "work")
    pipeline.save_pretrained(tmp_path / "model")
    save_file(contiguous(flux2(pipeline.vae)), tmp_path / "vae.safetensors")
    whole = opened(tmp_path / "model", cond=False)
    (tmp_path / "model" / "vae" / FILE).unlink()
    split = opened(tmp_path / "model", vae=tmp_path / "vae.safetensors", cond=False)
    assert split.vae.normalization == whole.vae.normalization
    assert split.patch == whole.patch
    options = ("--no-cond", "--resolution", 64, "--bucket-step", 32, "--min-side", 32, "--out", tmp_path / "c")
    assert (
        run("encode", images, "--model", tmp_path / "model", "--vae", tmp_path / "vae.safetensors", *options).code == 0
    )
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 1).code == 0
    result = run("encode", images, "--model", tmp_path / "model", *options[:-1], tmp_path / "d")
    assert "Weights in a file of their own are --vae FILE." in result.err


def test_a_config_of_no_known_vae_is_refused(made, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "VQModel"}))
    assert "its VAE is VQModel, expected AutoencoderKL, AutoencoderKLFlux2, " in refusal(
        made("FLUX.2")[2], "--vae", tmp_path
    )
