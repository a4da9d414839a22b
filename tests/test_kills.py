"""Random kills of runs that share the work: two ranks, and two devices. LATENTPREP_KILLS says how many."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from tests.conftest import SMALL
from tests.test_encode import files
from tests.test_engines import Run, many, without_device  # noqa: F401 (a fixture)
from tests.test_faults import HARNESS, SHARDS, change, latents_files, more_images

KILLS = int(os.environ.get("LATENTPREP_KILLS", "16"))  # `make faults`: 200


class Forked:
    """Runs of a rank, one after the other, without the seconds that its imports take."""

    def __init__(self):
        command = [sys.executable, "-c", HARNESS]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def start(self, kill, *arguments):
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([kill, [str(argument) for argument in arguments]]) + "\n")
        self.process.stdin.flush()

    def end(self):
        """Exit code and seconds."""
        assert self.process.stdout is not None
        return json.loads(self.process.stdout.readline())


@pytest.fixture(scope="module")
def two():
    pair = Forked(), Forked()
    yield pair
    for forked in pair:
        forked.process.communicate()


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("phase", ["first", "incremental"])
def test_two_ranks_killed_at_random_moments_end_as_one_run_that_is_not(two, images, tmp_path, phase):
    more_images(images)
    whole, cache, start = tmp_path / "whole", tmp_path / "c", tmp_path / "start"
    start.mkdir()
    options = ("encode", images, *SMALL, *SHARDS, "--out")
    if phase == "incremental":
        two[0].start(None, *options, start)
        assert two[0].end()[0] == 0
        change(images)
        shutil.copytree(start, whole)
    two[0].start(None, *options, whole)
    code, seconds = two[0].end()
    assert code == 0
    wanted, random, killed, ends = files(whole), np.random.default_rng(1), 0, 0
    while killed < KILLS // 8 or not ends:
        shutil.rmtree(cache, ignore_errors=True)
        shutil.copytree(start, cache)
        known, left = latents_files(cache), [0, 1]
        while left:
            for rank in left:
                kill = [str(cache), 0, float(random.uniform(0.2, 1.1) * seconds)]
                if random.random() < 0.6:
                    folder = str(random.choice([cache, cache / "shards"]))
                    kill = [folder, int(random.integers(1, 8)), float(random.uniform(0, 0.02))]
                is_killed = killed < KILLS // 8 and random.random() < 0.8
                two[rank].start(kill if is_killed else None, *options, cache, "--rank", rank, "--world-size", 2)
            codes = {rank: two[rank].end()[0] for rank in left}
            assert set(codes.values()) <= {0, -9}
            now = latents_files(cache) if (cache / "shards").exists() else {}
            assert known.items() <= now.items()  # no finished shard was lost or written again
            known = now
            killed += sum(code == -9 for code in codes.values())
            left = [rank for rank, code in codes.items() if code]
        # a rank that was killed between its commit and its end has nothing more to do, and leaves what it found
        two[0].start(None, *options, cache)
        assert two[0].end()[0] == 0
        assert files(cache) == wanted
        ends += 1


@pytest.mark.long
@pytest.mark.slow
def test_processes_of_two_devices_killed_at_random_moments(run, many, tmp_path):  # noqa: F811
    assert run(*Run(many, tmp_path / "whole").arguments).code == 0
    wanted = without_device(tmp_path / "whole")[:2]
    random, killed = np.random.default_rng(2), 0
    while killed < max(2, KILLS // 10):
        shutil.rmtree(tmp_path / "c", ignore_errors=True)
        code = -9
        while code == -9:
            running = Run(many, tmp_path / "c", "--devices", "cpu,cpu").start()
            before = len(list(running.cache.glob("shards/*.latents.*")))
            while len(list(running.cache.glob("shards/*.latents.*"))) == before and running.process.poll() is None:
                time.sleep(0.01)
            time.sleep(float(random.uniform(0, 0.3)))
            for victim in [running.process.pid, *running.workers()][random.integers(3) :][:1]:
                if random.random() < 0.8:
                    os.kill(victim, signal.SIGKILL)
                    killed += 1
            code, _, err = running.end()
            assert code in (0, -9), err
        assert without_device(tmp_path / "c")[:2] == wanted
        assert not list(Path(tmp_path / "c").glob("shards/*.partial.*"))
