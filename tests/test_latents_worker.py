"""prepare/work/latents.py: an exception is its own unit's, a stop keeps what is done, and no thread is left."""

import re
import threading
import time
from collections import Counter
from contextlib import closing
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from latentprep.cache.latents import Latents
from latentprep.cache.storage import Storage
from latentprep.errors import UserError, WriteError
from latentprep.geometry import Geometry
from latentprep.options import EncodeOptions, TextOptions
from latentprep.prepare.devices import BatchLimit
from latentprep.prepare.encode import encode
from latentprep.prepare.models.vae_encoder import Posterior, VaeEncoder
from latentprep.prepare.survey import prepare
from latentprep.prepare.work import batches, latents, rows
from latentprep.prepare.work.events import Failure, Step
from latentprep.prepare.work.finish import Finisher
from latentprep.progress import Silent
from tests.conftest import NoBar, gradient
from tests.test_encode import files


def prepared(images, out, **options):
    geometry = Geometry.from_options(
        resolution="64", width=None, height=None, bucket_step=32, min_side=32, max_side=None, max_aspect=4.0,
        upscale=True, fit="crop", filter="lanczos", crop="center", crops=1, seed=0,
    )  # fmt: skip
    defaults = {"model": "tiny", "device": "cpu", "shard_bytes": 40_000, "batch_size": 1, "workers": 2, "flip": True}
    return prepare(
        EncodeOptions(source=images, out=str(out), geometry=geometry, text=TextOptions(), **{**defaults, **options}),
        Silent(),
    )


def run(images, out, **options):
    """The events of the units of a run; no thread of it is left."""
    found = prepared(images, out, **options)
    with closing(found.latents_worker().run(found.plan.units)) as events:
        told = list(events)
    wait_for_threads()
    return found.plan.units, told


def wait_for_threads():
    deadline = time.monotonic() + 5
    while any(re.match("load|finish|write|decode", thread.name) for thread in threading.enumerate()):
        assert time.monotonic() < deadline, threading.enumerate()
        time.sleep(0.01)


def results(told):
    found = [event for event in told if not isinstance(event, Step)]
    assert len({event.id for event in found}) == len(found)  # each unit is told of once
    return {event.id: event for event in found}


def fail_once(monkeypatch, place, name, error, call):
    """The call of this number of a function fails."""
    function, calls = getattr(place, name), []

    def fails(*arguments, **named):
        calls.append(1)
        if len(calls) == call:
            raise error
        return function(*arguments, **named)

    monkeypatch.setattr(place, name, fails)
    return calls


STAGES = {
    "find": (latents, "find_leftover"),
    "rows": (latents, "load_rows"),
    "load": (batches, "load_pixels"),
    "stack": (batches, "stack"),
    "start": (VaeEncoder, "start"),
    "finish": (VaeEncoder, "finish"),
    "row": (Finisher, "_keep"),
    "build": (rows.UnitRows, "build"),
    "write": (Storage, "write_atomic"),
}


@pytest.mark.parametrize("call", [1, 2])
@pytest.mark.parametrize("stage", list(STAGES))
def test_an_exception_at_any_stage_fails_its_own_unit_alone(images, tmp_path, monkeypatch, stage, call):
    undone, _ = run(images, tmp_path / "whole")
    error = WriteError("no space") if stage == "write" else RuntimeError("a fault")
    with monkeypatch.context() as patch:
        calls = fail_once(patch, *STAGES[stage], error, call)
        units, told = run(images, tmp_path / "c")
    assert len(calls) >= call
    found = results(told)
    assert found.keys() == {unit.id for unit in units} == {unit.id for unit in undone}
    failures = [event for event in found.values() if isinstance(event, Failure)]
    assert len(failures) == 1
    assert str(error) in failures[0].error
    run(images, tmp_path / "c")
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_what_cannot_be_packed_is_no_fault_of_the_next_unit(images, tmp_path, monkeypatch):
    """It fails in the thread that writes, while the next unit is gathered."""
    fail_once(monkeypatch, Latents, "pack", MemoryError("too large"), 1)
    units, told = run(images, tmp_path / "c")
    found = results(told)
    assert found.keys() == {unit.id for unit in units}
    assert found[units[0].id] == Failure(units[0].id, "MemoryError: too large")
    assert sum(isinstance(event, Failure) for event in found.values()) == 1


