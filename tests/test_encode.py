"""The whole path, against diffusers' and transformers' own results on the same images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionXLPipeline
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentprep import LatentDataset
from latentprep.cache.borrowed import CondFiles
from latentprep.cache.cond import open_uncond
from latentprep.cache.manifest import open_manifest
from latentprep.cache.schema import LATENTS
from latentprep.cache.storage import Storage
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import SMALL, TINY, gradient, make_model


def rows(cache):
    """key -> dict of tensors of its row, over all the rows that count."""
    storage = Storage(cache)
    found = {}
    fields = {field.name for field in LATENTS} - {"flipped", "key", "nbytes", "version"}
    for entry in open_manifest(storage).shards:
        latents = entry.open_latents(storage)
        text = entry.open_text(storage)
        all_cond = CondFiles(storage).of(text)
        for group, words, live in zip(latents.groups, text.groups, entry.live_rows(), strict=True):
            for row in live:
                own = {name: getattr(group, name)[row] for name in fields if getattr(group, name) is not None}
                prompt = words.prompt_of[row, 0]
                cond = {f"cond/{name}": value for name, value in all_cond.rows(int(prompt)).items()}
                assert words.key[row] not in found
                found[words.key[row]] = {**own, **cond, "prompt": text.prompt[prompt]}
    return found


def reference(vae, pixels):
    """AutoencoderKL.encode of one [H,W,3] uint8 image in float32: mean, std [C,h,w]."""
    images = torch.from_numpy((pixels / 127.5 - 1.0).astype(np.float32)).permute(2, 0, 1)[None]
    with torch.inference_mode():
        distribution = vae.encode(images).latent_dist
    return distribution.mean[0], distribution.std[0]


@pytest.mark.parametrize("store_dtype", ["float32", "float16", "bfloat16"])
def test_latents_equal_autoencoderkl(run, photos, tmp_path, store_dtype):
    options = (
        "--width",
        192,
        "--height",
        128,
        "--fit",
        "stretch",
        "--filter",
        "bicubic",
        "--dtype",
        "float32",
        "--flip",
    )
    result = run(
        "encode",
        photos,
        "--out",
        tmp_path / "c",
        "--model",
        "tiny",
        *options,
        "--store-dtype",
        store_dtype,
        "--batch-size",
        4,
    )
    assert result.code == 0
    vae = AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    found = rows(tmp_path / "c")
    assert len(found) == 6
    dtype = getattr(torch, store_dtype)
    for key, row in found.items():
        if key == "rocket.jpg":
            continue  # in Adobe RGB, see test_load.py
        pixels = np.array(Image.open(photos / key).convert("RGB").resize((192, 128), Image.BICUBIC))
        for view, seen in enumerate((pixels, pixels[:, ::-1])):
            for name, wanted in zip(
                ("latent_mean", "latent_std"), reference(vae, np.ascontiguousarray(seen)), strict=True
            ):
                stored = row[name][view]
                assert stored.dtype == dtype
                limit = 1e-4 * reference(vae, np.ascontiguousarray(seen))[0].std()
                rounding = torch.finfo(dtype).eps * wanted.abs() if store_dtype != "float32" else 0
                assert ((stored.float() - wanted).abs() <= limit + rounding).all()


def test_cond_equals_clip_on_the_same_tokens(run, photos, model, tmp_path):
    result = run(
        "encode",
        photos,
        "--out",
        tmp_path / "c",
        "--model",
        model,
        "--resolution",
        64,
        "--bucket-step",
        32,
        "--min-side",
        32,
        "--store-dtype",
        "float32",
    )
    assert result.code == 0
    tokenizer = CLIPTokenizer.from_pretrained(model / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(model / "text_encoder").float().eval()
    captions = {"astronaut.png": "a woman in an orange suit", "chelsea.png": "a ginger cat", "coffee.png": "coffee"}
    found = rows(tmp_path / "c")
    for key, caption in captions.items():
        tokens = tokenizer(caption, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            wanted = encoder(tokens)[0][0]
        assert torch.allclose(found[key]["cond/prompt_embeds"], wanted, atol=1e-5)
    uncond = open_uncond(Storage(tmp_path / "c"), open_manifest(Storage(tmp_path / "c")).uncond.id)[1]["prompt_embeds"]
    tokens = tokenizer("", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.inference_mode():
        assert torch.allclose(uncond, encoder(tokens)[0], atol=1e-5)


def test_sdxl_cond_equals_the_pipelines(run, images, tmp_path):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    options = {
        "vocab_size": 514,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "eos_token_id": 513,
    }
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL(block_out_channels=(8, 8, 8, 8), down_block_types=("DownEncoderBlock2D",) * 4,
                          up_block_types=("UpDecoderBlock2D",) * 4, norm_num_groups=8, scaling_factor=0.13025),
        text_encoder=CLIPTextModel(CLIPTextConfig(hidden_size=32, projection_dim=32, **options)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=48, projection_dim=40, **options)),
        tokenizer=tokenizer, tokenizer_2=tokenizer, unet=None, scheduler=None,
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "xl")
    result = run(
        "encode", images, "--out", tmp_path / "c", "--model", tmp_path / "xl", *SMALL[2:], "--store-dtype", "float32"
    )
    assert result.code == 0
    with torch.inference_mode():
        embeds, _, pooled, _ = pipeline.encode_prompt(
            "picture number 1", device="cpu", do_classifier_free_guidance=False
        )
    row = rows(tmp_path / "c")["tall1.png"]
    assert row["cond/prompt_embeds"].shape == (77, 80)
    assert torch.allclose(row["cond/prompt_embeds"], embeds[0], atol=1e-5)
    assert torch.allclose(row["cond/pooled_prompt_embeds"], pooled[0], atol=1e-5)
    assert LatentDataset(tmp_path / "c")[0].cond["pooled_prompt_embeds"].shape == (1, 40)


def test_a_factor_that_is_not_8(run, images, tmp_path):
    folder = make_model(tmp_path / "model", block_out_channels=(8, 8, 8))
    result = run("encode", images, "--out", tmp_path / "c", "--model", folder, "--width", 36, "--height", 60)
    assert result.code == 0
    assert rows(tmp_path / "c")["tall0.png"]["latent_mean"].shape == (1, 4, 15, 9)


def test_geometry_and_weights_reach_the_cache(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip").code == 0
    found = rows(tmp_path / "c")
    assert len(found) == 8
    tall = found["tall1.png"]
    assert tall["original_size"].tolist() == [80, 64]
    assert tall["resized_size"].tolist() == [[80, 64]] * 2
    assert tall["crop"].tolist() == [[8, 0, 64, 64]] * 2
    assert tall["latent_mean"].shape == (2, 4, 8, 8)
    assert found["wide0.png"]["resized_size"].tolist() == [[32, 102]] * 2
    assert found["wide0.png"]["crop"].tolist() == [[0, 3, 32, 96]] * 2
    assert found["wide0.png"]["latent_mean"].shape == (2, 4, 4, 12)
    assert torch.equal(found["tall3.png"]["weight"][1], found["tall3.png"]["weight"][0].flip(-1))
    assert not torch.equal(found["tall3.png"]["weight"][1], found["tall3.png"]["weight"][0])
    assert (found["tall0.png"]["weight"] == 1).all()  # its group has weights, so it has too
    assert "weight" not in found["wide0.png"]  # no image of its group has alpha


def test_batch_size_and_workers_do_not_change_what_is_written(run, images, tmp_path):
    for name, options in {"a": ("--workers", 1), "b": ("--workers", 7), "c": ("--workers", 3)}.items():
        assert run("encode", images, "--out", tmp_path / name, *SMALL, *options, "--batch-size", 3).code == 0
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shard_size_is_a_budget_for_either_file(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB").code == 0
    manifest = open_manifest(Storage(tmp_path / "c"))
    assert [shard.num_rows for shard in manifest.shards] == [2, 2, 2, 2]
    # the header of a shard is a few kB, and no part of the budget
    assert all(stamp.nbytes < 36_000 for s in manifest.shards for stamp in (s.latents_file, s.text_file))
    assert len(rows(tmp_path / "c")) == 8


def test_mean_only(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--store", "mean", "--no-cond").code == 0
    row = rows(tmp_path / "c")["wide0.png"]
    assert "latent_std" not in row
    assert not any(name.startswith("cond/") for name in row)
    assert not list((tmp_path / "c").glob("uncond*"))


def test_templates_become_prompts_and_distinct_ones_are_encoded_once(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--template", "none").code == 0
    storage = Storage(tmp_path / "c")
    (entry,) = open_manifest(storage).shards
    assert entry.open_text(storage).cond["prompt_embeds"].shape[0] == 1
    assert LatentDataset(tmp_path / "c")[0].cond_text == ["an image"]
    template = ("--template", "subject_filewords", "--placeholder", "sks")
    assert run("encode", images, "--out", tmp_path / "d", *SMALL, *template).code == 0
    data = LatentDataset(tmp_path / "d")
    for index in range(len(data)):
        (prompt,) = data[index].cond_text
        assert prompt.endswith(data.caption(index)[0])
        assert "sks" in prompt


def overflowing_model(folder: Path) -> Path:
    """A VAE whose activations are beyond float16's 65504, and whose posterior is not."""
    make_model(folder)
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.encoder.conv_in.weight.mul_(1e6)
    vae.save_pretrained(folder / "vae")
    return folder


