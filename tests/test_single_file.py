"""prepare/models/single_file.py: a checkpoint in one file gives the numbers of its folder, and says what it lacks.

The files are written here, by a mapping of names from diffusers to the original code that is the tests' own.
"""

import json
import pickle
import re
import shutil

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.prepare.models.checkpoint import KINDS
from latentprep.prepare.models.clip_tokenizer import load_tokenizer, make_vocabulary
from latentprep.prepare.models.model_set import open_models
from latentprep.prepare.models.single_file import ARCHITECTURES
from tests.conftest import TINY, scaled_by

PARTS_LEFT_OUT = (
    "unet", "transformer", "vae", "scheduler", "safety_checker", "feature_extractor", "image_encoder",
)  # fmt: skip
PROMPTS = [
    "a photo of a cat",
    "",
    "a much longer prompt, of which a tokenizer of single bytes keeps only the beginning",
]

VAE_NAMES = [  # diffusers -> the original code
    (r"down_blocks\.(\d+)\.resnets\.(\d+)", r"down.\1.block.\2"),
    (r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d+)\.resnets\.(\d+)", lambda m: f"up.{3 - int(m[1])}.block.{m[2]}"),
    (r"up_blocks\.(\d+)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"),
    (r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}"),
    (r"mid_block\.attentions\.0\.group_norm", "mid.attn_1.norm"),
    (r"mid_block\.attentions\.0\.to_([qkv])", r"mid.attn_1.\1"),
    (r"mid_block\.attentions\.0\.to_out\.0", "mid.attn_1.proj_out"),
    (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"),
]
OPEN_CLIP_NAMES = [
    (r"text_model\.encoder\.layers\.", "transformer.resblocks."),
    (r"text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"text_model\.final_layer_norm", "ln_final"),
    (r"layer_norm(\d)", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
    (r"self_attn\.out_proj", "attn.out_proj"),
]


def rename(name, table):
    for pattern, new in table:
        name = re.sub(pattern, new, name)
    return name


def ldm_vae(vae, prefix=""):
    """A VAE's tensors in the original layout, where attention is made of 1x1 convolutions."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        new = rename(name, VAE_NAMES)
        tensors[prefix + new] = tensor[..., None, None] if "attn_1" in new and tensor.ndim == 2 else tensor
    return contiguous(tensors)


def clip(encoder, prefix=""):
    """A text encoder's tensors under the names that files have, whatever transformers calls them."""
    return {
        prefix + (name if name.startswith("text_") else f"text_model.{name}"): tensor.contiguous()
        for name, tensor in encoder.state_dict().items()
    }


def open_clip(encoder, prefix):
    tensors = clip(encoder)
    result = {}
    for name, tensor in tensors.items():
        if match := re.match(r"(.*)self_attn\.q_proj\.(weight|bias)$", name):
            joined = [tensors[f"{match[1]}self_attn.{part}_proj.{match[2]}"] for part in "qkv"]
            result[f"{rename(match[1], OPEN_CLIP_NAMES)}attn.in_proj_{match[2]}"] = torch.cat(joined)
        elif name == "text_projection.weight":
            result["text_projection"] = tensor.T
        elif not re.search(r"self_attn\.[kv]_proj", name):
            result[rename(name, OPEN_CLIP_NAMES)] = tensor
    result["logit_scale"] = torch.tensor(4.6)
    return contiguous({prefix + name: tensor for name, tensor in result.items()})


def contiguous(tensors):
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def unet(width=768):
    """What a UNet in the original layout is known by; no number of it is ever read."""
    return {"model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(8, width)}


def small_config(**changes):
    return CLIPTextConfig(
        **{
            "vocab_size": 514, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 4, "projection_dim": 32, "bos_token_id": 512, "eos_token_id": 513,
            "pad_token_id": 513, **changes,
        }
    )  # fmt: skip


def configs_of(folder, path):
    """A copy of a diffusers folder without its weights."""
    shutil.copytree(folder, path, ignore=shutil.ignore_patterns("*.safetensors"))
    return path


def make_sd1(tmp_path, model):
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder")
    extra = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None]}
    return model, clip(encoder, "cond_stage_model.transformer.") | extra


def make_sd2(tmp_path, model):
    """The file has a third layer, which diffusers' folders leave out."""
    torch.manual_seed(2)
    whole = CLIPTextModel(small_config(num_hidden_layers=3, hidden_act="gelu"))
    encoder = CLIPTextModel(small_config(hidden_act="gelu"))
    encoder.load_state_dict(whole.state_dict(), strict=False)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token="!")
    StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(model / "vae"), encoder, tokenizer, None, None, None, None,
        requires_safety_checker=False,
    ).save_pretrained(tmp_path / "folder")  # fmt: skip
    prefix = "cond_stage_model.model."
    projection = {f"{prefix}text_projection": torch.randn(32, 32)}
    return tmp_path / "folder", open_clip(whole, prefix) | projection


