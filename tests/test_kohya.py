"""kohya's files: each key of a dataset.toml becomes an option or is said, and folders of `10_sks dog` are sets."""

import json
import shutil
from collections import Counter
from pathlib import Path

import pytest

import latentprep
from latentprep import LatentDataset, LatentLoader, UserError
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.kohya.dataset_toml import read_dataset_config
from latentprep.kohya.folders import list_folders
from latentprep.kohya.keys import NO_EQUIVALENT, OF_DATASET, OF_SUBSET, OF_SUBSET_ALONE
from latentprep.options import TextOptions
from latentprep.prepare.source.kohya_metadata import make_captions
from tests.test_sets import count_epoch, draw

SMALL = {"model": "tiny", "device": "cpu", "progress": False}
# what sd-scripts' library/config_util.py takes (its commit 48d368f), of ControlNet and fine-tuning too
SD_SCRIPTS = {
    "color_aug", "face_crop_aug_range", "flip_aug", "num_repeats", "random_crop", "shuffle_caption", "keep_tokens",
    "keep_tokens_separator", "secondary_separator", "caption_separator", "enable_wildcard", "token_warmup_min",
    "token_warmup_step", "caption_prefix", "caption_suffix", "custom_attributes", "resize_interpolation",
    "caption_dropout_every_n_epochs", "caption_dropout_rate", "caption_tag_dropout_rate", "caption_extension",
    "class_tokens", "cache_info", "image_dir", "is_reg", "alpha_mask", "metadata_file", "conditioning_data_dir",
    "batch_size", "bucket_no_upscale", "bucket_reso_steps", "enable_bucket", "max_bucket_reso", "min_bucket_reso",
    "validation_seed", "validation_split", "resolution", "network_multiplier",
}  # fmt: skip


@pytest.fixture(autouse=True)
def desk(tmp_path, monkeypatch):
    """A folder with ./dog and ./a, of an image each."""
    for name in ("dog", "a"):
        draw(tmp_path / name / "0.png", "red")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def read(dataset=None, subset=None, general=None):
    """The only run of a file with one subset: its options, its set, and its notes."""
    table = {"datasets": [{"resolution": 512, "subsets": [{"image_dir": "dog", **(subset or {})}], **(dataset or {})}]}
    (run,) = read_dataset_config(Path("k.toml"), {"general": general or {}, **table})
    return run.options, run.sets[0], run.notes


def test_every_key_of_sd_scripts_is_known():
    known = {*OF_SUBSET, *OF_SUBSET_ALONE, *OF_DATASET, *NO_EQUIVALENT}
    assert known == SD_SCRIPTS | {"debug_dataset", "skip_image_resolution"}


# key, value, and what comes of it: of the run, or of the set
BUCKETS = {"enable_bucket": True}
OPTIONS = [
    ({"resolution": 768}, {"width": 768, "height": 768}),
    ({"resolution": [768, 512]}, {"width": 768, "height": 512}),
    ({"resolution": 768, **BUCKETS}, {"resolution": 768, "bucket_step": 64, "min_side": 256, "max_side": 1024}),
    ({"resolution": [768, 512], **BUCKETS}, {"resolution": "768x512"}),
    ({"bucket_reso_steps": 32, **BUCKETS}, {"bucket_step": 32}),
    ({"min_bucket_reso": 330, **BUCKETS}, {"min_side": 320}),
    ({"max_bucket_reso": 1000, **BUCKETS}, {"max_side": 1024, "max_aspect": 4.0}),
    ({"bucket_no_upscale": True, **BUCKETS}, {"resolution": 512, "no_upscale": True, "bucket_step": 64}),
    ({"flip_aug": True}, {"flip": True}),
    ({"flip_aug": False}, {"flip": False}),
    ({"random_crop": True}, {"crop": "random"}),
    ({"resize_interpolation": "area"}, {"filter": "box"}),
    ({}, {"weights": "none"}),
]
SETS = [
    ({}, {"repeats": 1, "first_line": True}),
    ({"num_repeats": 10}, {"repeats": 10}),
    ({"caption_extension": ".txt"}, {"caption_extension": ".txt"}),
    ({"class_tokens": "sks dog"}, {"default_caption": "sks dog"}),
    ({"caption_prefix": "a"}, {"caption_prefix": "a"}),
    ({"caption_suffix": "b"}, {"caption_suffix": "b"}),
    ({"shuffle_caption": True, "keep_tokens": 2}, {"shuffle_tags": True, "keep_tags": 2}),
    ({"caption_tag_dropout_rate": 0.1, "keep_tokens": 1}, {"tag_drop_out": 0.1, "keep_tags": 1}),
    ({"caption_dropout_rate": 0.2}, {"caption_dropout": 0.2}),
    ({"enable_wildcard": True}, {"wildcards": True, "caption_lines": True, "first_line": False}),
    ({"flip_aug": True}, {"flip": True}),
]


