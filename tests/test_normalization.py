"""cache/normalization.py: VAE configs as public models have them, against the formulas of diffusers' own scripts."""

import json
import shutil

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latentprep import LatentDataset
from latentprep.cache.manifest import LatentFacts
from latentprep.cache.normalization import Normalization
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import TINY
from tests.test_single_file import configs_of, ldm_vae, make_sd1, opened, posterior

SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32, "--no-cond", "--store-dtype", "float32")
# The numbers of Playground v2.5, as ComfyUI has them too (comfy/latent_formats.py, SDXL_Playground_2_5)
PLAYGROUND = {
    "scaling_factor": 0.5,
    "latents_mean": [-1.6574, 1.886, -1.383, 2.5155],
    "latents_std": [8.4927, 5.9022, 6.5498, 5.2299],
}
BARE = {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}
PUBLIC = {  # name -> what its config says, what its scaling_factor and shift_factor are, whether it says force_upcast
    "SD 1.5": ({"scaling_factor": 0.18215}, 0.18215, None, True),
    "SD 2.1 base": ({}, 0.18215, None, True),
    "SD 2 inpainting": ({}, 0.18215, None, True),
    "SD 1.5 inpainting": ({}, 0.18215, None, True),
    "sd-vae-ft-mse": ({}, 0.18215, None, True),
    "Nitro-Diffusion": ({}, 0.18215, None, True),
    "SDXL": ({"scaling_factor": 0.13025, "force_upcast": True}, 0.13025, None, True),
    "SDXL fp16 fix": ({"scaling_factor": 0.13025, "force_upcast": False}, 0.13025, None, False),
    "SD 3": ({**BARE, "scaling_factor": 1.5305, "shift_factor": 0.0609}, 1.5305, 0.0609, True),
    "FLUX.1": ({**BARE, "scaling_factor": 0.3611, "shift_factor": 0.1159}, 0.3611, 0.1159, True),
    "Playground v2.5": (PLAYGROUND, 0.5, None, True),
    "of zero shift": ({"scaling_factor": 0.5, "shift_factor": 0.0}, 0.5, 0.0, True),
}


def save_vae(folder, **config):
    torch.manual_seed(0)
    shape = {
        "block_out_channels": [8, 8, 16, 16], "norm_num_groups": 8, "layers_per_block": 1, "latent_channels": 4,
        "down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4,
    }  # fmt: skip
    AutoencoderKL(**{**shape, **config}).save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"_class_name": "AutoencoderKL", **shape, **config}))
    return folder


