"""prepare/engine/local.py and child.py: several processes, their deaths, their errors, and their end."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from contextlib import closing
from pathlib import Path

import pytest

from latentprep.errors import UserError
from latentprep.prepare.devices import choose_devices
from latentprep.prepare.engine import local
from latentprep.prepare.engine.child import Channel, Unheard, portable
from latentprep.prepare.engine.where import Where
from latentprep.prepare.work.events import Failure, Step, TextResult
from tests.conftest import SMALL, gradient
from tests.test_encode import files
from tests.workers import OddError, Task, Worker

TWO = Where(("cpu", "cpu"))
ROOT = Path(__file__).parents[1]


def tasks(*what):
    return [Task(f"t{n}", do) for n, do in enumerate(what)]


def run_all(tmp_path, what, ahead=1, where=TWO):
    """id -> what became of each task; nothing of the processes is left behind, and each image counts once."""
    with closing(local.run(Worker(str(tmp_path), ahead), tasks(*what), where)) as events:
        told = list(events)
    found = [event for event in told if not isinstance(event, Step)]
    assert sum(event.num_images for event in told if isinstance(event, Step)) == len(what)
    assert not multiprocessing.active_children()
    assert len({event.id for event in found}) == len(found)
    return {event.id: event for event in found}


def times_begun(tmp_path):
    return Counter(path.name.partition("-")[0] for path in tmp_path.glob("t*-*"))


@pytest.mark.slow
def test_every_task_is_done_once_by_one_of_the_processes(tmp_path, capfd):
    found = run_all(tmp_path, ["wait"] * 6)
    assert found == {f"t{n}": TextResult(f"t{n}") for n in range(6)}
    assert times_begun(tmp_path) == {f"t{n}": 1 for n in range(6)}
    assert len(list(tmp_path.glob("closed-*"))) == 2
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "once"), [(1, "die once"), (3, "")])
def test_a_task_that_kills_takes_no_other_with_it(tmp_path, capfd, ahead, once):
    """Each process holds several tasks at a time: when one dies, those beside the culprit are not to be blamed."""
    found = run_all(tmp_path, ["", "", "die", "", once, "", "", ""], ahead)
    assert [name for name, event in sorted(found.items()) if isinstance(event, Failure)] == ["t2"]
    assert sorted(found) == [f"t{n}" for n in range(8)]
    assert found["t2"].error == "two processes died with it; the last, on cpu, with exit code -9"
    assert times_begun(tmp_path)["t2"] == 2
    assert "Traceback" not in capfd.readouterr().err


@pytest.mark.slow
def test_a_device_whose_processes_die_again_and_again_is_left_alone(tmp_path):
    with pytest.raises(UserError, match=r"^--devices cpu,cpu: their processes keep ending too early, the last with"):
        run_all(tmp_path, ["die"] * 12)
    assert sum(times_begun(tmp_path).values()) <= 2 * local.MAX_DEATHS
    assert not multiprocessing.active_children()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("user error", UserError, "t0: not\x1b[2J good."),
        ("os error", PermissionError, r"Permission denied: '/a/b'"),
        ("odd error", RuntimeError, "OddError: 1 and 2"),
        ("fault", ZeroDivisionError, "a fault"),
    ],
)
def test_what_ends_one_process_ends_the_run_as_in_a_single_one(tmp_path, capfd, what, kind, words):
    with pytest.raises(kind) as caught:
        run_all(tmp_path, [what, "wait", "wait", "wait"])
    assert words.strip("^") in str(caught.value)
    assert type(caught.value) is kind
    assert not multiprocessing.active_children()
    assert capfd.readouterr() == ("", "")


def test_an_exception_is_sent_with_its_place_and_one_that_cannot_be_as_its_words():
    try:
        raise ValueError("bad")
    except ValueError as error:
        sent = portable(error)
    assert type(sent) is ValueError
    assert "test_engines.py" in sent.__notes__[0]
    assert repr(portable(OddError(1, 2))) == "RuntimeError('OddError: 1 and 2')"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "kind"), [("flood", KeyboardInterrupt), ("swallow", GeneratorExit), ("hang", KeyboardInterrupt)]
)
def test_a_stop_is_not_held_up(tmp_path, capfd, what, kind):
    """Though a process is in the midst of sending, a library swallows the signal, or a thread of it hangs."""
    events = local.run(Worker(str(tmp_path)), tasks(what, what), TWO)
    while len(times_begun(tmp_path)) < 2:
        next(events)
    time.sleep(0.3)  # until the pipe is full, or the thread hangs
    started = time.monotonic()
    if kind is GeneratorExit:
        events.close()
    else:
        with pytest.raises(KeyboardInterrupt):
            events.throw(KeyboardInterrupt)
    assert time.monotonic() - started < 5
    assert not multiprocessing.active_children()
    assert len(list(tmp_path.glob("closed-*"))) == 2  # each could keep what it has done
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_stop_while_the_processes_begin(tmp_path, capfd):
    pool = local.Pool(Worker(str(tmp_path)), tasks("", "", "", ""), ("cpu", "cpu"))
    pool._fill()
    for moment in (0.0, 0.2, 1.0, 2.0):
        for child in pool.children:
            os.kill(child.process.pid, signal.SIGINT)  # as a terminal sends it to all; heard by none
            os.kill(child.process.pid, signal.SIGHUP)
        time.sleep(moment)
    assert all(child.process.is_alive() for child in pool.children)
    pool._stop()
    assert not multiprocessing.active_children()
    pool.children.clear()
    pool._fill()
    pool._stop()
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_the_processes_of_a_killed_parent_end_within_seconds(tmp_path):
    code = (
        "import sys; from tests.workers import Task, Worker; from latentprep.prepare.engine import local\n"
        "from latentprep.prepare.engine.where import Where\n"
        "for _ in local.run(Worker(sys.argv[1]), [Task('t0', 'hang'), Task('t1', 'flood')], Where(('cpu', 'cpu'))):\n"
        "    print('.', flush=True)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert parent.stdout is not None
    wait_until(lambda: len(times_begun(tmp_path)) == 2)
    pids = [int(path.name.partition("-")[2]) for path in tmp_path.glob("t*-*")]
    parent.kill()
    _, err = parent.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))
    assert err == ""


def wait_until(is_so, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_nothing_is_sent_behind_a_message_that_was_interrupted():
    """Its other half would be read as another message."""

    class Interrupted:
        def send(self, message):
            raise KeyboardInterrupt

    channel = Channel(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        channel.send(Step("", 1))
    with pytest.raises(Unheard):
        channel.send("next")


def test_a_parent_that_is_gone_is_no_tasks_failure():
    ours, theirs = multiprocessing.Pipe()
    channel = Channel(theirs)
    asked = channel.tasks()
    thread = threading.Thread(target=lambda: (ours.recv(), ours.close()))
    thread.start()
    with pytest.raises(Unheard):
        next(asked)
    thread.join()
    with pytest.raises(Unheard):
        channel.send(Step("", 1))
    assert not issubclass(Unheard, Exception)


class Run:
    """`latentprep encode --devices cpu,cpu` as a process of its own, over so many images that it can be disturbed."""

    def __init__(self, images, cache, *options):
        command = ["encode", images, "--out", cache, *SMALL, "--resolution", "384", "--shard-size", "90kB", *options]
        self.arguments = [str(part) for part in command]
        self.cache = cache

    def start(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "latentprep", *self.arguments], cwd=ROOT, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip
        self.num_before = self.num_shards()
        return self

    def num_shards(self):
        return len(list(self.cache.glob("shards/*.latents.*")))

    def wait_for_shards(self, count):
        """Until it has made so many."""
        wait_until(lambda: self.num_shards() >= self.num_before + count, 60)

    def workers(self):
        """Process ids of its children, without multiprocessing's own."""
        tasks = Path(f"/proc/{self.process.pid}/task").glob("*/children")  # each thread has its own
        children = [child for task in tasks for child in task.read_text().split()]
        return [int(child) for child in children if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]

    def end(self):
        out, err = self.process.communicate(timeout=120)
        assert "Traceback" not in err
        return self.process.returncode, out, err


