"""Files of options, and caches that know theirs: --options, --again, and a .toml in the place of a source."""

import json

import pytest

import latentprep
from latentprep import UserError
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage

TOP = 'model = "tiny"\nresolution = 64\nbucket-step = 32\nmin_side = 32\ndevice = "cpu"\n'


@pytest.fixture
def desk(images, monkeypatch):
    monkeypatch.chdir(images.parent)
    return images.parent


def geometry(cache):
    return open_manifest(Storage(cache)).recipe.latents.geometry


def test_a_file_gives_options_and_the_command_line_counts_first(run, desk):
    (desk / "o.toml").write_text(f"{TOP}flip = true\nexclude = ['wide*']\n", encoding="utf-8")
    result = run("encode", "images", "--options", "o.toml", "--out", "c", "--bucket-step", 16, "--min-side", 16)
    assert result.code == 0, result.err
    manifest = open_manifest(Storage("c"))
    assert (geometry("c").resolution, geometry("c").bucket_step) == (64, 16)
    assert (manifest.recipe.latents.views, manifest.num_images) == (("plain", "flipped"), 4)


def test_what_is_typed_counts_even_if_it_is_the_default(run, desk):
    (desk / "o.toml").write_text(f"{TOP}store = 'mean'\n", encoding="utf-8")
    assert run("encode", "images", "--options", "o.toml", "--out", "c", "--store", "mean+std").code == 0
    assert open_manifest(Storage("c")).recipe.latents.store == "mean+std"
    assert latentprep.encode("images", "p", options="o.toml", store="mean+std", progress=False).ok
    assert open_manifest(Storage("p")).recipe.latents.store == "mean+std"


def test_a_file_may_name_its_source_and_paths_begin_at_the_file(run, desk):
    (desk / "jobs").mkdir()
    (desk / "lines.txt").write_text("seen [filewords]\n", encoding="utf-8")
    text = f'{TOP}source = "../images"\nout = "../made"\ntemplate = "../lines.txt"\n'
    (desk / "jobs/job.toml").write_text(text, encoding="utf-8")
    assert run("encode", "jobs/job.toml").code == 0
    data = latentprep.LatentDataset("made")
    assert data.num_images == 8
    assert latentprep.verify("made", source="jobs/job.toml", progress=False).ok
    assert all(prompt.startswith("seen ") for batch in latentprep.LatentLoader(data, 4) for prompt in batch.cond_text)


def test_a_cache_is_made_again_without_typing_anything(run, desk, monkeypatch):
    options = ["--model", "tiny", "--resolution", 64, "--bucket-step", 32, "--min-side", 32, "--device", "cpu"]
    assert (
        run("encode", "images", "--out", "c", *options, "--flip", "--exclude", "wide1*", "--trigger", "sks").code == 0
    )
    (desk / "images/tall0.txt").write_text("another", encoding="utf-8")
    (desk / "elsewhere").mkdir()
    monkeypatch.chdir(desk / "elsewhere")
    result = run("encode", "--again", "../c")
    assert result.code == 0, result.err
    assert "1 caption" in result.out
    assert "../c is complete with 7 images; nothing to do" in run("encode", "--again", "../c").out
    changed = run("encode", "--again", "../c", "--trigger", "xyz")  # another one, and it is remembered
    assert "the text of 7 images is written anew" in changed.out
    assert "nothing to do" in run("encode", "--again", "../c").out
    assert open_manifest(Storage("../c")).made_with.again["trigger"] == "xyz"


def test_a_file_counts_before_what_the_cache_remembers_and_a_typed_size_replaces_all_of_them(run, desk):
    (desk / "fixed.toml").write_text('model = "tiny"\nwidth = 64\nheight = 64\ndevice = "cpu"\n', "utf-8")
    assert run("encode", "images", "--options", "fixed.toml", "--trigger", "old", "--out", "c").code == 0
    (desk / "new.toml").write_text('trigger = "new"\n', "utf-8")
    assert run("encode", "--again", "c", "--options", "new.toml").code == 0
    data = latentprep.LatentDataset("c")
    assert all(data.caption(n)[0].startswith("new") for n in range(len(data)))
    for command in (("images", "--options", "fixed.toml", "--out", "d"), ("--again", "c", "--out", "e")):
        assert run("encode", *command, "--resolution", 96, "--bucket-step", 32).code == 0
        assert geometry(command[-1]).mode == "buckets"


