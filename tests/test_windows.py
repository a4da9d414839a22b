"""windows.py, --max-tokens and --emphasis: against stable-diffusion-webui's rules and CLIPTextModel run by hand."""

import random
import re
import time

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from latentprep.options import TextOptions
from latentprep.prepare.models.clip_tokenizer import load_tokenizer
from latentprep.prepare.models.single_file import ARCHITECTURES
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.models.text_folder import open_text
from latentprep.prepare.models.token_counter import read_special_tokens_as_text
from latentprep.prepare.models.windows import MAX_WEIGHT, join, parse_emphasis, split_windows
from tests.conftest import TINY
from tests.miniatures import make_t5_tokenizer
from tests.test_families import make_mini

CPU = torch.device("cpu")


@pytest.fixture(scope="session")
def minis(tmp_path_factory):
    folder = tmp_path_factory.mktemp("windows")
    return {name: make_mini(name, folder) for name in ("sd2", "sdxl")}


@pytest.fixture(scope="module")
def count():
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    return lambda texts: [len(ids) for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]]


def texts(prompt, num_windows, count, room=75):
    return [join(window).strip() for window in split_windows([(prompt, 1.0)], num_windows, room, count)]


@pytest.mark.parametrize(
    ("prompt", "wanted"),
    [  # from the docstring of the web UI's parse_prompt_attention
        ("normal text", [("normal text", 1.0)]),
        ("an (important) word", [("an ", 1.0), ("important", 1.1), (" word", 1.0)]),
        ("(unbalanced", [("unbalanced", 1.1)]),
        (r"\(literal\]", [("(literal]", 1.0)]),
        ("(unnecessary)(parens)", [("unnecessaryparens", 1.1)]),
        (
            "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).",
            [("a ", 1.0), ("house", 1.5730000000000004), (" ", 1.1), ("on", 1.0), (" a ", 1.1), ("hill", 0.55),
             (", sun, ", 1.1), ("sky", 1.4641000000000006), (".", 1.1)],
        ),
        # and what it does elsewhere
        ("", []),
        ("[less]", [("less", 1 / 1.1)]),
        ("a) b] 1:2 :1.3)", [("a) b] 1:2 :1.3)", 1.0)]),
        (r"one\\two \three", [(r"one\two three", 1.0)]),
        ("(at : 1.2 )", [("at ", 1.2)]),
        ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
    ],
)  # fmt: skip
def test_emphasis_is_read_as_the_web_ui_reads_it(prompt, wanted):
    assert parse_emphasis(prompt) == wanted


def test_a_prompt_that_fits_is_one_window(count):
    assert texts("a red house", 3, count) == ["a red house", "", ""]
    assert texts("x" * 75, 2, count) == ["x" * 75, ""]
    assert texts("x" * 300, 1, count) == ["x" * 300]  # one window is the tokenizer's to cut


def test_windows_end_between_words(count):
    words = " ".join(["sevenxx"] * 25)  # 10 of them in 70 tokens
    assert texts(words, 3, count) == [" ".join(["sevenxx"] * n) for n in (10, 10, 5)]


def test_windows_end_between_letters_digits_and_signs_as_tokens_do(count):
    whole = " ".join(["seven77"] * 11)
    assert texts(whole, 2, count) == [whole[:-2], "77"]
    assert texts("x" * 75 + "!?", 2, count) == ["x" * 75, "!?"]
    assert texts("x" * 75 + "'s", 2, count) == ["x" * 75, "'s"]


def test_prompts_without_measure_take_seconds(count):
    start = time.process_time()
    for text in ("x" * 64_000, "," * 64_000, "(a" * 32_000, "[(" * 16_000 + ")]" * 16_000, "(a:" + "1" * 63_000,
                 "(a" + " " * 63_000 + ")", "BREAK " * 10_000):  # fmt: skip
        windows = split_windows(parse_emphasis(text), 3, 75, lambda texts: list(map(len, texts)))
        assert len(windows) == 3
    assert time.process_time() - start < 10  # each of them took up to two minutes


