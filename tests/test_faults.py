"""Kills, signals, full and read-only disks, two runs at once: nothing is lost, and the end is as undisturbed."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch

from latentprep.cache.lock import hold
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.prepare.models.vae_encoder import VaeEncoder
from tests.conftest import SMALL, gradient
from tests.test_encode import files, rows

SHARDS = ("--shard-size", "30kB")
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}  # as in this process: another number moves the last bits
ENCODE = (sys.executable, "-m", "latentprep", "encode")

# Imports everything once, and forks a run for every line that it reads: [kill, arguments]. The kill comes so many
# seconds after the start, or once so many files have appeared in the cache and so many seconds more; or never.
HARNESS = """
import json, os, signal, sys, time
import torch
torch.set_num_threads(1)
from latentprep.cli import commands as cli
from latentprep.prepare import encode
from latentprep import messages
from latentprep.prepare.work import latents as worker
from latentprep.prepare.models import vae_encoder as vae
from latentprep.prepare.models import text_encoder as text
from latentprep.prepare.plan import estimate
from latentprep.prepare.images import load
from latentprep.prepare.engine import local
from latentprep.prepare.devices import quiet_libraries
quiet_libraries()
FLAGS = os.WEXITED | os.WNOHANG | os.WNOWAIT
def listing(folder):
    return set(os.listdir(folder)) if os.path.isdir(folder) else set()