def test_two_files_in_a_row_that_cannot_be_written_end_the_run_at_once(images, tmp_path, monkeypatch):
    """And not when all has been encoded for nothing."""
    calls, start = [], VaeEncoder.start

    def fails(self, name, data):
        raise WriteError("no space left on /x")

    monkeypatch.setattr(Storage, "write_atomic", fails)
    monkeypatch.setattr(VaeEncoder, "start", lambda *a: calls.append(1) or time.sleep(0.02) or start(*a))
    found = prepared(images, tmp_path / "c", shard_bytes=1)
    assert len(found.plan.units) == 8
    with pytest.raises(WriteError, match="no space left on /x"):
        list(found.latents_worker().run(found.plan.units))
    wait_for_threads()
    assert len(calls) < 2 * 8


def test_a_remote_that_fails_in_its_own_way_fails_one_unit(images, monkeypatch):
    from fsspec.implementations.memory import MemoryFileSystem

    class OddError(Exception):
        pass

    fail_once(monkeypatch, MemoryFileSystem, "pipe_file", OddError("token\nexpired"), 2)
    units, told = run(images, f"memory://w{time.time_ns()}")
    failures = [event for event in results(told).values() if isinstance(event, Failure)]
    assert len(failures) == 1
    assert "cannot write (token expired)" in failures[0].error
    assert len(results(told)) == len(units)


def test_units_that_end_too_early_are_no_fault_of_those_before(images, tmp_path):
    """As when an engine's connection breaks: what was given is done first, then it is raised."""
    found = prepared(images, tmp_path / "c")

    def units():
        yield found.plan.units[0]
        raise EOFError("broken")

    with pytest.raises(EOFError, match="broken"):
        list(found.latents_worker().run(units()))
    wait_for_threads()
    (shard,) = (tmp_path / "c" / "shards").iterdir()
    assert shard.name == f"{found.plan.units[0].id}.latents.safetensors"


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["load", "start", "finish", "build", "write", "bar", "close"])
@pytest.mark.parametrize("count", [1, 4, 9, 14])
def test_a_stop_at_any_stage_ends_as_undisturbed(images, tmp_path, monkeypatch, stage, count):
    """KeyboardInterrupt comes in the main thread, wherever the others are: as each stage begins for the n-th time."""
    for name in ("tall1.png", "wide3.png"):
        (images / name).write_bytes((images / name).read_bytes()[:-40])
    whole = prepared(images, tmp_path / "whole")
    encode(whole, NoBar)
    found = prepared(images, tmp_path / "c")
    asked, calls = threading.Event(), []

    def counts(*_):
        calls.append(1)
        if len(calls) == count:
            asked.set()

    if stage in STAGES:
        place, name = STAGES[stage]
        function = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, **k: counts() or function(*a, **k))
    events = found.latents_worker().run(found.plan.units)
    for number, _ in enumerate(events):
        if asked.is_set() or (stage in ("bar", "close") and number == count):
            if stage == "close":
                events.close()
                break
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt)
            break
    wait_for_threads()
    monkeypatch.undo()
    encode(prepared(images, tmp_path / "c"), NoBar)
    assert files(tmp_path / "c") == files(tmp_path / "whole")


class Interrupts(NoBar):
    def update(self, count):
        raise KeyboardInterrupt


def test_a_bar_that_is_interrupted(images, tmp_path):
    encode(prepared(images, tmp_path / "whole"), NoBar)
    with pytest.raises(KeyboardInterrupt):
        encode(prepared(images, tmp_path / "c"), Interrupts)
    wait_for_threads()
    encode(prepared(images, tmp_path / "c"), NoBar)
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def test_a_decode_that_hangs_does_not_hold_up_a_stop(images, tmp_path, monkeypatch):
    release, load = threading.Event(), batches.load_pixels

    def hangs(item, *rest):
        if item.key == "tall2.png":
            release.wait(30)
        return load(item, *rest)

    monkeypatch.setattr(batches, "load_pixels", hangs)
    found = prepared(images, tmp_path / "c", shard_bytes=10**9)
    events = found.latents_worker().run(found.plan.units)
    for _ in range(4):
        next(events)
    started = time.monotonic()
    events.close()
    assert time.monotonic() - started < 3
    release.set()
    wait_for_threads()
    assert list((tmp_path / "c" / "shards").glob("*.partial.*"))


