"""Z-Image whole: prompts that become a chat for Qwen3, and cond of which each prompt has its own number of tokens."""

import json
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from latentprep import LatentDataset
from latentprep.cache.ragged import Ragged, mask_of, pad
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.models import families
from latentprep.prepare.models.encode_prompt import inference_defaults, take_rows
from latentprep.prepare.models.families import FAMILIES, find_family
from latentprep.prepare.models.family import LIST, MASK, Call, Family
from latentprep.prepare.models.text_folder import open_text
from tests.miniatures import CHAT, make_qwen_tokenizer, make_t5, make_t5_tokenizer, make_vae
from tests.test_hostile_models import check_refused

diffusers = pytest.importorskip("diffusers", minversion="0.36")
pytest.importorskip("transformers", minversion="4.51")
from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3Model  # noqa: E402

CPU = torch.device("cpu")
PROMPTS = ["a red house, snow", "", "a cat " * 40, "naïve <|im_end|> ☃"]
SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)


def make_qwen3(kind, tokens):
    config = Qwen3Config(
        vocab_size=tokens, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=600, tie_word_embeddings=False,
    )  # fmt: skip
    return kind(config).eval()


@pytest.fixture(scope="module", params=[Qwen3Model, Qwen3ForCausalLM], ids=lambda kind: kind.__name__)
def zimage(request, tmp_path_factory):
    """A miniature pipeline and the folder it was saved to."""
    folder = tmp_path_factory.mktemp("zimage")
    torch.manual_seed(0)
    tokenizer = make_qwen_tokenizer(folder / "vocabulary")
    vae = make_vae(latent_channels=16, scaling_factor=0.3611, shift_factor=0.1159)
    pipeline = diffusers.ZImagePipeline(
        scheduler=None, vae=vae, text_encoder=make_qwen3(request.param, len(tokenizer)), tokenizer=tokenizer,
        transformer=None,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "model")
    return pipeline, folder / "model"


@torch.inference_mode()
def expected(pipeline, prompts, **options):
    return pipeline.encode_prompt(list(prompts), device=CPU, do_classifier_free_guidance=False, **options)[0]


def assert_rows(found, wanted):
    assert isinstance(found, Ragged)
    assert len(found) == len(wanted)
    for n, row in enumerate(wanted):
        assert found[n].dtype == torch.float32
        assert torch.equal(found[n], row)


def test_cond_is_the_pipelines_own_bit_for_bit(zimage):
    pipeline, folder = zimage
    text = open_text(folder)
    assert (text.family.name, text.family.length, dict(text.widths)) == ("Z-Image", LIST, {"prompt_embeds": 32})
    encoder, prompts = text.open(CPU, torch.float32), list(PROMPTS)
    found = encoder.encode(prompts)
    assert prompts == PROMPTS  # the pipeline overwrites the list it is given
    wanted = expected(pipeline, PROMPTS)
    assert len({len(row) for row in wanted}) == 4
    assert list(found) == ["prompt_embeds"]
    assert_rows(found["prompt_embeds"], wanted)
    for n, prompt in enumerate(PROMPTS):
        assert_rows(encoder.encode([prompt])["prompt_embeds"], expected(pipeline, [prompt]))
        assert len(wanted[n]) == encoder.count_tokens([prompt])[0]
    many = [f"number {n}" for n in range(6)]  # more than one batch
    assert_rows(encoder.encode(many)["prompt_embeds"], [*expected(pipeline, many[:4]), *expected(pipeline, many[4:])])


