"""--dtype, --tiling and --compile: how far each may move the numbers, against diffusers' own."""

import importlib
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import Encoder

from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import SMALL, TINY, gradient
from tests.test_encode import rows

CPU = torch.device("cpu")


def save_vae(folder: Path, channels=(8, 8, 16, 16), *, latent_channels=4, quant_conv=True) -> Path:
    torch.manual_seed(0)
    AutoencoderKL(
        block_out_channels=channels, down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels), norm_num_groups=8, latent_channels=latent_channels,
        use_quant_conv=quant_conv, use_post_quant_conv=quant_conv,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module", params=["tiny", "random", "16 channels"])
def folder(request, tmp_path_factory) -> Path:
    """The built-in VAE; one with attention and random weights; one as FLUX and SD 3 have it, without a quant_conv."""
    if request.param == "tiny":
        return TINY / "vae"
    many = request.param == "16 channels"
    return save_vae(tmp_path_factory.mktemp("vae"), latent_channels=16 if many else 4, quant_conv=not many)


def pixels(width: int, height: int, count: int = 1) -> np.ndarray:
    """[N,H,W,3] uint8: pictures with noise on them."""
    noise = np.random.default_rng(0).integers(0, 64, (count, height, width, 3))
    return ((np.array(gradient(width, height)) + noise) // 2).astype(np.uint8)


@torch.inference_mode()
def reference(vae: AutoencoderKL, images: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """diffusers' own posterior of [N,H,W,3] uint8."""
    values = torch.from_numpy((images / 127.5 - 1.0).astype(np.float32)).permute(0, 3, 1, 2)  # channels_last
    distribution = vae.encode(values.to(vae.dtype)).latent_dist
    return distribution.mean.float(), distribution.std.float()


def load_plain(folder: Path, dtype: torch.dtype) -> AutoencoderKL:
    """A whole VAE in our memory layout; without gradients, for which torch takes other convolutions on a CPU."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=dtype).eval().requires_grad_(False)
    return vae.to(memory_format=torch.channels_last)


def relative(found: torch.Tensor, wanted: torch.Tensor, spread: torch.Tensor) -> float:
    """RMS difference, in units of `spread`'s standard deviation."""
    return float((found - wanted).square().mean().sqrt() / spread.std())


# standard deviations of the latent; each some three times what is measured here
BOUNDS = {torch.float32: 1e-5, torch.float16: 5e-3, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_every_dtype_is_near_to_float32(folder, dtype):
    images = pixels(96, 64, 2)
    mean, std = reference(AutoencoderKL.from_pretrained(folder).float().eval(), images)
    encoder = VaeEncoder(open_vae(folder), CPU, dtype)
    found = encoder.encode(images)
    assert {weight.dtype for weight in encoder.vae.parameters()} == {dtype}
    assert encoder.num_retried == 0
    assert found.mean.dtype == found.std.dtype == torch.float32
    assert relative(found.mean, mean, mean) <= BOUNDS[dtype]
    assert float(((found.std - std) / std).square().mean().sqrt()) <= BOUNDS[dtype]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_an_image_that_is_one_latent_wide_is_encoded_in_float32(folder, dtype):
    images = pixels(8, 64, 2)
    mean, std = reference(AutoencoderKL.from_pretrained(folder).float().eval(), images)
    found = VaeEncoder(open_vae(folder), CPU, dtype).encode(images)
    assert relative(found.mean, mean, mean) <= BOUNDS[torch.float32]
    assert float(((found.std - std) / std).square().mean().sqrt()) <= BOUNDS[torch.float32]


def test_only_the_encoder_is_kept(folder):
    kept = VaeEncoder(open_vae(folder), CPU, torch.float32).vae
    assert {name.split(".")[0] for name, _ in kept.named_parameters()} <= {"encoder", "quant_conv"}
    whole = open_vae(folder).load(torch.float16)
    assert whole.dtype == torch.float16
    assert not whole.decoder.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("width", "height"), [(160, 64), (208, 152), (64, 72), (136, 136)])
def test_tiles_are_diffusers_own_bit_for_bit(folder, dtype, width, height):
    images = pixels(width, height, 2)
    plain = load_plain(folder, dtype)
    whole, _ = reference(plain, images)
    plain.enable_tiling()
    plain.tile_sample_min_size, plain.tile_latent_min_size = 64, 8
    mean, std = reference(plain, images)
    found = VaeEncoder(open_vae(folder), CPU, dtype, tiling=64).encode(images)
    assert torch.equal(found.mean, mean)
    assert torch.equal(found.std, std)
    assert found.mean.shape == whole.shape
    assert not torch.equal(found.mean, whole)


def test_a_tile_of_the_size_in_its_config_is_what_enable_tiling_alone_gives():
    images = pixels(576, 512)
    plain = load_plain(TINY / "vae", torch.float32)
    assert plain.config.sample_size == 512
    plain.enable_tiling()
    mean, std = reference(plain, images)
    found = VaeEncoder(open_vae(TINY), CPU, torch.float32, tiling=512).encode(images)
    assert torch.equal(found.mean, mean)
    assert torch.equal(found.std, std)


def test_an_image_of_a_tiles_size_is_encoded_whole():
    images = pixels(64, 64)
    found, whole = (VaeEncoder(open_vae(TINY), CPU, torch.float32, tiling=side).encode(images) for side in (64, None))
    assert torch.equal(found.mean, whole.mean)
    assert torch.equal(found.std, whole.std)


def test_what_overflows_in_tiles_is_encoded_again_in_tiles(folder, tmp_path):
    vae = AutoencoderKL.from_pretrained(folder).float()
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)
    vae.save_pretrained(tmp_path / "vae")
    images = pixels(160, 64)
    half, whole = (VaeEncoder(open_vae(tmp_path / "vae"), CPU, d, tiling=64) for d in (torch.float16, torch.float32))
    assert torch.equal(half.encode(images).mean, whole.encode(images).mean)
    assert half.num_retried == 1


SIZE = ("--model", "tiny", "--no-cond", "--width", 96, "--height", 64)


def test_tiling_is_part_of_the_recipe(run, images, tmp_path):
    cache, source = tmp_path / "c", ("--source", images, "--re-encode", 8)
    assert run("encode", images, "--out", cache, *SIZE).code == 0
    assert open_manifest(Storage(cache)).recipe.latents.tiling is None
    result = run("encode", images, "--out", cache, *SIZE, "--tiling", 64)
    assert result.code == 1
    assert "holds a cache of another recipe (--tiling none -> 64; cache -> asked)" in result.err
    assert run("encode", images, "--out", tmp_path / "t", *SIZE, "--tiling", 64).code == 0
    recipe = open_manifest(Storage(tmp_path / "t")).recipe.latents
    assert recipe == replace(open_manifest(Storage(cache)).recipe.latents, tiling=64)
    assert "encoded in float32 in tiles of 64 pixels" in run("inspect", tmp_path / "t").out
    whole, tiled = rows(cache), rows(tmp_path / "t")
    assert all(not torch.equal(whole[key]["latent_mean"], tiled[key]["latent_mean"]) for key in whole)
    again = json.loads(run("verify", tmp_path / "t", *source, "--json").out)
    assert again["problems"] == []
    assert again["largest_difference"] < 1e-3  # float16 on disk: encoded in the recipe's tiles again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tiling", 72), "--tiling 72: not a multiple of 32, four of this VAE's latents, of which tiles share one. "
                           "Try 96."),
        (("--tiling", 0), "--tiling 0: not a multiple of 32, four of this VAE's latents, of which tiles share one. "
                          "Try 32."),
        (("--tiling", 96), "--tiling 96: no bucket is larger, their sides are at most 96 pixels. "
                           "Give fewer, or leave it out."),
    ],
)  # fmt: skip
def test_tiles_that_make_no_sense_are_refused(run, images, tmp_path, options, message):
    result = run("encode", images, "--out", tmp_path / "c", *SIZE, *options)
    assert (result.code, result.err.splitlines()[-1]) == (1, f"error: {message}")
    assert not (tmp_path / "c").exists() or not list((tmp_path / "c").glob("*.json"))