def test_a_unit_of_which_all_is_skipped_or_there_already(images, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        load = batches.load_pixels
        patch.setattr(
            batches, "load_pixels",
            lambda item, *rest: item.skip("unreadable", "x") if item.key < "u" else load(item, *rest),
        )  # fmt: skip
        _, told = run(images, tmp_path / "c", shard_bytes=1)
    empty = [event for event in results(told).values() if event.shard is None]
    assert [len(event.skips) for event in empty] == [1] * 4
    _, told = run(images, tmp_path / "c", shard_bytes=1)
    assert sorted(event.num_found for event in results(told).values()) == [0] * 4 + [1] * 4
    assert sum(event.num_images for event in told if isinstance(event, Step)) == 8


def test_only_so_much_is_in_memory(images, tmp_path, monkeypatch):
    """However slow the last stage is, the stages before it wait."""
    loaded, written, most = [], [], []
    load, keep = batches.load_pixels, Finisher._keep

    def slow(self, *rest):
        time.sleep(0.02)
        written.append(1)
        most.append(len(loaded) - len(written))
        return keep(self, *rest)

    monkeypatch.setattr(batches, "load_pixels", lambda *a: loaded.append(1) or load(*a))
    monkeypatch.setattr(Finisher, "_keep", slow)
    for n in range(40):
        (images / f"more{n}.png").write_bytes((images / "wide0.png").read_bytes())
    run(images, tmp_path / "c")
    assert len(written) == 48
    assert max(most) <= 4 + 2 * latents.AHEAD + 4  # decoded ahead, in two queues, in hands


def test_a_vae_that_does_not_fit_is_one_line(images, tmp_path, monkeypatch):
    def fails(self, dtype):
        import torch

        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    monkeypatch.setattr(VaeEncoder, "_load", fails)
    with pytest.raises(UserError, match=r"^--device cpu: its memory is too small for the VAE\. Free some of it"):
        run(images, tmp_path / "c")
    wait_for_threads()


class Slow:
    """A device that works by itself, in the order of what it is asked for, each input for as long as `seconds`."""

    num_retried, limit = 0, BatchLimit()

    def __init__(self, seconds):
        self.seconds, self.free, self.num_asked, self.num_done, self.most = seconds, 0.0, 0, 0, 0

    def start(self, pixels):
        self.num_asked += 1
        self.free = max(self.free, time.perf_counter()) + self.seconds
        self.most = max(self.most, self.num_asked - self.num_done)
        count, height, width, _ = pixels.shape
        zeros = torch.zeros(count, 4, height // 8, width // 8)
        return Posterior(zeros, zeros, Slow.Moment(self, self.free, self.num_asked))

    def finish(self, started, pixels):
        started.wait()
        return started

    class Moment:
        def __init__(self, device, when, number):
            self.device, self.when, self.number = device, when, number

        def synchronize(self):
            time.sleep(max(0.0, self.when - time.perf_counter()))
            self.device.num_done = max(self.device.num_done, self.number)


def test_what_waits_for_a_device_that_works_by_itself_is_counted_as_the_devices(images, tmp_path):
    """And not as waiting for who writes behind it; it is asked for two inputs at most before they are done."""
    found, device = prepared(images, tmp_path / "c"), Slow(0.05)
    worker = replace(found.latents_worker(), vae=SimpleNamespace(open=lambda *_, **__: device))
    waits = Counter()
    for event in worker.run(found.plan.units):
        if isinstance(event, Step):
            waits.update(event.waits)
    assert device.num_asked == 16  # eight images and their mirror images
    assert device.most == 2
    assert waits["encode"] > 0.5
    assert waits["write"] < 0.2 * waits["encode"]


def of_results(told):
    return [event for event in told if not isinstance(event, Step)]


def test_what_overflows_and_does_not_fit_in_float32_is_a_skip_by_itself(images, tmp_path, monkeypatch):
    """One of four images of a batch overflows; the others keep what half precision gave."""
    start, again = VaeEncoder._start, VaeEncoder._start_float32

    def overflows(encoder, pixels):
        mean, std = start(encoder, pixels)
        mean = mean.clone()
        mean[0] = torch.inf
        return mean, std

    def full(encoder, pixels):
        raise RuntimeError("not enough memory: you tried to allocate 1 byte")

    half = {"dtype": "bfloat16", "batch_size": 4, "flip": False, "shard_bytes": 10**9}
    with monkeypatch.context() as patch:
        patch.setattr(VaeEncoder, "_start", overflows)
        patch.setattr(VaeEncoder, "_start_float32", full)
        _, told = run(images, tmp_path / "c", **half)
    (result,) = of_results(told)
    assert [skip.reason for skip in result.skips] == ["out_of_memory"] * 2
    assert result.shard.num_images == 6
    with monkeypatch.context() as patch:  # memory is full for the VAE itself
        patch.setattr(VaeEncoder, "_start", overflows)
        load = VaeEncoder._load
        patch.setattr(VaeEncoder, "_load", lambda e, dtype: full(e, 0) if dtype == torch.float32 else load(e, dtype))
        _, told = run(images, tmp_path / "d", **half)
    (result,) = of_results(told)
    assert {skip.detail for skip in result.skips} == {"the device's memory is too small for the VAE in float32 too"}
    monkeypatch.setattr(VaeEncoder, "_start", overflows)
    monkeypatch.setattr(VaeEncoder, "_start_float32", again)
    (result,) = of_results(run(images, tmp_path / "e", **half)[1])
    assert not result.skips
    assert result.num_retried == 2


def test_a_float32_retry_that_does_not_fit_says_nothing_of_half_precision(images, tmp_path, monkeypatch):
    start, again, sizes = VaeEncoder._start, VaeEncoder._start_float32, []

    def overflows(encoder, pixels):
        sizes.append(len(pixels))
        mean, std = start(encoder, pixels)
        return (torch.full_like(mean, torch.inf) if len(sizes) == 1 else mean), std

    def one_at_a_time(encoder, pixels):
        if len(pixels) > 1:
            raise RuntimeError("not enough memory: you tried to allocate 1 byte")
        return again(encoder, pixels)

    monkeypatch.setattr(VaeEncoder, "_start", overflows)
    monkeypatch.setattr(VaeEncoder, "_start_float32", one_at_a_time)
    for n in range(12):
        (images / f"more{n:02}.png").write_bytes((images / "wide0.png").read_bytes())
    _, told = run(images, tmp_path / "c", dtype="bfloat16", batch_size=4, flip=False, shard_bytes=10**9)
    assert sizes == [4] * 5
    assert "out of memory with 2 images" in of_results(told)[0].batch_limit


def test_a_unit_at_which_two_threads_fail_is_told_once(images, tmp_path, monkeypatch):
    start, finishing, calls = VaeEncoder.start, threading.Event(), []

    def fails_behind(*_):
        finishing.set()
        raise RuntimeError("behind")

    def fails(encoder, pixels):
        calls.append(1)
        if len(calls) == 2:
            finishing.wait(5)
            raise RuntimeError("on the device")
        return start(encoder, pixels)

    monkeypatch.setattr(VaeEncoder, "start", fails)
    monkeypatch.setattr(VaeEncoder, "finish", fails_behind)
    units, told = run(images, tmp_path / "c", flip=False, shard_bytes=10**9)
    assert [event.id for event in of_results(told)] == [units[0].id]


def test_images_that_an_earlier_run_has_skipped_are_not_found_images(images, tmp_path, monkeypatch):
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-60])
    (first,) = of_results(run(images, tmp_path / "c", shard_bytes=10**9)[1])
    assert [skip.key for skip in first.skips] == ["bad.png"]
    _, told = run(images, tmp_path / "c", shard_bytes=10**9)
    assert of_results(told)[0].num_found == 8
    assert sum(event.num_images for event in told if isinstance(event, Step)) == 9