def test_windows_end_behind_a_comma_among_the_last_20_tokens(count):
    for before, is_near in ((54, False), (55, True), (60, True), (74, True)):
        prompt = "x" * before + ", " + "yy " * 30
        first = texts(prompt, 3, count)[0]
        assert (first == "x" * before + ",") == is_near, before
    assert texts("x" * 20 + "," + "x" * 45 + "," + "y" * 30, 2, count) == ["x" * 20 + "," + "x" * 45 + ",", "y" * 30]


def test_the_last_comma_counts_and_not_if_the_rest_would_no_longer_fit(count):
    prompt = "x" * 57 + ", yy, zzz " + "w" * 60
    assert texts(prompt, 2, count) == ["x" * 57 + ", yy,", "zzz " + "w" * 60]
    prompt = "x" * 57 + ", yy, zzz vvv " + "w" * 70
    assert texts(prompt, 2, count) == ["x" * 57 + ", yy, zzz vvv", "w" * 70]
    assert texts(prompt, 3, count) == ["x" * 57 + ", yy,", "zzz vvv", "w" * 70]


def test_a_word_longer_than_a_window_is_cut_between_characters(count):
    assert texts("ab " + "x" * 200 + " cd", 5, count) == ["ab", "x" * 75, "x" * 75, "x" * 50 + " cd", ""]
    assert texts("☃" * 60, 3, count) == ["☃" * 25, "☃" * 25, "☃" * 10]  # three tokens each


@pytest.mark.slow
def test_nothing_is_lost_whatever_the_prompt(count):
    dice = random.Random(0)
    for _ in range(200):
        words = ["".join(dice.choices("ab,é☃ '-_,", k=dice.choice((1, 5, 12, 90)))) for _ in range(dice.randrange(40))]
        prompt, num_windows = " ".join(words), dice.choice((2, 3, 40))
        windows = texts(prompt, num_windows, count)
        assert len(windows) == num_windows
        assert re.sub(r"\s", "", "".join(windows)) == re.sub(r"\s", "", prompt)
        sizes = count(windows)
        assert max(sizes[:-1]) <= 75
        if num_windows == 40:
            assert sizes[-1] <= 75


def by_hand(clip, tokenizer, texts):
    """[N,77,D]: CLIPTextModel over windows, each with a start, an end and padding of its own."""
    rows = []
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False).input_ids[:75]
        rows.append([512, *ids, 513, *[tokenizer.pad_token_id] * (75 - len(ids))])
    return clip(torch.tensor(rows), output_hidden_states=True)


@torch.inference_mode()
def test_windows_are_clips_own_side_by_side(minis):
    pipeline, facts = minis["sd2"].pipeline, open_text(minis["sd2"].folder)
    encoder = TextEncoder(facts, CPU, torch.float32, TextOptions(max_tokens=150))
    prompts = ["x" * 60 + ", " + "y" * 40, "short", "z" * 75 + " " + "w" * 90]
    found = encoder.encode(prompts)["prompt_embeds"]
    parts = ["x" * 60 + ",", "y" * 40, "short", "", "z" * 75, "w" * 90]
    wanted = by_hand(pipeline.text_encoder, pipeline.tokenizer, parts)[0].reshape(3, 154, 32)
    assert torch.allclose(found, wanted, atol=1e-6)
    assert found[0].numel() == facts.num_values(TextOptions(max_tokens=150))
    assert encoder.max_tokens == 152
    assert encoder.count_tokens(prompts).tolist() == [103, 7, 167]


@torch.inference_mode()
def test_windows_of_sdxl_and_the_pooled_of_the_first(minis):
    pipeline, facts = minis["sdxl"].pipeline, open_text(minis["sdxl"].folder)
    found = TextEncoder(facts, CPU, torch.float32, TextOptions(max_tokens=225)).encode(["x" * 70 + " " + "y" * 100])
    parts = ["x" * 70, "y" * 75, "y" * 25]
    one = by_hand(pipeline.text_encoder, pipeline.tokenizer, parts).hidden_states[-2]
    two = by_hand(pipeline.text_encoder_2, pipeline.tokenizer_2, parts)
    assert torch.allclose(
        found["prompt_embeds"][0], torch.cat([one, two.hidden_states[-2]], -1).flatten(0, 1), atol=1e-6
    )
    assert torch.allclose(found["pooled_prompt_embeds"], two.text_embeds[:1], atol=1e-6)


