"""tokens.py, size_words.py: what a dry run says of the longest prompt and of the disk, without encoders' weights."""

import re

import pytest
import torch

from latentprep.options import TextOptions
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.text_folder import TextFolder, open_text
from latentprep.prepare.plan import tokens
from tests.conftest import SMALL
from tests.test_families import CPU, NAMES, PROMPTS, make_mini, minis  # noqa: F401 (a fixture)
from tests.test_zimage import zimage  # noqa: F401 (a fixture)

SIZE = ("--resolution", 64, "--bucket-step", 32, "--min-side", 32)


def fails(*_):
    raise AssertionError("weights are loaded")


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_those_of_the_encoder_and_no_weights_are_loaded(minis, monkeypatch, name):  # noqa: F811
    facts, options = open_text(minis[name].folder), TextOptions()
    encoder = TextEncoder(facts, CPU, torch.float32, options)
    monkeypatch.setattr(TextFolder, "load_pipeline", fails)
    counter = facts.open_counter(options)
    assert counter.count(PROMPTS).tolist() == encoder.count_tokens(PROMPTS).tolist()
    assert counter.max_tokens == encoder.max_tokens


@pytest.fixture
def flux(tmp_path):
    return make_mini("flux", tmp_path / "model").folder


def text_bytes(cache):
    return sum(path.stat().st_size for path in cache.rglob("*.text.safetensors"))


def in_bytes(number, unit):
    return float(number) * {"kB": 1e3, "MB": 1e6}[unit]


def test_advice_where_padding_counts_is_what_following_it_gives(run, images, tmp_path, flux):
    (images / "tall2.txt").write_text("word " * 12)
    command = ("encode", images, "--model", flux, *SIZE)
    page = run(*command, "--out", tmp_path / "c", "--dry-run").out
    longest = re.search(
        r"^tokens: (\d+) in the longest prompt; 512 are kept \(tall2.png: 'word word", page, re.MULTILINE
    )
    assert longest
    found = re.search(
        r"stores 512 tokens of each prompt, padding too\n +--max-tokens (\d+) cuts none, and stores ([\d.]+) (\wB)",
        page,
    )
    assert found
    assert int(longest[1]) <= int(found[1]) < int(longest[1]) + 16
    assert f"But padding counts:\n        to see the same, inference needs max_sequence_length={found[1]} too" in page
    said = re.search(r"disk: about .* of latents, about ([\d.]+) (\wB) of text, 1 new shard", page)
    each = re.search(r"for each image .* of latents and ([\d.]+) (\wB) of text", page)
    assert in_bytes(*each.groups()) * 8 == pytest.approx(in_bytes(*said.groups()), rel=0.02)

    assert run(*command, "--out", tmp_path / "c").code == 0
    assert text_bytes(tmp_path / "c") == pytest.approx(in_bytes(*said.groups()), rel=0.02)
    result = run(*command, "--out", tmp_path / "d", "--max-tokens", found[1])
    assert "cut " not in result.out
    assert text_bytes(tmp_path / "d") == pytest.approx(in_bytes(found[2], found[3]), rel=0.1)
    assert "--max-tokens" not in run(*command, "--out", tmp_path / "e", "--dry-run", "--max-tokens", found[1]).out


def test_prompts_that_will_be_cut_are_counted_before(run, images, tmp_path):
    for n in (0, 1):
        (images / f"tall{n}.txt").write_text("word " * (90 + n))
    page = run("encode", images, "--out", tmp_path / "c", *SMALL, "--dry-run").out
    assert re.search(r"^tokens: \d+ in the longest prompt; 77 are kept \(tall1.png: 'word ", page, re.MULTILINE)
    assert "        2 prompts will be cut (--max-tokens 150 keeps more)\n" in page
    assert "padding" not in page


def test_of_many_prompts_the_longest_are_counted_and_it_is_said(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "MOST_COUNTED", 3)
    (images / "tall3.txt").write_text("a very long caption " * 3)
    page = run("encode", images, "--out", tmp_path / "c", *SMALL, "--dry-run").out
    assert re.search(
        r"^tokens: \d+ in the longest prompt, of the 3 longest prompts; 77 are kept \(tall3", page, re.MULTILINE
    )


def test_the_same_caption_takes_its_place_once_a_shard(run, images, tmp_path):
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text("a house")
    command = ("encode", images, "--out", tmp_path / "c", *SMALL)
    said = re.search(r"about ([\d.]+) (\wB) of text", run(*command, "--dry-run").out)
    assert run(*command).code == 0
    assert text_bytes(tmp_path / "c") == pytest.approx(in_bytes(*said.groups()), rel=0.2)


def test_prompts_of_lengths_of_their_own_get_no_advice(zimage, run, images, tmp_path):  # noqa: F811
    page = run("encode", images, "--model", zimage[1], "--out", tmp_path / "c", *SIZE, "--dry-run").out
    assert "Z-Image stores each prompt at its own length: a smaller --max-tokens saves nothing" in page
    bound = re.search(r"of latents, up to ([\d.]+) (\wB) of text", page)
    assert run("encode", images, "--model", zimage[1], "--out", tmp_path / "c", *SIZE).code == 0
    assert 0.3 * in_bytes(*bound.groups()) < text_bytes(tmp_path / "c") <= in_bytes(*bound.groups())


def test_without_cond_nothing_is_said_of_tokens(run, images, tmp_path):
    page = run("encode", images, "--out", tmp_path / "c", *SMALL, "--no-cond", "--dry-run").out
    assert "tokens:" not in page
    assert "of text, 1 new shard" in page
