"""Models of the newer families that are broken or hostile: one line that says what, and nothing that hangs."""

import json
import shutil
import sys
from importlib.util import find_spec
from pathlib import Path

import diffusers
import msgspec
import pytest
import torch

from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.models import chat_template, text_folder
from latentprep.prepare.models.chat_template import AS_IT_IS, bounded_chat
from latentprep.prepare.models.text_folder import open_text
from latentprep.recipe import TextRecipe

CPU = torch.device("cpu")
SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)
pytestmark = pytest.mark.skipif(not hasattr(diffusers, "ErnieImagePipeline"), reason="a newer diffusers")


@pytest.fixture
def copy(miniature, tmp_path):
    """Stem -> a copy of its miniature's folder."""
    return lambda stem: shutil.copytree(miniature(stem)[1], tmp_path / stem)


def edit(path, **changes):
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["ErnieImage", "HunyuanDiT", "HunyuanImage"])
def test_a_dry_run_tries_no_number_of_tokens_where_a_family_takes_none(stem, miniature, images, tmp_path, run):
    (images / "tall0.txt").write_text("w" * 210)
    result = run("encode", images, "--model", miniature(stem)[1], "--out", tmp_path / "c", *SIZE, "--dry-run")
    assert result.code == 0, result.err
    assert "--max-tokens" not in result.out
    result = run("encode", images, "--model", miniature(stem)[1], "--out", tmp_path / "c", *SIZE, "--max-tokens", 64)
    assert "--max-tokens 64: its pipeline takes none for" in result.err


def test_hidreams_llama_needs_no_pad_token_and_its_clips_two_tokens(copy):
    folder = copy("HiDreamImage")
    edit(folder / "tokenizer_4" / "tokenizer_config.json", pad_token=None)
    text = open_text(folder)
    text.check()
    found = text.open(CPU, torch.float32, TextOptions(max_tokens=2)).encode(["a"])
    assert found["prompt_embeds_llama3"].shape[2] == 2
    with pytest.raises(UserError, match=r"--max-tokens 1: HiDream-I1 takes 2 to 128\. Try 2\."):
        text.settings(TextOptions(max_tokens=1))


def test_a_tokenizer_that_cannot_pad_is_refused(copy):
    folder = copy("QwenImage")
    edit(folder / "tokenizer" / "tokenizer_config.json", pad_token=None)
    with pytest.raises(UserError, match=r"tokenizer: names no pad_token. Set it in its tokenizer_config.json.$"):
        open_text(folder).check()


@pytest.mark.parametrize("layers", [None, [1, 99]])
def test_layers_that_an_encoder_does_not_have(copy, layers):
    folder = copy("Krea2")
    edit(folder / "model_index.json", text_encoder_select_layers=layers)
    with pytest.raises(UserError, match=r"takes layer \d\d of a text encoder of 6. Complete text_encoder_select"):
        open_text(folder)


@pytest.mark.parametrize("layers", ["all", [], [-1], [10**9], [True], [1] * 100_000, {"a": 1}])
def test_layers_that_are_no_list_of_layers(copy, layers):
    folder = copy("Krea2")
    edit(folder / "model_index.json", text_encoder_select_layers=layers)
    with pytest.raises(UserError, match=r"text_encoder_select_layers is .*, expected a list of layers"):
        open_text(folder)


@pytest.mark.parametrize(
    ("half", "name", "message"),
    [
        ("vision_config", "depth", "its config's depth is 1000000"),
        ("text_config", "num_hidden_layers", "its config's num_hidden_layers is 1000000"),
        ("text_config", "hidden_size", "hidden_size is 10000000000"),
    ],
)
def test_sizes_that_no_half_of_an_encoder_has(copy, half, name, message):
    folder = copy("QwenImage")
    path = folder / "text_encoder" / "config.json"
    absurd = 10**10 if name == "hidden_size" else 10**6
    edit(path, **{half: {**json.loads(path.read_text())[half], name: absurd}})
    with pytest.raises(UserError, match=message):
        open_text(folder)


@pytest.mark.parametrize("tokens", [10**9, 0, -1, "7"])
def test_a_cache_that_asks_for_absurd_padding_is_refused(tokens):
    text = {
        "placeholder": "", "shuffle_tags": False, "tag_drop_out": 0.0, "keep_tags": 0, "wildcards": False,
        "prompts_per_image": 1,
    }  # fmt: skip
    assert msgspec.convert({**text, "pad_to": {"prompt_embeds": 256}}, TextRecipe).pad_to == {"prompt_embeds": 256}
    with pytest.raises(msgspec.ValidationError, match="pad_to"):
        msgspec.convert({**text, "pad_to": {"prompt_embeds": tokens}}, TextRecipe)


