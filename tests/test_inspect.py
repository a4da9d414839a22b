"""look/rows.py: images of a cache one by one, and those that are the same."""

import json
import re
import shutil

import pytest

import latentprep
from tests.conftest import SMALL, gradient


@pytest.fixture
def cache(run, images, tmp_path):
    for n in range(3):
        shutil.copy(images / "wide0.png", images / f"same{n}.png")
    shutil.copy(images / "tall0.png", images / "other.png")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB").code == 0
    return tmp_path / "c"


def test_list_has_a_line_for_each_image(run, cache):
    result = run("inspect", cache, "--list")
    lines = [line.split("\t") for line in result.out.splitlines()]
    assert (result.code, len(lines)) == (0, 12)
    assert ["tall1.png", "64x64", "64x80", "picture number 1"] in lines
    assert ["wide0.png", "96x32", "128x40", "wide0"] in lines


def test_a_pattern_chooses(run, cache):
    assert {line.split("\t")[0] for line in run("inspect", cache, "--list", "wide[01]*").out.splitlines()} == {
        "wide0.png", "wide1.png",
    }  # fmt: skip
    assert run("inspect", "--list", cache, "tall1.png").out.count("\n") == 1
    none = run("inspect", cache, "--list", "x*")
    assert (none.code, none.out) == (1, "")
    assert none.err == f"error: PATTERN x*: none of the 12 images in {cache} fits it.\n"


def test_a_list_as_json_is_an_object_a_line(run, cache):
    (found,) = map(json.loads, run("inspect", cache, "--list", "tall1*", "--json").out.splitlines())
    assert found == {
        "key": "tall1.png", "bucket": [64, 64], "original_size": [80, 64], "enlarged": False,
        "caption": ["picture number 1"],
    }  # fmt: skip


def test_images_that_were_enlarged_are_listed_by_the_command_that_is_told(run, images, tmp_path):
    gradient(40, 48).save(images / "small.png")
    gradient(24, 72).save(images / "narrow.png")
    (images / "small.txt").write_text("a small one")
    cache = tmp_path / "c"
    planned = run("encode", images, "--out", cache, *SMALL, "--dry-run").out
    assert (
        "enlarged: 2 images smaller than the bucket (--no-upscale keeps the pixels): narrow.png, small.png" in planned
    )
    done = run("encode", images, "--out", cache, *SMALL).out
    (told,) = re.findall(r" 2 images enlarged to .*\(latentprep (inspect CACHE .*);", done)
    listed = run(*told.replace("CACHE", str(cache)).split())
    lines = [line.split("\t") for line in sorted(listed.out.splitlines())]
    assert lines == [["narrow.png", "32x96", "24x72", "narrow"], ["small.png", "64x64", "40x48", "a small one"]]
    assert run("inspect", cache, "--list", "s*", "--enlarged").out.count("\n") == 1
    rows = map(json.loads, run("inspect", cache, "--list", "--json").out.splitlines())
    assert {row["key"] for row in rows if row["enlarged"]} == {"narrow.png", "small.png"}
    none = run("inspect", cache, "--list", "wide*", "--enlarged")
    assert none.err == f"error: --enlarged: none of the 10 images in {cache} was enlarged and fits wide*.\n"
    assert run("inspect", cache, "--enlarged").err == "error: --enlarged: is for --list. Add it, or leave this out.\n"


def test_images_that_are_gone_are_not_listed(run, images, cache):
    (images / "wide2.png").unlink()
    assert run("encode", images, "--out", cache, *SMALL).code == 0
    assert "wide2.png" not in run("inspect", cache, "--list").out


def test_a_pattern_or_a_key_without_its_option_is_refused(run, cache):
    advice = "is for --list and --preview. Add one of them, or leave it out."
    assert run("inspect", cache, "wide*").err == f"error: PATTERN wide*: {advice}\n"
    assert run("inspect", cache, "--list", "--key", "a").err.startswith("error: --list with --key: ")


def test_duplicates_are_counted_and_named(run, images, cache):
    found = latentprep.inspect(cache)["duplicates"]
    assert (found["images"], found["groups"]) == (6, 2)
    groups = {tuple(sorted(group["keys"])): group["images"] for group in found["examples"]}
    assert groups == {("same0.png", "same1.png", "same2.png", "wide0.png"): 4, ("other.png", "tall0.png"): 2}
    shown = run("inspect", cache).out
    assert "6 images in 2 groups of equal content" in shown
    for name in ("other.png", "same0.png", "same1.png", "same2.png"):  # a row that is dead is no duplicate
        (images / name).unlink()
    assert run("encode", images, "--out", cache, *SMALL).code == 0
    assert latentprep.inspect(cache)["duplicates"] == {"images": 0, "groups": 0, "examples": []}
    assert "Duplicates" not in run("inspect", cache).out


def test_the_first_of_many_duplicates_are_named(run, images, tmp_path):
    for n in range(8):
        data = (images / f"{('wide', 'tall')[n // 4]}{n % 4}.png").read_bytes()
        for k in range(7):
            (images / f"copy{n}-{k}.png").write_bytes(data)
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    found = latentprep.inspect(tmp_path / "c")["duplicates"]
    assert (found["images"], found["groups"], len(found["examples"])) == (64, 8, 5)
    assert all((len(group["keys"]), group["images"]) == (5, 8) for group in found["examples"])
    assert " and 3 more" in run("inspect", tmp_path / "c").out


def test_an_image_costs_what_its_live_rows_take(run, images, cache):
    before = latentprep.inspect(cache)
    whole = sum(before["bytes"].values())
    assert before["dead_bytes"] == 0
    for path in images.glob("[swo]*.png"):  # two thirds of the images
        path.unlink()
    assert run("encode", images, "--out", cache, *SMALL, "--allow-gone").code == 0
    after = latentprep.inspect(cache)
    assert after["dead_rows"] == 8
    assert 0.5 * whole < after["dead_bytes"] < 0.9 * whole
    shown = run("inspect", cache).out
    live = (sum(after["bytes"].values()) - after["dead_bytes"]) / after["images"]
    assert f"{live / 1000:.1f} kB an image" in shown
    assert "of changed or removed images, about" in shown


def test_a_crop_says_what_its_numbers_are(run, images, tmp_path):
    options = (*SMALL, "--flip", "--crop", "random", "--crops", 2)
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    crops = latentprep.inspect(tmp_path / "c", key="wide0.png")["crop"]
    boxes = dict.fromkeys(map(tuple, crops))  # those of mirrored views are said once
    shown = "; ".join(f"{width}x{height} at left {left}, top {top}" for top, left, height, width in boxes)
    assert re.search(f"^crop +{shown} *$", run("inspect", tmp_path / "c", "--key", "wide0.png").out, re.MULTILINE)


def test_an_example_prompt_says_something(run, images, tmp_path):
    for path in images.glob("*.txt"):
        path.unlink()
    (images / "wide3.txt").write_text("a wide picture")
    options = ("--out", tmp_path / "c", *SMALL, "--shard-size", "30kB", "--caption-from", "file")
    assert run("encode", images, *options).code == 0
    found = latentprep.inspect(tmp_path / "c")["text"]
    assert found["empty_captions"] > 0
    assert found["example_prompt"] == "a wide picture"