def test_flags_of_one_call_are_not_remembered(desk):
    small = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "device": "cpu", "progress": False}
    latentprep.encode("images", "c", **small, overwrite=True, retry_skipped=True, check_content=True, allow_gone=True)
    again = open_manifest(Storage("c")).made_with.again
    wanted = {"source": str(desk / "images"), **{name: small[name] for name in small if name != "progress"}}
    assert again == wanted
    assert latentprep.encode(again="c", progress=False).num_encoded == 0


def test_the_recipe_of_another_cache_is_refused_by_options(run, desk):
    (desk / "o.toml").write_text(TOP, encoding="utf-8")
    assert run("encode", "images", "--options", "o.toml", "--out", "c").code == 0
    command = ("encode", "images", "--options", "o.toml", "--out", "c")
    result = run(
        *command, "--flip", "--no-upscale", "--crop", "focus", "--crops", 2,
        "--background", "white", "--store", "mean", "--no-draft",
    )  # fmt: skip
    assert result.code == 1
    for words in (
        "--flip: no -> yes; --crops 1 -> 2; ", "--no-upscale: no -> yes", "--crop center -> focus",
        "--background auto -> #ffffff", "--store mean+std -> mean", "--no-draft: no -> yes", "(--again c has them)",
    ):  # fmt: skip
        assert words in result.err, words
    result = run("encode", "images", "--options", "o.toml", "--out", "c", "--width", 64, "--height", 32)
    assert "--width, --height none -> 64x32" in result.err


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("resolution = ", "o.toml: not TOML (Invalid value"),
        ("resolutoin = 64", "o.toml: resolutoin: no such key. Did you mean resolution?"),
        ("resolution = true", "o.toml: resolution=True: expected"),
        ("flip = 'yes'", "o.toml: flip='yes': expected True or False."),
        ("[[set]]\nsource = 'images'", "o.toml: set: no such key."),
        ("dry_run = true", "o.toml: dry_run: is for one call. Type it"),
        ("dry-run = true", "o.toml: dry-run: is for one call. Type it"),
        ("min_side = 64\nmin-side = 64", "min_side: stands there twice, with - and with _"),
        (f"max_side = {2**400}", "--max-side 2.582e+120: expected at most 1,048,576 pixels"),
        (f"prompts_per_image = {10**12}", "prompts_per_image=1000000000000: expected at most 10,000"),
        ("max_megapixels = 1e308", "--max-megapixels 1e+308: expected a number"),
        ("crops = 0", "crops"),
    ],
)
def test_a_wrong_file_is_one_line_that_names_it(run, desk, text, words):
    (desk / "o.toml").write_text(text, encoding="utf-8")
    result = run("encode", "images", "--options", "o.toml", "--out", "c")
    assert result.code == 1
    assert words in result.err
    assert result.err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("model = 'tiny'", "expected [[set]] tables, each with a source"),
        ("source = 'images'\n[[set]]\nsource = 'images'", "expected [[set]] tables, each with a source"),
        ("[set]\nsource = 'images'", "set: expected [[set]] tables, in double brackets"),
        ("[[sets]]\nsource = 'images'", "sets: no such key. Did you mean set?"),
        ("source = ['images']", "source = ['images']: expected a folder. Several are [[set]] tables."),
        ("source = 3", "source = 3: expected a folder"),
        ("[[set]]\nsource = 'images'\ntrigger = '~nobody x'\nrepeats = 0", "set images: repeats = 0"),
        ("[[set]]\nsource = 'images'\nrepeat = 2", "[[set]] 1: repeat: no such key. Did you mean repeats?"),
        ("[[set]]\nname = 'x'", "set x: source: expected a folder"),
    ],
)
def test_a_wrong_file_of_sets_is_one_line_that_names_it(run, desk, text, words):
    (desk / "s.toml").write_text(text, encoding="utf-8")
    result = run("encode", "s.toml", "--model", "tiny")
    assert result.code == 1
    assert words in result.err
    assert result.err.count("\n") == 1, result.err
    assert not (desk / "s.latents").exists()