def test_more_tokens_than_max_exactly_where_something_is_cut(minis):
    encoder = TextEncoder(open_text(minis["sd2"].folder), CPU, torch.float32, TextOptions(max_tokens=150))

    def kept(prompt):
        sizes = encoder.windows.count([join(window) for window in encoder.windows.split([prompt])])
        return sum(min(75, size) for size in sizes)

    dice = random.Random(1)
    prompts = [" ".join("x" * dice.randint(1, 30) for _ in range(dice.randint(1, 14))) for _ in range(100)]
    prompts += ["x" * 40 + " " + "y" * 70 + " " + "z" * 40]  # 150 tokens, but not in two windows
    counts = encoder.count_tokens(prompts)
    is_cut = [kept(prompt) < len(re.sub(" ", "", prompt)) for prompt in prompts]
    assert (counts > encoder.max_tokens).tolist() == is_cut
    assert 5 < sum(is_cut) < 90
    assert counts[-1] == 187
    plain = TextEncoder(open_text(minis["sd2"].folder), CPU, torch.float32)
    assert plain.count_tokens(prompts).tolist() == [len(re.sub(" ", "", prompt)) + 2 for prompt in prompts]


def test_emphasis_multiplies_tokens_and_restores_the_mean(minis):
    for name, widths in (("sd2", [32]), ("sdxl", [32, 48])):
        mini = minis[name]
        options = TextOptions(emphasis=True)
        encoder = TextEncoder(open_text(mini.folder), CPU, torch.float32, options)
        found = encoder.encode(["ab (cde:1.5) [f]", "none", r"\(one\)"])
        plain = TextEncoder(open_text(mini.folder), CPU, torch.float32).encode(["ab cde f", "none", "(one)"])
        weights = np.ones(77)
        weights[3:6], weights[6] = 1.5, 1 / 1.1
        start = 0
        for width in widths:
            before = plain["prompt_embeds"][0, :, start : start + width].numpy().astype(np.float64)
            after = before * weights[:, None]
            after *= before.mean() / after.mean()
            np.testing.assert_allclose(found["prompt_embeds"][0, :, start : start + width], after, rtol=1e-4, atol=1e-5)
            start += width
        assert torch.equal(found["prompt_embeds"][1:], plain["prompt_embeds"][1:])
        if name == "sdxl":
            assert torch.equal(found["pooled_prompt_embeds"], plain["pooled_prompt_embeds"])
        assert encoder.count_tokens(["ab (cde:1.5) [f]"]).tolist() == [8]


def test_emphasis_goes_with_its_words_into_the_next_window(minis):
    facts = open_text(minis["sd2"].folder)
    options = TextOptions(max_tokens=150, emphasis=True)
    found = TextEncoder(facts, CPU, torch.float32, options).encode(["x" * 70 + " (yy " + "z" * 72 + ":1.4) w"])
    halves = TextEncoder(facts, CPU, torch.float32, TextOptions(emphasis=True)).encode(
        ["x" * 70 + " (yy:1.4)", "(" + "z" * 72 + ":1.4) w"]
    )
    assert torch.allclose(found["prompt_embeds"][0], halves["prompt_embeds"].flatten(0, 1), atol=1e-6)
    plain = TextEncoder(facts, CPU, torch.float32).encode(["(yy:1.4)"])
    assert torch.equal(
        plain["prompt_embeds"], TextEncoder(facts, CPU, torch.float32).encode(["(yy:1.4)"])["prompt_embeds"]
    )


def web_ui_windows(ids, comma, room=75, backtrack=20):
    """The web UI's rule over token ids, written anew: fill up to `room`; at the next token that is no comma go back to
    behind a comma that stands at most `backtrack` tokens before the end."""
    windows, last_comma = [[]], None
    for token in ids:
        window = windows[-1]
        if token == comma:
            last_comma = len(window)
        elif len(window) == room and last_comma is not None and room - last_comma <= backtrack:
            windows[-1], rest = window[: last_comma + 1], window[last_comma + 1 :]
            windows.append(rest)
            last_comma = None
        if len(windows[-1]) == room:
            windows.append([])
            last_comma = None if token != comma else 0
        windows[-1].append(token)
    return windows