for line in sys.stdin:
    kill, arguments = json.loads(line)
    started, child = time.monotonic(), os.fork()
    if child == 0:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1); os.dup2(null, 2)
        sys.argv = ["latentprep", *arguments]
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = exit_.code
        os._exit(code)
    if kill is not None:
        folder, count, delay = kill
        seen, new = listing(folder), 0
        while new < count and time.monotonic() < started + 30 and not os.waitid(os.P_PID, child, FLAGS):
            now = listing(folder)
            seen, new = seen | now, new + len(now - seen)
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.monotonic() - started]), flush=True)
"""


@pytest.fixture(scope="module")
def forked():
    """forked((folder, files, seconds) or None, "encode", ...) -> exit code, seconds; killed runs have exit code -9."""
    process = subprocess.Popen(
        [sys.executable, "-c", HARNESS], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def run_one(kill, *arguments):
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([kill, [str(argument) for argument in arguments]]) + "\n")
        process.stdin.flush()
        return tuple(json.loads(process.stdout.readline()))

    yield run_one
    process.communicate()


def more_images(images):
    for n in range(24):
        gradient(60 + n, 70).save(images / f"more{n}.png")
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])


def change(images):
    """A bit of everything that an incremental run has to do."""
    for n in range(6):
        (images / f"more{n}.png").rename(images / f"renamed{n}.png")
        gradient(80, 70 + n).save(images / f"more{n + 6}.png")
        (images / f"more{n + 12}.png").unlink()
        gradient(90, 70 + n).save(images / f"new{n}.png")
    (images / "tall0.txt").write_text("another caption")


def latents_files(cache):
    return {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in (cache / "shards").glob("*.latents.safetensors")}


@pytest.mark.slow
@pytest.mark.parametrize("phase", ["first", "incremental"])
def test_killed_at_random_moments_it_ends_as_an_undisturbed_run(forked, images, tmp_path, phase):
    """LATENTPREP_KILLS says how many (`make faults` runs 200)."""
    kills = int(os.environ.get("LATENTPREP_KILLS", "30")) // 2
    more_images(images)
    whole, cache, start = tmp_path / "whole", tmp_path / "c", tmp_path / "start"
    start.mkdir()
    if phase == "incremental":
        assert forked(None, "encode", images, "--out", start, *SMALL, *SHARDS)[0] == 0
        change(images)
        shutil.copytree(start, whole)
    code, seconds = forked(None, "encode", images, "--out", whole, *SMALL, *SHARDS)
    assert code == 0
    wanted = files(whole)
    random = np.random.default_rng(0)
    killed, interesting = 0, 0
    shutil.copytree(start, cache)
    known = latents_files(cache)
    while killed < kills:
        moment = float(random.uniform(0.2, 1.1) * seconds), float(random.uniform(0, 0.02))
        kill = [str(cache), 0, moment[0]]  # at any time, or when files are being written
        if random.random() < 0.6:
            kill = [str(random.choice([cache, cache / "shards"])), int(random.integers(1, 8)), moment[1]]
        code, _ = forked(kill, "encode", images, "--out", cache, *SMALL, *SHARDS)
        now = latents_files(cache) if (cache / "shards").exists() else {}
        assert known.items() <= now.items()  # no finished shard was lost or written again
        killed += code == -9
        interesting += code == -9 and now != known
        known = now
        if code == 0:
            assert files(cache) == wanted
            shutil.rmtree(cache)
            shutil.copytree(start, cache)
            known = latents_files(cache)
    assert interesting > kills // 10  # these came while shards were written
    assert forked(None, "encode", images, "--out", cache, *SMALL, *SHARDS)[0] == 0
    assert files(cache) == wanted
    assert known.items() <= latents_files(cache).items()


def test_scraps_of_a_killed_run_are_cleared(run, images, tmp_path):
    cache = tmp_path / "c"
    assert run("encode", images, "--out", cache, *SMALL).code == 0
    before = files(cache)
    scraps = (".cache.json.77.tmp", "shards/.x.latents.safetensors.77.tmp", "shards/abc.latents.safetensors")
    for name in scraps:
        (cache / name).write_bytes(b"half of")
    (cache / "mine.txt").write_text("not yours")
    verified = json.loads(run("verify", cache, "--json").out)
    assert sorted(p["name"] for p in verified["problems"] if p["problem"] == "orphan") == sorted(scraps)
    result = run("encode", images, "--out", cache, *SMALL)
    assert "cleared  1 file that nothing refers to (7 B)" in result.out
    assert files(cache) == {**before, "mine.txt": b"not yours"}


def wait_for_shards(process, cache, count):
    deadline = time.monotonic() + 60
    while not ((cache / "shards").is_dir() and len(list((cache / "shards").glob("*.latents.*"))) >= count):
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.005)


@pytest.fixture
def many(images):
    for n in range(120):
        shutil.copy(images / "wide0.png", images / f"copy{n}.png")
    return images


@pytest.mark.slow
def test_sigterm_is_as_good_as_ctrl_c(run, many, tmp_path):
    cache = tmp_path / "c"
    command = ["encode", many, "--out", cache, *SMALL, *SHARDS]
    process = subprocess.Popen([*ENCODE, *map(str, command[1:])], stderr=subprocess.PIPE, text=True, env=ONE_THREAD)
    wait_for_shards(process, cache, 2)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopping once this batch is done; again to stop at once" in err
    assert re.search(rf"Stopped; \d+ finished shards.* safe in {cache}\. To go on", err)
    assert not (cache / ".lock").exists()
    assert run(*command).code == 0
    assert run("encode", many, "--out", tmp_path / "whole", *SMALL, *SHARDS).code == 0
    assert files(tmp_path / "whole") == files(cache)


SLOW = """
import sys, time, ctypes
from latentprep.cli import commands as cli
from latentprep.prepare.models.vae_encoder import VaeEncoder
def encode(self, pixels):
    print("encoding", flush=True)
    ctypes.CDLL(None).usleep(30_000_000)  # as deep in another library as torch: Python's handlers have to wait