@pytest.mark.parametrize(("given", "wanted"), OPTIONS)
def test_keys_of_a_dataset_become_options(given, wanted):
    """Given in the dataset, and in [general] alike."""
    for options in (read(given)[0], read(general=given, dataset={"resolution": given.get("resolution", 512)})[0]):
        assert wanted.items() <= options.items()


@pytest.mark.parametrize(("given", "wanted"), SETS)
def test_keys_of_a_subset_become_options_of_a_set(given, wanted):
    """Given in the subset, its dataset, or in [general]; the nearest counts."""
    for own in (read(subset=given)[1], read(dataset=given)[1], read(general=given)[1]):
        assert wanted.items() <= own.items()
    farther = {"num_repeats": 99, "caption_prefix": "far", "class_tokens": "far"}
    own = read(general=farther, subset={"num_repeats": 2})[1]
    assert (own["repeats"], own["caption_prefix"], own["default_caption"]) == (2, "far", "far")


def test_a_set_says_nothing_of_flips_if_no_subset_does():
    assert "flip" not in read()[1]
    subsets = [{"image_dir": "dog", "flip_aug": True}, {"image_dir": "a"}]
    (run,) = read_dataset_config(Path("k.toml"), {"datasets": [{"resolution": 64, "subsets": subsets}]})
    assert [own["flip"] for own in run.sets] == [True, False]


def test_masks_and_regularization_are_of_the_subset_alone():
    assert read(subset={"alpha_mask": True})[0]["weights"] == "alpha"
    assert read(subset={"is_reg": True})[1]["repeats"] == "auto"
    with pytest.raises(UserError, match=r"\[general\]: is_reg: no such key"):
        read(general={"is_reg": True})


VALUES = {"validation_split": 0.1, "caption_separator": ";", "custom_attributes": {"a": 1}, "color_aug": True}


@pytest.mark.parametrize("name", sorted(NO_EQUIVALENT))
def test_what_has_no_equivalent_is_said_once_for_each_place(name):
    value = VALUES.get(name, 4)
    _, _, notes = read(dataset={name: value})
    assert [note for note in notes if note.startswith(f"{name} = ")] == list(notes)
    assert len(notes) == 1
    _, _, notes = read(dataset={name: value}, subset={name: value})
    assert len(notes) == 2
    assert "(subset 1)" in notes[1]
    _, _, notes = read(dataset={name: False if value is True else 0})  # switched off, as by default
    assert notes == ()


def table_of(dataset=None, **subset):
    return {"datasets": [{"resolution": 512, "subsets": [{"image_dir": "a", **subset}], **(dataset or {})}]}


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({"dataset": []}, "dataset: no such key. Did you mean datasets?"),
        ({"datasets": []}, "expected a table"),
        ({"datasets": [{"resolution": 512}]}, r"\[\[datasets\]\] 1: has no \[\[datasets.subsets\]\]"),
        ({"datasets": [{"subsets": [{"image_dir": "a"}]}]}, "1: resolution: is missing"),
        (table_of({"resolution": "512"}), "resolution = '512': expected a number"),
        (table_of({"subsets": [{}]}), "subset 1: has no image_dir. Give the folder."),
        (table_of(num_repeat=3), "Did you mean num_repeats"),
        (table_of(num_repeats="3"), "expected a whole number"),
        (
            table_of({"enable_bucket": True, "max_bucket_reso": 256}),
            "min_bucket_reso = 256 and max_bucket_reso = 256: the resolution 512x512 is to lie",
        ),
        (table_of(num_repeats=0), "none of its subsets"),
    ],
)
def test_what_sd_scripts_would_refuse_is_one_line(table, words):
    with pytest.raises(UserError, match=rf"^k.toml: .*{words}"):
        read_dataset_config(Path("k.toml"), table)