@pytest.fixture
def many(images):
    for n in range(40):
        gradient(96 + n, 90).save(images / f"more{n}.png")
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    return images


def without_device(cache):
    found = files(cache)
    manifest = json.loads(found.pop("cache.json"))
    device = manifest["made_with"].pop("device")
    manifest["made_with"].pop("again")  # what was typed, --devices too
    manifest.pop("blake2b")
    return found, manifest, device


@pytest.mark.slow
def test_disturbed_as_it_may_be_the_end_is_that_of_one_device(run, many, tmp_path):
    assert run(*Run(many, tmp_path / "whole").arguments).code == 0
    *wanted, device = without_device(tmp_path / "whole")
    assert device == "cpu"
    disturbed = Run(many, tmp_path / "c", "--devices", "cpu,cpu")

    for number in (signal.SIGINT, signal.SIGTERM):
        disturbed.start().wait_for_shards(1)
        pids = disturbed.workers()
        assert len(pids) == 2
        os.killpg(disturbed.process.pid, number)  # as a terminal or a scheduler does: to all of its processes
        code, _, err = disturbed.end()
        assert code == 128 + number
        assert "safe in" in err
        assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    before = {path.name: path.stat().st_ino for path in (tmp_path / "c" / "shards").glob("*.latents.*")}

    disturbed.start().wait_for_shards(1)
    pids = disturbed.workers()
    disturbed.process.kill()
    disturbed.process.communicate()
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))

    disturbed.start().wait_for_shards(1)
    os.kill(disturbed.workers()[0], signal.SIGKILL)
    code, out, err = disturbed.end()
    assert code == 0, err
    assert "FAILED" not in out
    now = {path.name: path.stat().st_ino for path in (tmp_path / "c" / "shards").glob("*.latents.*")}
    assert before.items() <= now.items()  # no finished shard was made again
    *found, device = without_device(tmp_path / "c")
    assert device == "cpu, cpu"
    assert found == wanted


