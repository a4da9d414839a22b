"""prompts.py and K prompts an image, from captions to what a training loop reads."""

import json
import re
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel, CLIPTokenizer

from latentprep import LatentDataset
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prompts import expand_wildcards, load_template, make_prompt, make_prompts
from latentprep.recipe import TextRecipe
from tests.conftest import SMALL, TINY
from tests.test_encode import files, rows

TAGS = "girl, red hair, smile, hat, outdoors, tree"
EVERYTHING = TextOptions(
    ("a {photo|painting} of [filewords]", "[name]: [filewords]"), "sks", prompts_per_image=5, shuffle_tags=True,
    tag_drop_out=0.3, keep_tags=1, wildcards=True,
)  # fmt: skip
KEYS = [f"sub/{n}.png" for n in range(50)]


def of(captions, key="a.png", seed=0, **options):
    return make_prompts(captions, key, TextOptions(**options), seed)


def test_a_prompt_depends_on_seed_key_and_number_alone():
    captions = (TAGS, "a {cat|dog}, {big|small}")
    found = {key: make_prompts(captions, key, EVERYTHING, 3) for key in KEYS}
    for key in reversed(KEYS):
        assert make_prompts(captions, key, EVERYTHING, 3) == found[key]
        few = TextOptions(**{**vars(EVERYTHING), "prompts_per_image": 2})
        assert make_prompts(captions, key, few, 3) == found[key][:2]  # more prompts leave the first as they are
    assert len({tuple(prompts) for prompts in found.values()}) == len(KEYS)
    assert sum(make_prompts(captions, key, EVERYTHING, 4) == found[key] for key in KEYS) == 0


def test_prompts_stay_what_they_are_from_version_to_version():
    """Otherwise a cache made before would differ from one made now, under the same recipe."""
    assert make_prompts((TAGS, "a {cat|dog}, {big|small}"), "a.png", EVERYTHING, 0) == [
        "sks: girl, red hair, outdoors, tree, hat",
        "a photo of a cat, big",
        "sks: girl, smile, outdoors, hat, red hair, tree",
        "a photo of a dog",
        "sks: girl, smile, hat, tree",
    ]


def test_one_prompt_is_the_captions_own_or_the_line_that_seed_and_key_choose():
    assert of(("first", "second")) == ["first"]
    assert of(("",)) == [""]
    template = load_template("subject_filewords")
    for key in KEYS:
        assert of(("x",), key, 7, template=template, placeholder="sks") == [make_prompt(template, "x", "sks", 7, key)]


def test_captions_come_in_turn():
    assert of(("a", "b", "c"), prompts_per_image=7) == ["a", "b", "c", "a", "b", "c", "a"]
    assert of(("a", "b", "c"), prompts_per_image=2) == ["a", "b"]


def test_lines_of_a_template_come_in_turn_from_one_that_the_key_chooses():
    template = tuple(f"{n} [filewords]" for n in range(6))
    starts = Counter()
    for key in KEYS * 10:
        lines = [int(prompt.split()[0]) for prompt in of(("x",), key, template=template, prompts_per_image=8)]
        assert lines == [(lines[0] + k) % 6 for k in range(8)]
        starts[lines[0]] += 1
    assert len(starts) == 6
    for count in range(1, 7):
        assert len(set(of(("x",), template=template, prompts_per_image=count))) == count


def test_shuffling_keeps_all_tags_and_the_first_in_their_place():
    found = of((TAGS,), shuffle_tags=True, keep_tags=2, prompts_per_image=24 * 8)
    assert all(prompt.startswith("girl, red hair, ") for prompt in found)
    assert {tuple(sorted(prompt.split(", "))) for prompt in found} == {tuple(sorted(TAGS.split(", ")))}
    assert len(set(found)) == 24  # every order of the other four


