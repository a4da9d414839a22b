"""prepare/models/ and the built-in model: what is found, what is hashed, and what is said where there is nothing."""

import json
import math
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from latentprep import LatentDataset
from latentprep.errors import UserError
from latentprep.prepare.models.files import class_of
from latentprep.prepare.models.find import TEXT_FILES, VAE_FILES, commit_of, find_model
from latentprep.prepare.models.load_text import known_class
from latentprep.prepare.models.text_folder import open_text
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import HELD_OUT, SMALL, TINY, find_photo, make_model, scaled_by


def test_tiny_is_a_diffusers_folder_of_at_most_4_mb():
    assert sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file()) <= 4_000_000
    vae = AutoencoderKL.from_pretrained(TINY / "vae")
    assert vae.config.latent_channels == 4
    assert 2 ** (len(vae.config.block_out_channels) - 1) == 8
    assert isinstance(CLIPTextModel.from_pretrained(TINY / "text_encoder"), CLIPTextModel)
    folder = open_vae(find_model("tiny"))
    assert (folder.factor, folder.latent_channels, folder.normalization) == (8, 4, scaled_by(vae.config.scaling_factor))
    assert open_text(find_model("tiny")).window == 77


@pytest.mark.slow
@torch.inference_mode()
def test_tiny_restores_photos_it_never_saw():
    vae = AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    psnr = []
    for name in HELD_OUT:
        photo = Image.open(find_photo(name)).convert("RGB")
        photo = photo.crop((0, 0, photo.width // 8 * 8, photo.height // 8 * 8))
        pixels = torch.from_numpy(np.array(photo).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        restored = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
        psnr.append(-10 * math.log10(((restored - pixels) / 2).square().mean().item()))
    assert sum(psnr) / len(psnr) >= 24


@torch.inference_mode()
def test_tinys_latents_have_unit_spread_once_scaled():
    vae = AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    photo = Image.open(find_photo(HELD_OUT[0])).convert("RGB")
    pixels = torch.from_numpy(np.array(photo).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
    scaled = vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor
    assert 0.5 < scaled.std().item() < 2


def test_tinys_tokenizer_is_byte_level():
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    assert len(tokenizer) == 514
    ids = tokenizer("a Cat ☃").input_ids
    assert ids[0] == 512
    assert ids[-1] == 513
    assert len(ids) == 2 + 1 + 3 + 3  # start and end; "a"; "cat"; three bytes of a snowman
    vocabulary = json.loads((TINY / "tokenizer" / "vocab.json").read_text(encoding="utf-8"))
    assert vocabulary == tokenizer.get_vocab()


def copy(model, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(model, folder)
    return folder


def test_digest_is_of_weights_and_config_and_not_of_names(model, tmp_path):
    folder = copy(model, tmp_path)
    assert open_vae(folder).digest == open_vae(model).digest
    assert open_text(folder).digest == open_text(model).digest
    config = json.loads((folder / "vae/config.json").read_text())
    (folder / "vae/config.json").write_text(json.dumps({**config, "_diffusers_version": "9.9", "_name_or_path": "/x"}))
    assert open_vae(folder).digest == open_vae(model).digest
    (folder / "vae/config.json").write_text(json.dumps({**config, "scaling_factor": 0.5}))
    assert open_vae(folder).digest != open_vae(model).digest


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_one_changed_byte_of_weights_is_another_digest(model, tmp_path, part):
    folder = copy(model, tmp_path)
    path = folder / f"{part}.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    changed = (open_vae(folder).digest != open_vae(model).digest, open_text(folder).digest != open_text(model).digest)
    assert changed == (part.startswith("vae"), part.startswith("text"))


def test_vae_only_folder(model):
    assert open_vae(model / "vae").digest == open_vae(model).digest


NO_SUCH = (
    "no such folder or file. Give a diffusers folder, a .safetensors checkpoint, a hub id such as owner/name, or tiny."
)
PICKLE = (
    "a pickle, and loading one can run any code, so it is not loaded. In a program that you trust, save its tensors as "
    ".safetensors, or make a folder of it with diffusers' convert_original_stable_diffusion_to_diffusers.py "
    "--to_safetensors."
)
OTHER = (
    "a file of another kind, expected a .safetensors checkpoint, a folder in diffusers layout, "
    "or a hub id such as owner/name."
)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no/such/folder", NO_SUCH),
        ("nothing-here", NO_SUCH),
        ("model.ckpt", PICKLE),
        ("model.BIN", PICKLE),
        ("model.gguf", OTHER),
    ],
)
def test_models_that_are_not_there(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    for file in ("model.ckpt", "model.BIN", "model.gguf"):
        (tmp_path / file).write_bytes(b"x")
    with pytest.raises(UserError) as error:
        find_model(name)
    assert str(error.value) == f"--model {name}: {message}"


def test_hub_id_without_network_says_what_to_do(tmp_path, monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", offline)
    with pytest.raises(UserError) as error:
        find_model("stable-diffusion-v1-5/stable-diffusion-v1-5")
    assert str(error.value) == (
        "--model stable-diffusion-v1-5/stable-diffusion-v1-5: not on this machine, and the hub cannot be reached. "
        "Download it where there is a network (hf download stable-diffusion-v1-5/stable-diffusion-v1-5), "
        "point --model at a diffusers folder, or try latentprep out with --model tiny."
    )


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache on this machine, holding what a test copies into it; and no network."""
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))

    def add(name, source, branch="main", commit="0" * 40):
        folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True, exist_ok=True)
        (folder / "refs" / branch).write_text(commit)
        shutil.copytree(source, folder / "snapshots" / commit)
        return folder / "snapshots" / commit

    return add


def test_a_hub_model_that_is_here_needs_no_network(hub, model):
    folder = hub("some/model", model)
    said = []
    assert find_model("some/model", say=said.append) == folder
    assert open_vae(folder).digest == open_vae(model).digest
    vae = hub("some/vae", model / "vae")
    assert open_vae(find_model("some/vae", say=said.append)).path == vae
    assert not said


def test_a_revision_is_a_branch_or_a_commit_of_a_hub_model(hub, model):
    main = hub("some/model", model)
    other = hub("some/model", model, "other", "1" * 40)
    assert find_model("some/model") == main
    assert find_model("some/model", revision="other") == other
    assert find_model("some/model", revision="0" * 40) == main
    assert [commit_of(folder) for folder in (main, other, model)] == ["0" * 40, "1" * 40, None]
    with pytest.raises(UserError, match=r"^--model some/model --revision v2: not on this machine, and the hub cannot"):
        find_model("some/model", revision="v2")


@pytest.mark.parametrize("name", ["tiny", "{model}"])
def test_what_is_on_this_machine_has_no_revisions(model, name):
    name = name.format(model=model)
    with pytest.raises(UserError) as error:
        find_model(name, revision="v2")
    assert str(error.value) == f"--revision v2: is for models of the hub, and --model {name} is on this machine."


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("RevisionNotFoundError", "--revision v2: the hub's model has no such branch, tag or commit."),
        ("RepositoryNotFoundError", "--revision v2: the hub has no such model. Check the name, or point --model at"),
        ("GatedRepoError", "--revision v2: access is gated. Accept its terms on the hub and run: hf auth login;"),
    ],
)
def test_what_the_hub_refuses_is_said(monkeypatch, kind, message):
    import huggingface_hub.errors

    def refuse(*_, **__):
        error = getattr(huggingface_hub.errors, kind)
        raise error.__new__(error)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(UserError) as error:
        find_model("some/model", revision="v2")
    assert str(error.value).startswith(f"--model some/model {message}")


def test_the_commit_is_said_and_remembered(hub, model, run, images, tmp_path):
    hub("some/model", model, "other", "1" * 40)
    options = ("--revision", "other", "--resolution", "64", "--bucket-step", "32", "--min-side", "32")
    result = run("encode", images, "--out", tmp_path / "c", "--model", "some/model", *options)
    assert f"model    some/model at {'1' * 40} (factor 8)\n" in result.err
    made = json.loads((tmp_path / "c" / "cache.json").read_text())["made_with"]
    assert (made["model"], made["revision"], made["commit"]) == ("some/model", "other", "1" * 40)
    hub("some/model", make_model(tmp_path / "newer", seed=1), "other", "2" * 40)
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).code == 0


def usable(folder):
    open_vae(folder)
    open_text(folder)


@pytest.mark.parametrize("missing", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_half_a_download_is_not_taken_for_the_model(hub, model, missing):
    (hub("some/model", model) / f"{missing}.safetensors").unlink()
    said = []
    with pytest.raises(UserError):
        usable(find_model("some/model", say=said.append))
    assert said == ["download some/model from the hub: VAE, text encoder and tokenizer"]


def wants_download(name):
    said = []
    find_model(name, say=said.append)
    return bool(said)


def test_a_download_of_several_parts_is_whole_when_all_of_them_are_there(hub, model):
    folder = hub("some/model", model)
    encoder = folder / "text_encoder"
    parts = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    (encoder / "model.safetensors").rename(encoder / parts[0])
    (encoder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": parts[0], "b": parts[1]}}))
    assert wants_download("some/model")
    shutil.copy(encoder / parts[0], encoder / parts[1])
    assert not wants_download("some/model")


def test_parts_that_a_model_leaves_out_are_not_waited_for(hub, model):
    folder = hub("some/model", model)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "text_encoder_3": [None, None]}))
    assert not wants_download("some/model")
    (folder / "model_index.json").write_text(json.dumps({**index, "transformer": ["diffusers", "X"]}))
    assert wants_download("some/model")
    (folder / "transformer").mkdir()
    (folder / "transformer" / "config.json").write_text("{}")  # of its weights there is no need
    assert not wants_download("some/model")


def test_what_is_downloaded_of_a_hub_model():
    from huggingface_hub.utils import filter_repo_objects

    wanted = [
        "model_index.json", "vae/config.json", "vae/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
        "text_encoder/model.safetensors", "text_encoder_2/model-00001-of-00002.safetensors", "tokenizer/vocab.json",
        "config.json", "diffusion_pytorch_model.safetensors", "transformer/config.json", "tokenizer_3/spiece.model",
        "text_encoder_3/model-00002-of-00002.safetensors", "text_encoder_3/model.safetensors.index.json",
    ]  # fmt: skip
    others = [
        "unet/diffusion_pytorch_model.safetensors", "vae/diffusion_pytorch_model.bin", "v1-5-pruned.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors", "text_encoder/model.fp16.safetensors", "README.md",
        "safety_checker/model.safetensors", "text_encoder/pytorch_model.bin", "text_encoder_3/model.fp16.safetensors",
        "transformer/diffusion_pytorch_model-00001-of-00002.safetensors", "sd3_medium.safetensors",
    ]  # fmt: skip
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=[*VAE_FILES, *TEXT_FILES])) == wanted
    without_text = [name for name in wanted if not name.startswith(("text_encoder", "tokenizer", "transformer"))]
    assert list(filter_repo_objects([*wanted, *others], allow_patterns=VAE_FILES)) == without_text


def test_where_a_vae_is_all_that_is_wanted_no_text_encoder_is_waited_for(hub, model, run, images, tmp_path):
    folder = hub("some/model", model)
    shutil.rmtree(folder / "text_encoder")
    assert wants_download("some/model")
    said = []
    assert find_model("some/model", say=said.append, with_text=False) == folder
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    for number, options in enumerate((("--no-cond",), ("--only", "latents"))):
        result = run("encode", images, "--out", tmp_path / str(number), "--model", "some/model", *size, *options)
        assert result.code == 0
        assert "download" not in result.err
    assert not said


@pytest.mark.parametrize("part", ["vae/diffusion_pytorch_model", "text_encoder/model"])
def test_weights_of_unknown_names_are_never_replaced_by_random_ones(model, tmp_path, part, run, images):
    folder = copy(model, tmp_path)
    path = folder / f"{part}.safetensors"
    save_file({f"other.{name}": tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    result = run("encode", images, "--out", tmp_path / "c", "--model", folder, *size)
    assert result.code == 1
    assert re.search(rf"error: {path.parent}: \d+ of its weights were not found, such as .*upgrade it, or", result.err)
    assert not (tmp_path / "c" / "cache.json").exists()


def damage_nothing(folder):
    shutil.rmtree(folder)
    folder.mkdir()


def damage_class(folder):
    (folder / "vae/config.json").write_text('{"_class_name": "VQModel"}')


def damage_json(folder):
    (folder / "vae/config.json").write_text("{")


def damage_weights(folder):
    (folder / "vae/diffusion_pytorch_model.safetensors").rename(folder / "vae/diffusion_pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing, "not a diffusers folder, it has no config.json."),
        (damage_class, "its VAE is VQModel, expected AutoencoderKL, AutoencoderKLFlux2, "),
        (damage_json, "cannot be read"),
        (
            damage_weights,
            "no diffusion_pytorch_model.safetensors (found diffusion_pytorch_model.bin). Save the model again",
        ),
    ],
)
def test_folders_without_a_usable_vae(model, tmp_path, damage, message):
    folder = copy(model, tmp_path)
    damage(folder)
    with pytest.raises(UserError) as error:
        open_vae(folder)
    assert message in str(error.value)
    assert str(folder) in str(error.value)


def test_folders_without_a_usable_text_encoder(model, tmp_path):
    with pytest.raises(
        UserError, match=r"has no model_index.json, so no text encoder. Give a pipeline folder, or --no-cond."
    ):
        open_text(model / "vae")
    folder = copy(model, tmp_path)
    (folder / "model_index.json").write_text('{"_class_name": "LatentConsistencyModelPipeline"}')
    with pytest.raises(
        UserError, match=r"a LatentConsistencyModelPipeline, expected a pipeline of Stable Diffusion 1 and 2, SDXL, "
    ):
        open_text(folder)
    shutil.copy(model / "model_index.json", folder / "model_index.json")
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match=r"has no text_encoder and tokenizer folders"):
        open_text(folder)


def test_code_is_never_downloaded_from_the_hub():
    from fnmatch import fnmatch

    wanted = [*VAE_FILES, *TEXT_FILES]
    for name in ("tokenizer/tokenizer.py", "text_encoder/model.py", "vae/vae.py", "model.py", "pipeline.py"):
        assert not any(fnmatch(name, pattern) for pattern in wanted), name
    for name in ("vocab.json", "merges.txt", "spiece.model", "tokenizer.json", "special_tokens_map.json"):
        assert any(fnmatch(f"tokenizer_2/{name}", pattern) for pattern in wanted), name


def set_length(model, value):
    path = model / "tokenizer" / "tokenizer_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "model_max_length": value}))


@pytest.mark.parametrize("value", [10**30, 248, None, "x", -5, 0, 1e400, "missing"])
def test_a_tokenizer_that_does_not_say_its_length_has_that_of_its_encoder(model, run, images, tmp_path, value):
    """As one that was saved from its vocabulary alone: it says 10**30."""
    copied = copy(model, tmp_path)
    if value == "missing":
        (copied / "tokenizer" / "tokenizer_config.json").unlink()
    else:
        set_length(copied, value)
    for name, folder in (("c", copied), ("wanted", model)):
        assert run("encode", images, "--out", tmp_path / name, "--model", folder, *SMALL[2:]).code == 0
    found, wanted = (LatentDataset(tmp_path / name)[0].cond["prompt_embeds"] for name in ("c", "wanted"))
    assert torch.equal(found, wanted)


def test_a_tokenizer_that_would_cut_prompts_short_is_refused_before_anything_is_encoded(model, run, images, tmp_path):
    copied = copy(model, tmp_path)
    set_length(copied, 7)
    result = run("encode", images, "--out", tmp_path / "c", "--model", copied, *SMALL[2:])
    assert result.code == 1
    assert "tokenizer_config.json: model_max_length is 7, but its text encoder takes 77 tokens. Set it" in result.err
    assert not (tmp_path / "c").exists()


def test_two_threads_that_ask_for_a_class_do_so_one_after_the_other():
    """diffusers and transformers import it at that moment, and tell the second that there is none."""

    class Lazy:
        busy = False

        def __getattr__(self, name):
            if self.busy:
                raise AttributeError(name)
            self.busy = True
            time.sleep(0.05)
            self.busy = False
            return name

    library = Lazy()
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda _: class_of(library, "Kind"), range(4))) == ["Kind"] * 4


def test_a_class_that_this_transformers_lacks_is_one_line():
    with pytest.raises(UserError, match=r"^--model: its text encoder needs Qwen9Model, which transformers [\d.]+ does"):
        known_class("Qwen9Model")
