"""Damaged and hostile model folders and files: each ends in one line, at once, and leaves no cache behind."""

import json
import os
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from latentprep.prepare.models.files import is_finite
from latentprep.prepare.models.vae_folder import open_vae
from tests.test_single_file import configs_of, ldm_vae, make_sd1

VAE, TEXT = "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)


def config(part, **changes):
    def damage(folder):
        path = folder / part / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def without(part, name):
    def damage(folder):
        path = folder / part / "config.json"
        path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != name}))

    return damage


def index(**changes):
    def damage(folder):
        path = folder / "model_index.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def text(path, content):
    return lambda folder: (folder / path).write_text(content)


def cut(path, keep):
    return lambda folder: (folder / path).write_bytes((folder / path).read_bytes()[:keep])


def weights(path, change):
    def damage(folder):
        tensors = load_file(folder / path)
        change(tensors)
        save_file(tensors, folder / path, {"format": "pt"})

    return damage


def gone(path):
    def damage(folder):
        shutil.rmtree(folder / path) if (folder / path).is_dir() else (folder / path).unlink()

    return damage


def fifo(path):
    def damage(folder):
        (folder / path).unlink()
        os.mkfifo(folder / path)

    return damage


def device(path):
    def damage(folder):
        (folder / path).unlink()
        (folder / path).symlink_to("/dev/zero")

    return damage


def only_json(folder):
    """What transformers 4 saves beside tokenizer.json would do without it."""
    for name in ("vocab.json", "merges.txt"):
        (folder / "tokenizer" / name).unlink(missing_ok=True)


def both(*damages):
    def damage(folder):
        for one in damages:
            one(folder)

    return damage


def set_value(name, value):
    def change(tensors):
        tensors[name].view(-1)[0] = value

    return change


