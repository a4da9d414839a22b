"""FLUX.2's VAE: latents in patches of 2x2, and a normalization that stands in the weights as a batch norm."""

import json
import pickle
import shutil
import threading
from types import SimpleNamespace

import msgspec
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn.modules import module as hooks

from latentprep import LatentDataset
from latentprep.cache.manifest import LatentFacts, Manifest
from latentprep.cache.normalization import Normalization, patchify
from latentprep.errors import UserError
from latentprep.personalized.models import make_live_vae
from latentprep.prepare.models.vae_config import bounded, build_vae
from latentprep.prepare.models.vae_encoder import LEVELS, to_levels
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import gradient
from tests.test_hostile_models import both, check_refused, config, set_value, weights

diffusers = pytest.importorskip("diffusers", minversion="0.36")
CPU = torch.device("cpu")
SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
FILE = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def flux2(tmp_path_factory):
    """A miniature with statistics as training leaves them, and the folder it was saved to."""
    torch.manual_seed(0)
    vae = diffusers.AutoencoderKLFlux2(
        block_out_channels=(8, 8, 16, 16), norm_num_groups=8, layers_per_block=1, latent_channels=4
    ).eval()
    vae.bn.running_mean.normal_()
    vae.bn.running_var.uniform_(0.1, 4)
    folder = tmp_path_factory.mktemp("flux2")
    vae.save_pretrained(folder)
    return vae, folder


def copy(folder, tmp_path):
    """The folder as a pipeline's vae, as the damages of test_hostile_models want it."""
    shutil.copytree(folder, tmp_path / "copy" / "vae")
    return tmp_path / "copy"


@torch.no_grad()
def what_the_denoiser_sees(vae, latents):
    """Flux2Pipeline._encode_vae_image from the latents on."""
    pipeline = object.__new__(diffusers.Flux2Pipeline)
    encoded = SimpleNamespace(latents=latents)
    pipeline.__dict__["vae"] = SimpleNamespace(encode=lambda image: encoded, bn=vae.bn, config=vae.config)
    return pipeline._encode_vae_image(torch.zeros(1, 3, 8, 8), None)


def test_batches_hold_what_flux2s_pipeline_makes_bit_for_bit(flux2, images, tmp_path, run):
    vae, folder = flux2
    result = run("encode", images, "--out", tmp_path / "c", "--model", folder, "--store-dtype", "float32", *SIZE)
    assert result.code == 1  # a VAE alone has no text encoder
    options = ("--model", folder, "--store-dtype", "float32", "--no-cond", *SIZE)
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert result.code == 0, result.err
    data = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic", include_cond=False)
    for index in range(len(data)):
        batch = data.__getitems__([index])
        height, width = batch.latent_mean.shape[2:]
        assert batch.latent_mean.shape[1] == 4  # as the VAE gave it
        assert batch.latent_sample.shape == (1, 16, height // 2, width // 2)
        assert torch.equal(batch.latent_sample, what_the_denoiser_sees(vae, batch.latent_mean))
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).code == 0
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["latent"]["normalization"]["patch"] == 2
    random = LatentDataset(tmp_path / "c", include_cond=False).__getitems__([0])
    assert random.latent_sample.shape[1] == 16


def test_weights_fit_what_the_denoiser_sees(flux2, images, tmp_path, run):
    faded = Image.new("RGBA", (64, 64), (200, 30, 30, 0))
    faded.paste((200, 30, 30, 255), (0, 0, 40, 64))
    faded.save(images / "faded.png")
    assert run("encode", images, "--out", tmp_path / "c", "--model", flux2[1], "--no-cond", *SIZE).code == 0
    data = LatentDataset(tmp_path / "c", include_cond=False, use_weight="raw")
    (index,) = [n for n in range(len(data)) if data.key(n) == "faded.png"]
    batch = data[index]
    assert batch.weight.shape == batch.latent_sample.shape
    flat = batch.stored_weight.expand(-1, batch.latent_mean.shape[1], -1, -1)
    assert torch.equal(batch.weight, patchify(flat, 2))
    assert {0.0, 1.0} <= set(batch.weight.flatten().tolist())


def test_buckets_are_whole_patches(flux2, images, tmp_path, run):
    gradient(120, 72).save(images / "odd.png")
    options = ("--model", flux2[1], "--out", tmp_path / "c", "--resolution", "native", "--no-cond")
    assert run("encode", images, *options).code == 0
    assert "112x64" in json.loads(run("inspect", tmp_path / "c", "--json").out)["buckets"]
    result = run("encode", images, "--model", flux2[1], "--width", 72, "--height", 64, "--no-cond")
    assert result.code == 1
    assert "--width 72: not a multiple of 16, this model's factor. Try 80." in result.err


def test_the_digest_is_of_the_statistics_too(flux2, tmp_path):
    folder = copy(flux2[1], tmp_path)
    before = open_vae(folder)
    weights("vae/" + FILE, set_value("bn.running_mean", 3.0))(folder)
    after = open_vae(folder)
    assert after.digest != before.digest
    assert (after.normalization.shift[0], after.normalization.shift[1:]) == (3.0, before.normalization.shift[1:])