VaeEncoder.start = encode
cli.main()
"""


@pytest.mark.slow
def test_a_second_ctrl_c_ends_it_at_once(images, tmp_path):
    command = [sys.executable, "-c", SLOW, "encode", str(images), "--out", str(tmp_path / "c"), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "encoding\n"
    process.send_signal(signal.SIGINT)
    assert process.stderr is not None
    heard = ""
    while "again to stop at once" not in heard:  # said at once, though the batch goes on
        heard += process.stderr.readline()
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=10) == 130


@pytest.mark.slow
def test_a_second_run_says_who_holds_the_cache_and_a_dead_one_blocks_nobody(run, many, tmp_path):
    cache = tmp_path / "c"
    command = ["encode", many, "--out", cache, *SMALL, *SHARDS]
    process = subprocess.Popen([*ENCODE, *map(str, command[1:])], stderr=subprocess.DEVNULL, env=ONE_THREAD)
    wait_for_shards(process, cache, 1)
    result = run(*command)
    assert result.code == 1
    assert re.search(
        rf"error: {cache}: another latentprep run is writing it \(process {process.pid} on \S+ since [-\d]+ [:\d]+: "
        rf"latentprep encode {many} .*\). Wait for it, or stop it",
        result.err,
    )
    process.kill()
    process.wait()
    assert (cache / ".lock").exists()
    assert run(*command).code == 0
    assert run("encode", many, "--out", tmp_path / "whole", *SMALL, *SHARDS).code == 0
    assert files(tmp_path / "whole") == files(cache)


def test_a_lock_that_lost_its_name_keeps_nobody_out_and_is_not_taken(tmp_path, monkeypatch):
    """Its holder unlinks it just after it was opened here: two would write, each with a file of its own."""
    flock = fcntl.flock

    def late(file, operation):
        (tmp_path / ".lock").unlink(missing_ok=True)
        return flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UserError, match="another latentprep run is writing it"), hold(Storage(tmp_path)):
        pass


def test_who_asks_for_a_lock_leaves_the_holders_name_in_it(tmp_path):
    with hold(Storage(tmp_path)):
        before = (tmp_path / ".lock").read_text()
        with pytest.raises(UserError, match=rf"\(process {os.getpid()} on "), hold(Storage(tmp_path)):
            pass
        assert (tmp_path / ".lock").read_text() == before


def test_the_lock_goes_with_its_holder_and_leaves_nothing(tmp_path):
    storage = Storage(tmp_path / "a" / "b")
    with hold(storage):
        assert (tmp_path / "a" / "b" / ".lock").exists()
    assert not (tmp_path / "a").exists()
    storage.write_atomic("x", b"")
    with pytest.raises(ZeroDivisionError), hold(storage):
        raise ZeroDivisionError
    assert files(tmp_path) == {"a/b/x": b""}
    with hold(storage):
        pass


@pytest.mark.slow
def test_a_disk_that_is_full(run, images, tmp_path):
    """A quota on the size of a file: the latents fit, the manifest and text do not."""
    cache = tmp_path / "c"
    command = ["encode", str(images), "--out", str(cache), *SMALL, "--store-dtype", "float32", *SHARDS]
    limits = (20_000, 20_000)
    process = subprocess.run(
        [*ENCODE, *command[1:]], capture_output=True, text=True, env=ONE_THREAD,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits), check=False,
    )  # fmt: skip
    assert process.returncode == 1
    assert re.search(
        r"error: \S+: cannot write \(File too large\). Nothing was left half-written; mend that", process.stderr
    )
    left = files(cache / "shards")
    assert left
    assert all(name.endswith(".safetensors") for name in left)
    assert run(*command).code == 0
    left = {name: data for name, data in left.items() if ".latents." in name}
    assert left.items() <= files(cache / "shards").items()
    assert run("encode", images, "--out", tmp_path / "whole", *command[4:]).code == 0
    assert files(tmp_path / "whole") == files(cache)


def can_mount():
    return shutil.which("unshare") and not subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True, check=False
    ).returncode  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="mounting is not permitted here")
def test_a_small_file_system_that_fills_and_one_that_turns_read_only(run, images, tmp_path):
    encode = " ".join([*ENCODE, str(images), "--out", str(tmp_path / "c"), *SMALL, *SHARDS])
    script = f"""
        mkdir {tmp_path}/c && mount -t tmpfs -o size=80k tmpfs {tmp_path}/c || exit 99
        {encode} > {tmp_path}/full.txt 2>&1; echo $? >> {tmp_path}/full.txt
        ls -A {tmp_path}/c/shards > {tmp_path}/left.txt
        mount -o remount,size=10m,ro {tmp_path}/c
        {encode} > {tmp_path}/read-only.txt 2>&1; echo $? >> {tmp_path}/read-only.txt
        mount -o remount,rw {tmp_path}/c
        {encode} && cp -r {tmp_path}/c {tmp_path}/end
    """
    subprocess.run(
        ["unshare", "-rm", "sh", "-c", textwrap.dedent(script)], check=True, capture_output=True, env=ONE_THREAD
    )
    full, read_only = (tmp_path / "full.txt").read_text(), (tmp_path / "read-only.txt").read_text()
    assert "No space left on device" in full
    assert "Read-only file system" in read_only
    for text in (full, read_only):
        assert text.endswith("\n1\n")
        assert "Traceback" not in text
    left = (tmp_path / "left.txt").read_text().split()
    assert left
    assert not [name for name in left if name.startswith(".")]
    assert run("encode", images, "--out", tmp_path / "whole", *SMALL, *SHARDS).code == 0
    assert files(tmp_path / "whole") == files(tmp_path / "end")


class Full:
    """A device that holds so many pixels at once, with the error of the real one."""

    def __init__(self, monkeypatch, pixels):
        self.batches = []
        whole = VaeEncoder._posterior

        def posterior(encoder, vae, images):
            count, _, height, width = images.shape
            self.batches.append(count)
            if count * height * width > pixels:
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return whole(encoder, vae, images)

        monkeypatch.setattr(VaeEncoder, "_posterior", posterior)


def test_out_of_memory_halves_the_batch_and_is_remembered(run, images, tmp_path, monkeypatch):
    assert run("encode", images, "--out", tmp_path / "whole", *SMALL, "--batch-size", 8).code == 0
    device = Full(monkeypatch, 2 * 32 * 96)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--batch-size", 8)
    assert result.code == 0
    assert "out of memory with 4 images of 96x32 at once: went on with 2" in result.out
    assert device.batches == [4, 2, 2, 1, 1, 1, 1]
    found, wanted = rows(tmp_path / "c"), rows(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    for key in found:
        assert torch.allclose(found[key]["latent_mean"].float(), wanted[key]["latent_mean"].float(), atol=2e-3)


def test_an_image_that_does_not_fit_alone_is_skipped_and_tried_again(run, images, tmp_path, monkeypatch):
    options = ("--out", tmp_path / "c", *SMALL)
    Full(monkeypatch, 32 * 96)
    result = run("encode", images, *options)
    assert result.code == 0
    assert "skipped  4 out_of_memory (tall0.png: one image of 64x64 does not fit into the device's memory" in result.out
    monkeypatch.undo()
    result = run("encode", images, *options)
    assert "encoded  4 images" in result.out
    assert (tmp_path / "c" / "skipped.jsonl").read_bytes() == b""


def test_another_runtime_error_is_no_lack_of_memory(run, images, tmp_path, monkeypatch):
    def posterior(self, vae, images):
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(VaeEncoder, "_posterior", posterior)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert result.code == 1
    assert "no cache was made, since 1 unit failed (RuntimeError: shapes cannot be multiplied)" in result.err
    assert not (tmp_path / "c").exists()


def test_compact_waits_for_no_other_and_disturbs_none(run, images, tmp_path):
    cache = tmp_path / "c"
    run("encode", images, "--out", cache, *SMALL)
    before = files(cache)
    with hold(Storage(cache)):
        result = run("compact", cache, "--min-share", 0)
    assert (result.code, "another latentprep run is writing" in result.err) == (1, True)
    assert files(cache) == before


def test_compact_deletes_nothing_before_it_has_committed(run, images, tmp_path, monkeypatch):
    cache = tmp_path / "c"
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    (images / "wide0.png").unlink()
    run("encode", images, "--out", cache, *SMALL, *SHARDS)
    before = files(cache)

    def fails(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("latentprep.cache.compact.commit", fails)
    with pytest.raises(ZeroDivisionError):
        run("compact", cache, "--min-share", 0)
    after = files(cache)
    assert {name: after[name] for name in before if name != ".lock"} == {n: before[n] for n in before if n != ".lock"}


def test_the_folder_of_a_new_file_is_synced(tmp_path, monkeypatch):
    synced = []
    fsync = os.fsync

    def seen(descriptor):
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", seen)
    Storage(tmp_path / "c").write_atomic("x", b"y")
    assert synced[-1] == str(tmp_path / "c")
    assert len(synced) == 2


def test_strict_holds_for_a_finished_cache_too(run, images, tmp_path):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    command = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*command, "--strict").code == 1
    result = run(*command, "--strict")
    assert ("nothing to do" in result.out, result.code) == (True, 1)
    assert run(*command).code == 0