def test_images_that_overflow_in_half_precision_are_encoded_again_in_float32(tmp_path):
    folder = open_vae(overflowing_model(tmp_path / "model"))
    pixels = np.array(gradient(64, 64))[None]
    wanted = VaeEncoder(folder, torch.device("cpu"), torch.float32)
    half = VaeEncoder(folder, torch.device("cpu"), torch.float16)
    found = half.encode(pixels)
    assert half.num_retried == 1
    assert wanted.num_retried == 0
    assert torch.allclose(found.mean, wanted.encode(pixels).mean, atol=1e-5)


def test_a_run_in_half_precision_counts_what_it_did_again(run, images, tmp_path):
    options = ("--model", overflowing_model(tmp_path / "model"), *SMALL[2:])
    result = run("encode", images, "--out", tmp_path / "c", *options, "--dtype", "float16")
    assert result.code == 0
    assert "8 encodings done again in float32, after an overflow" in result.out
    assert run("encode", images, "--out", tmp_path / "whole", *options, "--dtype", "float32").code == 0
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "whole")
    assert len(found) == 8
    for key in found:
        assert torch.equal(found[key]["latent_mean"], wanted[key]["latent_mean"])


def test_images_that_are_never_finite_are_skipped_and_said_so(run, images, tmp_path):
    folder = make_model(tmp_path / "model")
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    with torch.no_grad():
        vae.quant_conv.bias.fill_(3e38)  # finite, and no float16 holds it
    vae.save_pretrained(folder / "vae")
    result = run("encode", images, "--out", tmp_path / "c", "--model", folder, *SMALL[2:])
    assert (result.code, ": non_finite, " in result.err) == (1, True)
    assert not (tmp_path / "c").exists()


