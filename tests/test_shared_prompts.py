"""shared.py, borrowed.py: prompts of several shards are encoded once and stored once, and texts borrow their cond."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import latentprep
from latentprep.cache.borrowed import CondFiles
from latentprep.cache.cond import open_cond, write_cond
from latentprep.cache.files import METADATA_KEY, pack
from latentprep.cache.manifest import commit, open_manifest
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.text import open_text
from latentprep.errors import UserError
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.work import text as work
from latentprep.prepare.work.writing import Writing
from tests.conftest import SMALL, gradient
from tests.miniatures import make_miniature
from tests.test_encode import files

OPTIONS = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "shard_size": "30kB"}
DOG, CAT = CLASSES = ("a photo of a dog", "a photo of a cat")


@pytest.fixture
def classes(images):
    """Eight images, which become four shards of two: all but one have one of two captions."""
    for n, path in enumerate(sorted(images.glob("*.png"))):
        path.with_suffix(".txt").write_text(CLASSES[n % 2])
    (images / "wide3.txt").write_text("a house")
    return images


def encode(images, cache, **options):
    return latentprep.encode(images, cache, **{**OPTIONS, "progress": False, **options})


def shard_files(cache):
    return {name: data for name, data in files(cache).items() if name.startswith("shards/")}


def cond_files(cache):
    return sorted((Path(cache) / "shards").glob("*.cond.safetensors"))


def text_files(cache):
    return sorted(Path(cache).glob("shards/*.text.safetensors"))


def flip(path):
    """Another byte in the middle, which is in a tensor of cond: all that is checked as the file opens is right."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def add_images(images, captions=CLASSES):
    for n in range(3):
        gradient(64, 70 + n).save(images / f"new{n}.png")
        (images / f"new{n}.txt").write_text(captions[n % len(captions)])


def cond_of_keys(cache, **options):
    """Key -> prompt and cond of each image, as a training loop gets them."""
    data = latentprep.LatentDataset(cache, **options)
    samples = {data.key(n): data[n] for n in range(len(data))}
    return {
        key: (sample.cond_text[0], {name: value[0] for name, value in sample.cond.items()})
        for key, sample in samples.items()
    }


def same_cond(found, wanted):
    return found.keys() == wanted.keys() and all(
        found[key][0] == wanted[key][0]
        and all(torch.equal(value, wanted[key][1][name]) for name, value in found[key][1].items())
        for key in found
    )


def test_a_prompt_of_many_shards_is_encoded_once_and_stored_once(classes, tmp_path, encoded):
    dry = encode(classes, tmp_path / "c", dry_run=True)
    del encoded[:]
    result = encode(classes, tmp_path / "c")
    assert encoded == [[*CLASSES], ["a house"], [""]]
    assert result.num_prompts == dry.num_prompts == 4
    manifest, storage = open_manifest(Storage(tmp_path / "c")), Storage(tmp_path / "c")
    texts = [shard.open_text(storage) for shard in manifest.shards]
    (cond_file,) = manifest.cond_files
    assert sorted(len(text.cond.get("prompt_embeds", ())) for text in texts) == [0, 0, 0, 1]
    assert all(text.cond_files == (cond_file,) for text in texts)
    assert [*open_cond(storage, cond_file).prompt] == [*CLASSES]
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=8, progress=False).ok


def test_readers_get_what_they_would_get_without_sharing(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    encode(classes, tmp_path / "alone", shard_size="1MB")
    assert len(cond_files(tmp_path / "alone")) == 0
    found, wanted = cond_of_keys(tmp_path / "c"), cond_of_keys(tmp_path / "alone")
    assert same_cond(found, wanted)
    assert len(found) == 8
    data = latentprep.LatentDataset(tmp_path / "c")
    batches = list(latentprep.LatentLoader(data, 4))
    for batch in [*batches, *latentprep.LatentLoader(data, 3, num_workers=1)]:
        rows = [found[data.key(n)][1]["prompt_embeds"] for n in batch.index.tolist()]
        assert torch.equal(batch.cond["prompt_embeds"], torch.stack(rows))
    dropped = next(iter(latentprep.LatentLoader(latentprep.LatentDataset(tmp_path / "c", caption_dropout=1.0), 4)))
    assert dropped.cond_text == [""] * 4
    assert not torch.equal(dropped.cond["prompt_embeds"], batches[0].cond["prompt_embeds"])


def test_without_cond_no_cond_file_is_opened(classes, tmp_path):
    encode(classes, tmp_path / "c")
    cond_files(tmp_path / "c")[0].unlink()
    data = latentprep.LatentDataset(tmp_path / "c", include_cond=False)
    assert data[0].cond_text[0] in CLASSES
    with pytest.raises(UserError, match=r"cond\.safetensors: missing"):
        latentprep.LatentDataset(tmp_path / "c")[0]


def test_int8_and_several_prompts_of_an_image(classes, tmp_path):
    options = {"cond_dtype": "int8", "prompts_per_image": 2, "shuffle_tags": True}
    (classes / "wide0.txt").write_text("one, two, three")
    encode(classes, tmp_path / "c", **options)
    assert len(cond_files(tmp_path / "c")) == 1
    (prompt, cond) = cond_of_keys(tmp_path / "c")["wide0.png"]
    assert sorted(prompt.split(", ")) == ["one", "three", "two"]
    assert cond["prompt_embeds"].dtype == torch.float32
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=8, progress=False).ok