@pytest.fixture
def folders(tmp_path, monkeypatch):
    for n in range(4):
        draw(tmp_path / f"img/10_sks dog/{n}.png", (60 * n, 0, 0), caption=f"sks, tag a, tag {n}" if n < 2 else None)
        draw(tmp_path / f"img/2_cat/{n}.png", (0, 60 * n, 0))
        draw(tmp_path / f"reg/{n}.png", (0, 0, 60 * n))
    draw(tmp_path / "img/2_cat/below/not.png", "white")
    monkeypatch.chdir(tmp_path)
    return tmp_path


TOML = """
[general]
caption_extension = ".txt"
keep_tokens = 1

[[datasets]]
resolution = 64
batch_size = 2

  [[datasets.subsets]]
  image_dir = "img/10_sks dog"
  class_tokens = "sks dog"
  num_repeats = 3
  flip_aug = true

  [[datasets.subsets]]
  image_dir = "reg"
  is_reg = true
  class_tokens = "a dog"
"""


def test_a_dataset_toml_is_read_as_it_is(run, folders):
    (folders / "dataset.toml").write_text(TOML, encoding="utf-8")
    result = run("encode", "dataset.toml", "--model", "tiny", "--device", "cpu", "--out", "c")
    assert result.code == 0, result.err
    assert "note     batch_size = 2 is the loader's: LatentLoader(data, batch_size=2)\n" in result.err
    assert "captions: 2 from .txt, 6 by default\n" in result.err
    data = LatentDataset("c", flip_p=1.0)
    assert count_epoch(LatentLoader(data, 2)) == {
        f"{name}/{n}.png": 3 for name in ("10_sks dog", "reg") for n in range(4)
    }
    for batch in LatentLoader(data, 2):
        for n, index in enumerate(batch.index.tolist()):
            name, number = data.key(index).removesuffix(".png").split("/")
            own = f"sks, tag a, tag {number}" if int(number) < 2 else "sks dog"
            assert batch.cond_text[n] == (own if name != "reg" else "a dog")
            assert bool(batch.flipped[n]) == (name != "reg")
    assert run("verify", "c", "--source", "dataset.toml", "--re-encode", 8).code == 0
    assert "nothing to do" in run("encode", "--again", "c").out


LINES = TextOptions(caption_lines=True)


@pytest.mark.parametrize(
    ("options", "fields", "captions"),
    [
        (TextOptions(), {"caption": "a dog"}, ["a dog"]),
        (TextOptions(), {"tags": "x, y"}, ["x, y"]),
        (TextOptions(), {"caption": "a dog\nline two", "tags": "x, y"}, ["a dog"]),
        (TextOptions(), {"caption": "a dog", "tags": "x, y"}, ["a dog,x, y"]),
        (TextOptions(), {}, [""]),
        (LINES, {"caption": "a dog\nline two", "tags": "x\ny"}, ["a dog,x,y", "line two,x,y"]),
        (LINES, {"tags": "x"}, ["x"]),
    ],
)
def test_caption_and_tags_are_joined_as_sd_scripts_joins_them(options, fields, captions):
    assert make_captions(Path("meta.json"), "a.png", fields, options) == captions


@pytest.mark.parametrize("name", ["absolute", "0.png", "0"])
@pytest.mark.parametrize("kind", ["json", "jsonl"])
def test_metadata_of_fine_tuning_captions_its_images_and_no_others(folders, name, kind):
    image = str(folders / "reg/0.png") if name == "absolute" else name
    meta = {"json": {image: {"tags": "x, y"}, "gone.png": {}}, "jsonl": {"image_path": image, "tags": "x, y"}}[kind]
    (folders / f"meta.{kind}").write_text(json.dumps(meta) + "\n", encoding="utf-8")
    subset = f'[[datasets.subsets]]\nimage_dir = "reg"\nmetadata_file = "meta.{kind}"\ncaption_prefix = "pre"\n'
    (folders / "k.toml").write_text(f"[[datasets]]\nresolution = 64\n{subset}", encoding="utf-8")
    assert latentprep.encode("k.toml", "c", **SMALL).ok
    data = LatentDataset("c")
    assert [data.key(n) for n in range(len(data))] == ["reg/0.png"]
    assert data.caption(0) == ["pre x, y"]