@pytest.mark.slow
def test_an_error_in_a_process_is_one_line_at_the_terminal(many, tmp_path):
    running = Run(many, tmp_path / "c", "--devices", "cpu,cpu").start()
    running.wait_for_shards(1)
    (tmp_path / "images").rename(tmp_path / "gone")
    code, _, err = running.end()
    assert code == 1
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert len(lines) == 1
    assert lines[0].startswith("error: SOURCE ")


@pytest.mark.slow
def test_what_goes_wrong_before_a_process_begins_is_shown(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: -1)  # which the process is told to use
    with pytest.raises(UserError, match=r"ended before it began, with exit code 1\. What it wrote above may say why"):
        run_all(tmp_path, ["", ""])
    assert "expects a positive integer" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("device", "devices", "message"),
    [
        ("cpu,cpu", None, "--device cpu,cpu: expected auto, cuda, cuda:N, mps or cpu. Several are for --devices."),
        ("all", None, "--device all: expected auto, cuda, cuda:N, mps or cpu. Several are for --devices."),
        ("auto", "bogus", "--devices bogus: expected auto, cuda, cuda:N, mps or cpu."),
        ("auto", "cuda,cuda:0", "--devices cuda,cuda:0: cuda:0 stands twice in it."),
        ("cuda:", None, "--device cuda:: expected auto"),
        ("cuda:00", None, "--device cuda:00: expected auto"),
        ("cuda:²", None, "--device cuda:²: expected auto"),
        ("cpu:0", None, "--device cpu:0: expected auto"),
        ("cuda:4", None, "--device cuda:4: there are 4 CUDA devices, counted from 0."),
    ],
)
def test_a_device_that_is_none_is_named_with_its_option(monkeypatch, device, devices, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    with pytest.raises(UserError) as error:
        choose_devices(device, devices)
    assert str(error.value).startswith(message)
    assert choose_devices("auto", "cuda:0, cuda:3")[0] == ("cuda:0", "cuda:3")
    assert choose_devices("auto", "cpu,cpu")[0] == ("cpu", "cpu")
    assert choose_devices("cuda:3", None)[0] == ("cuda:3",)


def test_more_devices_than_shards_are_told(run, images, tmp_path):
    err = run("encode", images, "--out", tmp_path / "c", *SMALL[:-2], "--devices", "cpu,cpu", "--dry-run").err
    assert "shards   1 shard to encode for 2 devices, which share whole ones: a smaller --shard-size makes more" in err


@pytest.mark.slow
def test_who_swallows_a_signal_sends_nothing_though_somebody_still_listens(tmp_path, monkeypatch):
    """The next message is the last that a process can be told by: were it sent, it would wait for ever."""
    stop, killed = local.Pool._stop, []

    def slow(pool):
        for child in pool.children:
            child.process.terminate()
        deadline = time.monotonic() + 15
        while any(child.process.is_alive() for child in pool.children) and time.monotonic() < deadline:
            time.sleep(0.05)
        killed.extend(child.process.kill() for child in pool.children if child.process.is_alive())
        stop(pool)

    monkeypatch.setattr(local.Pool, "_stop", slow)
    events = local.run(Worker(str(tmp_path)), tasks("swallow", "swallow"), TWO)
    while len(times_begun(tmp_path)) < 2:
        next(events)
    time.sleep(0.3)
    events.close()
    assert not killed
    assert list(tmp_path.glob("swallowed-*"))