def make_sdxl(tmp_path, model):
    torch.manual_seed(3)
    first, second = CLIPTextModel(small_config()), CLIPTextModelWithProjection(small_config(num_attention_heads=2))
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    vae = AutoencoderKL.from_pretrained(model / "vae")
    vae.register_to_config(scaling_factor=0.13025)
    StableDiffusionXLPipeline(
        vae, first, second, tokenizer, CLIPTokenizer.from_pretrained(TINY / "tokenizer", pad_token="!"), None, None
    ).save_pretrained(tmp_path / "folder")
    texts = clip(first, "conditioner.embedders.0.transformer.") | open_clip(second, "conditioner.embedders.1.model.")
    return tmp_path / "folder", texts


MAKERS = {"sd1": make_sd1, "sd2": make_sd2, "sdxl": make_sdxl}
WIDTHS = {"sd1": 768, "sd2": 1024, "sdxl": 2048}


@pytest.fixture(params=MAKERS)
def checkpoint(request, tmp_path, model):
    """A miniature checkpoint, the diffusers folder of the same weights, and a folder of its configs alone."""
    folder, texts = MAKERS[request.param](tmp_path, model)
    tensors = ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.")
    save_file({**tensors, **texts, **unet(WIDTHS[request.param])}, tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors", folder, configs_of(folder, tmp_path / "configs")


def opened(model, *, said=None, cond=True, **changes):
    """The models of `latentprep encode --model ...`."""
    options = EncodeOptions(
        source=".", out="", geometry=Geometry.from_options(), text=TextOptions(include_cond=cond), model=str(model),
        **{name: value if value is None or isinstance(value, tuple) else str(value) for name, value in changes.items()},
    )  # fmt: skip
    return open_models(options, (said if said is not None else []).append)


def refusal(*arguments, **options):
    with pytest.raises(UserError) as error:
        opened(*arguments, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.inference_mode()
def posterior(vae):
    torch.manual_seed(0)
    distribution = vae.eval().encode(torch.rand(2, 3, 64, 48) * 2 - 1).latent_dist
    return torch.stack([distribution.mean, distribution.std])


@torch.inference_mode()
def conds(pipeline):
    results = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    return [result for result in results if result is not None]


def reference(folder):
    return DiffusionPipeline.from_pretrained(folder, **dict.fromkeys(PARTS_LEFT_OUT))


def test_a_checkpoint_gives_the_numbers_of_its_folder(checkpoint):
    file, folder, configs = checkpoint
    models = opened(file, config=configs)
    of_folder = opened(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    assert torch.equal(posterior(models.vae.load(torch.float32)), posterior(vae))
    for part in ("factor", "latent_channels", "normalization"):
        assert getattr(models.vae, part) == getattr(of_folder.vae, part)
    for name in ("family", "window", "num_layers", "widths"):
        assert getattr(models.text, name) == getattr(of_folder.text, name)
    assert models.text.family.pipeline == of_folder.text.family.pipeline
    ours, theirs = conds(models.text.load_pipeline(torch.float32)), conds(reference(folder))
    assert len(ours) == len(theirs) == (2 if "XL" in models.text.family.pipeline else 1)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)


def test_models_come_in_the_dtype_that_is_asked_for(checkpoint):
    file, _, configs = checkpoint
    models = opened(file, config=configs)
    assert {tensor.dtype for tensor in models.vae.load(torch.bfloat16).parameters()} == {torch.bfloat16}
    pipeline = models.text.load_pipeline(torch.bfloat16)
    assert {tensor.dtype for tensor in pipeline.text_encoder.parameters()} == {torch.bfloat16}


def test_merged_checkpoints_may_leave_text_model_out(tmp_path, model):
    folder, texts = make_sd1(tmp_path, model)
    merged = {name.replace(".text_model.", "."): tensor for name, tensor in texts.items()}
    digests = []
    for tensors in (texts, merged):
        file = tmp_path / f"{len(digests)}.safetensors"
        save_file(ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | tensors, file)
        text = opened(file, config=folder).text
        assert torch.equal(conds(text.load_pipeline(torch.float32))[0], conds(reference(folder))[0])
        digests.append(text.digest)
    assert digests[0] == digests[1]


def test_a_text_encoder_whose_weights_are_no_numbers_is_named(checkpoint):
    file, _, configs = checkpoint
    tensors = load_file(file)
    name = next(name for name in tensors if name.startswith("cond") and "token_emb" in name)
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, file)
    text = opened(file, config=configs).text
    with pytest.raises(UserError, match=rf"^{re.escape(str(file))}: its weight .*token_emb.* holds NaN or infinite"):
        text.load_pipeline(torch.float32)


def test_a_tokenizer_that_pads_on_the_left_is_refused(checkpoint):
    file, _, configs = checkpoint
    path = configs / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "padding_side": "left"}))
    assert refusal(file, config=configs) == (
        f"{path.parent}: its tokenizer pads prompts on the left, expected the right. "
        'Set "padding_side": "right" in its tokenizer_config.json.'
    )