@pytest.mark.parametrize("caption", ["photos", "~nobody x", "a long caption, " * 20])
def test_a_caption_is_never_taken_for_a_path(run, desk, caption):
    (desk / "photos").mkdir()
    (desk / "s.toml").write_text(f'{TOP}[[set]]\nsource = "images"\ndefault_caption = "{caption}"\n', "utf-8")
    wide = lambda cache: latentprep.LatentDataset(cache).select("*/wide0.png").caption(0)  # noqa: E731
    assert run("encode", "s.toml", "--out", "c").code == 0
    assert wide("c") == [caption.strip()]
    assert run("encode", "images", "--options", "o.toml").code == 1
    (desk / "o.toml").write_text(TOP, "utf-8")
    assert run("encode", "images", "--options", "o.toml", "--default-caption", caption, "--out", "d").code == 0
    assert "nothing to do" in run("encode", "--again", "d").out


@pytest.mark.parametrize("word", ["alpha", "none"])
def test_words_of_ours_are_no_paths(run, desk, word):
    (desk / "jobs" / word).mkdir(parents=True)
    text = f'{TOP}[[set]]\nsource = "../images"\nweights = "{word}"\n'
    (desk / "jobs/s.toml").write_text(text, "utf-8")
    result = run("encode", "jobs/s.toml", "--out", "c")
    assert result.code == 0, result.err
    assert open_manifest(Storage("c")).recipe.latents.images.weights == word


def test_another_source_is_not_typed_to_what_a_file_made(run, desk):
    (desk / "s.toml").write_text(f'{TOP}[[set]]\nsource = "images"\n', "utf-8")
    assert run("encode", "s.toml").code == 0
    result = run("encode", "images", "--again", "s.latents")
    assert f"--again s.latents: was made from {desk / 's.toml'}. Edit that, and give no SOURCE." in result.err


def test_errors_in_python_hold_no_escapes(desk):
    odd = "a\x1b[31m"
    for arguments in ({"source": odd}, {"source": "images", "model": odd}, {"source": [{"source": odd, "name": "x"}]}):
        with pytest.raises(UserError) as caught:
            latentprep.encode(**arguments, progress=False)
        assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("no.toml",), "SOURCE no.toml: cannot be read (No such file or directory)"),
        (("images", "--options", "no.toml"), "--options no.toml: cannot be read"),
        ((), "SOURCE: is missing. Give a folder of images, a .toml file of sets, or --again CACHE."),
        (("--again", "images"), "--again images: images: not a latent cache"),
        (("images", "--options", "/dev/zero"), "--options /dev/zero: not a file"),
    ],
)
def test_what_is_not_there_is_one_line(run, desk, arguments, words):
    result = run("encode", *arguments)
    assert result.code == 1
    assert words in result.err


@pytest.mark.parametrize(
    ("again", "words"),
    [
        ({}, "it does not know the options it was made with"),
        ({"source": "images", "flop": True}, "made with flop, which this latentprep does not know"),
        ({"source": "images", "flip": "yes"}, "flip='yes': expected True or False"),
        ({"source": "images", "progress": 3}, "made with progress"),
        ({"source": 3}, "expected a text or a path"),
        ({"source": [{"source": {}}]}, "source: expected a folder"),
        ({"source": "images", "weights": "\x1b[31mred"}, "[31mred"),
        ({"source": "a\0b"}, "can be no path"),
        ({"source": "\ud800"}, "can be no path"),
        ({"source": "images", "max_megapixels": 1e308}, "expected a number"),
    ],
)
def test_a_strangers_cache_cannot_ask_for_anything_odd(desk, again, words):
    small = {"model": "tiny", "resolution": 64, "device": "cpu", "progress": False}
    latentprep.encode("images", "c", **small)
    manifest = json.loads((desk / "c/cache.json").read_text())
    manifest["made_with"]["again"] = again
    from latentprep.cache.manifest import Manifest, msgspec, pack

    (desk / "c/cache.json").write_bytes(pack(msgspec.convert(manifest, Manifest)))
    with pytest.raises(UserError) as caught:
        latentprep.encode(again="c", progress=False)
    assert words in str(caught.value)