def test_tags_are_left_out_as_often_as_asked_for():
    assert of((TAGS,), tag_drop_out=1.0) == [""]
    assert of((TAGS,), tag_drop_out=1.0, keep_tags=1) == ["girl"]
    assert of((TAGS, " a ,b"), tag_drop_out=0.0, prompts_per_image=2) == [TAGS, " a ,b"]  # not even spaces change
    found = of((TAGS,), tag_drop_out=0.25, keep_tags=1, prompts_per_image=2000)
    kept = [prompt.split(", ") for prompt in found]
    assert abs(np.mean([len(tags) - 1 for tags in kept]) / 5 - 0.75) < 0.02
    order = TAGS.split(", ")
    assert all(tags == [tag for tag in order if tag in tags] for tags in kept)  # dropped, and not shuffled


@pytest.mark.parametrize(
    ("text", "outcomes"),
    [
        ("plain | text", {"plain | text"}),
        ("a {red|blue|} cat", {"a red cat", "a blue cat", "a  cat"}),
        ("{a|b}{c|d}", {"ac", "ad", "bc", "bd"}),
        ("{a|{b|c} x|{d}}", {"a", "b x", "c x", "d"}),
        ("{{{a|b}|c}|d}", {"a", "b", "c", "d"}),
        ("{} {x}", {" x"}),
        ("a { b | c", {"a { b | c"}),
        ("a } b {", {"a } b {"}),
        ("{ {a|b}", {"{ a", "{ b"}),
        ("{a|b} } :}", {"a } :}", "b } :}"}),
    ],
)
def test_wildcards_become_one_of_their_parts(text, outcomes):
    random = np.random.default_rng(0)
    assert {expand_wildcards(text, random) for _ in range(200)} == outcomes
    assert set(of((text,), wildcards=True, prompts_per_image=200)) == outcomes
    assert of((text,)) == [text]  # only when asked for


def test_each_part_is_as_likely_as_the_others():
    counts = Counter(of(("{a|b|c}",), wildcards=True, prompts_per_image=6000))
    assert all(abs(count / 6000 - 1 / 3) < 0.02 for count in counts.values())


def test_wildcards_within_wildcards_are_read_100_levels_deep():
    random = np.random.default_rng(0)
    assert expand_wildcards("{" * 100 + "a" + "}" * 100, random) == "a"
    assert expand_wildcards("{" * 30_000 + "a" + "}" * 30_000, random) == "{" * 29_900 + "a" + "}" * 29_900