@pytest.mark.parametrize("text", ["[]", "{", "{}", '{"a.png": 3}', '{"a.png": {"caption": 3}}', "[" * 10**5])
def test_broken_metadata_is_one_line(folders, text):
    (folders / "meta.json").write_text(text, encoding="utf-8")
    table = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "reg"\nmetadata_file = "meta.json"\n'
    (folders / "k.toml").write_text(table, encoding="utf-8")
    with pytest.raises(UserError, match=r"^set reg: .*meta.json: "):
        latentprep.encode("k.toml", **SMALL)


@pytest.mark.slow
def test_several_datasets_are_a_cache_each(run, folders):
    second = '\n[[datasets]]\nresolution = [96, 64]\n  [[datasets.subsets]]\n  image_dir = "reg"\n'
    (folders / "dataset.toml").write_text(TOML + second + second, encoding="utf-8")
    result = run("encode", "dataset.toml", "--model", "tiny", "--device", "cpu")
    assert result.code == 0, result.err
    assert sorted(path.name for path in (folders / "dataset.latents").iterdir()) == ["64x64", "96x64", "96x64-2"]
    assert LatentDataset("dataset.latents/96x64").buckets == [(4, 8, 12)]
    assert "[[datasets]] 2 of 3: dataset.latents/96x64" in result.err
    assert result.out.count("next     latentprep inspect") == 3
    once_more = run("encode", "--again", "dataset.latents/96x64")
    assert "dataset.latents/96x64 is complete with 4 images" in once_more.out
    planned = latentprep.encode("dataset.toml", "other", dry_run=True, **SMALL)
    done = latentprep.encode("dataset.toml", "other", **SMALL)
    assert planned.num_prompts == done.num_prompts == 4 + 1 + 2 * 2  # of the three, with the empty prompt of each
    both = latentprep.encode("dataset.toml", **SMALL)
    assert (both.cache, both.num_cached, both.num_encoded) == ("dataset.latents", 16, 0)
    assert run("verify", "dataset.latents/96x64", "--source", "dataset.toml").code == 0
    result = run("inspect", "dataset.latents")
    assert result.code == 1
    assert "it holds caches: 64x64, 96x64, 96x64-2" in result.err


def test_a_tree_of_kohyas_folders_is_sets(run, folders):
    result = run("encode", "img", "--model", "tiny", "--resolution", 64, "--device", "cpu")
    assert result.code == 0, result.err
    assert "2 folders named like kohya's: sets with repeats (--folders plain: just folders)" in result.err
    data = LatentDataset("img.latents")
    assert data.sets == ["10_sks dog", "2_cat"]
    wanted = {f"10_sks dog/{n}.png": 10 for n in range(4)} | {f"2_cat/{n}.png": 2 for n in range(4)}
    assert count_epoch(LatentLoader(data, 3)) == wanted | {"2_cat/below/not.png": 2}
    prompts = {data.key(n): data.caption(n) for n in range(data.num_images)}
    assert prompts["10_sks dog/0.png"] == ["sks, tag a, tag 0"]
    assert prompts["10_sks dog/3.png"] == ["sks dog"]
    assert prompts["2_cat/1.png"] == ["cat"]
    assert run("verify", "img.latents", "--source", "img").code == 0
    # other repeats are another name of the folder: nothing is encoded again
    (folders / "img/2_cat").rename(folders / "img/5_cat")
    result = run("encode", "--again", "img.latents")
    assert "5 renamed" in result.out
    assert Counter(LatentDataset("img.latents").key(n) for n in range(65))["5_cat/0.png"] == 5
    plain = latentprep.encode("img", "plain", folders="plain", resolution=64, **SMALL)
    assert plain.ok
    assert open_manifest(Storage("plain")).sets == ()


@pytest.mark.parametrize(
    ("names", "is_tree"),
    [
        (["10_sks dog"], True),
        (["1_a", "10_b"], True),
        (["100_a", "100_b"], True),
        (["1_a", "2_b", "3_c"], False),  # numbers that count
        (["01_a", "05_b"], False),
        (["2023_summer", "2024_winter"], False),
        (["10_a", "other"], False),
        (["a", "b"], False),
        (["0_a"], False),
    ],
)
def test_only_folders_that_cannot_mean_anything_else_are_taken_for_kohyas(tmp_path, names, is_tree):
    tree = tmp_path / "tree"
    for name in names:
        draw(tree / name / "0.png", "red")
    (tree / "log").mkdir()  # without images it is none of them
    sets, notes = list_folders(tree, "auto")
    assert bool(sets) == is_tree
    assert list_folders(tree, "plain") == ((), ())
    with_repeats = [name for name in sorted(names) if name[0].isdigit() and int(name.partition("_")[0])]
    if with_repeats:
        assert "log: left out, no images are in it" in notes if is_tree else "--folders kohya makes them" in notes[0]
        draw(tree / "top.png", "red")
        assert list_folders(tree, "auto")[0] == ()
        assert "with 1 image beside them: plain folders for now" in list_folders(tree, "auto")[1][0]
        asked, notes = list_folders(tree, "kohya")
        assert [own["name"] for own in asked] == with_repeats
        assert "1 image beside the folders left out, such as top.png" in notes


