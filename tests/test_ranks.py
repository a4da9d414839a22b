"""prepare/engine/ranks.py and where.py: several runs that share the work, and nothing but the cache."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from itertools import permutations

import numpy as np
import pytest

import latentprep
from latentprep.cache import lock
from latentprep.cache.lock import hold
from latentprep.cache.manifest import find_manifest, open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import LockedError, UserError
from latentprep.prepare.devices import default_threads
from latentprep.prepare.engine import ranks
from latentprep.prepare.engine.where import MAX_WORLD_SIZE, Share, find_share
from latentprep.prepare.work import batches, cond, text
from latentprep.prepare.work.latents import LatentsWorker
from tests.conftest import SMALL
from tests.test_encode import files
from tests.test_latents_worker import prepared

SHARDS = (*SMALL, "--shard-size", "15kB")


@pytest.fixture
def encode(run, images, tmp_path):
    """encode(rank, size, ...) -> the result of that rank, or without ranks of a run alone."""

    def encode_one(rank=None, size=None, *options, out=None, code=0):
        share = ("--rank", rank, "--world-size", size) if rank is not None else ()
        result = run("encode", images, "--out", out or tmp_path / "c", *SHARDS, *share, *options)
        assert code in (None, result.code), result.err
        return result

    return encode_one


def whole(encode, tmp_path):
    encode(out=tmp_path / "whole")
    return files(tmp_path / "whole")


@pytest.mark.parametrize("order", list(permutations(range(3)))[::2])
def test_in_any_order_the_end_is_that_of_one_run(encode, tmp_path, order):
    for n, rank in enumerate(order):
        result = encode(rank, 3)
        absent = ", ".join(map(str, sorted(order[n + 1 :])))
        assert (f"not yet: {absent}. The last one commits" in result.out) == (n < 2)
        assert (tmp_path / "c" / "cache.json").exists() == (n == 2)
    assert files(tmp_path / "c") == whole(encode, tmp_path)


@pytest.mark.parametrize(
    "names", [("RANK", "WORLD_SIZE", "LOCAL_RANK"), ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")]
)
def test_the_variables_of_launchers_say_the_rank(encode, tmp_path, monkeypatch, names):
    for rank in range(2):
        for name, value in zip(names, (rank, 2, rank), strict=True):
            monkeypatch.setenv(name, str(value))
        assert f"rank     {rank} of 2 ({names[0]})" in encode().err
    for name in names:
        monkeypatch.delenv(name)
    assert files(tmp_path / "c") == whole(encode, tmp_path)


def test_which_variables_count():
    torchrun = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    slurm = {"SLURM_PROCID": "3", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert find_share(None, None, {}) == Share()
    assert find_share(None, None, {**slurm, **torchrun}) == Share(1, 4, 1, "RANK")
    assert find_share(0, 1, torchrun) == Share(0, 1, None, "--rank")  # this process alone
    assert find_share(None, None, {**torchrun, "WORLD_SIZE": "1", "RANK": "0"}) == Share()
    step = {**slurm, "SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0"}
    assert find_share(None, None, step) == Share(3, 8, 0, "SLURM_PROCID")
    batch = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_JOB_ID": "7"}
    assert find_share(None, None, batch) == Share()  # it runs once, and would wait for seven others in vain
    together = {**torchrun, "LOCAL_WORLD_SIZE": "4"}
    assert find_share(None, None, together) == Share(1, 4, 1, "RANK", local_size=4)
    for bad in ({"RANK": "4"}, {"LOCAL_WORLD_SIZE": "x"}, {"RANK": "x"}, {"RANK": "-1"}, {"WORLD_SIZE": str(10**12)}):
        with pytest.raises(UserError, match=r"^RANK=.*: expected"):
            find_share(None, None, {**torchrun, **bad})
    with pytest.raises(UserError, match=r"^--world-size 1048577: expected at most 1048576\."):
        find_share(0, MAX_WORLD_SIZE + 1, {})


def test_who_shares_a_machine_shares_its_cores(images, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))  # that this process may use
    assert [default_threads(count) for count in (1, 2, 5, 100)] == [12, 6, 2, 1]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(100)))
    assert default_threads(2) == 16
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(12)))
    for name, value in {"RANK": 1, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    assert prepared(images, tmp_path / "c", workers=None).threads == 6
    assert prepared(images, tmp_path / "d", workers=None, device="auto", devices="cpu,cpu").threads == 3


def test_torchrun_with_one_process_is_a_run_alone(encode, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "rank " not in encode().err
    assert (tmp_path / "c" / "cache.json").exists()


def skip_one(monkeypatch, key, reason):
    load = batches.load_pixels
    monkeypatch.setattr(
        batches, "load_pixels", lambda item, *rest: item.skip(reason, "now") if item.key == key else load(item, *rest)
    )


@pytest.mark.parametrize("reason", ["io_error", "unreadable"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_a_rank_that_starts_late_plans_what_the_others_have_planned(encode, tmp_path, monkeypatch, reason, order):
    """Though these have finished shards with skips that a run alone would try again."""
    skip_one(monkeypatch, "tall1.png", reason)
    larger = ("--shard-size", "40kB")  # a unit with a skip has other images, too
    for rank in order:
        encode(rank, 2, *larger)
    encode(None, None, *larger, out=tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")
    assert json.loads((tmp_path / "c" / "skipped.jsonl").read_text())["reason"] == reason


def stop_after(monkeypatch, count):
    """A run that is killed once so many shards are there."""
    work = LatentsWorker.run

    def stops(self, units):
        for event in work(self, units):
            yield event
            count[0] -= getattr(event, "shard", None) is not None
            if not count[0]:
                raise KeyboardInterrupt

    monkeypatch.setattr(LatentsWorker, "run", stops)
    return lambda: monkeypatch.setattr(LatentsWorker, "run", work)


def test_shards_of_an_unfinished_run_that_planned_otherwise_are_in_no_ones_way(encode, images, tmp_path, monkeypatch):
    """Each rank plans at another time: what the others have made by then must not change its plan."""
    larger = ("--shard-size", "40kB")
    undo = stop_after(monkeypatch, [1])
    encode(None, None, *larger, code=130)
    undo()
    shutil.copy(images / "wide0.png", images / "a-new-one.png")
    assert (
        "an unfinished run that planned otherwise: only a run without ranks takes such up" in encode(0, 2, *larger).err
    )
    encode(1, 2, *larger)
    assert open_manifest(Storage(tmp_path / "c")).num_images == 9
    encode(None, None, *larger, out=tmp_path / "whole")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_rank_that_is_stopped_and_started_again_encodes_nothing_twice(encode, tmp_path, monkeypatch):
    encode(1, 2)
    undo = stop_after(monkeypatch, [1])
    assert "Stopped" in encode(0, 2, code=130).err
    undo()
    before = {path: path.stat().st_ino for path in (tmp_path / "c" / "shards").glob("*.latents.*")}
    encode(0, 2)
    assert all(path.stat().st_ino == inode for path, inode in before.items())
    assert files(tmp_path / "c") == whole(encode, tmp_path)


def test_ranks_that_add_text_alone(encode, images, tmp_path):
    encode()
    (images / "tall0.txt").write_text("another caption")
    (images / "wide1.txt").write_text("a third")
    before = (tmp_path / "c" / "cache.json").read_bytes()
    shutil.copytree(tmp_path / "c", tmp_path / "alone")
    encode(1, 2)
    assert (tmp_path / "c" / "cache.json").read_bytes() == before  # and it can be read all the time
    encode(0, 2)
    encode(out=tmp_path / "alone")
    assert files(tmp_path / "c") == files(tmp_path / "alone")
    assert "nothing to do" in encode(0, 2).out


def test_a_text_that_fails_leaves_its_latents_to_the_next_run(encode, tmp_path, monkeypatch):
    wanted = whole(encode, tmp_path)
    compose = text.Run._compose

    def fails(self, task, rows, *others):
        if any(row.key == "tall0.png" for row in rows):
            raise ZeroDivisionError("a fault")
        return compose(self, task, rows, *others)

    monkeypatch.setattr(text.Run, "_compose", fails)
    results = [encode(rank, 2, code=None) for rank in range(2)]
    assert sorted(("FAILED" in result.out, result.code) for result in results) == [(False, 0), (True, 1)]
    monkeypatch.setattr(text.Run, "_compose", compose)
    manifest = open_manifest(Storage(tmp_path / "c"))
    assert 0 < manifest.num_images < 8
    assert {n for n in files(tmp_path / "c") if "latents" in n} == {n for n in wanted if "latents" in n}
    encode()
    assert files(tmp_path / "c") == wanted


def test_two_ranks_that_end_at_the_same_moment(images, tmp_path, monkeypatch):
    barrier, hand_in = threading.Barrier(3), ranks.hand_in

    def together(storage, part):
        hand_in(storage, part)
        barrier.wait()

    monkeypatch.setattr(ranks, "hand_in", together)
    found = []

    def one(rank):
        options = {"model": "tiny", "resolution": 64, "shard_size": "15kB", "rank": rank, "world_size": 3}
        try:
            found.append(latentprep.encode(images, tmp_path / "c", progress=False, **options))
        except BaseException as error:
            barrier.abort()  # the others would wait for ever
            found.append(error)
            raise

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(result).__name__ for result in found] == ["Encoded"] * 3, found
    assert [(result.absent, result.num_cached, result.ok) for result in found] == [((), 8, True)] * 3
    assert latentprep.verify(tmp_path / "c", progress=False).ok


def test_who_holds_the_lock_for_a_moment_keeps_no_rank_from_committing(encode, tmp_path, monkeypatch):
    """As a run that looks whether ranks are at work, and is refused."""
    encode(0, 2)
    hand_in = ranks.hand_in
    entered, thread = threading.Event(), []

    def holds():
        with hold(Storage(tmp_path / "c"), beside_ranks=True):
            entered.set()
            time.sleep(0.8)

    def handed_in(storage, part):
        hand_in(storage, part)
        thread.append(threading.Thread(target=holds))
        thread[0].start()
        entered.wait()

    monkeypatch.setattr(ranks, "hand_in", handed_in)
    encode(1, 2)
    thread[0].join()
    assert find_manifest(Storage(tmp_path / "c")) is not None


def test_while_ranks_are_at_work_others_are_refused(encode, run, tmp_path, monkeypatch):
    encode()
    encode(0, 2, "--flip", out=tmp_path / "d")
    monkeypatch.setattr(lock, "PATIENCE", 0.02)
    for cache in (tmp_path / "c", tmp_path / "d"):
        before = files(cache)
        with hold(Storage(cache), (0, 2)):
            for command in (("encode", tmp_path / "images", "--out", cache, *SHARDS), ("merge", cache, "--incomplete")):
                result = run(*command)
                assert (result.code, "another latentprep run is writing it (process" in result.err) == (1, True)
            if cache.name == "c":
                assert "another latentprep run is writing it" in run("compact", cache).err
            for share in ((0, 2), (0, 3), (2, 3)):  # itself, and those of another run
                with pytest.raises(LockedError), hold(Storage(cache), share):
                    pass
            with hold(Storage(cache), (1, 2)):
                pass
        with hold(Storage(cache)), pytest.raises(LockedError), hold(Storage(cache), (0, 2)):
            pass
        assert files(cache) == before


def test_many_ranks_that_begin_at_once_beside_a_dead_ones_lock(tmp_path):
    """To look whether a lock is held is to hold it for a moment."""
    (tmp_path / ".lock").write_text('{"pid": 1}')
    for n in range(0, 16, 2):
        (tmp_path / f".lock.{n}-of-16").write_text('{"pid": 1}')
    refused, barrier = [], threading.Barrier(16)

    def begin(rank):
        barrier.wait()
        try:
            with hold(Storage(tmp_path), (rank, 16)):
                time.sleep(0.01)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin, args=(rank,)) for rank in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert refused == []
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_run_has_handed_in_is_no_part_of_this_one(encode, run, images, tmp_path):
    """Its last rank was killed between its commit and the end."""
    cache = tmp_path / "c"
    encode(0, 2)
    stale = (cache / "rank-0-of-2.json").read_bytes()
    encode(1, 2)
    for rank in range(2):
        (cache / f"rank-{rank}-of-2.json").write_bytes(stale.replace(b'"rank": 0', f'"rank": {rank}'.encode()))
    before = (cache / "cache.json").read_bytes()
    (images / "tall0.png").unlink()
    assert "not yet: 1, 2." in encode(0, 3).out
    refused = run("merge", cache)
    assert "of 3 ranks, some have not finished: 1, 2." in refused.err
    assert (cache / "cache.json").read_bytes() == before
    encode(2, 3)
    encode(1, 3)
    assert open_manifest(Storage(cache)).num_images == 7
    assert not list(cache.glob("rank-*"))
    encode()
    for rank in range(2):
        (cache / f"rank-{rank}-of-2.json").write_bytes(stale.replace(b'"rank": 0', f'"rank": {rank}'.encode()))
    assert "no rank has handed in anything" in run("merge", cache).err
    encode()  # which clears it away
    assert not list(cache.glob("rank-*"))


def test_ranks_of_another_number_begun_before(encode, tmp_path):
    encode(0, 3)
    encode(1, 3)
    encode(0, 2)
    encode(1, 2)
    assert files(tmp_path / "c") == whole(encode, tmp_path)


def test_ranks_whose_sources_differ_commit_nothing_and_it_is_said(encode, run, images, tmp_path):
    encode(0, 2)
    os.utime(images / "tall0.png", (1, 1))
    assert "not yet: 0." in encode(1, 2).out
    assert find_manifest(Storage(tmp_path / "c")) is None
    for options in ((), ("--incomplete",)):
        refused = run("merge", tmp_path / "c", *options)
        assert refused.code == 1
        assert "ranks 0 of 2, 1 of 2 have planned different work. Their images differ in number, size or time" in (
            refused.err
        )
    encode(0, 2)
    assert open_manifest(Storage(tmp_path / "c")).num_images == 8


def test_captions_that_differ_are_different_work_too(encode, run, images, tmp_path):
    encode(0, 2)
    (images / "tall0.txt").write_text("another")
    encode(1, 2)
    assert "have planned different work" in run("merge", tmp_path / "c").err


def test_the_empty_prompts_cond_of_whoever_was_last(encode, run, tmp_path, monkeypatch):
    """On other devices its last digits differ, and each rank has made it."""
    encode(0, 2)
    (file,) = (tmp_path / "c").glob("uncond.*")
    first = file.read_bytes()
    file.unlink()
    make = cond.CondMaker.make

    def other(self, prompts, *others):
        made = make(self, prompts, *others)
        if prompts == [""]:
            for value in made.cond.values():
                value.flatten()[0] += 0.5
        return made

    monkeypatch.setattr(cond.CondMaker, "make", other)
    encode(1, 2)
    assert file.read_bytes() != first
    assert run("verify", tmp_path / "c").code == 0


def test_a_remote_cache(encode, run, images, tmp_path):
    out = f"memory://ranks{np.random.default_rng().integers(2**60)}"
    for rank in (2, 0, 1):
        encode(rank, 3, out=out)
    wanted = whole(encode, tmp_path)
    storage = Storage(out)
    del wanted[".readers"]
    names = [name for folder in ("", "shards") for name in storage.names(folder)]
    assert {name: storage.read(name) for name in names} == wanted
    (images / "tall0.txt").write_text("another caption")
    for rank in (0, 1):
        encode(rank, 2, out=out)
    assert run("verify", out).code == 0
    assert not [name for name in storage.names() if name.startswith("rank")]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda part: b"{", "cannot be read"),
        (lambda part: b"[" * 100_000, "cannot be read"),
        (lambda part: part.replace(b'"world_size": 2', b'"world_size": 1000000000000'), "cannot be read"),
        (lambda part: part.replace(b'"rank": 0', b'"rank": 1'), "it is of rank 1 of 2"),
        (lambda part: part.replace(b'"rank": 0', b'"rank": -1'), "cannot be read"),
    ],
)
def test_a_part_that_is_none(encode, run, tmp_path, change, words):
    encode(0, 2)
    path = tmp_path / "c" / "rank-0-of-2.json"
    path.write_bytes(change(path.read_bytes()))
    refused = run("merge", tmp_path / "c")
    assert words in refused.err
    assert "Delete it, and start that rank again." in refused.err
    encode(0, 2)
    encode(1, 2)
    assert files(tmp_path / "c") == whole(encode, tmp_path)


def test_no_image_that_can_be_used_is_no_cache(encode, run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(batches, "load_pixels", lambda item, *rest: item.skip("unreadable", "broken"))
    encode(0, 2)
    refused = encode(1, 2, code=1)
    assert "no rank has an image that can be used (wide0.png: unreadable, broken)" in refused.err
    assert find_manifest(Storage(tmp_path / "c")) is None


def test_ranks_may_not_overwrite(encode):
    assert (
        "--overwrite with several ranks: one would delete what another has made"
        in encode(0, 2, "--overwrite", code=1).err
    )


def test_merge_of_what_is_no_cache_makes_nothing(run, tmp_path):
    assert "not a latent cache" in run("merge", tmp_path / "nothing").err
    assert not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_three_real_processes_at_once(encode, images, tmp_path):
    command = [sys.executable, "-m", "latentprep", "encode", images, "--out", tmp_path / "c", *SHARDS]
    started = []
    for rank in range(3):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "RANK": str(rank), "WORLD_SIZE": "3"}
        started.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE))
    said = [process.communicate() for process in started]
    assert [process.returncode for process in started] == [0, 0, 0], said
    assert sum(b"\ncache    " in out for out, _ in said) >= 1
    assert files(tmp_path / "c") == whole(encode, tmp_path)