def test_wildcards_of_the_caption_come_before_its_tags_and_those_of_the_line_leave_the_caption_alone():
    found = of(("{x, y|z}, w",), wildcards=True, tag_drop_out=0.5, prompts_per_image=200)
    assert set(found) == {"x, y, w", "x, y", "x, w", "y, w", "x", "y", "z, w", "z", "w", ""}
    options = {"template": ("{in|out}: [filewords] by [name]",), "placeholder": "{me|you}", "wildcards": True}
    found = of(("title | site :{",), **options, prompts_per_image=200)
    assert set(found) == {f"{where}: title | site :{{ by {who}" for where in ("in", "out") for who in ("me", "you")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_image": 0}, "--prompts-per-image 0: must be at least 1."),
        ({"tag_drop_out": 1.5}, "--tag-drop-out 1.5: a probability, expected 0 to 1."),
        ({"tag_drop_out": float("nan")}, "--tag-drop-out nan: a probability"),
        ({"keep_tags": -1, "shuffle_tags": True}, "--keep-tags -1: must be at least 0."),
        ({"keep_tags": 2}, "--keep-tags 2: nothing is shuffled or dropped. Give --shuffle-tags or --tag-drop-out."),
    ],
)
def test_what_makes_no_sense_is_refused(options, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TextOptions(**options)


def test_the_recipe_holds_the_seed_only_where_it_counts():
    def recipe(seed, **options):
        return TextRecipe.of(
            text_encoder="x", settings={}, options=TextOptions(**options), seed=seed, dtype="float32",
            store_dtype="float16",
        )  # fmt: skip

    for options in ({}, {"prompts_per_image": 3}, {"caption_lines": True}, {"keep_tags": 0, "tag_drop_out": 0}):
        assert recipe(1, **options) == recipe(2, **options)
    choices = ({"template": ("a",)}, {"shuffle_tags": True}, {"tag_drop_out": 0.1}, {"wildcards": True})
    for options in (*choices, {"shuffle_tags": True, "keep_tags": 1}):
        assert recipe(1, **options).seed == 1
    made = [json.dumps(recipe(1, **options).to_json()) for options in ({}, {"prompts_per_image": 2}, *choices)]
    assert len(set(made)) == len(made)


# --- through the command line, and read again

SEVERAL = ("--caption-lines", "--prompts-per-image", 3, "--template", "style_filewords", "--placeholder", "sks",
           "--shuffle-tags", "--tag-drop-out", 0.2, "--wildcards", "--shard-size", "60kB")  # fmt: skip


@pytest.fixture
def captioned(images):
    """Images of which two have several captions."""
    (images / "tall0.txt").write_text(f"{TAGS}\n\na {{cat|dog}}, sitting\n", encoding="utf-8")
    (images / "tall1.txt").write_text("one, two\nthree, four\nfive, six\nseven, eight\n", encoding="utf-8")
    return images


def texts_of(cache):
    storage = Storage(cache)
    return [e.open_text(storage) for e in open_manifest(storage).shards]


def test_every_distinct_prompt_is_encoded_once_and_stored_once_a_shard(run, captioned, tmp_path, encoded):
    result = run("encode", captioned, "--out", tmp_path / "c", *SMALL, *SEVERAL)
    assert result.code == 0
    texts = texts_of(tmp_path / "c")
    assert len(texts) > 1
    done = [prompt for call in encoded for prompt in call]
    assert sorted(done) == sorted({prompt for text in texts for prompt in text.prompt} | {""})
    for text in texts:
        assert len(set(text.prompt)) == len(text.prompt)
        used = np.concatenate([group.prompt_of for group in text.groups])
        assert used.shape == (sum(map(len, text.groups)), 3)
        assert set(used.flatten().tolist()) == set(range(len(text.prompt)))
    assert f"and {sum(map(len, encoded))} prompts in" in result.out
    assert "8 images with 3 prompts each, " in result.out
    # captions and template that are the same for all cost one prompt, however many are asked for
    encoded.clear()
    run("encode", captioned, "--out", tmp_path / "d", *SMALL, "--template", "none", "--prompts-per-image", 9)
    assert sorted(map(sorted, encoded)) == [[""], sorted(load_template("none"))]


def test_reading_gives_every_prompt_over_the_epochs_with_the_cond_of_the_encoder(run, captioned, tmp_path):
    assert run("encode", captioned, "--out", tmp_path / "c", *SMALL, *SEVERAL, "--store-dtype", "float32").code == 0
    options = TextOptions(
        load_template("style_filewords"),
        "sks",
        prompts_per_image=3,
        shuffle_tags=True,
        tag_drop_out=0.2,
        wildcards=True,
    )
    data = LatentDataset(tmp_path / "c")
    assert {data.key(n): data.caption(n) for n in range(8)}["tall0.png"] == [TAGS, "a {cat|dog}, sitting"]
    tokenizer = CLIPTokenizer.from_pretrained(TINY / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(TINY / "text_encoder").float().eval()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for epoch in range(25):
        data.set_epoch(epoch)
        for n in range(8):
            batch = data[n]
            found.setdefault(data.key(n), {})[batch.cond_text[0]] = batch.cond["prompt_embeds"][0]
    assert len(found) == 8
    for n in range(8):
        own = found[data.key(n)]
        assert own.keys() == set(make_prompts(data.caption(n), data.key(n), options, 0))
        assert data.key(n) not in ("tall0.png", "tall1.png") or len(own) == 3
        ids = tokenizer(list(own), padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        with torch.inference_mode():
            wanted = encoder(ids)[0]
        assert torch.allclose(torch.stack(list(own.values())), wanted, atol=1e-5)


@pytest.mark.parametrize("change", ["captions", "K", "seed", "options"])
def test_a_change_of_prompts_writes_text_files_only(run, captioned, tmp_path, change, encoded):
    before_options = after_options = SEVERAL
    if change == "K":
        after_options = (*SEVERAL, "--prompts-per-image", 4)
    elif change == "seed":
        after_options = (*SEVERAL, "--seed", 1)
    elif change == "options":
        after_options = (*SEVERAL, "--tag-drop-out", 0, "--keep-tags", 1)
    assert run("encode", captioned, "--out", tmp_path / "c", *SMALL, *before_options).code == 0
    before, known = files(tmp_path / "c" / "shards"), {p for text in texts_of(tmp_path / "c") for p in text.prompt}
    encoded.clear()
    if change == "captions":
        (captioned / "tall1.txt").write_text("one, two\nthree, four\nnine, ten\n", encoding="utf-8")
    planned = run("encode", captioned, "--out", tmp_path / "c", *SMALL, *after_options, "--dry-run").out
    encoded.clear()
    result = run("encode", captioned, "--out", tmp_path / "c", *SMALL, *after_options)
    assert result.code == 0
    after = files(tmp_path / "c" / "shards")
    assert {n: d for n, d in before.items() if ".latents." in n} == {n: d for n, d in after.items() if ".latents." in n}
    assert {n for n in before if ".text." in n} != {n for n in after if ".text." in n}
    done = [prompt for call in encoded for prompt in call]
    wanted = {p for text in texts_of(tmp_path / "c") for p in text.prompt}
    assert set(done) | known >= wanted  # what was there already is taken over
    assert len(done) < sum(len(text.prompt) for text in texts_of(tmp_path / "c"))
    count = 4 if change == "K" else 3
    assert re.findall(rf"^prompts: {count} per image, (\d+) to encode$", planned, re.MULTILINE) == [str(len(done))]
    assert "nothing to do" in run("encode", captioned, "--out", tmp_path / "c", *SMALL, *after_options).out
    assert run("verify", tmp_path / "c", "--source", captioned).code == 0


def test_plain_captions_do_not_depend_on_the_seed(run, captioned, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, "--caption-lines", "--prompts-per-image", 2)
    assert run("encode", captioned, *options).code == 0
    assert "nothing to do" in run("encode", captioned, *options, "--seed", 5).out


@pytest.mark.parametrize("phase", ["first", "new prompts"])
def test_an_interrupted_run_ends_as_an_undisturbed_one(run, captioned, tmp_path, phase, monkeypatch):
    options = ("--out", tmp_path / "c", *SMALL, *SEVERAL)
    if phase == "new prompts":
        assert run("encode", captioned, *options, "--prompts-per-image", 1).code == 0
    encode, calls = TextEncoder.encode, []

    def stop(self, prompts):
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return encode(self, prompts)

    with monkeypatch.context() as patch:
        patch.setattr(TextEncoder, "encode", stop)
        assert run("encode", captioned, *options).code == 130
    assert run("encode", captioned, *options).code == 0
    assert run("encode", captioned, "--out", tmp_path / "whole", *options[2:]).code == 0
    if phase == "first":
        assert files(tmp_path / "c") == files(tmp_path / "whole")
    else:  # units are cut by what rows cost, so a cache that began with fewer prompts has larger shards
        found, wanted = (prompts_by_key(tmp_path / name) for name in ("c", "whole"))
        assert found == wanted
    assert run("verify", tmp_path / "c", "--source", captioned).code == 0


def prompts_by_key(cache):
    return {
        key: [text.prompt[n] for n in numbers]
        for text in texts_of(cache)
        for group in text.groups
        for key, numbers in zip(group.key, group.prompt_of.tolist(), strict=True)
    }


def test_compact_keeps_the_prompts_of_every_row(run, captioned, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, *SEVERAL)
    assert run("encode", captioned, *options).code == 0
    before = prompts_by_key(tmp_path / "c")
    (captioned / "tall0.png").unlink()
    (captioned / "wide1.png").unlink()
    (captioned / "tall3.txt").write_text("other tags, of it")
    assert run("encode", captioned, *options).code == 0
    assert run("compact", tmp_path / "c", "--min-share", 0).code == 0
    after = prompts_by_key(tmp_path / "c")
    assert after.keys() == before.keys() - {"tall0.png", "wide1.png"} == rows(tmp_path / "c").keys()
    assert {key for key in after if after[key] != before[key]} == {"tall3.png"}
    assert "nothing to do" in run("encode", captioned, *options).out


def test_the_dry_run_counts_what_is_encoded(run, captioned, tmp_path, encoded):
    options = ("encode", captioned, "--out", tmp_path / "c", *SMALL, *SEVERAL)
    planned = run(*options, "--dry-run").out
    encoded.clear()
    assert run(*options).code == 0
    count = sum(map(len, encoded))  # with the empty one
    assert f"prompts: 3 per image, {count} to encode\n" in planned
    assert "prompts: 3 per image\n" in run(*options, "--dry-run").out


def test_prompts_that_cannot_differ_are_said(run, images, tmp_path):
    options = ("encode", images, "--out", tmp_path / "c", *SMALL, "--dry-run")
    said = "the 2 prompts of an image are all its one caption, since nothing varies it (--template, --shuffle-tags"
    assert said in run(*options, "--prompts-per-image", 2).err
    assert said not in run(*options, "--prompts-per-image", 2, "--shuffle-tags").err
    assert "prompts of an image" not in run(*options).err


def test_inspect_shows_every_caption_and_prompt(run, captioned, tmp_path):
    assert run("encode", captioned, "--out", tmp_path / "c", *SMALL, *SEVERAL).code == 0
    found = json.loads(run("inspect", tmp_path / "c", "--key", "tall1.png", "--json").out)
    assert found["caption"] == ["one, two", "three, four", "five, six", "seven, eight"]
    assert len(found["prompt"]) == len(found["tokens"]) == 3
    shown = run("inspect", tmp_path / "c", "--key", "tall1.png").out
    assert re.search(r"^caption +one, two *\n +three, four *\n +five, six *\n +seven, eight *\n", shown, re.MULTILINE)


def test_wildcards_at_read_time(run, images, tmp_path):
    (images / "tall0.txt").write_text("a {cat|dog} | x")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    (tmp_path / "lines.txt").write_text("{one|two}: [filewords]")
    plain = LatentDataset(tmp_path / "c", wildcards=True, include_cond=False)
    data = LatentDataset(tmp_path / "c", wildcards=True, template=tmp_path / "lines.txt", include_cond=False)
    (index,) = [n for n in range(8) if data.key(n) == "tall0.png"]
    found = set()
    for epoch in range(40):
        plain.set_epoch(epoch)
        data.set_epoch(epoch)
        found |= {plain[index].cond_text[0], data[index].cond_text[0]}
    drawn = {f"a {animal} | x" for animal in ("cat", "dog")}
    assert found == drawn | {f"{number}: {text}" for number in ("one", "two") for text in drawn}
    with pytest.raises(UserError, match="wildcards make prompts anew, which the stored cond does not fit"):
        LatentDataset(tmp_path / "c", wildcards=True)


def test_no_caption_is_an_empty_one():
    assert make_prompts((), "a.png", TextOptions(), 0) == [""]
    assert make_prompts((), "a.png", TextOptions(("a [filewords]",)), 0) == ["a "]