def test_prompts_of_their_own_lengths(classes, tmp_path):
    make_miniature("ZImage", tmp_path / "parts").save_pretrained(tmp_path / "m")
    options = {"model": tmp_path / "m", "cond_dtype": "float32"}
    encode(classes, tmp_path / "c", **options)
    encode(classes, tmp_path / "alone", shard_size="10MB", **options)
    assert cond_files(tmp_path / "c")
    assert len(cond_files(tmp_path / "alone")) == 0
    found, wanted = cond_of_keys(tmp_path / "c"), cond_of_keys(tmp_path / "alone")
    for key, (prompt, cond) in found.items():
        assert prompt == wanted[key][0]
        torch.testing.assert_close(cond["prompt_embeds"], wanted[key][1]["prompt_embeds"], atol=1e-5, rtol=1e-5)
        assert torch.equal(cond["prompt_embeds_mask"], wanted[key][1]["prompt_embeds_mask"])
    batch = next(iter(latentprep.LatentLoader(latentprep.LatentDataset(tmp_path / "c"), 4)))
    assert batch.cond["prompt_embeds_mask"].sum(1).min() > 0


def test_many_shared_prompts_are_cut_into_files_of_the_size_of_a_shard(images, tmp_path, encoded):
    for n, path in enumerate(sorted(images.glob("*.png"))):
        path.with_suffix(".txt").write_text(f"class {n % 4}")
    encode(images, tmp_path / "c", shard_size="1kB")
    assert len(open_manifest(Storage(tmp_path / "c")).shards) == 8
    assert [*map(len, encoded)] == [1] * 5
    assert len(cond_files(tmp_path / "c")) == 4
    assert latentprep.verify(tmp_path / "c", progress=False).ok