def test_images_that_are_named_are_those_of_the_unit(images, tmp_path):
    photo = gradient(64, 80).convert("RGB")
    for name in ("a.jpg", "z.jpg"):
        photo.save(images / name)
        data = (images / name).read_bytes()
        (images / name).write_bytes(data.replace(b"\xff\xda", b"\xff\xfe\0\x04ab" + b"\0" * 3 + b"\xff\xda", 1))
    _, told = run(images, tmp_path / "c", shard_bytes=1)
    named = [event.named for event in of_results(told) if event.named]
    assert sorted(keys for found in named for keys in found.values()) == [("a.jpg",), ("z.jpg",)]


def test_of_very_large_images_one_is_decoded_at_a_time(images, tmp_path, monkeypatch):
    load, now, most = batches.load_pixels, [], []

    def watched(*arguments):
        now.append(1)
        most.append(len(now))
        time.sleep(0.02)
        now.pop()
        return load(*arguments)

    monkeypatch.setattr(batches, "load_pixels", watched)
    run(images, tmp_path / "c", workers=4)
    assert max(most) > 1
    most.clear()
    monkeypatch.setattr(batches, "is_large", lambda item: True)
    run(images, tmp_path / "d", workers=4)
    assert max(most) == 1


def test_a_fault_without_words_is_named(images, tmp_path, monkeypatch):
    fail_once(monkeypatch, batches, "stack", MemoryError(), 1)
    units, told = run(images, tmp_path / "c")
    assert results(told)[units[0].id] == Failure(units[0].id, "MemoryError: ")