def test_skips_stand_in_the_file_with_reason_and_detail(run, images, tmp_path):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    (images / "none.jpg").write_text("not a picture")
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert result.code == 0
    lines = [json.loads(line) for line in (tmp_path / "c" / "skipped.jsonl").read_text().splitlines()]
    assert [(line["key"], line["reason"]) for line in lines] == [("bad.png", "truncated"), ("none.jpg", "not_an_image")]
    assert len(rows(tmp_path / "c")) == 8
    assert run("encode", images, "--out", tmp_path / "d", *SMALL, "--strict").code == 1


@pytest.mark.slow
def test_real_photos_with_the_true_architecture_of_sd_1_5(run, photos, tmp_path):
    """Random weights, but every layer as large as the real ones: 84 M parameters of VAE, 123 M of text encoder."""
    torch.manual_seed(0)
    folder = make_model(tmp_path / "model")
    AutoencoderKL(
        block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, latent_channels=4, sample_size=512,
        scaling_factor=0.18215,
    ).half().save_pretrained(folder / "vae")  # fmt: skip
    CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            bos_token_id=512, eos_token_id=513, pad_token_id=513,
        )
    ).half().save_pretrained(folder / "text_encoder")  # fmt: skip
    options = ("--model", folder, "--resolution", 256, "--store-dtype", "float32", "--no-draft")  # Pillow resizes
    torch.set_num_threads(2)
    try:
        result = run("encode", photos, "--out", tmp_path / "c", *options)
    finally:
        torch.set_num_threads(1)
    assert result.code == 0
    found = rows(tmp_path / "c")
    assert len(found) == 6
    assert found["coffee.png"]["latent_mean"].shape == (1, 4, 24, 40)
    assert found["coffee.png"]["cond/prompt_embeds"].shape == (77, 768)
    vae = AutoencoderKL.from_pretrained(folder / "vae").float().eval()
    pixels = np.array(Image.open(photos / "coffee.png").convert("RGB").resize((320, 213), Image.LANCZOS))[10:202]
    mean, std = reference(vae, pixels)
    assert (found["coffee.png"]["latent_mean"][0] - mean).abs().max() < 1e-4 * mean.std()
    assert (found["coffee.png"]["latent_std"][0] - std).abs().max() < 1e-4 * mean.std()