def test_a_vae_in_memory_is_known_by_its_statistics(flux2):
    vae, _ = flux2
    live, _ = make_live_vae(vae, None)
    before = live.facts("")
    assert before.normalization == open_vae(flux2[1]).normalization
    with torch.no_grad():
        vae.bn.running_mean[0] += 1
    changed = make_live_vae(vae, None)[0].facts("")
    with torch.no_grad():
        vae.bn.running_mean[0] -= 1
    assert changed.digest != before.digest


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config("vae", patch_size=[1, 4]), "patch_size is [1, 4]"),
        (config("vae", patch_size=[10**9] * 2), "patch_size is [1000000000, 1000000000]"),
        (config("vae", patch_size="2"), "makes no AutoencoderKLFlux2"),
        (config("vae", batch_norm_eps=-1), "batch_norm_eps is -1, expected 0 to 1"),
        (config("vae", batch_norm_eps="x"), "batch_norm_eps is 'x', expected 0 to 1"),
        (config("vae", latent_channels=8), "tensors of its VAE are not those of its config"),
        (config("vae", layers_per_block=10**6), "layers_per_block is 1000000"),
        (config("vae", block_out_channels=[10**9] * 4), "block_out_channels is"),
        (config("vae", act_fn="x" * 10**5), "act_fn is"),
        (config("vae", sample_size=10**12), "sample_size is"),
        (
            weights("vae/" + FILE, set_value("bn.running_mean", float("nan"))),
            "copy/vae: its weight bn.running_mean holds NaN or infinite numbers",
        ),
        (
            weights("vae/" + FILE, set_value("bn.running_var", -5.0)),
            "copy/vae: its weight bn.running_var has numbers below",
        ),
        (
            both(config("vae", batch_norm_eps=0), weights("vae/" + FILE, set_value("bn.running_var", 0.0))),
            "batch_norm_eps is 0, and with it bn.running_var has numbers that are not above 0",
        ),
        (weights("vae/" + FILE, lambda t: t.pop("bn.running_var")), "1 of its weights were not found, such as bn."),
        (weights("vae/" + FILE, lambda t: t.update({"bn.running_var": torch.ones(3)})), "bn.running_var: [3]"),
    ],
)
def test_hostile_configs_and_statistics_are_refused_in_one_line(flux2, images, tmp_path, run, damage, message):
    folder = copy(flux2[1], tmp_path)
    damage(folder)
    check_refused(run, images, tmp_path / "cache", folder, message, "--no-cond")


def test_what_is_built_is_bounded_wherever_it_comes_from(monkeypatch):
    with pytest.raises(UserError, match=r"^x: its config.json asks for more than 4,294,967,296 numbers"):
        build_vae(
            {"_class_name": "AutoencoderKL", "block_out_channels": [2**14] * 10, "latent_channels": 4,
             "down_block_types": ["DownEncoderBlock2D"] * 10, "up_block_types": ["UpDecoderBlock2D"] * 10,
             "layers_per_block": 64}, "x",
        )  # fmt: skip
    with pytest.raises(UserError, match="more than 20,000 modules"), bounded("x"):
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_001)))
    assert len(torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_001)))) == 20_001


def test_other_threads_build_what_they_like_meanwhile():
    """torch's tables of hooks are those of the whole process: who changes them stops threads that read them."""
    with bounded("x"):
        pass
    tables = [hooks._global_module_registration_hooks, hooks._global_parameter_registration_hooks]
    before, made = [dict(table) for table in tables], []

    def build():
        made.append(len(torch.nn.Sequential(*(torch.nn.Identity() for _ in range(20_001)))))

    with bounded("x"):
        assert [dict(table) for table in tables] == before
        thread = threading.Thread(target=build)
        thread.start()
        thread.join()
        torch.nn.Sequential(*(torch.nn.Identity() for _ in range(19_999)))
    assert made == [20_001]
    assert [dict(table) for table in tables] == before


def test_patches_are_flux2s():
    latents = torch.randn(2, 3, 8, 12)
    assert torch.equal(patchify(latents, 2), diffusers.Flux2Pipeline._patchify_latents(latents))
    assert patchify(latents, 1) is latents
    weight = torch.rand(2, 1, 8, 12)
    loss = (patchify(latents, 2) ** 2) * Normalization((0.0,), (1.0,), 2).patch_weight(weight, 3)
    assert torch.equal(loss, patchify(latents**2 * weight, 2))


def facts(normalization):
    """What a manifest says of latents of 4 channels."""
    data = {"normalization": normalization, "factor": 8, "channels": 4, "views": ["plain"]}
    return msgspec.convert(data, LatentFacts)


@pytest.mark.parametrize("patch", [0, 3, True, 2.0, "2", None, [2]])
def test_patches_that_are_none(patch):
    with pytest.raises(ValueError, match="patch"):
        facts({"patch": patch, "shift": [0.0], "scale": [1.0]})


