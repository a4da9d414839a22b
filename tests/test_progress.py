"""progress.py: bars that fit their terminal, and lines for pipes and logs."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager

import pytest

import latentprep
from latentprep import progress
from latentprep.cli.terminal import Terminal
from latentprep.prepare.outcome import collect
from latentprep.prepare.work.events import LatentsResult, Step
from latentprep.records import Skip
from tests.conftest import SMALL

WAITS = {"decode": 1234.0, "encode": 12345.0, "text": 0.0, "write": 123.0}


@contextmanager
def terminal(monkeypatch, columns):
    """A terminal of that width as stderr; gives what it is shown."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with open(theirs, "w", encoding="utf-8") as stderr, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", stderr)
        yield
    os.close(ours)


def steps(num_images, num_skips):
    yield Step("unit", num_images, waits=WAITS, num_skips=num_skips)


@pytest.mark.parametrize("columns", [80, 120, 160])
def test_a_bar_fits_its_terminal(monkeypatch, columns):
    with terminal(monkeypatch, columns):
        bar = Terminal().bar(100_000, "latents")
        bar.start_t -= 5000
        collect(steps(45_000, 123), bar)
        shown = str(bar)
    assert len(shown) <= columns
    assert re.search(r"45%\|.+\| 45000/100000 \[1:23:20<1:41:51, +9\.00img/s, 123 skipped", shown)
    assert shown.endswith("]")
    waited = ", waited: decode 1234s, encode 12345s, text 0s, write 123s]"
    assert shown.endswith(waited) == (columns == 160)


def test_a_bar_of_few_images_is_long_enough_to_see(monkeypatch):
    with terminal(monkeypatch, 80):
        bar = Terminal().bar(400, "latents")
        collect(steps(200, 0), bar)
        shown = str(bar)
    assert len(shown.split("|")[1]) >= 20
    assert "skipped" not in shown


def test_skips_are_counted_while_a_unit_is_in_work(monkeypatch, capfd):
    def events():
        yield Step("a", 4, num_skips=1)
        yield Step("b", 4, num_skips=2)
        yield Step("a", -4)  # its process has died: all of it comes again
        yield Step("a", 4, num_skips=1)
        yield Step("b", 4)
        yield LatentsResult(
            "b", None, tuple(Skip(f"{n}", "non_finite", "") for n in range(3))
        )  # one more than was known
        yield Step("a", 4)

    tally = collect(events(), Terminal().bar(16, "latents"))
    assert tally.skipped == {"a": 1, "b": 3}
    assert capfd.readouterr().err.startswith("latents  100%  16 of 16, ")


def test_in_a_pipe_there_is_a_line_every_ten_seconds_and_one_at_the_end(monkeypatch, capfd):
    now = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])

    def events():
        yield Step("unit", 500, is_new=False)
        for _ in range(900):
            now[0] += 0.05
            yield Step("unit", 5, waits={"decode": 0.01}, num_skips=0)
        yield Step("unit", 1000, waits=WAITS, num_skips=7)

    collect(events(), Terminal().bar(6000, "latents"))
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 5
    assert re.fullmatch(r"latents   25%  1,50[05] of 6,000, 100\.\d/s, 45 s left", lines[0]), lines[0]
    assert re.fullmatch(
        r"latents  100%  6,000 of 6,000, 122\.\d/s, 45 s, 7 skipped, "
        r"waited: decode 1243s, encode 12345s, text 0s, write 123s",
        lines[-1],
    ), lines[-1]


def test_bytes_without_an_end_are_lines_too(capfd):
    with progress.make_bar(None, None, "hash", "B", disable=False) as bar:
        bar.update(3_000_000)
    assert re.fullmatch(r"hash     3\.0 MB, .*/s, 1 s\n", capfd.readouterr().err)


def test_nothing_to_do_shows_nothing(capfd):
    with Terminal().bar(0, "latents"), Terminal(has_bars=False).bar(3, "latents"), Terminal(has_bars=None).bar(3, "x"):
        pass
    assert capfd.readouterr().err == ""


@pytest.mark.slow
@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_in_a_terminal_shows_whole_lines(images, tmp_path, columns):
    for n in range(100):
        (images / f"more{n}.png").write_bytes((images / f"wide{n % 4}.png").read_bytes())
    (images / "a.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    command = [sys.executable, "-m", "latentprep", "encode", str(images), "--out", str(tmp_path / "c"), *SMALL]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = b""
    while True:
        try:
            shown += (part := os.read(ours, 65536))
        except OSError:  # the other end has gone
            break
        if not part:
            break
    os.close(ours)
    assert process.wait() == 0
    bars = [line for line in re.split(r"[\r\n]+", shown.decode()) if re.match(r"(latents|text): ", line)]
    assert len(bars) > 3
    assert all(len(line) < columns and line.endswith("]") for line in bars)
    assert "1 skipped" in [line for line in bars if line.startswith("latents")][-1]


def test_runs_leave_no_threads_behind(images, tmp_path):
    """tqdm starts one for each class of bars."""
    options = {"model": "tiny", "resolution": 64, "progress": False}
    latentprep.encode(images, tmp_path / "first", **options)
    before = threading.active_count()
    latentprep.encode(images, tmp_path / "second", **options)
    assert threading.active_count() == before
