"""families.py, text.py: cond of every family against its own diffusers pipeline, on miniatures true to shape."""

import ast
import inspect
import json
import re
import shutil
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import (
    CLIPTextModel,
)

from latentprep import LatentDataset
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare import survey
from latentprep.prepare.models import text_folder
from latentprep.prepare.models.families import FAMILIES, find_family
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.text_folder import family_of, open_text
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.work.events import Truncated
from tests.miniatures import make_miniature

CPU, PROMPTS = torch.device("cpu"), ["a red house, snow", "", "x" * 90 + " end"]
NAMES = ("sd2", "sdxl", "sd3", "flux")
ENCODE = {
    "sd2": {"do_classifier_free_guidance": False, "device": CPU, "num_images_per_prompt": 1},
    "sdxl": {"do_classifier_free_guidance": False},
    "sd3": {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None},
    "flux": {"prompt_2": None},
}


@dataclass
class Mini:
    """A miniature: its folder, and the whole pipeline that it was saved from."""

    folder: Path
    pipeline: Any


def make_mini(name, folder) -> Mini:
    pipeline = make_miniature(family_named(name).stem, folder)
    pipeline.save_pretrained(folder / name)
    return Mini(folder / name, pipeline)


@pytest.fixture(scope="session")
def minis(tmp_path_factory) -> dict[str, Mini]:
    folder = tmp_path_factory.mktemp("families")
    return {name: make_mini(name, folder) for name in NAMES}


def family_named(name):
    return FAMILIES[NAMES.index(name)]


def copy(mini, tmp_path) -> Path:
    return Path(shutil.copytree(mini.folder, tmp_path / "copy"))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@torch.inference_mode()
def expected(name, pipeline, prompts=PROMPTS, **options):
    """What the whole pipeline makes of prompts, by the names it is stored under."""
    result = pipeline.encode_prompt(prompt=prompts, **ENCODE[name], **options)
    return {key: value for key, value in zip(family_named(name).calls[0].returns, result, strict=True) if key}