def test_half_precision_files_are_read_as_what_they_are(checkpoint, tmp_path):
    file, _, configs = checkpoint
    small = tmp_path / "small.safetensors"
    for dtype in (torch.float16, torch.bfloat16, torch.float8_e4m3fn):
        tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
        save_file(tensors, small)
        models = opened(small, config=configs)
        weight = models.vae.load(torch.float32).encoder.conv_in.weight
        assert torch.equal(weight, tensors["first_stage_model.encoder.conv_in.weight"].float())
        (embeddings,) = (tensor for name, tensor in tensors.items() if re.search(r"^co.*(0|stage).*token_emb", name))
        pipeline = models.text.load_pipeline(torch.float32)
        assert torch.equal(pipeline.text_encoder.get_input_embeddings().weight, embeddings.float())


def test_only_the_tensors_that_are_used_are_hashed(checkpoint, tmp_path):
    file, _, configs = checkpoint
    models = opened(file, config=configs)

    def digests(change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, tmp_path / "other.safetensors", {"format": "pt"})
        other = opened(tmp_path / "other.safetensors", config=configs)
        return other.vae.digest == models.vae.digest, other.text.digest == models.text.digest

    assert digests(lambda tensors: tensors.pop(next(name for name in tensors if "diffusion_model" in name))) == (1, 1)
    for part, same in (("first_stage_model.encoder.", (False, True)), ("token_embedding", (True, False))):
        name = next(name for name in load_file(file) if name.startswith(part) or name.endswith(f"{part}.weight"))
        assert digests(lambda tensors, name=name: tensors[name].flatten()[0].add_(1)) == same
        assert digests(lambda tensors, name=name: tensors.update({name: tensors[name].half()})) == same