def test_only_a_token_that_is_a_comma_ends_a_window():
    """CLIP has a token for ), and others such as it, which the web UI takes for no comma."""
    tokenizer = load_tokenizer(ARCHITECTURES / "sd1" / "tokenizer")

    def count_own(texts):
        return list(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))

    words = "cat " * 60
    assert texts(words + "(dog), " + words, 3, count_own)[0].endswith("cat " * 11 + "cat")  # full
    assert texts(words + "dog, " + words, 3, count_own)[0].endswith("cat dog,")


def read_emphasis(prompt):
    """Texts and weights by a rule of its own, a stack of brackets; without backslashes and weights such as :1.3."""
    parts, stack = [["", 1.0]], []
    for char in prompt:
        if char in "([":
            stack.append(char)
            parts.append(["", 1.0])
        elif char in ")]":
            stack.pop()
            parts.append(["", 1.0])
        else:
            parts[-1][0] += char
            parts[-1][1] = 1.1 ** sum(1 if opened == "(" else -1 for opened in stack)
    return [part for part in parts if part[0]]


@pytest.mark.parametrize("with_break", [False, True])
def test_windows_with_emphasis_and_break_are_those_of_the_web_ui(with_break):
    tokenizer = load_tokenizer(ARCHITECTURES / "sd1" / "tokenizer")

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    (comma,) = ids_of(",")
    dice = random.Random(2)
    forms = ["{0}, "] * 6 + ["({0}), ", "[{0}], ", "(({0}) {0}), ", "8k, 4.5 {0},", "{0} , "]
    for _ in range(100):
        prompt = "".join(
            dice.choice(forms).format(" ".join(dice.choices(("red cat", "sunset", "moon", "tree house"), k=3)))
            + ("BREAK " if with_break and dice.random() < 0.06 else "")
            for _ in range(dice.randint(5, 60))
        ).removesuffix("BREAK ")  # fmt: skip
        wanted = []
        for section in prompt.split("BREAK"):
            parts = [(ids_of(text), weight) for text, weight in read_emphasis(section)]
            weights = [weight for ids, weight in parts for _ in ids]
            for window in web_ui_windows([token for ids, _ in parts for token in ids], comma):
                wanted.append((window, pytest.approx(weights[: len(window)])))
                weights = weights[len(window) :]
        found = split_windows(parse_emphasis(prompt), 40, 75, lambda texts: [len(ids_of(text)) for text in texts])
        for window, (ids, weights) in zip(found, wanted, strict=False):
            own = [(ids_of(text), weight) for text, weight in window]
            assert [token for ids_, _ in own for token in ids_] == ids
            assert [weight for ids_, weight in own for _ in ids_] == weights
        assert not any(found[len(wanted) :])


