"""shared.py, stored.py: a prompt of several shards is encoded once, and its bytes do not depend on which was first."""

import json
import os
import shutil
import signal
import time

import pytest

import latentprep
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.cache.text import open_text
from latentprep.prepare.models.text_encoder import TextEncoder
from latentprep.prepare.work.stored import StoredCond
from tests.conftest import SMALL, gradient
from tests.test_encode import files

OPTIONS = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "shard_size": "30kB"}
CLASSES = ("a photo of a dog", "a photo of a cat")


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


def test_a_prompt_of_many_shards_is_encoded_once_and_stored_in_each(classes, tmp_path, encoded):
    dry = encode(classes, tmp_path / "c", dry_run=True)
    del encoded[:]
    result = encode(classes, tmp_path / "c")
    assert encoded == [[CLASSES[0]], [CLASSES[1]], ["a house"], [""]]
    assert result.num_prompts == dry.num_prompts == 4
    storage = Storage(tmp_path / "c")
    texts = [shard.open_text(storage) for shard in open_manifest(storage).shards]
    assert len(texts) == 4
    rows = {prompt: [t.cond["prompt_embeds"][list(t.prompt).index(prompt)] for t in texts if prompt in t.prompt]
            for prompt in CLASSES}  # fmt: skip
    assert [len(found) for found in rows.values()] == [4, 3]
    assert all((row == found[0]).all() for found in rows.values() for row in found)
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=8, progress=False).ok


def test_who_finds_no_file_makes_the_same_bytes(classes, tmp_path, encoded, monkeypatch):
    encode(classes, tmp_path / "c")
    monkeypatch.setattr(StoredCond, "find", lambda *_: None)  # as if another device were to make each home, later
    encode(classes, tmp_path / "other")
    assert len(encoded) > 8
    assert shard_files(tmp_path / "c") == shard_files(tmp_path / "other")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_stopped_between_texts_it_ends_with_the_same_bytes(classes, tmp_path, encoded, monkeypatch, count):
    whole, add = StoredCond.add, []

    def stop(self, name, text):
        add.append(name)
        if len(add) > count:
            raise KeyboardInterrupt
        whole(self, name, text)

    with monkeypatch.context() as patch:
        patch.setattr(StoredCond, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            encode(classes, tmp_path / "c")
    del encoded[:]
    assert encode(classes, tmp_path / "c").num_prompts == len(encoded)
    assert [CLASSES[0]] not in encoded  # the first shard's file has it
    encode(classes, tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def add_images(images):
    for n in range(3):
        gradient(64, 70 + n).save(images / f"new{n}.png")
        (images / f"new{n}.txt").write_text(CLASSES[n % 2])


def test_what_the_cache_has_is_taken_from_it(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    add_images(classes)
    (classes / "wide3.txt").write_text(CLASSES[0])
    del encoded[:]
    dry = encode(classes, tmp_path / "c", dry_run=True)
    assert dry.num_prompts == 0
    result = encode(classes, tmp_path / "c")
    assert (result.num_prompts, encoded) == (0, [])
    assert (result.num_encoded, result.num_retexted) == (3, 2)
    assert latentprep.verify(tmp_path / "c", source=classes, re_encode=11, progress=False).ok


def test_cond_of_another_recipe_is_not_taken(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    add_images(classes)
    del encoded[:]
    assert encode(classes, tmp_path / "c", max_tokens=150).num_prompts == 4
    assert latentprep.verify(tmp_path / "c", progress=False).ok


def test_nothing_is_taken_from_a_file_whose_bytes_have_changed(classes, tmp_path, encoded):
    encode(classes, tmp_path / "c")
    shutil.copytree(tmp_path / "c", tmp_path / "healthy")
    for shard in open_manifest(Storage(tmp_path / "c")).shards:
        path = tmp_path / "c" / shard.text_name
        data = bytearray(path.read_bytes())
        data[-1] ^= 1  # in a tensor: all that is checked as it opens is right
        path.write_bytes(data)
    add_images(classes)
    del encoded[:]
    assert encode(classes, tmp_path / "c").num_prompts == len(encoded)
    assert encoded == [[CLASSES[0]], [CLASSES[1]], [CLASSES[0]]]  # of two new shards, each its own
    encode(classes, tmp_path / "healthy")
    new = [name for name in shard_files(tmp_path / "c") if name not in shard_files(tmp_path / "healthy")]
    assert new == []


def test_a_prompt_that_is_cut_counts_once(run, classes, tmp_path):
    for path in classes.glob("*.txt"):
        path.write_text("word " * 100)
    result = run("encode", classes, "--out", tmp_path / "c", *SMALL, "--shard-size", "30kB")
    assert "cut      1 prompt of more than 77 tokens" in result.out
    assert "encoded  8 images and 2 prompts in" in result.out
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["images"] == 8


def test_at_a_url_each_shard_encodes_its_own(classes, encoded):
    encode(classes, "memory://shared/c")
    assert sorted(map(tuple, encoded)) == sorted([CLASSES, CLASSES, CLASSES, (CLASSES[0], "a house"), ("",)])


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


def text_files(cache):
    return sorted(cache.glob("shards/*.text.safetensors"))


def open_prompts(path):
    shard, text_id = path.name.split(".")[:2]
    return open_text(Storage(path.parent.parent), shard, text_id).prompt