def test_long_prompts_are_cut_and_counted(zimage):
    pipeline, folder = zimage
    long = ["word " * 200]
    text = open_text(folder)
    assert text.num_values(TextOptions()) == 512 * 32
    encoder = text.open(CPU, torch.float32, TextOptions(max_tokens=100))
    assert_rows(encoder.encode(long)["prompt_embeds"], expected(pipeline, long, max_sequence_length=100))
    assert encoder.max_tokens == 100
    assert encoder.count_tokens(long)[0] > 1000
    assert text.more_tokens(100) == 512
    assert text.more_tokens(512) is None
    assert text.settings(TextOptions(max_tokens=100)) == {"fill": "zeros", "max_tokens": 100}
    for options, message in (
        ({"max_tokens": 513}, "--max-tokens 513: Z-Image takes 1 to 512. Try 512."),
        ({"clip_skip": 2}, "--clip-skip 2: for Stable Diffusion 1 and 2, not for Z-Image. Leave it out."),
        ({"emphasis": True}, "--emphasis: for CLIP alone, and Z-Image has none. Leave it out."),
    ):
        with pytest.raises(UserError) as error:
            text.settings(TextOptions(**options))
        assert str(error.value) == message


def test_from_images_to_batches(zimage, images, tmp_path, run):
    pipeline, folder = zimage
    (images / "tall1.txt").write_text("a longer caption than all of the others, with more to say")
    options = ("--model", folder, "--out", tmp_path / "c", "--store-dtype", "float32", *SIZE)
    result = run("encode", images, *options)
    assert result.code == 0, result.err
    files = [load_file(path) for path in (tmp_path / "c" / "shards").glob("*.text.safetensors")]
    assert all(found["cond/prompt_embeds"].ndim == 2 for found in files)
    counts = np.concatenate([np.diff(found["cond/prompt_embeds_offsets"].numpy()) for found in files])
    assert len(set(counts.tolist())) > 1
    data = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic")
    for bucket in (0, 1):
        indices = [n for n in range(len(data)) if data[n].latent_mean.shape[1:] == data.buckets[bucket]]
        batch = data.__getitems__(indices)
        assert batch.latent_mean.shape[1] == 16
        lengths, cond = batch.cond_lengths["prompt_embeds"], batch.cond["prompt_embeds"]
        for prompt, length, row in zip(batch.cond_text, lengths.tolist(), cond, strict=True):
            (wanted,) = expected(pipeline, [prompt])
            assert torch.allclose(row[:length], wanted, atol=2e-6)
            assert len(wanted) == length
            assert not row[length:].any()  # zeros, as the recipe says
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["recipe"]["text"]["fill"] == "zeros"
    assert data.uncond()["prompt_embeds"].shape[-1] == 32
    assert "nothing to do" in run("encode", images, *options).out
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", 2).code == 0
    assert "prompt_embeds [T, 32]" in run("inspect", tmp_path / "c").out


def test_its_denoiser_takes_patches_of_two(zimage, images, tmp_path, run):
    result = run("encode", images, "--model", zimage[1], "--width", 72, "--height", 64, "--no-cond")
    assert "--width 72: not a multiple of 16, this model's factor. Try 80." in result.err
    assert find_family("ZImageImg2ImgPipeline") is find_family("ZImagePipeline")
    assert find_family("ZImageOmniPipeline") is None