@pytest.mark.parametrize("kind", ["tags", "prose"])
def test_windows_are_those_of_the_web_ui(kind):
    tokenizer = load_tokenizer(ARCHITECTURES / "sd1" / "tokenizer")  # CLIP's own vocabulary
    words = (TINY.parent / "clip" / "merges.txt").read_text(encoding="utf-8").split("\n")[2000:20000]
    words = [word.replace(" ", "")[:-4] for word in words if re.fullmatch(r"[a-z]+ [a-z]+</w>", word)]

    def ids_of(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def count_own(texts):
        return [len(ids_of(text)) for text in texts]

    (comma,) = ids_of(",")
    dice, differ, commas_first = random.Random(1), 0, 0
    for _ in range(200):
        length = (1, 4) if kind == "tags" else (8, 30)  # words between two commas
        tags = [
            " ".join(dice.choices(words, k=dice.randint(*length))) for _ in range(dice.randint(30, 120) // length[1])
        ]
        prompt = ", ".join(tags)
        wanted = [window for window in web_ui_windows(ids_of(prompt), comma) if window]
        found = [ids_of(text) for text in texts(prompt, 12, count_own) if text]
        assert [token for window in found for token in window] == ids_of(prompt)
        differ += found != wanted
        commas_first += any(window[0] == comma for window in wanted)
    assert differ == 0
    assert commas_first > 0 or kind == "prose"


def test_break_begins_a_new_window(count):
    def windows(prompt, num_windows=4):
        return [join(window).strip() for window in split_windows(parse_emphasis(prompt), num_windows, 75, count)]

    assert windows("a cat BREAK a dog") == ["a cat", "a dog", "", ""]
    assert windows("BREAK a cat") == ["", "a cat", "", ""]
    assert windows("a cat BREAK") == ["a cat", "", "", ""]
    assert windows("one BREAK " + "x" * 74 + " yy BREAK two") == ["one", "x" * 74, "yy", "two"]
    assert windows("one BREAK two BREAK three", 2) == ["one", "two three"]
    assert windows("one BREAK BREAK two", 4) == ["one", "", "two", ""]  # an empty window between, as there
    assert windows("one BREAK BREAK", 2) == ["one", ""]
    assert windows("BREAKFAST outbreak BREAKs") == ["BREAKFAST outbreak BREAKs", "", "", ""]
    assert texts("a cat BREAK a dog", 2, count) == ["a cat BREAK a dog", ""]  # without --emphasis it is text


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|startoftext|>"])
def test_special_tokens_in_a_caption_are_text(text):
    encoder = TextEncoder(open_text(TINY), CPU, torch.float32)
    assert int(encoder.count_tokens([f"a {text} b"])[0]) > 7
    plain, special, without = (encoder.encode([t])["prompt_embeds"] for t in ("a b", f"a {text} b", "a"))
    assert not torch.equal(special, without)
    assert not torch.equal(special, plain)
    ids = encoder.pipeline.tokenizer(f"a {text} b", padding="max_length", max_length=77)["input_ids"]
    assert ids.count(encoder.pipeline.tokenizer.bos_token_id) == 1


def test_special_tokens_of_t5_in_a_caption_are_text():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0)] + [(char, -2.0) for char in "▁abdextrips<>/_0"]
    tokenizer = make_t5_tokenizer(pieces, extra_ids=2)
    plain = tokenizer(["a bat", ""])["input_ids"]
    read_special_tokens_as_text(tokenizer)
    assert tokenizer(["a bat", ""])["input_ids"] == plain
    for text in ("a </s> b", "a</s></s>b", "<extra_id_0>", "<pad>"):
        *ids, end = tokenizer(text)["input_ids"]
        assert end == tokenizer.eos_token_id
        assert not set(tokenizer.all_special_ids) & set(ids), text
        said = "".join(tokenizer.convert_ids_to_tokens(ids)).replace("▁", " ").strip()
        assert said == text  # nothing was put in or left out


def test_special_tokens_are_text_to_families_with_t5(tmp_path):
    encoder = TextEncoder(open_text(make_mini("flux", tmp_path).folder), CPU, torch.float32)
    found, ended = (encoder.encode([text])["prompt_embeds"] for text in ("a </s> b", "a"))
    assert not torch.allclose(found, ended)
    pipeline = encoder.pipeline
    assert pipeline.tokenizer_2("a </s> b")["input_ids"].count(pipeline.tokenizer_2.eos_token_id) == 1
    assert int(encoder.count_tokens(["a </s> b"])[0]) == len(pipeline.tokenizer_2("a </s> b")["input_ids"])


@pytest.mark.parametrize(
    "prompt", ["(a:" + "9" * 400 + ") b", "(" * 8000 + "a", "((a:1" + "0" * 300 + "):1" + "0" * 300 + ")"]
)
def test_weights_without_measure_give_finite_cond(prompt):
    assert all(abs(weight) <= MAX_WEIGHT for _, weight in parse_emphasis(prompt))
    encoder = TextEncoder(open_text(TINY), CPU, torch.float32, TextOptions(emphasis=True))
    assert encoder.encode([prompt])["prompt_embeds"].isfinite().all()