@pytest.mark.slow
@pytest.mark.parametrize("count", range(1, 6))
def test_stopped_after_any_file_it_ends_with_the_same_bytes(classes, tmp_path, encoded, monkeypatch, count):
    done = []

    def stop(self):
        done.append(1)
        if len(done) == count:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Writing, "went_well", stop)
        with pytest.raises(KeyboardInterrupt):
            encode(classes, tmp_path / "c")
    del encoded[:]
    result = encode(classes, tmp_path / "c")
    assert result.num_encoded == 0 or count <= 4  # latents are written first
    assert result.num_prompts == sum(map(len, encoded))
    encode(classes, tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_what_the_cache_has_is_borrowed_again(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    add_images(classes)
    (classes / "wide3.txt").write_text(DOG)
    before = cond_files(tmp_path / "c")
    del encoded[:]
    assert encode(classes, tmp_path / "c", dry_run=True).num_prompts == 0
    result = encode(classes, tmp_path / "c")
    assert (result.num_prompts, encoded) == (0, [])
    assert (result.num_encoded, result.num_retexted) == (3, 2)
    assert cond_files(tmp_path / "c") == before
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=11, progress=False).ok


def test_what_one_shard_had_alone_is_taken_from_it_and_then_shared(images, tmp_path, encoded):
    encode(images, tmp_path / "c")
    assert cond_files(tmp_path / "c") == []
    add_images(images, ["picture number 0"])
    del encoded[:]
    assert encode(images, tmp_path / "c", shard_size="1kB").num_prompts == 0
    assert encoded == []
    storage = Storage(tmp_path / "c")
    assert [[*open_cond(storage, name).prompt] for name in open_manifest(storage).cond_files] == [["picture number 0"]]
    assert latentprep.verify(tmp_path / "c", source=images, re_encode=11, progress=False).ok


def test_cond_of_another_recipe_is_not_borrowed(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    before = cond_files(tmp_path / "c")
    del encoded[:]
    assert encode(classes, tmp_path / "c", max_tokens=150).num_prompts == 4
    assert not {*cond_files(tmp_path / "c")} & {*before}
    assert latentprep.verify(tmp_path / "c", progress=False).ok


def test_nothing_is_borrowed_from_a_file_whose_bytes_have_changed(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    flip(cond_files(tmp_path / "c")[0])
    gradient(64, 70).save(classes / "new.png")
    (classes / "new.txt").write_text(DOG)
    del encoded[:]
    encode(classes, tmp_path / "c")
    assert encoded == [[DOG]]
    problems = latentprep.verify(tmp_path / "c", progress=False).problems
    assert {(problem.name, problem.problem) for problem in problems} == {
        (f"shards/{cond_files(tmp_path / 'c')[0].name}", "hash")
    }


@pytest.mark.parametrize("harm", [Path.unlink, lambda path: path.write_bytes(path.read_bytes()[:-9])])
def test_a_cond_file_that_is_gone_is_made_again(classes, tmp_path, encoded, harm):
    encode(classes, tmp_path / "c")
    whole = files(tmp_path / "c")
    harm(cond_files(tmp_path / "c")[0])
    assert not latentprep.verify(tmp_path / "c", progress=False).ok
    del encoded[:]
    result = encode(classes, tmp_path / "c")
    assert encoded == [[*CLASSES]]
    assert result.num_encoded == 0
    assert files(tmp_path / "c") == whole


def test_a_cond_file_that_nobody_needs_goes(classes, tmp_path):
    encode(classes, tmp_path / "c")
    for n, path in enumerate(sorted(classes.glob("*.txt"))):
        path.write_text(f"number {n}")
    encode(classes, tmp_path / "c")
    assert cond_files(tmp_path / "c") == []
    assert "cond_files" not in (tmp_path / "c" / "cache.json").read_text()


def test_cond_that_an_unfinished_run_has_left_is_borrowed(classes, tmp_path, encoded, monkeypatch):
    """Even if the source has changed since: two of its four texts are there then, with what they borrow."""
    whole, made = work.Run._make_text, []

    def stop(self, task):
        made.append(task)
        if len(made) == 3:
            raise KeyboardInterrupt
        return whole(self, task)

    with monkeypatch.context() as patch:
        patch.setattr(work.Run, "_make_text", stop)
        with pytest.raises(KeyboardInterrupt):
            encode(classes, tmp_path / "c")
    assert (len(cond_files(tmp_path / "c")), len(text_files(tmp_path / "c"))) == (1, 2)
    add_images(classes)
    del encoded[:]
    result = encode(classes, tmp_path / "c")
    assert result.num_encoded == 3
    assert not {*CLASSES} & {prompt for call in encoded for prompt in call}
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=11, progress=False).ok


def test_compact_takes_along_what_its_rows_borrow(classes, tmp_path):
    encode(classes, tmp_path / "c")
    gone = [path for path in sorted(classes.glob("*.png")) if path.with_suffix(".txt").read_text() == CAT][:-1]
    for path in (*gone, classes / "wide3.png"):
        path.unlink()
    encode(classes, tmp_path / "c")
    before = cond_of_keys(tmp_path / "c")
    latentprep.compact(tmp_path / "c", min_share=0.1)
    manifest, storage = open_manifest(Storage(tmp_path / "c")), Storage(tmp_path / "c")
    assert manifest.num_dead == 0
    assert same_cond(cond_of_keys(tmp_path / "c"), before)
    texts = [shard.open_text(storage) for shard in manifest.shards]
    assert all(text.prompt and text.has_cond for text in texts)
    assert {row for text in texts for row in text.borrowed[:, 1].tolist()} <= {0, 1}
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=5, progress=False).ok
    for path in sorted(classes.glob("*.txt")):
        path.write_text("all the same")
    encode(classes, tmp_path / "c")
    assert latentprep.verify(tmp_path / "c", source=classes, progress=False).ok


def test_a_cond_file_that_fails_leaves_its_texts_to_the_next_run(classes, run, tmp_path, monkeypatch):
    make = work.Run._make_cond

    def fails(self, task):
        raise ZeroDivisionError("a fault")

    command = ("encode", classes, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB")
    monkeypatch.setattr(work.Run, "_make_cond", fails)
    result = run(*command)
    assert result.code == 1
    assert "cond of several shards, " in result.out
    assert "ZeroDivisionError: a fault" in result.out
    monkeypatch.setattr(work.Run, "_make_cond", make)
    result = run(*command)
    assert result.code == 0
    assert "8 images found from an earlier run that did not finish" in result.out
    encode(classes, tmp_path / "whole")
    assert shard_files(tmp_path / "c") == shard_files(tmp_path / "whole")


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_ranks_share_cond_as_they_share_shards(classes, tmp_path, order):
    for rank in order:
        encode(classes, tmp_path / "c", rank=rank, world_size=2)
    encode(classes, tmp_path / "whole")
    assert shard_files(tmp_path / "c") == shard_files(tmp_path / "whole")
    assert open_manifest(Storage(tmp_path / "c")).shards == open_manifest(Storage(tmp_path / "whole")).shards


def test_of_ranks_that_are_missing_no_text_borrows(classes, tmp_path):
    encode(classes, tmp_path / "c", rank=1, world_size=2)  # rank 0 makes the cond file
    (part,) = tmp_path.glob("c/rank-*.json")
    assert json.loads(part.read_text())["manifest"]["shards"]
    with pytest.raises(UserError, match="no cache was made"):
        latentprep.merge(tmp_path / "c", incomplete=True)
    encode(classes, tmp_path / "c", rank=0, world_size=2)
    assert latentprep.verify(tmp_path / "c", source=classes, progress=False).ok


@pytest.mark.slow
def test_with_two_processes(classes, tmp_path):
    encode(classes, tmp_path / "c", devices="cpu,cpu")
    encode(classes, tmp_path / "whole")
    assert shard_files(tmp_path / "c") == shard_files(tmp_path / "whole")


def test_at_a_url_too(classes, tmp_path, encoded):
    out = f"memory://shared{np.random.default_rng().integers(2**60)}/c"
    encode(classes, out)
    assert encoded == [[*CLASSES], ["a house"], [""]]
    add_images(classes)
    del encoded[:]
    encode(classes, out)
    assert encoded == []
    encode(classes, tmp_path / "c")
    assert same_cond(cond_of_keys(out), cond_of_keys(tmp_path / "c"))
    assert latentprep.verify(out, progress=False).ok


def test_a_prompt_that_is_cut_counts_once(run, classes, tmp_path):
    for path in classes.glob("*.txt"):
        path.write_text("word " * 100)
    result = run("encode", classes, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB")
    assert "cut      1 prompt of more than 77 tokens" in result.out
    assert "encoded  8 images and 2 prompts in" in result.out
    seen = json.loads(run("inspect", tmp_path / "c", "--json").out)
    assert (seen["images"], seen["text"]["distinct_prompts"], seen["text"]["truncated_prompts"]) == (8, 1, 1)
    assert seen["bytes"]["text"] == sum(
        path.stat().st_size for path in [*cond_files(tmp_path / "c"), *text_files(tmp_path / "c")]
    )
    assert json.loads(run("inspect", tmp_path / "c", "--key", "tall0.png", "--json").out)["tokens"] == [402]


def test_a_dry_run_counts_shared_prompts_once(classes, tmp_path):
    shared = encode(classes, tmp_path / "c", dry_run=True)
    for n, path in enumerate(sorted(classes.glob("*.txt"))):
        path.write_text(f"number {n}")
    assert encode(classes, tmp_path / "c", dry_run=True).num_prompts == 9
    assert shared.num_prompts == 4


def change(cache, tensors=(), metadata=()):
    """Write another text file, of a shard that borrows all of its cond, and a manifest that names it."""
    storage = Storage(cache)
    manifest = open_manifest(storage)
    shards = sorted(manifest.shards, key=lambda shard: shard.open_text(storage).num_own)
    path = cache / shards[0].text_name
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    fields = {**json.loads(header[METADATA_KEY]), **dict(metadata)}
    stamp = storage.write_atomic(shards[0].text_name, pack("text", {**load_file(path), **dict(tensors)}, fields))
    shards[0] = shards[0].with_text(shards[0].text_id, stamp, shards[0].cond_files)
    commit(storage, manifest.having(sorted(shards, key=Shard.order)), [])


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, 2)


@pytest.mark.parametrize(
    ("tensors", "metadata", "words"),
    [
        ({"borrowed": int32([0, 7], [0, 1])}, {}, "borrows row 7, which it does not have"),
        ({"borrowed": int32([0, -1], [0, 1])}, {}, "borrowed points outside its 1 cond files"),
        ({"borrowed": int32([1, 0], [0, 1])}, {}, "borrowed points outside its 1 cond files"),
        ({"borrowed": torch.tensor([[0, 0], [0, 1]])}, {}, "borrowed is not int32 with two numbers"),
        ({"borrowed": int32(*[[0, 0]] * 5)}, {}, "borrowed has 5 rows for 2 prompts, of 1 cond files"),
        ({"borrowed": int32()}, {}, "borrowed has 0 rows"),
        ({"borrowed": int32([0, 0])}, {}, "some of its prompts borrow cond, and others have none"),
        ({}, {"cond_files": ["../../x"]}, "its list of cond files is invalid"),
        ({}, {"cond_files": "ab"}, "its list of cond files is invalid"),
        ({}, {"cond_files": []}, "borrowed points outside its 0 cond files"),
    ],
)  # fmt: skip
def test_a_crafted_text_is_refused_in_one_line(classes, tmp_path, tensors, metadata, words):
    encode(classes, tmp_path / "c")
    change(tmp_path / "c", tensors, metadata)
    with pytest.raises(UserError, match="damaged, or no shard of latentprep") as refused:
        list(latentprep.LatentLoader(latentprep.LatentDataset(tmp_path / "c"), 1))
    assert words in str(refused.value)
    assert any(words in problem.detail for problem in latentprep.verify(tmp_path / "c", progress=False).problems)


def test_verify_finds_what_borrows_the_cond_of_another_prompt(classes, tmp_path):
    encode(classes, tmp_path / "c")
    change(tmp_path / "c", {"borrowed": int32([0, 1], [0, 0])})
    (problem,) = latentprep.verify(tmp_path / "c", progress=False).problems
    assert problem.problem == "cond"
    assert "2 of its prompts borrow the cond of others" in problem.detail


def test_a_cond_file_of_another_kind_is_refused(classes, tmp_path):
    encode(classes, tmp_path / "c")
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    ((name, _),) = manifest.cond_files.items()
    cond = open_cond(storage, name)
    cond.cond["prompt_embeds"] = cond.cond["prompt_embeds"][:, :5].clone()
    stamp = write_cond(storage, name, cond)
    commit(storage, manifest.having(manifest.shards, {name: stamp}), [])
    texts = [shard.open_text(storage) for shard in manifest.shards]  # one has cond of its own too
    with pytest.raises(UserError, match="its cond does not fit"):
        CondFiles(storage).of(max(texts, key=lambda text: text.num_own))
    with pytest.raises(UserError, match="Run latentprep verify"):
        list(latentprep.LatentLoader(latentprep.LatentDataset(tmp_path / "c", caption_dropout=0.5), 1))
    assert not latentprep.verify(tmp_path / "c", progress=False).ok


@pytest.mark.parametrize("names", [[], ["0" * 32], ["../x"]])
def test_a_manifest_that_names_other_cond_files_than_its_shards_is_refused(classes, tmp_path, names):
    encode(classes, tmp_path / "c")
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    stamp = next(iter(manifest.cond_files.values()))
    object.__setattr__(manifest, "cond_files", dict.fromkeys(names, stamp))
    commit(storage, manifest, [])
    with pytest.raises(UserError, match="not a complete manifest"):
        open_manifest(storage)


def test_killed_in_the_text_pass_no_finished_shard_is_made_again(images, tmp_path, encoded, monkeypatch):
    """kill -9 while an encoder as slow as a large one is at its third shard."""
    child = os.fork()
    if child == 0:
        calls = []

        def slow(self, prompts):
            calls.append(prompts)
            while len(calls) == 3 or (len(calls) == 2 and not text_files(tmp_path / "c")):
                time.sleep(0.005)
            return whole(self, prompts)

        try:
            whole, TextEncoder.encode = TextEncoder.encode, slow
            encode(images, tmp_path / "c")
        finally:
            os._exit(1)  # it is killed before, and must not go on as a second pytest
    deadline = time.monotonic() + 60
    while len(text_files(tmp_path / "c")) < 1 and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "c" / "cache.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in text_files(tmp_path / "c")}
    prompts = {prompt for path in finished for prompt in open_prompts(path)}
    assert prompts
    assert encode(images, tmp_path / "c").num_encoded == 0
    done = {prompt for call in encoded for prompt in call}
    assert not done & prompts
    assert finished.items() <= {path: path.stat().st_mtime_ns for path in text_files(tmp_path / "c")}.items()
    encode(images, tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def open_prompts(path):
    shard, text_id = path.name.split(".")[:2]
    return open_text(Storage(path.parent.parent), shard, text_id).prompt


def test_a_foreign_file_in_the_place_of_a_cond_file_is_not_taken(classes, tmp_path, encoded):
    """Whole, and sealed: made of other prompts, or of the same in another precision."""
    encode(classes, tmp_path / "c")
    whole = files(tmp_path / "c")
    (name,) = [path.name for path in cond_files(tmp_path / "c")]
    encode(classes, tmp_path / "float32", cond_dtype="float32")
    for path in classes.glob("*.txt"):
        path.write_text(f"{path.read_text()} with another end")
    encode(classes, tmp_path / "other")
    for path in classes.glob("*.txt"):
        path.write_text(path.read_text().removesuffix(" with another end"))
    for cache in ("float32", "other"):
        shutil.copy(cond_files(tmp_path / cache)[0], tmp_path / "c" / "shards" / name)
        del encoded[:]
        encode(classes, tmp_path / "c")
        assert encoded == [[*CLASSES]]
        assert files(tmp_path / "c") == whole


def test_a_manifest_that_has_lost_its_cond_files_is_mended(classes, tmp_path):
    encode(classes, tmp_path / "c")
    wanted = cond_of_keys(tmp_path / "c")
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    shards = [shard.with_text(shard.text_id, shard.text_file) for shard in manifest.shards]
    commit(storage, manifest.having(shards), [])
    for path in cond_files(tmp_path / "c"):
        path.unlink()
    encode(classes, tmp_path / "c")
    assert same_cond(cond_of_keys(tmp_path / "c"), wanted)
    assert latentprep.verify(tmp_path / "c", progress=False).ok


def test_verify_asks_no_more_of_cond_that_dead_rows_alone_borrow(images, tmp_path):
    for n, path in enumerate(sorted(images.glob("*.png"))):  # tall0 to tall3, wide0 to wide3: four shards
        path.with_suffix(".txt").write_text(CLASSES[n // 4])
    encode(images, tmp_path / "c")
    for path in images.glob("tall*.png"):
        path.unlink()
    encode(images, tmp_path / "c", cond_dtype="float32", allow_gone=True)
    assert latentprep.verify(tmp_path / "c", source=images, progress=False).ok


def test_an_image_that_returns_has_its_own_prompt(images, tmp_path):
    """Its row was dead when the text was made anew, and has no prompts there."""
    encode(images, tmp_path / "c", shard_size="1MB")
    (images / "tall0.png").rename(tmp_path / "tall0.png")
    encode(images, tmp_path / "c", shard_size="1MB")
    (images / "tall1.txt").write_text("horse")
    encode(images, tmp_path / "c", shard_size="1MB")
    (tmp_path / "tall0.png").rename(images / "tall0.png")
    result = encode(images, tmp_path / "c", shard_size="1MB")
    assert (result.num_encoded, result.num_retexted) == (0, 8)
    found = cond_of_keys(tmp_path / "c")
    assert (found["tall0.png"][0], found["tall1.png"][0]) == ("picture number 0", "horse")
    assert encode(images, tmp_path / "c", shard_size="1MB").num_retexted == 0
    assert latentprep.verify(tmp_path / "c", source=images, re_encode=8, progress=False).ok


def test_an_image_that_returns_before_any_new_text_costs_none(images, tmp_path):
    encode(images, tmp_path / "c", shard_size="1MB")
    before = files(tmp_path / "c")
    (images / "tall0.png").rename(tmp_path / "tall0.png")
    encode(images, tmp_path / "c", shard_size="1MB")
    (tmp_path / "tall0.png").rename(images / "tall0.png")
    assert encode(images, tmp_path / "c", shard_size="1MB").num_retexted == 0
    assert files(tmp_path / "c") == before