def test_a_package_that_a_pipeline_does_without_in_silence_has_to_be_there(miniature, monkeypatch):
    monkeypatch.setattr(text_folder, "find_spec", lambda name: None if name == "bs4" else find_spec(name))
    with pytest.raises(UserError, match=r"PixArt-Sigma needs beautifulsoup4 to encode prompts\. pip install beau"):
        open_text(miniature("PixArtSigma")[1])


@pytest.mark.parametrize("stem", ["ZImage", "Flux2"])
@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("fixed text", "prompts do not reach the text encoder. Is its chat_template.jinja whole?"),
        ("{{ messages }}{{ 'x' * 2000000 }}", "characters of one prompt, expected up to 1,048,576"),
    ],
)
def test_templates_that_ignore_prompts_or_have_no_end(copy, stem, template, message):
    folder = copy(stem)
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError) as error:
        open_text(folder).check()
    assert message in str(error.value)


TAKES_LONG = {
    "loops": "{% for a in range(3000) %}{% for b in range(3000) %}{% endfor %}{% endfor %}",
    "calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(17) }}",
    "filters": "{{ range(90000)|map('string')|map('upper')|map('lower')|map('title')|list|length }}" * 4,
}


@pytest.mark.parametrize("stem", ["ZImage", "Flux2", "Flux2Klein"])
@pytest.mark.parametrize("template", TAKES_LONG.values(), ids=TAKES_LONG)
def test_a_template_has_an_end(copy, stem, template, monkeypatch):
    monkeypatch.setattr(chat_template, "MAX_SECONDS", 0.1)
    folder = copy(stem)
    path = folder / "tokenizer" / "chat_template.jinja"
    path.write_text(template + path.read_text())
    traced = sys.gettrace()
    with pytest.raises(UserError) as error:
        open_text(folder).check()
    assert str(error.value) == (
        f"{folder / 'tokenizer'}: its files make no chat of a prompt (its chat_template takes over 0.1 seconds for one "
        "prompt). Use another model."
    )
    assert sys.gettrace() is traced


def test_a_template_in_the_config_is_no_larger_than_one_in_a_file(copy):
    folder = copy("ZImage")
    (folder / "tokenizer" / "chat_template.jinja").unlink()
    for template in ("x" * 10**5, [{"name": "default", "template": "x" * 10**5}]):
        edit(folder / "tokenizer" / "tokenizer_config.json", chat_template=template)
        with pytest.raises(UserError, match=r"tokenizer_config.json has a chat_template of over 65,536 characters"):
            open_text(folder).check()


def test_a_template_runs_once_for_each_prompt():
    """If it ran again for the tokens, chance or the clock could give another text than the one that was looked at."""
    chats, ran = [[{"role": "user", "content": text}] for text in ("a", "b")], []

    def call(chat, tokenize, chat_template=None, **options):
        if not tokenize:
            ran.append((chat, options))
            return f"chat {len(ran)}"
        assert (chat_template, options) == (AS_IT_IS, {"padding": True})
        return chat

    checked = bounded_chat(call, Path("x"))
    found = checked(chats, tokenize=True, padding=True, enable_thinking=False)
    assert ran == [(chat, {"enable_thinking": False}) for chat in chats]
    assert [chat[0]["content"] for chat in found] == ["chat 1", "chat 2"]
    assert checked(chats[0], tokenize=True, padding=True)[0]["content"] == "chat 3"


def test_tokens_are_those_of_what_a_template_wrote(copy):
    tokenizer = open_text(copy("Flux2")).load_tokenizer("text_encoder")
    for prompt in ("{{ 1 }} two\n", " {% if %} <|im_end|>"):
        chat = [{"role": "user", "content": prompt}]
        text = tokenizer.apply_chat_template(chat, tokenize=False)
        assert prompt in text
        found = tokenizer.apply_chat_template([chat], tokenize=True, return_dict=True)["input_ids"]
        assert found == [tokenizer(text, add_special_tokens=False)["input_ids"]]


def test_what_a_library_raises_over_a_model_is_one_line(copy, images, tmp_path, run):
    folder = copy("CogView4")
    tokenizer = json.loads((folder / "tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
    (folder / "tokenizer" / "tokenizer.json").write_text(json.dumps({**tokenizer, "post_processor": None}))
    (images / "tall0.txt").write_text("")
    result = run("encode", images, "--model", folder, "--out", tmp_path / "c", *SIZE)
    assert result.code == 1
    (line,) = [line for line in result.err.splitlines() if line.startswith("error:")]
    assert "CogView4Pipeline cannot encode ''" in line
    assert "Traceback" not in result.err + result.out