def assert_same(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("name", NAMES)
def test_cond_is_what_the_whole_pipeline_makes(minis, name):
    facts = open_text(minis[name].folder)
    assert facts.family is family_of(minis[name].folder) is family_named(name)
    found = TextEncoder(facts, CPU, torch.float32).encode(PROMPTS)
    wanted = expected(name, minis[name].pipeline)
    if name == "flux":
        assert wanted["text_ids"].shape == (512, 3)
        wanted["text_ids"] = wanted["text_ids"][None].repeat(3, 1, 1)
    assert_same(found, wanted)
    assert sum(value[0].numel() for value in found.values()) == facts.num_values(TextOptions())


def test_sdxl_with_the_second_encoder_alone_as_the_refiner(minis, tmp_path):
    folder = copy(minis["sdxl"], tmp_path)
    for part in ("text_encoder", "tokenizer"):
        shutil.rmtree(folder / part)
    with pytest.raises(UserError, match="has no text_encoder and tokenizer folders"):
        open_text(folder)
    edit(
        folder / "model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None],
        tokenizer=[None, None], requires_aesthetics_score=True,
    )  # fmt: skip
    facts = open_text(folder)
    assert facts.widths == {"prompt_embeds": 48, "pooled_prompt_embeds": 48}
    parts = {**minis["sdxl"].pipeline.components, "text_encoder": None, "tokenizer": None}
    pipeline = diffusers.StableDiffusionXLImg2ImgPipeline(**parts)
    assert_same(TextEncoder(facts, CPU, torch.float32).encode(PROMPTS), expected("sdxl", pipeline))


# diffusers before 0.36 has another number of zeros in the place of a T5, so there a model without one is refused
takes_no_t5 = pytest.mark.skipif(
    tuple(map(int, diffusers.__version__.split(".")[:2])) < (0, 36), reason="of diffusers 0.36 and later"
)


@takes_no_t5
@pytest.mark.parametrize("kind", ["null", "no folder"])
def test_sd3_without_its_t5(minis, tmp_path, kind):
    folder = copy(minis["sd3"], tmp_path)
    if kind == "null":
        edit(folder / "model_index.json", text_encoder_3=[None, None], tokenizer_3=[None, None])
    else:
        shutil.rmtree(folder / "text_encoder_3")
    facts = open_text(folder)
    assert facts.left_out == ("text_encoder_3",)
    parts = {**minis["sd3"].pipeline.components, "text_encoder_3": None, "tokenizer_3": None}
    encoder = TextEncoder(facts, CPU, torch.float32)
    found = encoder.encode(PROMPTS)
    assert_same(found, expected("sd3", diffusers.StableDiffusion3Pipeline(**parts)))
    assert found["prompt_embeds"].shape == (3, 77 + 256, 80)
    assert encoder.max_tokens == 77
    assert encoder.count_tokens(["house"]).tolist() == [7]
    assert facts.digest != open_text(minis["sd3"].folder).digest
    (folder / "transformer/config.json").unlink()
    with pytest.raises(UserError, match=r"has no T5, so .*transformer/config.json must say joint_attention_dim"):
        open_text(folder)


@pytest.mark.parametrize("version", ["0.33.0", "0.35.2", "0.36.0.dev0", "1.0.0"])
def test_diffusers_that_is_too_old_to_leave_a_t5_out_is_said(minis, tmp_path, monkeypatch, version):
    folder = copy(minis["sd3"], tmp_path)
    shutil.rmtree(folder / "text_encoder_3")
    monkeypatch.setattr(text_folder, "version", lambda name: version if name == "diffusers" else None)
    if version not in ("0.33.0", "0.35.2"):
        assert open_text(folder).left_out == ("text_encoder_3",)
        return
    with pytest.raises(UserError) as error:
        open_text(folder)
    assert str(error.value) == (
        f"--model {folder}: has no text_encoder_3, and diffusers {version} has another number of zeros in its place "
        "than newer ones. Upgrade diffusers to 0.36 or later, add that folder, or --no-cond."
    )


def test_sdxl_says_in_one_line_that_a_config_is_no_text_encoders(minis, tmp_path):
    folder = copy(minis["sdxl"], tmp_path)
    (folder / "text_encoder_2/config.json").write_text("{}")
    with pytest.raises(UserError, match=r"text_encoder_2/config.json says no hidden_size, expected a text encoder's"):
        open_text(folder)


def code_of(method):
    """What a method does: its source without comments, docstring and types, in which copies differ."""
    (tree,) = ast.parse(textwrap.dedent(inspect.getsource(method))).body
    for argument in tree.args.args:
        argument.annotation = None
    code = ast.unparse([tree.args, *tree.body[ast.get_docstring(tree) is not None :]])
    for one, other in (  # Chroma's inpainting, and FLUX.2 klein's for several images
        (").to(device=device, dtype=dtype)", ", device=device, dtype=dtype)"),
        ("tokenizer_mask_device", "tokenizer_mask"),
        ("model_device = get_module_execution_device(text_encoder)", ""),
        ("model_device", "device"),
        ("maybe_convert_prompt(prompt, self.tokenizer_2)", "maybe_convert_prompt(prompt, self.tokenizer)"),  # FLUX.1's
    ):
        code = code.replace(one, other)
    code = "\n".join(line for line in code.splitlines() if line.strip())
    return re.sub(r"(max_sequence_length: ?\w*|max_sequence_length)=\d+", r"\1", code)  # it is always given


def test_variants_encode_prompts_as_their_base_does():
    """Every pipeline of diffusers that counts as one of a family has copied encode_prompt from the family's base."""
    older = {"SanaPAGPipeline"}  # a copy from before LoRAs were scaled and helpers were cut out; else the same
    variants = [name for name in dir(diffusers) if find_family(name) is not None and name not in older]
    assert len(variants) > 50
    for name in variants:
        base, variant = getattr(diffusers, find_family(name).pipeline), getattr(diffusers, name)
        helpers = [
            part for part in dir(base) if re.fullmatch(r"_get_\w*embeds|get_text_hidden_states|_text_prep.*", part)
        ]
        for part in ["encode_prompt", *helpers]:
            assert code_of(getattr(variant, part)) == code_of(getattr(base, part)), (name, part)


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("StableDiffusionPipeline", 0),
        ("StableDiffusionControlNetInpaintPipeline", 0),
        ("StableDiffusionPAGImg2ImgPipeline", 0),
        ("StableDiffusionXLControlNetUnionPipeline", 1),
        ("StableDiffusion3ControlNetInpaintingPipeline", 2),
        ("FluxKontextPipeline", 3),
        ("FluxFillPipeline", 3),
        ("FluxControlImg2ImgPipeline", 3),
        ("Flux2Pipeline", 5),
        ("Flux2KleinPipeline", 6),
        ("Flux2KleinKVPipeline", 6),
        ("QwenImageControlNetInpaintPipeline", 7),
        ("QwenImageEditPipeline", 8),
        ("QwenImageEditInpaintPipeline", 8),
        ("QwenImageEditPlusPipeline", 9),
        ("FluxPriorReduxPipeline", None),
        ("StableDiffusionXLInstructPix2PixPipeline", None),
        ("PixArtSigmaPAGPipeline", 16),
        ("WanPipeline", None),
        (None, None),
    ],
)
def test_which_family_a_class_is_of(name, wanted):
    assert find_family(name) is (None if wanted is None else FAMILIES[wanted])