CONV = "encoder.conv_in.weight"
HEADER = b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}'
DAMAGES = {
    # name -> what is done, and what the line must say
    "vae cut off": (cut(VAE, -1), "diffusion_pytorch_model.safetensors: cannot be read as safetensors"),
    "vae empty": (cut(VAE, 0), "cannot be read as safetensors"),
    "vae with a bad header": (
        lambda f: (f / VAE).write_bytes(len(HEADER).to_bytes(8, "little") + HEADER + bytes(4)),
        "cannot be read as safetensors",
    ),
    "vae with a huge header": (lambda f: (f / VAE).write_bytes(b"\xff" * 64), "cannot be read as safetensors"),
    "vae is text": (text(VAE, "<html>404</html>"), "cannot be read as safetensors"),
    "vae of other shapes": (
        weights(VAE, lambda t: t.update({CONV: torch.zeros(4, 3, 3, 3)})),
        "its VAE are not those of its config (1 of another shape, such as encoder.conv_in.weight: [4, 3, 3, 3]",
    ),
    "vae of other dimensions": (weights(VAE, lambda t: t.update({CONV: torch.zeros(())})), "1 of another shape"),
    "vae lacks a tensor": (weights(VAE, lambda t: t.pop(CONV)), "1 of its weights were not found"),
    "vae with NaN": (weights(VAE, set_value(CONV, float("nan"))), f"its weight {CONV} holds NaN or infinite"),
    "vae with infinity": (weights(VAE, set_value(CONV, float("-inf"))), f"its weight {CONV} holds NaN or infinite"),
    "vae of integers": (weights(VAE, lambda t: t.update({CONV: t[CONV].int()})), "is torch.int32"),
    "vae is missing": (gone(VAE), "no diffusion_pytorch_model.safetensors"),
    "vae is a FIFO": (fifo(VAE), "is no regular file"),
    "vae is a device": (device(VAE), "is no regular file"),
    "vae config is a FIFO": (fifo("vae/config.json"), "is no regular file"),
    "vae config is a device": (device("vae/config.json"), "is no regular file"),
    "vae config is a folder": (
        both(gone("vae/config.json"), lambda f: (f / "vae/config.json").mkdir()), "is no regular file",
    ),
    "vae config is a list": (text("vae/config.json", "[]"), "is not a JSON object"),
    "vae config is deep": (text("vae/config.json", "[" * 10**5 + "]" * 10**5), "nested too deep"),
    "vae config is binary": (lambda f: (f / "vae/config.json").write_bytes(b"\xff\xfe\0"), "cannot be read"),
    "vae config is huge": (lambda f: os.truncate(f / "vae/config.json", 2**30), "which no config has"),
    "vae class is hostile": (config("vae", _class_name="\x1b[2Jevil\n"), "\\x1b[2Jevil\\n, expected AutoencoderKL"),
    "vae without channels": (without("vae", "block_out_channels"), "has no block_out_channels"),
    "vae channels is text": (config("vae", block_out_channels="8"), "block_out_channels is '8'"),
    "vae channels is empty": (config("vae", block_out_channels=[]), "block_out_channels is []"),
    "vae channels negative": (config("vae", block_out_channels=[8, 8, -16, 16]), "block_out_channels is"),
    "vae channels absurd": (config("vae", block_out_channels=[8, 8, 10**9, 16]), "block_out_channels is"),
    "vae layers absurd": (config("vae", layers_per_block=10**9), "layers_per_block is 1000000000"),
    "vae latent channels are text": (config("vae", latent_channels="4"), "latent_channels is '4'"),
    "vae latent channels are none": (config("vae", latent_channels=None), "latent_channels is None"),
    "vae in_channels 4": (config("vae", in_channels=4), "in_channels is 4, expected 3"),
    "vae groups do not divide": (config("vae", norm_num_groups=7), "its config.json makes no AutoencoderKL"),
    "vae block types unknown": (config("vae", down_block_types=["Evil"] * 4), "makes no AutoencoderKL"),
    "vae block types few": (config("vae", down_block_types=["DownEncoderBlock2D"]), "down_block_types is"),
    "vae activation unknown": (config("vae", act_fn="evil"), "makes no AutoencoderKL"),
    "scaling_factor NaN": (config("vae", scaling_factor=float("nan")), "scaling_factor is nan, expected a number"),
    "scaling_factor infinite": (config("vae", scaling_factor=float("inf")), "scaling_factor is inf"),
    "scaling_factor 0": (config("vae", scaling_factor=0), "scaling_factor is 0"),
    "scaling_factor negative": (config("vae", scaling_factor=-0.18), "scaling_factor is -0.18"),
    "scaling_factor absurd": (config("vae", scaling_factor=1e30), "scaling_factor is 1e+30"),
    "scaling_factor null": (config("vae", scaling_factor=None), "scaling_factor is None"),
    "scaling_factor is text": (config("vae", scaling_factor="0.18"), "scaling_factor is '0.18'"),
    "shift_factor NaN": (config("vae", shift_factor=float("nan")), "shift_factor is nan"),
    "shift_factor absurd": (config("vae", shift_factor=1e9), "shift_factor is 1000000000.0"),
    "latents_mean of 3": (config("vae", latents_mean=[0, 0, 0], latents_std=[1] * 4), "latents_mean is [0, 0, 0]"),
    "latents_mean alone": (config("vae", latents_mean=[0] * 4), "latents_std is None"),
    "latents_std alone": (config("vae", latents_std=[1] * 4), "latents_mean is None"),
    "latents_std 0": (config("vae", latents_mean=[0] * 4, latents_std=[1, 1, 0, 1]), "latents_std has 0.0"),
    "latents_std NaN": (config("vae", latents_mean=[0] * 4, latents_std=[1, 1, 1, float("nan")]), "latents_std is nan"),
    "index with no files": (
        both(gone(VAE), text(f"{VAE}.index.json", "{}")), "names no files",
    ),
    "index that leads outside": (
        both(gone(VAE), text(f"{VAE}.index.json", '{"weight_map": {"a": "../../x.safetensors"}}')), "names no files",
    ),
    "index of a shard that is missing": (
        text(f"{VAE}.index.json", '{"weight_map": {"a": "x.safetensors"}}'), "its x.safetensors is missing",
    ),
    "text cut off": (cut(TEXT, -1), "text_encoder/model.safetensors: cannot be read as safetensors"),
    "text of other shapes": (
        weights(TEXT, lambda t: t.update({name: torch.zeros(5) for name in t if name.endswith("fc1.bias")})),
        "text_encoder are not those of its config",
    ),
    "text is a FIFO": (fifo(TEXT), "is no regular file"),
    "text is missing": (gone(TEXT), "no model.safetensors"),
    "text config is empty": (text("text_encoder/config.json", "{}"), "says no hidden_size"),
    "text width negative": (config("text_encoder", hidden_size=-32), "hidden_size is -32"),
    "text width is text": (config("text_encoder", hidden_size="32"), "hidden_size is '32'"),
    "text width absurd": (config("text_encoder", hidden_size=10**9), "hidden_size is 1000000000"),
    "text layers absurd": (config("text_encoder", num_hidden_layers=10**6), "num_hidden_layers is 1000000"),
    "text heads 0": (config("text_encoder", num_attention_heads=0), "num_attention_heads is 0"),
    "text heads do not divide": (config("text_encoder", num_attention_heads=5), "makes no CLIPTextModel"),
    "text activation unknown": (config("text_encoder", hidden_act="evil"), "makes no CLIPTextModel"),
    "text is quantized": (config("text_encoder", quantization_config={"quant_method": "x"}), "are quantized"),
    "text config deep": (text("text_encoder/config.json", "[" * 10**5), "nested too deep"),
    "tokenizer.json is empty": (both(only_json, text("tokenizer/tokenizer.json", "{}")), "its files make no"),
    "tokenizer.json is no JSON": (text("tokenizer/tokenizer.json", "{"), "tokenizer.json cannot be read"),
    "tokenizer without files": (
        lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()], "tokenizer: has no vocabulary",
    ),
    "tokenizer gone": (gone("tokenizer"), "has no text_encoder and tokenizer folders"),
    "tokenizer_config is a list": (text("tokenizer/tokenizer_config.json", "[]"), "is not a JSON object"),
    "index is no JSON": (text("model_index.json", "{"), "model_index.json cannot be read"),
    "index of another pipeline": (index(_class_name=["x", "\x1b[2J"]), "expected a pipeline of"),
    "index names another VAE": (
        index(vae=["diffusers", "AutoencoderTiny"]),
        "its model_index.json says that vae is ['diffusers', 'AutoencoderTiny'], and vae/config.json that it is Auto",
    ),
    "index names an unknown VAE": (index(vae=["diffusers", "AsymmetricAutoencoderKL"]), "AsymmetricAutoencoderKL'], "),
    "index names a VAE unnamed": (index(vae=["diffusers", "\x1b[2J"]), "says that vae is ['diffusers', '\\x1b[2J'], "),
    "VAE of another class": (config("vae", _class_name="AutoencoderTiny"), "'AutoencoderKL'], and vae/config.json "),
    "index names another encoder": (index(text_encoder=["evil", "Evil"]), "Other classes are never loaded"),
    "index names text": (index(text_encoder="evil"), "Other classes are never loaded"),
    "index names a number": (index(text_encoder=5), "Other classes are never loaded"),
    "index names another tokenizer": (index(tokenizer=["transformers", "AutoTokenizer"]), "Other classes are"),
}  # fmt: skip