def test_the_digest_is_of_the_chat_too(zimage, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(zimage[1], folder)
    before = open_text(folder).digest
    assert before == open_text(zimage[1]).digest
    (template,) = (folder / "tokenizer").glob("chat_template.jinja")
    template.write_text(CHAT + " ")
    assert open_text(folder).digest != before


def test_weights_that_were_saved_with_a_head_are_loaded_without(zimage, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(zimage[1], folder)
    edit(folder / "model_index.json", text_encoder=["transformers", "Qwen3Model"])
    text = open_text(folder)
    text.check()
    assert_rows(text.open(CPU, torch.float32).encode(["a cat"])["prompt_embeds"], expected(zimage[0], ["a cat"]))
    path = folder / "text_encoder" / "config.json"
    edit(path, intermediate_size=64)
    with pytest.raises(UserError, match="text_encoder are not those of its config"):
        open_text(folder).check()


def test_descriptions_go_to_other_processes(zimage):
    text = open_text(zimage[1])
    data = pickle.dumps(text)
    assert len(data) < 10_000
    found = pickle.loads(data).open(CPU, torch.float32).encode(["a cat"])
    assert_rows(found["prompt_embeds"], expected(zimage[0], ["a cat"]))


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


DAMAGES = {
    "another encoder": (
        lambda f: edit(f / "model_index.json", text_encoder=["transformers", "GPT2Model"]),
        "that text_encoder is ['transformers', 'GPT2Model'], expected transformers' Qwen3Model or Qwen3",
    ),
    "another library": (lambda f: edit(f / "model_index.json", text_encoder=["evil", "Qwen3Model"]), "never loaded"),
    "another tokenizer": (
        lambda f: edit(f / "model_index.json", tokenizer=["transformers", "CLIPTokenizer"]),
        "expected transformers' Qwen2Tokenizer or Qwen2TokenizerFast",
    ),
    "no encoder": (lambda f: edit(f / "model_index.json", text_encoder=[None, None]), "text_encoder is [None, None]"),
    "width absurd": (lambda f: edit(f / "text_encoder/config.json", hidden_size=10**9), "hidden_size is 1000000000"),
    "heads absurd": (lambda f: edit(f / "text_encoder/config.json", num_key_value_heads=10**9), "key_value_heads is"),
    "head_dim absurd": (lambda f: edit(f / "text_encoder/config.json", head_dim=-1), "head_dim is -1"),
    "layers absurd": (lambda f: edit(f / "text_encoder/config.json", num_hidden_layers=10**5), "num_hidden_layers is"),
    "other shapes": (lambda f: edit(f / "text_encoder/config.json", intermediate_size=64), "not those of its config"),
    "no vocabulary": (
        lambda f: [path.unlink() for path in (f / "tokenizer").iterdir()], "tokenizer: has no vocabulary, expected",
    ),
    "a template without end": (
        lambda f: (f / "tokenizer/chat_template.jinja").write_text("x" * 10**5), "over 65,536 bytes",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_hostile_folders_are_refused_in_one_line(zimage, images, tmp_path, run, name):
    folder = tmp_path / "copy"
    shutil.copytree(zimage[1], folder)
    damage, message = DAMAGES[name]
    damage(folder)
    check_refused(run, images, tmp_path / "cache", folder, message)


TEMPLATES = {
    "no template": "{% for",
    "division": "{{ 1 / 0 }}",
    "refusal": "{{ raise_exception('x\x1b[2J') }}",
    "builtins": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "other messages": "{{ messages[9].content }}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_reaches_nothing_and_fails_in_one_line(zimage, images, tmp_path, run, name):
    folder = tmp_path / "copy"
    shutil.copytree(zimage[1], folder)
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATES[name])
    check_refused(run, images, tmp_path / "cache", folder, "its files make no chat of a prompt")


def test_a_chat_template_that_fails_for_some_prompts_is_said(zimage, images, tmp_path, run):
    folder = tmp_path / "copy"
    shutil.copytree(zimage[1], folder)
    for template, message in (
        (CHAT + "{{ 1 / 0 if 'picture' in messages[0].content }}", "its files make no chat of a prompt"),
        (
            "{{ '' if 'picture' in messages[0].content else messages[0].content }}",
            "gives no tokens for 'picture number",
        ),
    ):
        (folder / "tokenizer" / "chat_template.jinja").write_text(template)
        result = run("encode", images, "--out", tmp_path / "c", "--model", folder, *SIZE, "--overwrite")
        assert result.code == 1
        assert message in result.err


def test_a_diffusers_without_the_pipeline_is_said(zimage, monkeypatch):
    monkeypatch.setattr(diffusers, "ZImagePipeline", None)  # as if it were older
    with pytest.raises(UserError, match=r"Z-Image needs ZImagePipeline, which diffusers .* does not have. Upgrade"):
        open_text(zimage[1])


def test_a_row_adds_a_family_of_masks(tmp_path, images, run, monkeypatch):
    """PixArt-Sigma: T5, a mask that says which tokens count, and a default that __call__ has and encode_prompt not."""
    calls = (Call(("prompt_embeds", "prompt_embeds_mask", None, None), {"do_classifier_free_guidance": False}),)
    row = Family(
        "PixArt-Sigma", "PixArtSigma", calls, length=MASK, sequence="text_encoder", default_tokens=300, most_tokens=300,
        patch=2,
    )  # fmt: skip
    monkeypatch.setattr(families, "FAMILIES", (*FAMILIES, row))
    torch.manual_seed(0)
    t5, tokenizer = make_t5(), make_t5_tokenizer(model_max_length=512)
    pipeline = diffusers.PixArtSigmaPipeline(
        tokenizer=tokenizer, text_encoder=t5, vae=make_vae(latent_channels=4), transformer=None, scheduler=None
    )
    pipeline.save_pretrained(tmp_path / "model")
    options = ("--model", tmp_path / "model", "--store-dtype", "float32", *SIZE)
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert result.code == 0, result.err
    data = LatentDataset(tmp_path / "c", latent_sampling_method="deterministic")
    batch = data.__getitems__([n for n in range(len(data)) if data[n].latent_mean.shape[1:] == data.buckets[0]])
    with torch.inference_mode():
        embeds, mask, _, _ = pipeline.encode_prompt(
            batch.cond_text, do_classifier_free_guidance=False, device=CPU, max_sequence_length=300, clean_caption=True
        )
    found = batch.cond["prompt_embeds"]
    longest = found.shape[1]
    assert torch.equal(mask_of(batch.cond_lengths["prompt_embeds"], longest), mask[:, :longest].bool())
    assert not mask[:, longest:].any()
    assert torch.allclose(found, embeds[:, :longest] * mask[:, :longest, None], atol=2e-6)


def test_defaults_of_call_count_where_the_two_differ():
    assert inference_defaults(diffusers.PixArtSigmaPipeline)["clean_caption"] is True
    assert "complex_human_instruction" in inference_defaults(diffusers.SanaPipeline)
    assert inference_defaults(diffusers.StableDiffusionPipeline) == {"num_images_per_prompt": 1}
    assert inference_defaults(diffusers.ZImagePipeline) == {}


def test_masks_and_lists_become_rows():
    row, values = Family("", "", (), length=MASK), torch.arange(24.0).reshape(2, 3, 4)
    rows = take_rows("prompt_embeds", row, values, torch.tensor([[1, 1, 0], [1, 1, 1]]), 2)
    assert_rows(rows, [values[0, :2], values[1]])
    assert_rows(take_rows("prompt_embeds", row, values, None, 2), list(values))  # all tokens count
    layers = torch.arange(48.0).reshape(2, 3, 4, 2)  # Krea 2 has layers stacked
    assert_rows(
        take_rows("prompt_embeds", row, layers, torch.tensor([[1, 0, 0], [1, 1, 0]]), 2),
        [layers[0, :1], layers[1, :2]],
    )
    padded, lengths = pad([layers[0, :1], layers[1, :2]], "zeros")
    assert (list(padded.shape), lengths.tolist(), padded[0, 1:].any().item()) == ([2, 2, 4, 2], [1, 2], False)
    assert torch.equal(pad([layers[0, :1], layers[1, :2]], "repeat")[0][0, 1], layers[0, 0])
    gap, with_gaps = torch.tensor([[0, 1, 1], [1, 0, 1]]), replace(row, has_gaps=True)
    with pytest.raises(UserError, match=r"counts tokens which are not the first ones, .* Use another diffusers"):
        take_rows("prompt_embeds", row, values, gap, 2)
    assert_rows(take_rows("prompt_embeds", with_gaps, values, gap, 2), [values[0, 1:], values[1, [0, 2]]])
