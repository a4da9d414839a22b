"""terminal.py: strangers' text is never obeyed by a terminal, and a terminal that is gone stops no run."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest

from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import harmless
from tests.conftest import SMALL, gradient
from tests.test_encode import files

EVIL = "a\x1b[31m\x07\x9b2J\u202egnp\u2066\x7f\n\rb"
OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
COMMAND = (sys.executable, "-m", "latentprep")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_harmless_leaves_lines_and_tabs():
    assert harmless("one\n\ttwo") == "one\n\ttwo"
    assert not OBEYED.search(harmless(EVIL))


def obeyed(result):
    """What a terminal would obey, without the progress bar's carriage returns."""
    err = re.sub(r"\r(hash|source|latents|text)?", "", result.err)
    return OBEYED.findall(result.out.replace("\r\n", "\n")) + OBEYED.findall(err)


def test_nothing_that_strangers_write_is_obeyed(run, images, tmp_path):
    evil = EVIL.replace("\x00", "")
    gradient(64, 80).save(images / f"{evil}.png")
    (images / f"{evil}.txt").write_text(evil)
    (images / f"{evil}bad.png").write_bytes(b"no image")
    (images / f"{evil}cut.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    gradient(64, 81).save(images / f"{evil}text.png")
    (images / f"{evil}text.txt").write_bytes(b"caf\xe9")
    (images / f"{evil}.{evil[:4]}").write_bytes(b"x")
    (images / "wide1.txt").write_text(evil * 30)
    cache = tmp_path / "c"
    results = [
        run("encode", images, "--out", cache, *SMALL, "--dry-run"),
        run("encode", images, "--out", cache, *SMALL),
    ]
    (images / f"{evil}.png").rename(images / f"{evil}renamed.png")
    (images / f"{evil}.txt").rename(images / f"{evil}renamed.txt")
    results += [
        run("encode", images, "--out", cache, *SMALL, "--dry-run"),
        run("encode", images, "--out", cache, *SMALL),
        run("encode", images, "--out", cache, *SMALL),
        run("inspect", cache),
        run("inspect", cache, "--json"),
        run("inspect", cache, "--key", f"{evil}renamed.png"),
        run("inspect", cache, "--key", f"{evil}cut.png"),
        run("inspect", cache, "--key", evil),
        run("verify", cache, "--source", images),
        run("compact", cache),
        run("encode", tmp_path / evil),
        run("encode", images, "--out", tmp_path / "d", "--model", evil),
        run("encode", images, "--out", tmp_path / "d", *SMALL, "--template", evil),
        run("encode", images, "--out", tmp_path / "d", *SMALL, "--word-regex", "(" + evil),
    ]
    (images / "metadata.jsonl").write_text('{"' + json.dumps(evil)[1:-1] + '": 1}\n')
    results.append(run("encode", images, "--out", tmp_path / "d", *SMALL))
    (images / "metadata.jsonl").write_text("{" + evil.replace("\n", ""))
    results.append(run("encode", images, "--out", tmp_path / "d", *SMALL))
    for result in results:
        assert not obeyed(result), result
    assert all(result.err.count("\n") <= 12 for result in results)


def test_a_strangers_manifest_is_not_obeyed(run, images, tmp_path):
    run("encode", images, "--out", tmp_path / "c", *SMALL)
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    manifest = replace(
        manifest, made_with=replace(manifest.made_with, model=EVIL, vae=EVIL, text_encoders=(EVIL,), source=EVIL)
    )
    manifest.recipe.libraries["torch"] = EVIL
    from latentprep.cache.manifest import commit

    commit(storage, manifest, [])
    for command in (("inspect",), ("verify",), ("verify", "--source", images, "--re-encode", 1)):
        assert not obeyed(run(command[0], tmp_path / "c", *command[1:]))
    assert not obeyed(run("encode", images, "--out", tmp_path / "c", *SMALL))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_run_goes_on_if_nobody_listens(images, tmp_path, kind):
    if kind == "full":
        deaf = os.open("/dev/full", os.O_WRONLY)
    else:
        read, deaf = os.pipe()
        os.close(read)
    command = [*COMMAND, "encode", images, "--out", tmp_path / "c", *SMALL]
    process = subprocess.run(command, env=ENVIRONMENT, stdout=deaf, stderr=deaf)
    os.close(deaf)
    assert process.returncode == 0
    assert open_manifest(Storage(tmp_path / "c")).num_images == 8


@pytest.mark.slow
def test_inspect_into_head_ends_quietly(run, images, tmp_path):
    run("encode", images, "--out", tmp_path / "c", *SMALL)
    line = f"{sys.executable} -m latentprep inspect {tmp_path / 'c'} --json | head -1"
    result = subprocess.run(line, shell=True, capture_output=True, text=True, env=ENVIRONMENT)
    assert (result.stdout, result.stderr) == ("{\n", "")


@pytest.mark.slow
def test_a_terminal_that_is_closed_stops_the_run_in_good_order(run, images, tmp_path):
    for n in range(60):
        gradient(128, 100 + n).save(images / f"more{n}.png")
    options = ("--model", "tiny", "--resolution", "128", "--device", "cpu", "--shard-size", "100kB")
    command = [*COMMAND, "encode", images, "--out", tmp_path / "c", *options]
    process = subprocess.Popen(command, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "c").glob("shards/*.latents.*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGHUP)
    _, err = process.communicate()
    assert process.returncode == 128 + signal.SIGHUP
    assert "To go on, type:" in err


@pytest.mark.slow
def test_a_slow_read_holds_up_no_signal(images, tmp_path):
    code = (
        "import sys, time\n"
        "from latentprep.cli import commands as cli\n"
        "from latentprep.prepare.source.folder import Folder\n"
        "read = Folder.read\n"
        "def slow(self, key, limit):\n"
        "    if key.endswith('.png'): print('reading', flush=True); time.sleep(600)\n"
        "    return read(self, key, limit)\n"
        "Folder.read = slow\n"
        "cli.main()"
    )
    command = [sys.executable, "-c", code, "encode", images, "--out", tmp_path / "c", *SMALL]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "reading\n"
    started = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM
    assert time.monotonic() - started < 20


# names, URLs and numbers


def test_a_dot_as_source_makes_a_cache_beside_it(run, images, monkeypatch):
    monkeypatch.chdir(images)
    assert run("encode", ".", *SMALL).code == 0
    assert (images.parent / "images.latents" / "cache.json").exists()
    assert run("encode", "/", *SMALL, "--dry-run").code == 1


def test_locations_that_cannot_be_a_cache(run, images, tmp_path):
    before = files(tmp_path)
    for out, words in (
        (f"file://{images}", "is the image folder itself"),
        ("simplecache::s3://bucket/x", "chained locations are not supported"),
        ("nosuch://x", "cannot open this location"),
        (tmp_path / ("x" * 256), "File name too long"),
    ):
        result = run("encode", images, "--out", out, *SMALL)
        assert (result.code, words in result.err) == (1, True), result.err
        assert len(result.err.splitlines()) <= 6
    assert files(tmp_path) == before
    assert "in the memory of this process" in run("encode", images, "--out", "memory://b/c", *SMALL, "--dry-run").err


@pytest.mark.parametrize("value", [-1, 1.5, None, "1", True])
def test_epochs_batch_sizes_and_seeds_are_whole_numbers(run, images, tmp_path, value):
    run("encode", images, "--out", tmp_path / "c", *SMALL)
    data = LatentDataset(tmp_path / "c")
    for make in (
        lambda: data.set_epoch(value),
        lambda: LatentLoader(data, value),
        lambda: BucketBatchSampler(data, value),
        lambda: LatentLoader(data).set_epoch(value),
        lambda: LatentDataset(tmp_path / "c", repeats=value),
    ):
        with pytest.raises(UserError):
            make()
    if value != -1:
        for make in (lambda: LatentDataset(tmp_path / "c", seed=value), lambda: LatentLoader(data, seed=value)):
            with pytest.raises(UserError):
                make()


def test_large_and_odd_numbers_work(run, images, tmp_path):
    run("encode", images, "--out", tmp_path / "c", *SMALL)
    data = LatentDataset(tmp_path / "c", latent_sampling_method="random", seed=-(2**70))
    loader = LatentLoader(data, np.int64(2), seed=2**80)
    loader.set_epoch(np.int64(2**40))
    assert sum(len(batch) for batch in loader) == 8
    data.set_epoch(2**70)
    assert data[0].latent_sample.isfinite().all()