def test_denoisers_that_take_patches_say_so(minis, model):
    assert [family_of(minis[name].folder).patch for name in NAMES] == [1, 1, 2, 2]
    assert family_of(model).patch == 1
    assert family_of(model / "vae") is None


def test_digest_is_of_all_encoders_and_not_of_the_variant(minis, tmp_path):
    folder = copy(minis["sd3"], tmp_path)
    before = open_text(folder).digest
    edit(folder / "model_index.json", _class_name="StableDiffusion3Img2ImgPipeline")
    assert open_text(folder).digest == before
    (folder / "text_encoder_3/model.safetensors").unlink()
    minis["sd3"].pipeline.text_encoder_3.save_pretrained(folder / "text_encoder_3", max_shard_size="40KB")
    shards = sorted((folder / "text_encoder_3").glob("model-0000*.safetensors"))
    assert len(shards) > 1
    sharded = open_text(folder).digest
    assert sharded != before
    shards[-1].write_bytes(shards[-1].read_bytes()[:-1] + b"\xff")
    assert open_text(folder).digest != sharded
    (folder / "tokenizer_3/tokenizer.json").write_text("{}")
    changed = open_text(folder).digest
    (folder / "tokenizer_2/tokenizer.json").write_text("{}")
    assert len({before, sharded, changed, open_text(folder).digest}) == 4


def test_sharded_weights_are_loaded(minis, tmp_path):
    folder = copy(minis["flux"], tmp_path)
    (folder / "text_encoder_2/model.safetensors").unlink()
    minis["flux"].pipeline.text_encoder_2.save_pretrained(folder / "text_encoder_2", max_shard_size="40KB")
    found = TextEncoder(open_text(folder), CPU, torch.float32).encode(["a house"])
    assert torch.equal(found["prompt_embeds"], expected("flux", minis["flux"].pipeline, ["a house"])["prompt_embeds"])