def test_the_folder_above_is_told_which_one_holds_them(tmp_path):
    draw(tmp_path / "up/img/10_a/0.png", "red")
    draw(tmp_path / "up/reg/1_b/0.png", "red")
    sets, notes = list_folders(tmp_path / "up", "auto")
    assert sets == ()
    assert notes[0] == f"img holds folders such as kohya's. If you mean these, give {tmp_path / 'up/img'}"


def test_a_tree_stays_one_when_something_comes_beside_it(run, folders):
    assert run("encode", "img", "--model", "tiny", "--resolution", 64, "--device", "cpu").code == 0
    draw(folders / "img/cover.png", "red")
    result = run("encode", "--again", "img.latents")
    assert "1 image beside the folders left out, such as cover.png" in result.err
    assert len(LatentDataset("img.latents")) == 4 * 10 + 5 * 2


def test_a_file_means_the_same_wherever_one_is(run, folders, monkeypatch):
    """Folders beside the file count before those that one is in, and --again before both."""
    (folders / "conf").mkdir()
    shutil.copytree("reg", "conf/near")
    shutil.copytree("img/2_cat", "near")
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "{}"\n'
    (folders / "conf/near.toml").write_text(text.format("near"), encoding="utf-8")
    (folders / "conf/far.toml").write_text(text.format("reg"), encoding="utf-8")
    for name in ("near", "far"):
        assert run("encode", f"conf/{name}.toml", "--model", "tiny", "--device", "cpu", "--out", name + ".c").code == 0
    shutil.copytree("img/2_cat", "elsewhere/reg")
    monkeypatch.chdir("elsewhere")
    for name, place in (("near", "conf/near"), ("far", "reg")):
        result = run("encode", "--again", f"../{name}.c")
        assert "nothing to do" in result.out
        assert f"({folders / place})" in result.err


def test_captions_that_a_file_does_not_speak_of_may_be_typed(run, folders):
    subset = '[[datasets.subsets]]\nimage_dir = "img/10_sks dog"\nclass_tokens = "words"\ncaption_prefix = "pre"\n'
    (folders / "k.toml").write_text(f"[[datasets]]\nresolution = 64\n{subset}", "utf-8")

    def captions(*options):
        result = run("encode", "k.toml", "--model", "tiny", "--device", "cpu", "--out", "c", *options)
        assert result.code == 0, result.err
        data = LatentDataset("c")
        return [data.caption(n)[0] for n in range(len(data))]

    assert captions() == ["pre words"] * 4  # sd-scripts looks for .caption
    of_files = [f"pre sks, tag a, tag {n}" for n in range(2)]
    assert captions("--caption-extension", ".txt") == of_files + ["pre words"] * 2
    assert captions("--caption-from", "folder", "--trigger", "xyz") == ["xyz, pre sks dog"] * 4
    assert captions("--exclude", "3.png", "--caption-prefix", "typed") == ["pre words"] * 3


def test_what_a_file_does_not_say_may_be_typed(run, folders):
    subset = '[[datasets.subsets]]\nimage_dir = "reg"\n'
    (folders / "k.toml").write_text(f"[[datasets]]\nenable_bucket = true\nmin_bucket_reso = 64\n{subset}", "utf-8")
    assert "--resolution 512, or write it into the file" in run("encode", "k.toml", "--model", "tiny").err
    result = run("encode", "k.toml", "--model", "tiny", "--device", "cpu", "--resolution", 64, "--out", "c")
    assert result.code == 0, result.err
    (folders / "f.toml").write_text(f"[[datasets]]\nresolution = 64\n{subset}", "utf-8")  # one size for all
    result = run("encode", "f.toml", "--model", "tiny", "--resolution", "96x64", "--bucket-step", 32, "--dry-run")
    assert "64x64" in result.out  # a bucket, and no fixed size any more
    assert "96x64" not in result.out