def test_tiles_larger_than_a_bucket_may_be_larger_than_the_resolution(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--no-cond", "--tiling", 64).code == 0
    assert run("encode", images, "--out", tmp_path / "d", *SMALL, "--no-cond", "--tiling", 128).code == 1
    native = ("--model", "tiny", "--no-cond", "--resolution", "native", "--tiling", 1024)
    assert run("encode", images, "--out", tmp_path / "e", *native).code == 0


@pytest.fixture
def quick_compiler():
    """torch.compile without trying out for 10 s which vector instructions a compiler knows, and without a pool."""
    import torch._inductor.config as config

    torch.compiler.reset()
    with config.patch({"cpp.vec_isa_ok": True, "compile_threads": 1}):
        yield
    torch.compiler.reset()


@pytest.mark.slow
def test_a_compiled_encoder_differs_in_last_digits(quick_compiler, tmp_path):
    folder = open_vae(save_vae(tmp_path / "vae", (8,)))
    compiled, plain = (VaeEncoder(folder, CPU, torch.float32, tiling=128, compile=is_on) for is_on in (True, False))
    for width, height in ((96, 120), (128, 128), (192, 128)):  # the last in tiles
        found, wanted = compiled.encode(pixels(width, height)), plain.encode(pixels(width, height))
        assert relative(found.mean, wanted.mean, wanted.mean) <= BOUNDS[torch.float32]
        assert float(((found.std - wanted.std) / wanted.std).square().mean().sqrt()) <= BOUNDS[torch.float32]
    assert compiled.vae.encoder.made == {1}
    assert type(plain.vae.encoder) is Encoder


@pytest.mark.slow
def test_compile_stands_in_made_with_and_not_in_the_recipe(quick_compiler, run, images, tmp_path):
    folder = save_vae(tmp_path / "vae", (8,))
    options = ("--model", folder, "--no-cond", "--width", 96, "--height", 120, "--dtype", "bfloat16")
    assert run("encode", images, "--out", tmp_path / "c", *options, "--compile").code == 0
    assert run("encode", images, "--out", tmp_path / "d", *options).code == 0
    compiled, plain = (open_manifest(Storage(tmp_path / name)) for name in "cd")
    assert compiled.recipe == plain.recipe
    assert (compiled.made_with.compile, plain.made_with.compile) == (True, False)
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "d")
    for key in wanted:
        mean = wanted[key]["latent_mean"].float()
        assert relative(found[key]["latent_mean"].float(), mean, mean) <= BOUNDS[torch.bfloat16]
    assert "nothing to do" in run("encode", images, "--out", tmp_path / "c", *options).out