@pytest.mark.parametrize("layout", ["", "first_stage_model.", "vae.", "diffusers", "old diffusers"])
def test_a_vae_alone_goes_with_any_model(layout, tmp_path, model):
    torch.manual_seed(5)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(model / "vae"))
    file = tmp_path / "vae.safetensors"
    if "diffusers" in layout:
        old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"} if "old" in layout else {}
        pattern = "|".join(old) or "$^"
        save_file({re.sub(pattern, lambda m: old[m[0]], k): v for k, v in vae.state_dict().items()}, file)
    else:
        save_file({**ldm_vae(vae, layout), "loss.logvar": torch.zeros(1)}, file)
    of_folder = opened(model, vae=file)
    assert torch.equal(posterior(of_folder.vae.load(torch.float32)), posterior(vae))
    assert of_folder.vae.normalization == scaled_by(0.18215)
    assert of_folder.text == opened(model).text

    config = AutoencoderKL.load_config(model / "vae")
    other = configs_of(model, tmp_path / "other")
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.5, "shift_factor": 0.1}))
    with_config = opened(file, config=other, cond=False)
    assert with_config.vae.normalization == scaled_by(0.5, 0.1)
    assert with_config.vae.digest != of_folder.vae.digest


def test_a_vae_alone_has_one_digest_under_every_prefix(tmp_path, model):
    vae = AutoencoderKL.from_pretrained(model / "vae")
    digests = set()
    for n, prefix in enumerate(("", "first_stage_model.", "vae.")):
        save_file(ldm_vae(vae, prefix), tmp_path / f"{n}.safetensors")
        digests.add(opened(model, vae=tmp_path / f"{n}.safetensors", cond=False).vae.digest)
    assert len(digests) == 1


def test_encode_from_a_checkpoint_and_again_from_a_copy(run, images, tmp_path, model):
    folder, texts = make_sd1(tmp_path, model)
    file, copy = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_file(ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts | unet(), file)
    configs = configs_of(folder, tmp_path / "configs")
    small = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    result = run("encode", images, "--out", tmp_path / "c", "--model", file, "--config", configs, *small)
    assert (result.code, result.err.count("error")) == (0, 0)
    assert run("encode", images, "--out", tmp_path / "f", "--model", folder, *small).code == 0
    ours, theirs = (tensors_of(tmp_path / name) for name in "cf")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).code == 0

    file.rename(copy)
    again = run("encode", images, "--out", tmp_path / "c", "--model", copy, "--config", configs, *small)
    assert again.code == 0
    assert "is complete with 8 images; nothing to do." in again.out
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2, "--model", copy).code == 0
    assert "no such folder or file" in run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).err


def tensors_of(cache):
    """All tensors of a cache's shards, by kind of file and name; the rows of both are in the same order."""
    return {
        (path.name.split(".")[-2], name): tensor
        for path in (cache / "shards").iterdir()
        for name, tensor in load_file(path).items()
    }


def test_a_vae_alone_is_found_again_by_verify(run, images, tmp_path, model):
    torch.manual_seed(6)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(model / "vae"))
    save_file(ldm_vae(vae), tmp_path / "vae.safetensors")
    small = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    options = ("--model", model, "--vae", tmp_path / "vae.safetensors", *small)
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).code == 0
    other = run("verify", tmp_path / "c", "--source", images, "--re-encode", 2, "--model", model)
    assert "this cache was made with" in other.err


def test_names_in_a_file_cannot_write_to_the_terminal(tmp_path):
    save_file({"a\x1b[2J\nb": torch.zeros(1)}, tmp_path / "x.safetensors")
    assert refusal(tmp_path / "x.safetensors").isprintable()


GIVE_AWAY = {
    "edm_mean": "a Playground v2.5 checkpoint",
    "conditioner.embedders.0.model.ln_final.weight": "a refiner of Stable Diffusion XL",
    "model.diffusion_model.joint_blocks.0.x_block.mlp.fc1.weight": "a Stable Diffusion 3 checkpoint",
    "double_blocks.0.img_attn.qkv.weight": "a FLUX checkpoint",
    "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": "a LoRA",
    "unet.down_blocks.0.attentions.0.to_q.lora_A.weight": "a LoRA",
    "lora_te_text_model_encoder_layers_0_mlp_fc1.hada_w1_a": "a LoRA",
    "control_model.input_blocks.0.0.weight": "a ControlNet",
    "controlnet_cond_embedding.conv_in.weight": "a ControlNet",
    "emb_params": "a textual inversion",
    "down_blocks.0.attentions.0.proj_in.weight": "a UNet alone",
    "text_model.final_layer_norm.weight": "a text encoder alone",
    "model.diffusion_model.blocks.0.attn2.to_k.weight": "a Stable Diffusion XL UNet alone",
    "blocks.0.weight": "no model known here (blocks.0.weight)",
    "cond_stage_model.model.ln_final.weight": "a Stable Diffusion 2.x checkpoint",
}