@pytest.mark.parametrize(("name", "num_tokens"), [("sd3", 40), ("flux", 300)])
def test_max_tokens_of_t5(minis, name, num_tokens):
    facts, options = open_text(minis[name].folder), TextOptions(max_tokens=num_tokens)
    encoder = TextEncoder(facts, CPU, torch.float32, options)
    found = encoder.encode(PROMPTS)
    wanted = expected(name, minis[name].pipeline, max_sequence_length=num_tokens)
    assert torch.equal(found["prompt_embeds"], wanted["prompt_embeds"])
    assert sum(value[0].numel() for value in found.values()) == facts.num_values(options)
    assert encoder.max_tokens == num_tokens
    tokenizer = encoder.pipeline.tokenizer_3 if name == "sd3" else encoder.pipeline.tokenizer_2
    assert encoder.count_tokens(PROMPTS).tolist() == [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert facts.settings(options) == {"max_tokens": num_tokens}


def test_batches_are_as_large_as_their_tokens_allow(minis):
    sizes = {}
    for name in NAMES:
        for asked in (None, 150):
            encoder = TextEncoder(open_text(minis[name].folder), CPU, torch.float32, TextOptions(max_tokens=asked))
            sizes[name, asked] = encoder.tokens_at_once // encoder.stored_tokens
    assert sizes["sd2", None] == sizes["sdxl", None] == 32
    assert sizes["sdxl", 150] == 16  # of two windows each
    assert sizes["flux", None] == 4
    assert sizes["sd3", None] == 7
    many = [f"a house {n}" for n in range(10)]
    found = TextEncoder(open_text(minis["flux"].folder), CPU, torch.float32).encode(many)
    wanted = torch.cat([expected("flux", minis["flux"].pipeline, many[n : n + 4])["prompt_embeds"] for n in (0, 4, 8)])
    assert torch.equal(found["prompt_embeds"], wanted)


@pytest.mark.parametrize("layer", [1, 2, 3])
@torch.inference_mode()
def test_clip_skip_counts_as_the_web_ui_and_kohya(minis, layer):
    mini = minis["sd2"]
    encoder = TextEncoder(open_text(mini.folder), CPU, torch.float32, TextOptions(clip_skip=layer))
    clip, tokenizer = mini.pipeline.text_encoder, mini.pipeline.tokenizer
    ids = tokenizer(PROMPTS, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
    states = clip(ids, output_hidden_states=True).hidden_states
    wanted = getattr(clip, "text_model", clip).final_layer_norm(states[-layer])
    assert torch.equal(encoder.encode(PROMPTS)["prompt_embeds"], wanted)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sd2", {"max_tokens": 100}, "--max-tokens 100: Stable Diffusion 1 and 2 takes windows of 75 tokens, so a "
                                     "multiple of 75. Try 150."),
        ("sdxl", {"max_tokens": 0}, "--max-tokens 0: SDXL takes windows of 75 tokens, so a multiple of 75. Try 75."),
        ("sd3", {"max_tokens": 513}, "--max-tokens 513: Stable Diffusion 3 takes 1 to 512. Try 512."),
        ("flux", {"max_tokens": -3}, "--max-tokens -3: FLUX.1 takes 1 to 512. Try 1."),
        ("sd2", {"clip_skip": 4}, "--clip-skip 4: this text encoder takes 1 (its last layer, the default) to 3."),
        ("sd2", {"clip_skip": 0}, "--clip-skip 0: this text encoder takes 1 (its last layer, the default) to 3."),
        ("sdxl", {"clip_skip": 2}, "--clip-skip 2: for Stable Diffusion 1 and 2, not for SDXL. Leave it out."),
        ("flux", {"clip_skip": 2}, "--clip-skip 2: for Stable Diffusion 1 and 2, not for FLUX.1. Leave it out."),
        ("sd3", {"emphasis": True}, "--emphasis: for CLIP alone, and Stable Diffusion 3 has a T5 too. Leave it out."),
    ],
)  # fmt: skip
def test_what_a_family_cannot_do(minis, name, options, message):
    with pytest.raises(UserError) as error:
        open_text(minis[name].folder).settings(TextOptions(**options))
    assert str(error.value) == message


def test_equal_settings_are_one_recipe(minis):
    clip, t5 = open_text(minis["sdxl"].folder), open_text(minis["flux"].folder)
    assert all(clip.settings(TextOptions(max_tokens=n)) == {} for n in (None, 75, 77))
    assert t5.settings(TextOptions(max_tokens=512)) == {}
    everything = open_text(minis["sd2"].folder).settings(TextOptions(max_tokens=150, clip_skip=2, emphasis=True))
    assert everything == {"max_tokens": 150, "clip_skip": 2, "emphasis": True}


def test_float16_keeps_the_layers_of_t5_that_overflow(minis):
    encoder = TextEncoder(open_text(minis["sd3"].folder), CPU, torch.float16)
    block = encoder.pipeline.text_encoder_3.encoder.block[0].layer[-1].DenseReluDense
    assert (block.wo.weight.dtype, block.wi_0.weight.dtype) == (torch.float32, torch.float16)
    assert encoder.pipeline.text_encoder.dtype == torch.float16
    wanted = expected("sd3", minis["sd3"].pipeline, ["a house"])
    for key, value in encoder.encode(["a house"]).items():
        assert torch.allclose(value, wanted[key], atol=0.02), key