def test_what_overflows_in_a_compiled_encoder_is_encoded_again_in_one_that_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda encoder, dynamic: encoder)
    vae = AutoencoderKL.from_pretrained(save_vae(tmp_path / "vae"))
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)
    vae.save_pretrained(tmp_path / "vae")
    encoder = VaeEncoder(open_vae(tmp_path / "vae"), CPU, torch.float16, compile=True)
    encoder.encode(pixels(64, 64, 3))
    encoder.encode(pixels(64, 64))
    assert encoder.num_retried == 4
    assert encoder.vae.encoder.made == {1, 2}
    assert encoder.vae_float32 is not None
    assert type(encoder.vae_float32.encoder) is Encoder


@pytest.mark.slow
def test_without_a_compiler_there_is_one_line(run, images, tmp_path, monkeypatch):
    from torch._inductor import config, cpu_vec_isa

    torch.compiler.reset()
    options = ("--model", save_vae(tmp_path / "vae", (8,)), "--no-cond", "--width", 96, "--height", 120)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # where nothing is compiled already
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    with config.patch({"cpp.cxx": (None, "/nowhere/g++"), "cpp.vec_isa_ok": None}):
        result = run("encode", images, "--out", tmp_path / "c", *options, "--compile")
    torch.compiler.reset()
    cpu_vec_isa.valid_vec_isa_list.cache_clear()
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if "error" in line]
    assert line.startswith("error: --compile: torch.compile fails here (InvalidCxxCompiler: No working C++ compiler")
    assert line.endswith("Install what is missing, or leave --compile out.")
    assert not (tmp_path / "c" / "cache.json").exists()


def test_the_benchmark_has_a_row_for_every_mode(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent.parent / "benchmarks"))
    results = importlib.import_module("results").Results()
    importlib.import_module("precision").main(results, quick=True)
    errors = {found.what.replace("`", ""): found.value for found in results.records if found.column == "mean"}
    assert errors.keys() >= {"float32, on a CPU the default", "--dtype float16", "--dtype bfloat16", "--tiling 64"}
    assert errors["float32, on a CPU the default"] < 1e-5
    assert errors["--dtype float16"] < errors["--dtype bfloat16"] < errors["--tiling 64"]
    assert sum(found.unit == "%" for found in results.records) == 7