def test_of_patches_each_channel_has_its_numbers():
    data = {"patch": 2, "shift": [0.0] * 16, "scale": [1.0] * 16}
    assert facts(data).normalization.to_json() == data
    with pytest.raises(ValueError, match="expected 1 or 16"):
        facts({**data, "shift": [0.0] * 4})


def test_a_manifest_of_latents_that_are_no_patches_is_refused(flux2, images, tmp_path, run):
    assert run("encode", images, "--out", tmp_path / "c", "--model", flux2[1], "--no-cond", *SIZE).code == 0
    data = json.loads((tmp_path / "c" / "cache.json").read_text())
    data["shards"][0]["groups"][0][2] = [4, 7, 8]
    with pytest.raises(ValueError, match="without whole patches"):
        msgspec.convert(data, Manifest)


def test_descriptions_go_to_other_processes(flux2):
    opened = open_vae(flux2[1])
    data = pickle.dumps(opened)
    assert len(data) < 10_000
    assert pickle.loads(data) == opened
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).numpy()
    one, other = (vae.open(CPU, torch.float32).encode(pixels) for vae in (opened, pickle.loads(data)))
    assert torch.equal(one.mean, other.mean)


def test_every_byte_becomes_the_same_float_wherever_it_stands():
    for count in (1, 7, 256, 4099):
        pixels = torch.arange(count).to(torch.uint8)
        assert torch.equal(to_levels(pixels, LEVELS), LEVELS[pixels.int()])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_two_halves_of_encode_are_encode(tmp_path, dtype):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)  # overflows in float16
    vae.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (3, 32, 48, 3), dtype=torch.uint8)
    encoder = open_vae(tmp_path).open(CPU, dtype)
    first, second = encoder.start(pixels[:2].numpy()), encoder.start(pixels[2:])  # before either is finished
    assert encoder.num_retried == 0
    found = [encoder.finish(first, pixels[:2].numpy()), encoder.finish(second, pixels[2:])]
    assert encoder.num_retried == (3 if dtype == torch.float16 else 0)
    wanted = [open_vae(tmp_path).open(CPU, torch.float32).encode(part) for part in (pixels[:2], pixels[2:].numpy())]
    for one, other in zip(found, wanted, strict=True):
        assert one.mean.dtype == torch.float32
        assert torch.equal(one.mean, other.mean)
        assert torch.equal(one.std, other.std)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_on_cuda_the_numbers_come_by_themselves(flux2, dtype):
    encoder = open_vae(flux2[1]).open(torch.device("cuda"), dtype)
    pixels = torch.randint(0, 256, (3, 64, 64, 3), dtype=torch.uint8)
    started = [encoder.start(pixels.pin_memory()) for _ in range(3)]
    found = [encoder.finish(one, pixels) for one in started]
    wanted = open_vae(flux2[1]).open(CPU, torch.float32).encode(pixels)
    for one in found:
        assert one.mean.device.type == "cpu"
        assert torch.allclose(one.mean, wanted.mean, atol=0.05)
        assert torch.equal(one.mean, found[0].mean)
    levels = to_levels(torch.arange(256, dtype=torch.uint8).cuda(), LEVELS.cuda())
    assert torch.equal(levels.cpu(), LEVELS)


def test_memory_that_is_full_only_for_the_second_encoding_halves_it(tmp_path, monkeypatch):
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8,
                        up_block_types=("UpDecoderBlock2D",) * 2)  # fmt: skip
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)
    vae.save_pretrained(tmp_path)
    pixels = torch.randint(0, 256, (4, 32, 48, 3), dtype=torch.uint8).numpy()
    encoder = open_vae(tmp_path).open(CPU, torch.float16)
    started, sizes = encoder.start(pixels), []
    posterior = encoder._posterior

    def fills(vae, images):
        sizes.append(len(images))
        if len(images) > 1:
            raise RuntimeError("not enough memory")
        return posterior(vae, images)

    monkeypatch.setattr(encoder, "_posterior", fills)
    found = encoder.finish(started, pixels)
    assert sizes == [4, 2, 1, 1, 1, 1]
    assert found.mean.isfinite().all()
    assert "out of memory with 2 images" in encoder.limit.said


def test_weights_saved_before_0_15_still_load(model, tmp_path):
    """Names of attention that diffusers renames; the filter by names sees them as they are today."""
    shutil.copytree(model / "vae", tmp_path / "vae")
    tensors = load_file(tmp_path / "vae" / FILE)
    old = {name.replace("to_q", "query").replace("to_out.0", "proj_attn"): value for name, value in tensors.items()}
    assert old.keys() != tensors.keys()
    save_file(old, tmp_path / "vae" / FILE, {"format": "pt"})
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).numpy()
    one, other = (open_vae(f / "vae").open(CPU, torch.float32).encode(pixels) for f in (model, tmp_path))
    assert torch.equal(one.mean, other.mean)