def overflowing(mini, tmp_path) -> Path:
    """A copy whose CLIP gives 90,000, which float16 does not hold."""
    folder = copy(mini, tmp_path)
    clip = CLIPTextModel.from_pretrained(folder / "text_encoder")
    with torch.no_grad():
        getattr(clip, "text_model", clip).final_layer_norm.bias.fill_(60_000)
        getattr(clip, "text_model", clip).final_layer_norm.weight.fill_(30_000)
    clip.save_pretrained(folder / "text_encoder")
    return folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "float16"), "--dtype float16: the text encoder in {} overflows for 'wide0'. "
                                 "Use --dtype bfloat16 or float32."),
        ((), "--store-dtype float16: cannot hold the prompt_embeds of 'wide0'. "
             "Use --store-dtype bfloat16 or float32."),
    ],
)  # fmt: skip
def test_cond_that_overflows_is_never_written(minis, images, tmp_path, run, options, message):
    folder = overflowing(minis["sd2"], tmp_path)
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    result = run("encode", images, "--model", folder, "--out", tmp_path / "cache", *size, *options)
    assert result.code == 1
    assert f"error: {message.format(folder / 'text_encoder')}" in result.err
    for path in (tmp_path / "cache").rglob("*.text.safetensors"):  # of the first pass
        with safe_open(path, framework="pt") as file:
            assert not [name for name in file.keys() if name.startswith("cond/")]  # noqa: SIM118


@takes_no_t5
def test_a_t5_that_is_left_out_is_said(minis, images, tmp_path, run):
    folder = copy(minis["sd3"], tmp_path)
    shutil.rmtree(folder / "text_encoder_3")
    (images / "tall1.txt").write_text("word " * 30)
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    result = run("encode", images, "--model", folder, "--out", tmp_path / "cache", *size)
    assert "text     Stable Diffusion 3 without its text_encoder_3\n" in result.err
    assert "cut      1 prompt of more than 77 tokens: 122 'word word" in result.out  # no --max-tokens keeps more


def test_the_longest_truncated_prompts_are_named_once():
    one = Truncated.of([f"prompt {n}" for n in range(9)], np.arange(74, 83, dtype=np.int32), 77)
    truncated = Truncated() + one + one  # a prompt may stand in two shards
    assert (truncated.count, truncated.max_tokens) == (10, 77)
    assert truncated.longest == tuple((74 + n, f"prompt {n}") for n in (8, 7, 6, 5, 4))


@pytest.mark.parametrize("name", NAMES)
def test_from_images_to_batches(minis, images, tmp_path, run, name):
    mini, cache = minis[name], tmp_path / "cache"
    (images / "tall1.txt").write_text("word " * 600)
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    options = ("--model", mini.folder, "--out", cache, "--store-dtype", "float32", *size)
    result = run("encode", images, *options)
    assert result.code == 0, result.err
    assert "cut      1 prompt of more than " in result.out
    if name in ("sd2", "sdxl"):
        assert "than 77 tokens (--max-tokens 150 keeps more): 2402 'word word word" in result.out
    if name == "flux":
        assert "than 512 tokens: 3001 'word word" in result.out

    vae = open_vae(mini.folder)
    channels = 16 if name in ("sd3", "flux") else 4
    assert (vae.latent_channels, vae.normalization.shift) == (channels, (mini.pipeline.vae.config.shift_factor or 0.0,))
    data = LatentDataset(cache, latent_sampling_method="deterministic")
    index = next(n for n in range(len(data)) if data.key(n) == "tall2.png")
    batch = data.__getitems__([index])
    assert batch.latent_sample.shape[1] == channels
    for key, value in expected(name, mini.pipeline, ["picture number 2"]).items():
        wanted = value[None] if key == "text_ids" else value
        assert batch.cond[key].shape == wanted.shape
        assert torch.allclose(batch.cond[key], wanted, atol=2e-6), key
    assert data.uncond().keys() == batch.cond.keys()

    facts = open_text(mini.folder)
    storage, entry = Storage(str(cache)), data.manifest.shards[0]
    text = entry.open_text(storage)
    stored = sum(value.nbytes for value in text.cond.values()) / len(text.prompt)
    assert facts.num_values(TextOptions()) * 4 == stored
    assert entry.text_file.nbytes / len(text.prompt) == pytest.approx(stored + 512, rel=0.1)

    assert run("verify", cache).code == 0
    again = run("encode", images, *options)
    assert "nothing to do" in again.out
    shown = run("inspect", cache).out
    assert "1 prompt, the longest:" in shown
    assert " tokens: 'word word word" in shown