def normalized(latents, factor, shift, config):
    """The inverse of what diffusers' pipelines of SDXL and Stable Diffusion 3 do before they decode, in float64."""
    latents = latents.double()
    if "latents_mean" in config:
        mean, std = (
            torch.tensor(config[name], dtype=torch.float64).view(1, -1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        return (latents - mean) * factor / std
    return (latents - (shift or 0.0)) * factor


@pytest.mark.parametrize("name", PUBLIC)
def test_latents_are_scaled_as_diffusers_scales_them(run, images, tmp_path, name):
    config, factor, shift, upcast = PUBLIC[name]
    folder = save_vae(tmp_path / "vae", **config)
    assert open_vae(folder).force_upcast is upcast
    result = run("encode", images, "--out", tmp_path / "c", "--model", folder, *SIZE)
    assert result.code == 0, result.err
    data = LatentDataset(tmp_path / "c", include_cond=False, latent_sampling_method="deterministic")
    for index in range(len(data)):
        batch = data.__getitems__([index])
        expected = normalized(batch.latent_mean, factor, shift, config)
        assert batch.latent_sample.dtype == torch.float32
        assert torch.allclose(batch.latent_sample.double(), expected, rtol=1e-5, atol=1e-6)
    assert run("verify", tmp_path / "c").code == 0
    shown = run("inspect", tmp_path / "c").out
    assert all(f"{number:g}" in shown for number in (*data.normalization.shift, *data.normalization.scale))


def test_random_draws_are_scaled_per_channel(run, images, tmp_path):
    folder = save_vae(tmp_path / "vae", **PLAYGROUND)
    assert run("encode", images, "--out", tmp_path / "c", "--model", folder, *SIZE).code == 0
    batch = LatentDataset(tmp_path / "c", include_cond=False).__getitems__([0])
    drawn = batch.latent_sample.double()
    raw = drawn * torch.tensor(PLAYGROUND["latents_std"]).double()[:, None, None] / 0.5
    raw = raw + torch.tensor(PLAYGROUND["latents_mean"]).double()[:, None, None]
    noise = (raw - batch.latent_mean.double()) / batch.latent_std.double()
    assert 0.8 < noise.std() < 1.2
    assert noise.mean().abs() < 0.3


def test_a_single_file_of_playground_has_its_own_mean_and_std(model, tmp_path):
    folder, texts = make_sd1(tmp_path, model)
    tensors = ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts
    mean, std = (torch.tensor(PLAYGROUND[name]) for name in ("latents_mean", "latents_std"))
    save_file(
        {**tensors, "edm_mean": mean.view(1, 4, 1, 1), "edm_std": std.view(1, 4, 1, 1)}, tmp_path / "p.safetensors"
    )
    save_file(tensors, tmp_path / "plain.safetensors")
    configs = configs_of(folder, tmp_path / "configs")
    vae = opened(tmp_path / "p.safetensors", config=configs).vae
    assert vae.normalization.shift == tuple(mean.double().tolist())
    assert vae.normalization.scale == tuple((0.5 / std.double()).tolist())
    assert vae.digest != opened(tmp_path / "plain.safetensors", config=configs).vae.digest


@pytest.mark.parametrize("is_file", [False, True])
def test_an_encoder_alone_is_enough(model, tmp_path, is_file):
    whole = AutoencoderKL.from_pretrained(model / "vae")
    folder = tmp_path / "vae"
    shutil.copytree(model / "vae", folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    save_file({k: v for k, v in load_file(path).items() if k.startswith(("encoder.", "quant_conv."))}, path)
    if is_file:
        tensors = {k: v for k, v in ldm_vae(whole).items() if k.startswith(("encoder.", "quant_conv."))}
        save_file(tensors, tmp_path / "vae.safetensors")
        vae = opened(model, vae=tmp_path / "vae.safetensors", cond=False).vae
    else:
        vae = open_vae(folder)
    assert torch.equal(posterior(vae.load(torch.float32)), posterior(whole))


def test_of_an_index_and_a_whole_file_the_hashed_one_is_loaded(model, tmp_path):
    """diffusers takes the index; its shards are those it names, whatever else lies there."""
    folder = tmp_path / "vae"
    shutil.copytree(model / "vae", folder)
    name = "diffusion_pytorch_model"
    tensors = load_file(folder / f"{name}.safetensors")
    save_file({key: tensor + 1 for key, tensor in tensors.items()}, folder / "a.safetensors", {"format": "pt"})
    before = open_vae(folder).digest
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "a.safetensors")}
    (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index))
    sharded = open_vae(folder)
    assert sharded.digest != before
    assert torch.equal(posterior(sharded.load(torch.float32)), posterior(AutoencoderKL.from_pretrained(folder)))
    save_file({"stray": torch.zeros(1)}, folder / f"{name}-00001-of-00009.safetensors")
    (folder / f"{name}.safetensors").unlink()
    assert open_vae(folder).digest == sharded.digest
    save_file(tensors, folder / "a.safetensors", {"format": "pt"})
    assert open_vae(folder).digest != sharded.digest


def test_tiny_is_scaled_by_its_config():
    factor = json.loads((TINY / "vae" / "config.json").read_text())["scaling_factor"]
    assert open_vae(TINY).normalization == Normalization((0.0,), (factor,))


@pytest.mark.parametrize(
    "data",
    [
        None, [], {}, {"patch": 1, "shift": [0.0]}, {"patch": 1, "scale": [1.0]},
        {"patch": 1, "shift": [0.0], "scale": 1.0}, {"patch": 1, "shift": [0.0], "scale": []},
        {"patch": 1, "shift": [0.0], "scale": [1.0] * 3}, {"patch": 1, "shift": [True], "scale": [1.0]},
        {"patch": 1, "shift": ["0"], "scale": [1.0]}, {"patch": 1, "shift": [float("nan")], "scale": [1.0]},
        {"patch": 1, "shift": [0.0], "scale": [float("inf")]}, {"patch": 1, "shift": [0.0], "scale": [0.0]},
        {"patch": 1, "shift": [0.0], "scale": [-1.0]}, {"patch": 1, "shift": [2e6], "scale": [1.0]},
    ],
)  # fmt: skip
def test_normalizations_that_are_none(data):
    with pytest.raises(ValueError, match=r"normalization|shift|scale"):
        msgspec.convert({"normalization": data, "factor": 8, "channels": 4, "views": ["plain"]}, LatentFacts)
