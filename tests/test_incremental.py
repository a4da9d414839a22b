"""prepare/changes.py, plan.py: after every kind of change, only what changed is done again, and the cache is right."""

import json
import os
import re
import shutil
from itertools import takewhile

import pytest
import torch

from latentprep import LatentDataset
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from tests.conftest import SMALL, TINY, gradient, make_model
from tests.test_encode import files, rows

SHARDS = ("--shard-size", "30kB")  # two images a shard: four shards


def touch(path):
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 10**9))


def edit(path):
    gradient(64, 80).rotate(90).save(path)


def swap(one, other):
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def rename_with_caption(images):
    (images / "tall0.png").rename(images / "portrait.png")
    (images / "tall0.txt").rename(images / "portrait.txt")


# name, what happens to the folder, options;
# then: images encoded, prompts encoded, latents files and text files written, changes as --dry-run lists them
CASES = [
    ("nothing", lambda i: None, (), 0, 0, 0, 0, []),
    ("added", lambda i: edit(i / "new.png"), (), 1, 1, 1, 1, ["new new.png"]),
    ("removed", lambda i: (i / "wide1.png").unlink(), (), 0, 0, 0, 0, ["gone wide1.png"]),
    ("touched", lambda i: touch(i / "wide1.png"), (), 0, 0, 0, 1, ["touched wide1.png"]),
    ("edited", lambda i: edit(i / "tall1.png"), (), 1, 0, 1, 1, ["changed tall1.png"]),
    ("renamed, caption in a file", rename_with_caption, (), 0, 0, 0, 1, ["renamed portrait.png (was tall0.png)"]),
    ("renamed, caption from the name", lambda i: (i / "wide0.png").rename(i / "z.png"), (), 0, 1, 0, 1,
     ["renamed z.png (was wide0.png)"]),
    ("moved to a folder", lambda i: ((i / "sub").mkdir(), (i / "wide0.png").rename(i / "sub" / "wide0.png")), (),
     0, 0, 0, 1, ["renamed sub/wide0.png (was wide0.png)"]),
    ("two swapped", lambda i: swap(i / "wide0.png", i / "wide1.png"), (), 0, 0, 0, 1,
     ["renamed wide0.png (was wide1.png)", "renamed wide1.png (was wide0.png)"]),
    ("copied", lambda i: shutil.copy2(i / "wide0.png", i / "copy.png"), (), 1, 1, 1, 1, ["new copy.png"]),
    ("caption edited", lambda i: (i / "tall0.txt").write_text("another"), (), 0, 1, 0, 1, ["caption tall0.png"]),
    ("caption removed", lambda i: (i / "tall0.txt").unlink(), (), 0, 1, 0, 1, ["caption tall0.png"]),
    ("caption file touched", lambda i: touch(i / "tall0.txt"), (), 0, 0, 0, 0, []),
    ("turned unreadable", lambda i: (i / "wide1.png").write_text("no picture"), (), 0, 0, 0, 0, ["gone wide1.png"]),
    ("broken in the middle", lambda i: (i / "wide1.png").write_bytes((i / "wide1.png").read_bytes()[:-40]), (),
     0, 0, 0, 0, ["changed wide1.png"]),
    ("template", lambda i: None, ("--template", "subject_filewords", "--placeholder", "sks"), 0, 8, 0, 4,
     [f'prompt {kind}{n}.png (--placeholder "" -> sks; --seed none -> 0; --template none ->'
      for kind in ("tall", "wide") for n in range(4)]),
]  # fmt: skip