def test_other_settings_rewrite_the_text_alone(model, images, tmp_path, run):
    cache = tmp_path / "cache"
    options = ("--model", model, "--out", cache, "--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    run("encode", images, *options)
    latents = {path: path.stat().st_mtime_ns for path in cache.rglob("*.latents.*")}
    long = run("encode", images, *options, "--max-tokens", 150, "--clip-skip", 2, "--emphasis")
    assert long.code == 0, long.err
    assert "the text of 8 images is written anew" in long.out
    assert latents == {path: path.stat().st_mtime_ns for path in cache.rglob("*.latents.*")}
    data = LatentDataset(cache)
    assert data.__getitems__([0]).cond["prompt_embeds"].shape[1] == 154
    assert data.uncond()["prompt_embeds"].shape[1] == 154
    assert "nothing to do" in run("encode", images, *options, "--max-tokens", 150, "--clip-skip", 2, "--emphasis").out
    refused = run("encode", images, *options, "--max-tokens", 80)
    assert refused.code == 1
    assert "--max-tokens 80: Stable Diffusion 1 and 2 takes windows of 75" in refused.err


@pytest.mark.parametrize(
    ("name", "force_upcast", "asked", "vae_dtype"),
    [
        ("sdxl", True, "auto", "float32"), ("sdxl", False, "auto", "float16"), ("sdxl", True, "float16", "float16"),
        ("flux", True, "auto", "float16"),  # says so too, but its pipeline does not heed it
    ],
)  # fmt: skip
def test_sdxls_vae_is_in_float32_where_float16_is_only_the_default(
    minis, images, tmp_path, run, monkeypatch, name, force_upcast, asked, vae_dtype
):
    # as on CUDA, where "auto" is float16
    monkeypatch.setattr(survey, "choose_dtype", lambda dtype, device: "float16")
    folder = copy(minis[name], tmp_path)
    edit(folder / "vae" / "config.json", force_upcast=force_upcast)
    size = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
    result = run("encode", images, "--model", folder, "--out", tmp_path / "c", *size, "--dtype", asked)
    assert result.code == 0
    assert ("the VAE in float32, since it overflows in float16" in result.err) == (vae_dtype == "float32")
    recipe = json.loads((tmp_path / "c" / "cache.json").read_text())["recipe"]
    assert (recipe["latents"]["dtype"], recipe["text"]["dtype"]) == (vae_dtype, "float16")


@pytest.mark.parametrize(("name", "step"), [("sdxl", 8), ("sd3", 16), ("flux", 16)])
def test_native_sizes_are_cut_to_what_the_denoiser_takes(minis, images, tmp_path, run, name, step):
    Image.new("RGB", (120, 72), "red").save(images / "odd.png")
    options = ("--model", minis[name].folder, "--out", tmp_path / "c", "--resolution", "native", "--no-cond")
    assert run("encode", images, *options).code == 0
    sizes = json.loads(run("inspect", tmp_path / "c", "--json").out)["buckets"]
    assert f"{120 // step * step}x{72 // step * step}" in sizes
    result = run("encode", images, "--model", minis[name].folder, "--width", 72, "--height", 64, "--no-cond")
    assert result.code == (0 if step == 8 else 1)
    if step == 16:
        assert "--width 72: not a multiple of 16, this model's factor. Try 80." in result.err
