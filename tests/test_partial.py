"""prepare/partial.py: a run that is stopped keeps what is encoded of its unfinished shard, and ends as undisturbed."""

import os
import re
import signal
import subprocess
import sys
import termios
from contextlib import suppress

import pytest
import torch
from PIL import Image

from latentprep.prepare.models.vae_encoder import VaeEncoder
from tests.conftest import SMALL, gradient, stop_at
from tests.test_encode import files


def fill(images):
    for n in range(12):
        image = gradient(64, 80 + n)
        if n % 3 == 0:
            image.putalpha(Image.linear_gradient("L").resize(image.size))
        image.save(images / f"more{n}.png")
    (images / "more5.png").write_bytes((images / "more5.png").read_bytes()[:-40])


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [(), ("--flip", "--crop", "random", "--crops", 2), ("--store", "mean"), ("--batch-size", 3), ("--weights", "none"),
     ("--only", "latents")],
)  # fmt: skip
@pytest.mark.parametrize("calls", [2, 9])
def test_stopped_in_a_shard_it_goes_on_behind_what_is_encoded(run, images, tmp_path, monkeypatch, options, calls):
    fill(images)
    options = (*SMALL, *options)
    assert run("encode", images, "--out", tmp_path / "whole", *options).code == 0
    posterior, done = VaeEncoder._posterior, stop_at(monkeypatch, calls + 1)
    result = run("encode", images, "--out", tmp_path / "c", *options)
    first = len(done) - 1
    if result.code == 0:  # so few calls were needed
        return
    assert result.code == 130
    total = count_calls(run, images, tmp_path, monkeypatch, posterior, options)
    done.clear()
    monkeypatch.setattr(VaeEncoder, "_posterior", lambda *a: done.append(1) or posterior(*a))
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    views = 4 if "--crops" in options else 1
    assert total - first <= len(done) <= total - first + views  # what is encoded is not encoded again
    assert files(tmp_path / "c") == files(tmp_path / "whole")


def count_calls(run, images, tmp_path, monkeypatch, posterior, options):
    calls = []
    monkeypatch.setattr(VaeEncoder, "_posterior", lambda *a: calls.append(1) or posterior(*a))
    run("encode", images, "--out", tmp_path / "count", *options)
    return len(calls)


def test_a_damaged_partial_file_is_as_if_it_were_not_there(run, images, tmp_path, monkeypatch):
    assert run("encode", images, "--out", tmp_path / "whole", *SMALL).code == 0
    stop_at(monkeypatch, 5)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert "Stopped; what is encoded so far is safe in" in result.err
    (partial,) = (tmp_path / "c" / "shards").glob("*.partial.*")
    data = bytearray(partial.read_bytes())
    data[-1] ^= 1
    partial.write_bytes(data)
    monkeypatch.undo()
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
    assert files(tmp_path / "c") == files(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_keeps_the_unfinished_shard(run, images, tmp_path, number):
    for n in range(30):
        gradient(256, 200 + n).save(images / f"more{n}.png")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    options = ("--model", "tiny", "--resolution", "256", "--device", "cpu", "--shard-size", "1GB")
    command = [sys.executable, "-m", "latentprep", "encode", images, "--out", tmp_path / "c", *options]
    screen, terminal = os.openpty()  # in a pipe there is no bar that says where it is
    termios.tcsetwinsize(terminal, (24, 120))
    process = subprocess.Popen(command, stderr=terminal, stdout=subprocess.PIPE, env=environment)
    os.close(terminal)
    said = b""
    while not re.search(rb" [1-9]\d*/38 ", said) and process.poll() is None:
        said += os.read(screen, 1000)
    process.send_signal(number)
    with suppress(OSError):  # as a terminal ends whose last program has gone
        while more := os.read(screen, 1000):
            said += more
    process.communicate()
    os.close(screen)
    assert process.returncode == 128 + number
    assert b"Stopped; what is encoded so far is safe in" in said
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 0
    torch.set_num_threads(1)
    whole = [str(part) for part in command]
    whole[whole.index(str(tmp_path / "c"))] = str(tmp_path / "whole")
    assert subprocess.run(whole, env=environment, capture_output=True).returncode == 0
    assert files(tmp_path / "c") == files(tmp_path / "whole")