@pytest.mark.parametrize(
    ("act", "options", "images_done", "prompts_done", "latents", "texts", "changes"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_only_what_changed_is_done_again(
    run, images, tmp_path, act, options, images_done, prompts_done, latents, texts, changes
):
    cache = tmp_path / "c"
    assert run("encode", images, "--out", cache, *SMALL, *SHARDS).code == 0
    before = files(cache / "shards")
    act(images)

    planned = run("encode", images, "--out", cache, *SMALL, *SHARDS, *options, "--dry-run", "--list")
    assert planned.code == 0
    listed = takewhile(bool, planned.out.splitlines())
    found = [" ".join(line.split()) for line in listed if not line.startswith("skipped")]
    assert [line.startswith(wanted) for line, wanted in zip(found, changes, strict=True)] == [True] * len(changes)
    assert files(cache / "shards") == before

    result = run("encode", images, "--out", cache, *SMALL, *SHARDS, *options)
    assert result.code == 0
    done = {noun: int(count) for count, noun in re.findall(r"(\d+) (image|prompt)s?\b", result.out.split(" in ")[0])}
    if "nothing to do" in result.out:
        done = {}
    assert done == {k: v for k, v in (("image", images_done), ("prompt", prompts_done)) if v}
    after = files(cache / "shards")
    written = [name for name in after if after[name] != before.get(name)]
    assert sum(".latents." in name for name in written) == latents
    assert sum(".text." in name for name in written) == texts
    gone = before.keys() - after.keys()
    assert not [name for name in gone if ".latents." in name]

    # the cache is what the folder is now, and a second run finds nothing to do
    assert "nothing to do" in run("encode", images, "--out", cache, *SMALL, *SHARDS, *options).out
    verified = json.loads(run("verify", cache, "--source", images, "--json").out)
    assert verified["problems"] == []
    assert run("encode", images, "--out", tmp_path / "fresh", *SMALL, *SHARDS, *options).code == 0
    same_rows(rows(cache), rows(tmp_path / "fresh"))
    data = LatentDataset(cache)
    assert sorted(data.key(n) for n in range(len(data))) == sorted(rows(cache))


def same_rows(found, wanted):
    assert found.keys() == wanted.keys()
    for key, row in wanted.items():
        ones = {name for name in row.keys() ^ found[key].keys() if name == "weight"}  # another shard, another group
        for name in row.keys() - ones:
            if name == "prompt":
                assert found[key][name] == row[name]
            else:
                assert (found[key][name] == row[name]).all(), (key, name)


def test_another_text_encoder_changes_text_files_only(run, images, tmp_path, model):
    other = make_model(tmp_path / "other", seed=1)
    shutil.rmtree(other / "vae")
    shutil.copytree(model / "vae", other / "vae")
    options = ("--out", tmp_path / "c", *SMALL[2:], *SHARDS)
    assert run("encode", images, "--model", model, *options).code == 0
    before = files(tmp_path / "c" / "shards")
    planned = run("encode", images, "--model", other, *options, "--dry-run", "--list").out
    assert re.search(
        r"prompt +tall0.png +\(another text encoder \(--model, --text-encoder\): [0-9a-f]{32} -> [0-9a-f]{32}\)",
        planned,
    )
    result = run("encode", images, "--model", other, *options)
    assert "encoded  9 prompts in" in result.out
    assert {n: d for n, d in before.items() if ".latents." in n}.items() <= files(tmp_path / "c" / "shards").items()
    assert run("encode", images, "--model", other, "--out", tmp_path / "fresh", *options[2:]).code == 0
    assert files(tmp_path / "fresh") == files(tmp_path / "c")


def test_removed_images_come_back_without_being_encoded(run, images, tmp_path):
    """A drive that was not mounted must not cost the cache."""
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    assert run("encode", images, *options).code == 0
    before = files(tmp_path / "c")
    aside = tmp_path / "aside"
    aside.mkdir()
    for path in list(images.glob("tall*")):
        path.rename(aside / path.name)
    result = run("encode", images, *options)
    assert "4 gone" in result.out
    assert "latentprep compact" in result.out
    assert len(LatentDataset(tmp_path / "c")) == 4
    for path in aside.iterdir():
        path.rename(images / path.name)
    result = run("encode", images, *options)
    assert "encoded  nothing" in result.out
    assert "4 returned" in result.out
    assert files(tmp_path / "c") == before


def test_every_image_gone_and_another_there(run, images, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    assert run("encode", images, *options).code == 0
    for path in images.glob("*.png"):
        path.unlink()
    edit(images / "only.png")
    before = files(tmp_path / "c")
    result = run("encode", images, *options)
    assert (result.code, "8 of its 8 images are not in SOURCE" in result.err) == (1, True)
    assert files(tmp_path / "c") == before
    assert "1 new, 8 gone" in run("encode", images, *options, "--allow-gone").out
    assert len(LatentDataset(tmp_path / "c")) == 1
    # a template does not make new text for shards that nobody reads
    result = run("encode", images, *options, "--template", "none")
    assert "encoded  1 prompt in" in result.out
    assert run("verify", tmp_path / "c").code == 0


def test_a_skipped_image_is_tried_again_when_its_file_changes(run, images, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL)
    whole = (images / "wide0.png").read_bytes()
    (images / "bad.png").write_bytes(whole[:-40])
    assert "1 truncated" in run("encode", images, *options).out
    assert "nothing to do" in run("encode", images, *options).out
    (images / "bad.png").write_bytes(whole[:-30])
    assert "new      bad.png  (was skipped: truncated)" in run("encode", images, *options, "--dry-run", "--list").out
    assert "1 truncated" in run("encode", images, *options).out
    (images / "bad.png").write_bytes(whole)
    assert "encoded  1 image" in run("encode", images, *options).out
    assert (tmp_path / "c" / "skipped.jsonl").read_bytes() == b""


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "overwritten"])
def test_shards_that_are_lost_are_made_again(run, images, tmp_path, kind, damage):
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    assert run("encode", images, *options).code == 0
    before = files(tmp_path / "c")
    path = sorted((tmp_path / "c" / "shards").glob(f"*.{kind}.*"))[1]
    if damage == "missing":
        path.unlink()
    elif damage == "cut short":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.write_bytes(bytes(path.stat().st_size))
    assert run("verify", tmp_path / "c").code == 1
    result = run("encode", images, *options)
    if (
        damage == "overwritten" and kind == "latents"
    ):  # same size, and nobody opens it: verify knows, and says what to do
        assert "nothing to do" in result.out
        path.unlink()
        result = run("encode", images, *options)
    assert re.search(rf"lost     .*{path.name}.*: its images are encoded again", result.err)
    assert files(tmp_path / "c") == before
    assert run("verify", tmp_path / "c").code == 0


def test_a_folder_that_changed_after_a_kill_keeps_every_whole_shard(run, images, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    assert run("encode", images, *options).code == 0
    (tmp_path / "c" / "cache.json").unlink()
    gone = sorted((tmp_path / "c" / "shards").glob("*.latents.*"))[2]
    gone.unlink()
    edit(images / "a.png")  # sorts before all others, so that every unit would be cut elsewhere
    (images / "tall3.txt").write_text("changed too")
    result = run("encode", images, *options)
    assert "encoded  3 images" in result.out
    assert "9 images there already" in run("encode", images, *options, "--dry-run").out
    assert run("verify", tmp_path / "c", "--source", images).code == 0
    assert run("encode", images, "--out", tmp_path / "fresh", *options[2:]).code == 0
    same_rows(rows(tmp_path / "c"), rows(tmp_path / "fresh"))


def test_a_deleted_manifest_costs_nothing(run, images, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    assert run("encode", images, *options).code == 0
    edit(images / "tall1.png")
    (images / "wide0.png").unlink()
    assert run("encode", images, *options).code == 0
    before = rows(tmp_path / "c")
    (tmp_path / "c" / "cache.json").unlink()
    result = run("encode", images, *options)
    assert "encoded  nothing" in result.out
    same_rows(rows(tmp_path / "c"), before)
    assert run("verify", tmp_path / "c", "--source", images).code == 0


def test_shards_of_another_recipe_are_never_taken_into_a_finished_cache(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "other", *SMALL, "--flip").code == 0
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    (images / "wide0.png").rename(tmp_path / "aside.png")
    assert run("encode", images, *options).code == 0
    for path in (tmp_path / "other" / "shards").iterdir():
        shutil.copy(path, tmp_path / "c" / "shards" / path.name)
    (tmp_path / "aside.png").rename(images / "wide0.png")
    result = run("encode", images, *options)
    assert "encoded  1 image" in result.out
    assert "cleared  2 files" in result.out
    assert run("verify", tmp_path / "c", "--source", images).code == 0


def test_an_unfinished_cache_of_another_recipe_is_refused(run, images, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS)
    assert run("encode", images, *options).code == 0
    (tmp_path / "c" / "cache.json").unlink()
    before = files(tmp_path / "c")
    result = run("encode", images, *options, "--flip")
    assert result.code == 1
    assert "holds an unfinished cache of another recipe (--flip: no -> yes" in result.err
    assert files(tmp_path / "c") == before
    assert run("encode", images, *options, "--flip", "--overwrite").code == 0


def test_other_versions_of_libraries_are_said_and_not_refused(run, images, tmp_path, monkeypatch):
    from latentprep.prepare import recipes

    options = ("--out", tmp_path / "c", *SMALL)
    assert run("encode", images, *options).code == 0
    now = recipes.versions()
    monkeypatch.setattr(recipes, "versions", lambda: {**now, "torch": "9.9"})
    result = run("encode", images, *options)
    assert f'versions torch: "{now["torch"]}" -> "9.9": latents that are new may differ' in result.err
    assert "nothing to do" in result.out


def test_compact_frees_what_dead_rows_hold_and_changes_no_row(run, images, tmp_path):
    options = ("--out", tmp_path / "c", *SMALL, *SHARDS, "--flip")
    assert run("encode", images, *options).code == 0
    for name in ("tall0", "wide0", "wide1", "wide2"):
        (images / f"{name}.png").unlink()
    assert run("encode", images, *options).code == 0
    before, held = rows(tmp_path / "c"), open_manifest(Storage(tmp_path / "c"))
    assert (held.num_images, held.num_dead) == (4, 4)
    few = run("compact", tmp_path / "c", "--min-share", 0.9)
    assert few.code == 0
    assert "left in shards that have few" in few.out
    result = run("compact", tmp_path / "c")
    assert re.search(r"rewritten or removed, \d rows? and [\d.]+ kB freed\n", result.out)
    same_rows(rows(tmp_path / "c"), before)
    held = open_manifest(Storage(tmp_path / "c"))
    assert (held.num_images, held.num_dead) == (4, 0)
    assert run("verify", tmp_path / "c", "--source", images).code == 0
    assert "nothing to do" in run("encode", images, *options).out
    assert "0 shards rewritten" in run("compact", tmp_path / "c").out
    assert run("compact", tmp_path / "nowhere").code == 1


@pytest.mark.parametrize(
    "options",
    [("--clip-skip", 2), ("--max-tokens", 150), ("--emphasis",), ("--prompts-per-image", 2, "--shuffle-tags"),
     ("--template", "style_filewords", "--placeholder", "x")],
)  # fmt: skip
def test_one_setting_of_prompts_gives_the_cond_of_a_fresh_cache(run, images, tmp_path, options):
    """Each alone: of several at once one would hide that another is forgotten."""
    for n in range(4):
        (images / f"wide{n}.txt").write_text(f"(a house:1.3), by a lake, number {n}, " + "and much more, " * 40)
    base = ("--model", TINY, "--resolution", 64, "--device", "cpu")
    assert run("encode", images, "--out", tmp_path / "c", *base).code == 0
    assert run("encode", images, "--out", tmp_path / "c", *base, *options).code == 0
    assert run("encode", images, "--out", tmp_path / "fresh", *base, *options).code == 0
    found, wanted = (LatentDataset(tmp_path / name, latent_sampling_method="deterministic") for name in ("c", "fresh"))
    for n in range(len(found)):
        assert found.key(n) == wanted.key(n)
        assert torch.equal(found[n].cond["prompt_embeds"], wanted[n].cond["prompt_embeds"])


def test_one_caption_is_not_said_to_be_many(run, images, tmp_path):
    """Its whole shard has its text written anew, which is another thing."""
    options = ("--out", tmp_path / "c", *SMALL)
    assert run("encode", images, *options).code == 0
    (images / "tall0.txt").write_text("another one")
    planned = run("encode", images, *options, "--dry-run").out
    done = run("encode", images, *options).out
    anew = "         the text of 8 images is written anew, in whole shards; latents left alone\n"
    assert f"plan     {tmp_path / 'c'}: 1 caption changed\n{anew}" in planned
    assert f"         1 caption changed\n{anew}" in done
    assert "8 with prompts made otherwise" in run("encode", images, *options, "--prompts-per-image", 2).out
