"""examples/: both trainings run on a CPU with small models and resume in mid-epoch; the pages' picture is drawn."""

import importlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from latentprep import LatentDataset
from tests.conftest import SMALL, TINY

EXAMPLES = Path(__file__).parent.parent / "examples"
PICTURE = EXAMPLES / "backgrounds.png"

pytestmark = pytest.mark.slow


@pytest.fixture
def train(monkeypatch, capfd):
    """train("lora", cache, steps=3) -> what it prints; in this process, since importing takes longer than training."""
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def run_example(name, cache, **options):
        capfd.readouterr()
        importlib.import_module(f"train_{name}").main(str(cache), **options)
        return capfd.readouterr().out

    return run_example


@pytest.fixture
def cache(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip").code == 0
    return tmp_path / "c"


def test_a_hypernetwork_that_was_stopped_in_mid_epoch_ends_the_same(cache, train, tmp_path):
    options = {"batch_size": 2, "gradient_step": 2, "learning_rate": 1e-3}
    whole = train("hypernetwork", cache, out=tmp_path / "a", steps=7, **options)
    assert "For the real thing, on a GPU" in whole
    assert "latentprep encode ./photos --model stable-diffusion-v1-5/stable-diffusion-v1-5" in whole
    train("hypernetwork", cache, out=tmp_path / "b", steps=3, **options)
    again = train("hypernetwork", cache, out=tmp_path / "b", steps=7, **options)
    assert "going on at step 3, epoch 1" in again
    found, wanted = (load_file(tmp_path / name / "hypernetwork.safetensors") for name in "ba")
    assert found.keys() == wanted.keys()
    assert {name.split(".")[0] for name in found} == {"32", "64"}  # widths of the contexts, self-attention's too
    assert set(torch.load(tmp_path / "b" / "hypernetwork.pt", weights_only=True)) > {32, 64, "step", "layer_structure"}
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-6), name


def test_200_steps_of_a_hypernetwork_at_the_default_rate_show_a_fall(cache, train, tmp_path):
    out = train("hypernetwork", cache, out=tmp_path / "h", steps=200, batch_size=2)
    first, *_, last = map(float, re.findall(r"fixed loss (\S+)", out))
    assert last < 0.97 * first


def test_a_hypernetwork_with_dropout_goes_on_the_same_and_not_with_other_layers(cache, train, tmp_path):
    options = {"batch_size": 2, "layers": "1,2,2,1", "activation": "relu", "dropout": True, "learning_rate": 1e-3}
    for out, all_steps in (("a", [4]), ("b", [1, 4])):
        for steps in all_steps:
            train("hypernetwork", cache, out=tmp_path / out, steps=steps, **options)
    found, wanted = (load_file(tmp_path / name / "hypernetwork.safetensors") for name in "ba")
    for name in wanted:
        assert torch.allclose(found[name], wanted[name], atol=1e-6), name
    with pytest.raises(typer.BadParameter, match=r"of other layers\. Give the same options, or another --out"):
        train("hypernetwork", cache, out=tmp_path / "a", steps=5, **{**options, "layers": "1,3,1"})


def test_a_loras_file_is_one_that_diffusers_loads(cache, train, tmp_path):
    out = train("lora", cache, out=tmp_path / "lora", steps=6, rank=2, caption_dropout=0.5)
    assert "saved" in out
    weights = load_file(tmp_path / "lora" / "pytorch_lora_weights.safetensors")
    assert any("attn2.to_k.lora" in name for name in weights)
    assert max(float(value.abs().max()) for name, value in weights.items() if "lora_B" in name or "up" in name) > 0


def test_a_lora_for_sdxl_gets_pooled_embeddings_and_time_ids(run, train, images, tmp_path):
    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    options = {"vocab_size": 514, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
               "eos_token_id": 513, "hidden_size": 32, "projection_dim": 32}  # fmt: skip
    pipeline = StableDiffusionXLPipeline(
        vae=AutoencoderKL.from_pretrained(TINY / "vae"), text_encoder=CLIPTextModel(CLIPTextConfig(**options)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**options)), tokenizer=tokenizer,
        tokenizer_2=tokenizer, scheduler=None, unet=UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, block_out_channels=(8, 16), norm_num_groups=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1, attention_head_dim=4, cross_attention_dim=64, addition_embed_type="text_time",
            addition_time_embed_dim=8, projection_class_embeddings_input_dim=32 + 6 * 8,
        ),
    )  # fmt: skip
    pipeline.save_pretrained(tmp_path / "xl")
    DDPMScheduler(prediction_type="v_prediction").save_pretrained(tmp_path / "xl" / "scheduler")
    assert run("encode", images, "--out", tmp_path / "c", "--model", tmp_path / "xl", *SMALL[2:]).code == 0
    assert set(LatentDataset(tmp_path / "c")[0].cond) == {"prompt_embeds", "pooled_prompt_embeds"}
    for name, model in (("real", str(tmp_path / "xl")), ("random", None)):
        train("lora", tmp_path / "c", out=tmp_path / name, steps=3, rank=2, model=model)
        assert (tmp_path / name / "pytorch_lora_weights.safetensors").exists()


def test_the_picture_in_the_readme_is_what_its_script_draws(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    importlib.import_module("backgrounds").main(tmp_path / "drawn.png")
    drawn, shown = (np.array(Image.open(path).convert("RGB"), int) for path in (tmp_path / "drawn.png", PICTURE))
    assert np.abs(drawn - shown).mean() < 2  # letters may differ from one Pillow to the next