def check_refused(run, images, cache, model, message, *options):
    result = run("encode", images, "--out", cache, "--model", model, *SIZE, *options)
    lines = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert result.code == 1, result.err
    assert len(lines) == 1, result.err
    assert result.err.rstrip().splitlines()[-1] == lines[0]
    assert message in lines[0]
    assert lines[0].isprintable()
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage", [index(vae=None), index(vae=[None, None]), index(vae=["own", "Vae"]), gone("model_index.json")]
)
def test_a_vae_of_which_no_index_says_a_class_of_diffusers_is_that_of_its_config(model, tmp_path, damage):
    folder = shutil.copytree(model, tmp_path / "copy")
    damage(folder)
    assert open_vae(folder).digest == open_vae(model).digest


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_text_encoder_whose_weights_are_no_numbers_is_named(run, images, model, tmp_path, value):
    folder = shutil.copytree(model, tmp_path / "copy")
    tensors = load_file(folder / TEXT)
    name = next(name for name in tensors if name.endswith("token_embedding.weight"))
    tensors[name][-1, -1] = value  # of a token that no prompt has
    tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]  # as of older transformers; not used
    save_file(tensors, folder / TEXT, {"format": "pt"})
    result = run("encode", images, "--out", tmp_path / "cache", "--model", folder, *SIZE)
    assert result.code == 1
    assert result.err.splitlines()[-1] == (
        f"error: {folder / 'text_encoder'}: its weight {name} holds NaN or infinite numbers. Download the model again."
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_a_number_that_is_none_is_found_wherever_it_stands(dtype):
    assert is_finite(torch.zeros(0, 3, dtype=dtype))
    for size in (1, 2, 33, 257):
        numbers = torch.randn(size).to(dtype)
        assert is_finite(numbers)
        for place in range(size):
            damaged = numbers.clone()
            damaged[place] = float("nan")
            assert not is_finite(damaged), (size, place)
            damaged[place] = float("inf")  # the largest, or NaN, in 8 bits
            assert is_finite(damaged) == bool(damaged.float().isfinite().all())


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_folders_are_refused_in_one_line(run, images, model, tmp_path, name):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    damage, message = DAMAGES[name]
    damage(folder)
    check_refused(run, images, tmp_path / "cache", folder, message)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.update(edm_mean=torch.zeros(4)), "has edm_mean alone"),
        (lambda t: t.update(edm_mean=torch.zeros(3), edm_std=torch.ones(4)), "its edm_mean is [3], expected one"),
        (
            lambda t: t.update(edm_mean=torch.zeros(4), edm_std=torch.zeros(4)),
            "its edm_std has numbers that are",
        ),
        (lambda t: t.update(edm_mean=torch.zeros(4) / 0, edm_std=torch.ones(4)), "its weight edm_mean holds NaN"),
        (set_value(f"first_stage_model.{CONV}", float("nan")), "holds NaN or infinite numbers"),
    ],
)
def test_damaged_files_are_refused_in_one_line(run, images, model, tmp_path, change, message):
    folder, texts = make_sd1(tmp_path, model)
    file = tmp_path / "model.safetensors"
    tensors = ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts
    change(tensors)
    save_file(tensors, file)
    check_refused(run, images, tmp_path / "cache", file, message, "--config", configs_of(folder, tmp_path / "configs"))