@pytest.mark.parametrize("name", GIVE_AWAY)
def test_what_a_file_seems_to_be_is_said(tmp_path, model, name):
    file, kind = tmp_path / "x.safetensors", GIVE_AWAY[name]
    save_file({name: torch.zeros(4, 2048)}, file)
    expected = "Expected a checkpoint of Stable Diffusion or FLUX, or a VAE."
    advice = "Give one with --vae." if re.search(r"XL UNet|2\.x|Playground|n 3|FLUX", kind) else expected
    assert refusal(file) == f"--model {file}: has no VAE, it seems to be {kind}. {advice}"
    assert refusal(model, vae=file) == f"--vae {file}: has no VAE, it seems to be {kind}. {expected}"
    if "2.x" not in kind:
        assert refusal(file, vae=model / "vae").startswith(
            f"--model {file}: has no text encoder, it seems to be {kind}. Give a checkpoint or"
        )


def test_every_kind_is_told_apart():
    assert {kind.what for kind in KINDS.values()} <= {
        *GIVE_AWAY.values(), "a Stable Diffusion XL checkpoint", "a Stable Diffusion 1.x checkpoint",
    }  # fmt: skip


def test_a_checkpoint_without_a_text_encoder_is_one_for_no_cond(tmp_path, model):
    with torch.device("meta"):
        vae = AutoencoderKL.from_config(AutoencoderKL.load_config(ARCHITECTURES / "sdxl" / "vae")).half()
    file = tmp_path / "x.safetensors"
    save_file({**ldm_vae(vae.to_empty(device="cpu"), "first_stage_model."), **unet(2048)}, file)
    said = []
    assert opened(file, cond=False, said=said).vae.normalization == scaled_by(0.13025)
    assert said == [f"config   Stable Diffusion XL, by the tensors of {file}"]
    assert refusal(file) == (
        f"--model {file}: has no text encoder, it seems to be a Stable Diffusion XL UNet and VAE. "
        "Give a checkpoint or a pipeline folder that has them, or --no-cond."
    )


@pytest.fixture
def sdxl(tmp_path, model):
    folder, texts = make_sdxl(tmp_path, model)
    tensors = ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts
    return tensors, configs_of(folder, tmp_path / "configs"), tmp_path / "x.safetensors"


def test_half_of_the_text_encoders_is_not_enough(sdxl):
    tensors, configs, file = sdxl
    save_file({k: v for k, v in tensors.items() if "embedders.0" not in k}, file)
    assert refusal(file, config=configs) == (
        f"--model {file}: has of its text encoders only text_encoder_2, it seems to be a Stable Diffusion XL "
        "checkpoint. Give a checkpoint or a pipeline folder that has them, or --no-cond."
    )


def test_a_truncated_file_is_said_to_be_one(sdxl):
    tensors, configs, file = sdxl
    save_file(tensors, file)
    data = file.read_bytes()
    for length in (0, 4, 100, len(data) - 1):
        file.write_bytes(data[:length])
        message = refusal(file, config=configs)
        assert message.startswith(f"--model {file}: cannot be read as safetensors (")
        assert message.endswith("Compare its size with the original's: a download may have been cut short.")


def test_a_vae_alone_does_not_tell_its_config(tmp_path, model):
    file = tmp_path / "vae.safetensors"
    save_file(ldm_vae(AutoencoderKL.from_pretrained(model / "vae")), file)
    assert refusal(file) == (
        f"--model {file}: seems to be a VAE alone, whose tensors do not tell its config and scaling_factor. Give a "
        "diffusers folder that has them with --config, or give it as --vae of a --model that has them."
    )
    assert "has no text encoder, it seems to be a VAE alone" in refusal(file, config=model)


