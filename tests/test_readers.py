"""A reader is a guest: what it has opened it reads to its end, whatever is written beside it; then space is freed."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from latentprep import LatentDataset, LatentLoader
from latentprep.cache import readers
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.look import summary, verify
from tests.conftest import SMALL, gradient, make_model

SHARDS = ("--shard-size", "30kB")

# A process that opens a cache, touches one sample, says so, waits for a line, and then reads everything.
READER = """
import sys, torch
from latentprep import LatentDataset
data = LatentDataset(sys.argv[1], latent_sampling_method="deterministic", caption_dropout=float(sys.argv[2]))
data[0].latent_sample
print("open", flush=True)
sys.stdin.readline()
parts = [(data.key(n), data[n].cond_text, float(data[n].latent_mean.double().sum()),
          float(data[n].cond["prompt_embeds"].double().sum())) for n in range(len(data))]
print(sorted(parts), flush=True)
sys.stdin.readline()
"""


class Reader:
    def __init__(self, cache, dropout=0):
        self.process = subprocess.Popen(
            [sys.executable, "-c", READER, str(cache), str(dropout)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "open\n", self.process.stderr.read()

    def read(self):
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, self.process.stderr.read()
        return line

    def end(self):
        return self.process.communicate("\n")


def change_captions(run, images, cache, *_):
    for n in range(4):
        (images / f"tall{n}.txt").write_text(f"another caption {n}")
    assert run("encode", images, "--out", cache, *SMALL, *SHARDS).code == 0


def remove_and_compact(run, images, cache, *_):
    for n in range(1, 4):
        (images / f"wide{n}.png").unlink()
        gradient(64, 80).rotate(10 * n).save(images / f"tall{n}.png")
    assert run("encode", images, "--out", cache, *SMALL, *SHARDS).code == 0
    assert run("compact", cache, "--min-share", 0).code == 0


def another_encoder(run, images, cache, tmp_path):
    make_model(tmp_path / "other", seed=7)
    shutil.rmtree(tmp_path / "other" / "vae")
    shutil.copytree(tmp_path / "model" / "vae", tmp_path / "other" / "vae")
    options = [tmp_path / "other" if word == tmp_path / "model" else word for word in model_options(tmp_path)]
    assert run("encode", images, "--out", cache, *options, *SHARDS).code == 0


def overwrite(run, images, cache, *_):
    gradient(80, 64).save(images / "wide0.png")
    assert run("encode", images, "--out", cache, *SMALL, *SHARDS, "--overwrite").code == 0


def model_options(tmp_path):
    return ["--model", tmp_path / "model", "--resolution", 64, "--device", "cpu"]


slow = pytest.mark.slow


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        pytest.param(change_captions, marks=slow),
        remove_and_compact,
        pytest.param(overwrite, marks=slow),
        pytest.param(another_encoder, marks=slow),
    ],
)
def test_what_was_opened_is_read_to_its_end(run, images, tmp_path, change):
    cache = tmp_path / "c"
    options = SMALL
    if change is another_encoder:
        make_model(tmp_path / "model")
        options = model_options(tmp_path)
    run("encode", images, "--out", cache, *options, *SHARDS)
    undisturbed = Reader(cache, dropout=0.5)
    wanted = undisturbed.read()
    undisturbed.end()
    reader = Reader(cache, dropout=0.5)
    change(run, images, cache, tmp_path)
    assert run("verify", cache).code == 0  # what is kept for the reader is no problem
    assert reader.read() == wanted
    fresh = Reader(cache, dropout=0.5)
    assert fresh.read() != wanted  # whoever opens it anew sees the new state
    fresh.end()
    reader.end()
    again = run("encode", images, "--out", cache, *(model_options_of(change, tmp_path)), *SHARDS)
    assert "nothing to do" in again.out
    assert "cleared" in again.out  # now nobody reads
    named = {*open_manifest(Storage(cache)).files(), "cache.json", ".readers"}
    assert {path.relative_to(cache).as_posix() for path in cache.rglob("*") if path.is_file()} == named


def model_options_of(change, tmp_path):
    if change is not another_encoder:
        return SMALL
    return [tmp_path / "other" if word == tmp_path / "model" else word for word in model_options(tmp_path)]


def test_a_killed_reader_keeps_nothing(run, images, tmp_path):
    cache = tmp_path / "c"
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    reader = Reader(cache)
    change_captions(run, images, cache)
    before = len(list((cache / "shards").iterdir()))
    reader.process.kill()
    reader.process.wait()
    assert "cleared" in run("encode", images, "--out", cache, *SMALL, *SHARDS).out
    assert len(list((cache / "shards").iterdir())) < before


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_read_on_too(run, images, tmp_path, method):
    cache = tmp_path / "c"
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    data = LatentDataset(cache, latent_sampling_method="deterministic")
    wanted = {data.key(n): data[n].latent_sample for n in range(len(data))}
    del data
    data = LatentDataset(cache, latent_sampling_method="deterministic")
    loader = LatentLoader(data, 1, num_workers=1, multiprocessing_context=method, persistent_workers=True)
    remove_and_compact(run, images, cache)
    found = {data.key(int(batch.index)): batch.latent_sample for batch in loader}
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_without_locks_files_stay_for_a_day(run, images, tmp_path, monkeypatch):
    cache = tmp_path / "c"
    monkeypatch.setattr(readers, "_lock", lambda descriptor, exclusive: None)
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    before = {path.name for path in (cache / "shards").iterdir()}
    change_captions(run, images, cache)
    assert before <= {path.name for path in (cache / "shards").iterdir()}
    assert run("verify", cache).code == 0
    for n in range(4):  # the old captions again: their files are needed again
        (images / f"tall{n}.txt").write_text(f"picture number {n}\n")
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    now = time.time()
    monkeypatch.setattr(readers.time, "time", lambda: now + readers.GRACE + 1)
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    assert {path.name for path in (cache / "shards").iterdir()} == before
    assert run("verify", cache).code == 0
    assert json.loads((cache / readers.SUPERSEDED_NAME).read_text()) == {}


def test_a_reader_may_not_be_allowed_to_write(run, images, tmp_path, monkeypatch):
    cache = tmp_path / "c"
    run("encode", images, "--out", cache, *SMALL)
    opened = os.open

    def read_only(path, flags, *mode, **options):
        if str(path).endswith(readers.NAME) and flags & os.O_CREAT:
            raise OSError(30, "Read-only file system")
        return opened(path, flags, *mode, **options)

    monkeypatch.setattr(os, "open", read_only)
    data = LatentDataset(cache)
    monkeypatch.undo()
    assert readers.free(Storage(cache), ["shards/x.latents.safetensors"]) == []
    del data
    assert readers.free(Storage(cache), ["shards/x.latents.safetensors"]) != []


@pytest.mark.slow
@pytest.mark.parametrize("command", ["verify", "inspect"])
def test_verify_and_inspect_are_readers_too(run, images, tmp_path, monkeypatch, command):
    """A compact that begins once they know the manifest frees nothing before they are done."""
    cache = tmp_path / "c"
    assert run("encode", images, "--out", cache, *SMALL).code == 0
    for n in range(3):
        (images / f"wide{n}.png").unlink()
    assert run("encode", images, "--out", cache, *SMALL).code == 0
    before = set(open_manifest(Storage(cache)).files())
    module = {"verify": verify, "inspect": summary}[command]
    opened = module.open_manifest

    calls = []

    def open_and_compact(storage):
        manifest = opened(storage)
        calls.append(storage)
        if command == "verify" and len(calls) == 1:
            return manifest  # it looks for scraps first, which no reader keeps
        other = [sys.executable, "-m", "latentprep", "compact", str(cache)]
        found = subprocess.run(other, capture_output=True, text=True, check=True).stdout
        assert "stay while a training loop may read them" in found
        return manifest

    monkeypatch.setattr(module, "open_manifest", open_and_compact)
    result = run(command, cache)
    assert result.code == 0, result.out + result.err
    monkeypatch.undo()
    after = open_manifest(Storage(cache)).files()
    assert before - set(after)
    assert run("compact", cache).code == 0
    assert {path.name for path in (cache / "shards").iterdir()} == {name.split("/")[1] for name in after if "/" in name}


@pytest.mark.parametrize("command", ["verify", "inspect", "compact"])
def test_a_folder_that_is_no_cache_is_left_as_it_is(run, images, command):
    before = sorted(path.name for path in images.iterdir())
    assert run(command, images).code == 1
    with pytest.raises(UserError):
        LatentDataset(images)
    assert sorted(path.name for path in images.iterdir()) == before