def test_subsets_without_images_are_left_out_and_folders_that_are_not_there_are_refused(run, folders):
    (folders / "empty").mkdir()
    text = "[[datasets]]\nresolution = 64\n" + "".join(
        f"[[datasets.subsets]]\nimage_dir = '{name}'\n" for name in ("empty", "reg", "./reg/", "img/2_cat")
    )
    (folders / "k.toml").write_text(text, encoding="utf-8")
    result = run("encode", "k.toml", "--model", "tiny", "--device", "cpu", "--out", "c")
    assert "note     empty: left out, no images are in it\n" in result.err
    assert "note     ./reg/: left out, an earlier subset has it too\n" in result.err
    assert "note     img/2_cat: folders below it are left out, since sd-scripts does not look into them\n" in result.err
    (folders / "k.toml").write_text(text.replace("'empty'", r"'C:\data\dogs'"), encoding="utf-8")
    result = run("encode", "k.toml", "--model", "tiny")
    assert f"subset 1: image_dir = 'C:\\\\data\\\\dogs': is not there. Looked in {folders}" in result.err
    (folders / "k.toml").write_text(text.replace("'empty'", '"p\\birds"'), encoding="utf-8")
    assert "has an escape in it" in run("encode", "k.toml", "--model", "tiny").err
    (folders / "k.toml").write_text(text.replace("'empty'", '"C:\\data"'), encoding="utf-8")
    assert "A path with \\ stands between single quotes" in run("encode", "k.toml", "--model", "tiny").err


def test_names_that_are_no_control_characters_are_names(folders):
    draw(folders / "犬\u3000写真/0.png", "red")  # with the space of Japanese
    subset = {"image_dir": "犬\u3000写真"}
    (run,) = read_dataset_config(Path("k.toml"), {"datasets": [{"resolution": 64, "subsets": [subset]}]})
    assert run.sets[0]["name"] == "犬\u3000写真"
    for name in ("~nobody/x", "x" * 5000):
        table = {"datasets": [{"resolution": 64, "subsets": [{"image_dir": name}]}]}
        with pytest.raises(UserError, match=r"is not there\. Looked in"):
            read_dataset_config(Path("k.toml"), table)


def test_folders_of_one_name_have_names_that_tell_them_apart(folders):
    for place in ("a/v1/x", "b/v1/x", "c/x"):
        draw(folders / place / "0.png", "red")
    subsets = [{"image_dir": place} for place in ("a/v1/x", "b/v1/x", "c/x", "reg")]
    (run,) = read_dataset_config(Path("k.toml"), {"datasets": [{"resolution": 64, "subsets": subsets}]})
    assert [own["name"] for own in run.sets] == ["a-v1-x", "b-v1-x", "c-x", "reg"]


def test_regularization_that_is_larger_is_said(run, folders):
    text = '[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = "a"\n'
    (folders / "k.toml").write_text(f'{text}[[datasets.subsets]]\nimage_dir = "reg"\nis_reg = true\n', "utf-8")
    result = run("encode", "k.toml", "--model", "tiny", "--device", "cpu")
    assert "note     set reg has 4 images, more than the 1 samples of the others: each comes once" in result.err


def test_metadata_that_names_no_image_is_refused_and_names_without_an_image_are_said(run, folders):
    subset = '[[datasets.subsets]]\nimage_dir = "reg"\nmetadata_file = "m.json"\n'
    (folders / "k.toml").write_text(f"[[datasets]]\nresolution = 64\n{subset}", "utf-8")
    (folders / "m.json").write_text('{"else/9.png": {"caption": "x"}}', "utf-8")
    result = run("encode", "k.toml", "--model", "tiny", "--device", "cpu")
    assert "m.json: names none of the 4 images in reg, but others such as else/9.png." in result.err
    (folders / "m.json").write_text('{"else/9.png": {"caption": "x"}, "0.png": {}}', "utf-8")
    result = run("encode", "k.toml", "--model", "tiny", "--device", "cpu")
    assert "captions without an image: reg/else/9.png" in result.err


def test_a_folder_without_such_names_is_refused_if_they_are_asked_for(tmp_path):
    with pytest.raises(UserError, match=r"--folders kohya: SOURCE .* holds no folders of images such as '10_sks dog'"):
        list_folders(tmp_path, "kohya")