def test_configs_of_another_model_are_refused(sdxl, model, tmp_path):
    tensors, configs, file = sdxl
    save_file(tensors, file)
    assert refusal(file) == (
        f"--model {file}: its VAE has 4 levels of 8 to 16 channels and 4 latent channels, but 4 levels of 128 to 512 "
        "channels and 4 latent channels in the config of Stable Diffusion XL. Give the folder that it goes with as "
        "--config."
    )
    assert refusal(file, vae=model / "vae") == (
        f"--model {file}: the token_embedding of its text_encoder is [514, 32], but [49408, 768] in the config of "
        "Stable Diffusion XL. Give the folder that it goes with as --config."
    )
    assert refusal(file, config=model) == (
        f"--model {file}: has text_encoder and text_encoder_2, but text_encoder in {model}. Give the folder that it "
        "goes with as --config."
    )
    assert refusal(file, config=tmp_path / "none").startswith(f"--config {tmp_path / 'none'}: no such folder.")
    assert refusal(model, config=configs) == (
        f"--config {configs}: is for a model in a single file, and {model} is a folder."
    )
    shutil.rmtree(configs / "tokenizer")
    shutil.rmtree(configs / "tokenizer_2")
    assert refusal(file, config=configs) == f"--config {configs}: has no tokenizer folder. Complete it, or --no-cond."
    config = json.loads((configs / "text_encoder" / "config.json").read_text())
    (configs / "text_encoder" / "config.json").write_text(json.dumps({**config, "architectures": ["T5EncoderModel"]}))
    assert refusal(file, config=configs) == (
        f"--config {configs / 'text_encoder'}: is ['T5EncoderModel'], expected CLIPTextModel or "
        "CLIPTextModelWithProjection."
    )
    (configs / "text_encoder" / "config.json").write_text('{"architectures": ["CLIPTextModel"]}')
    assert refusal(file, config=configs) == (
        f"--config {configs / 'text_encoder'}: its config.json has no vocab_size. Save the model again."
    )
    (configs / "vae" / "config.json").write_text('{"_class_name": "VQModel"}')
    assert refusal(file, config=configs).startswith(f"--config {configs / 'vae'}: its VAE is VQModel, expected Auto")


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("first_stage_model.quant_conv.bias", None, "VAE are not those of its config (1 missing, such as quant_conv"),
        ("first_stage_model.encoder.mid.block_9.norm1.weight", torch.zeros(4), "VAE are not those of its config (1 of"),
        ("first_stage_model.quant_conv.bias", torch.zeros(5), "VAE are not those of its config ("),
        ("conditioner.embedders.1.model.text_projection", None, "text_encoder_2 are not those of its config (1 miss"),
        ("conditioner.embedders.1.model.text_projection", torch.zeros(()), "text_encoder_2 are not those of its"),
        ("conditioner.embedders.1.model.ln_final.bias", torch.zeros(5), "text_encoder_2 are not those of its config"),
        (
            "conditioner.embedders.0.transformer.text_model.encoder.layers.7.mlp.fc1.bias", torch.zeros(64),
            "text_encoder are not those of its config (1 too many, such as",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_never_loaded(sdxl, name, change, message):
    tensors, configs, file = sdxl
    tensors.pop(name, None)
    save_file(tensors | ({name: change} if change is not None else {}), file)
    models = opened(file, config=configs)
    load = models.vae.load if "first_stage" in name else models.text.load_pipeline
    with pytest.raises(UserError) as error:
        load(torch.float32)
    assert str(error.value).startswith(f"{file}: the tensors of its {message}")
    assert "\n" not in str(error.value)


def test_the_vocabulary_is_clips():
    vocabulary = make_vocabulary()
    assert len(vocabulary) == 49408
    assert list(vocabulary.values()) == list(range(49408))
    known = {"!": 0, "a</w>": 320, "cat</w>": 2368, "<|startoftext|>": 49406, "<|endoftext|>": 49407}
    assert {token: vocabulary[token] for token in known} == known


@pytest.mark.parametrize(
    ("folder", "pad"),
    [("sd1/tokenizer", 49407), ("sd2/tokenizer", 0), ("sdxl/tokenizer", 49407), ("sdxl/tokenizer_2", 0)],
)
def test_tokens_are_clips(folder, pad):
    tokenizer = load_tokenizer(ARCHITECTURES / folder)
    assert tokenizer("a photo of a cat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("A Photo  of a\ncat").input_ids == [49406, 320, 1125, 539, 320, 2368, 49407]
    assert tokenizer("").input_ids == [49406, 49407]
    padded = tokenizer("cat", padding="max_length", truncation=True).input_ids
    assert padded == [49406, 2368, 49407] + [pad] * 74
    assert len(tokenizer("cat " * 100, padding="max_length", truncation=True).input_ids) == 77


@pytest.mark.parametrize(
    ("part", "count"),  # as the model cards of the hub count them
    [
        ("sd1/vae", 83_653_863), ("sd2/vae", 83_653_863), ("sdxl/vae", 83_653_863), ("sd1/text_encoder", 123_060_480),
        ("sd2/text_encoder", 340_387_840), ("sdxl/text_encoder", 123_060_480), ("sdxl/text_encoder_2", 694_659_840),
    ],
)  # fmt: skip
def test_the_built_in_configs_are_of_the_true_models(part, count):
    folder = ARCHITECTURES / part
    with torch.device("meta"):
        if part.endswith("vae"):
            built = AutoencoderKL.from_config(AutoencoderKL.load_config(folder))
        else:
            config = CLIPTextConfig.from_pretrained(folder)
            built = (CLIPTextModelWithProjection if part.endswith("2") else CLIPTextModel)(config)
    assert sum(parameter.numel() for parameter in built.parameters()) == count


@pytest.mark.slow
@torch.inference_mode()
def test_stable_diffusion_1_of_true_size_needs_no_config(tmp_path):
    """The built-in configs against a VAE and text encoder that diffusers and transformers make of the same numbers."""
    torch.manual_seed(0)
    vae = AutoencoderKL.from_config(AutoencoderKL.load_config(ARCHITECTURES / "sd1" / "vae")).half()
    encoder = CLIPTextModel(CLIPTextConfig.from_pretrained(ARCHITECTURES / "sd1" / "text_encoder")).half()
    file = tmp_path / "v1-5.safetensors"
    save_file({**ldm_vae(vae, "first_stage_model."), **clip(encoder, "cond_stage_model.transformer."), **unet()}, file)
    said = []
    models = opened(file, said=said)
    assert said == [f"config   Stable Diffusion 1.x, by the tensors of {file}"]
    assert (models.vae.factor, models.vae.latent_channels, models.vae.normalization) == (8, 4, scaled_by(0.18215))
    assert (models.text.window, models.text.num_layers, models.text.widths) == (77, 12, {"prompt_embeds": 768})
    assert torch.equal(posterior(models.vae.load(torch.float32)), posterior(vae.float()))
    tokenizer = load_tokenizer(ARCHITECTURES / "sd1" / "tokenizer")
    ids = tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    (cond,) = conds(models.text.load_pipeline(torch.float32))
    assert torch.equal(cond, encoder.float().eval()(ids)[0])


def test_descriptions_of_a_file_go_to_other_processes(model, tmp_path):
    folder, texts = make_sd1(tmp_path, model)
    file = tmp_path / "model.safetensors"
    save_file(ldm_vae(AutoencoderKL.from_pretrained(folder / "vae"), "first_stage_model.") | texts, file)
    models = opened(file, config=configs_of(folder, tmp_path / "configs"))
    data = pickle.dumps(models)
    assert len(data) < 20_000  # paths and configs, no weights
    again = pickle.loads(data)
    assert again == models
    pixels = torch.randint(0, 256, (1, 32, 32, 3), dtype=torch.uint8).numpy()
    one, other = (found.vae.open(torch.device("cpu"), torch.float32).encode(pixels) for found in (models, again))
    assert torch.equal(one.mean, other.mean)
    assert torch.equal(one.std, other.std)
    one, other = (found.text.open(torch.device("cpu"), torch.float32).encode(["a cat"]) for found in (models, again))
    assert torch.equal(one["prompt_embeds"], other["prompt_embeds"])
