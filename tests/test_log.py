"""log_file.py, and the switches --quiet and --json: what a run says, where it goes."""

import json
import os
import re
import subprocess
import sys
import time

import pytest

import latentprep
from latentprep import progress
from latentprep.log_file import log_path
from latentprep.progress import LateBar, Silent
from tests.conftest import SMALL

OPTIONS = {"model": "tiny", "resolution": 64, "progress": False}


def read_log(path):
    return path.read_text().splitlines()


def test_what_is_said_stands_beside_the_cache_too(run, images, tmp_path):
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    lines = read_log(tmp_path / "c.log")
    head = re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d [+-]\d{4} latentprep \S+ encode (\{.*\})", lines[0])
    assert json.loads(head[1])["source"] == str(images)
    assert all(re.match(r"\d\d:\d\d:\d\d ", line) for line in lines[1:])
    said = "\n".join(line[9:] for line in lines[1:])
    assert result.out.strip() in said
    assert all(line in said for line in result.err.splitlines() if line.startswith(("model", "device", "source")))
    assert re.search(r"^latents  100%  8 of 8, .*/s, ", said, re.MULTILINE)
    assert re.search(r"^text     100%  8 of 8, ", said, re.MULTILINE)


def test_runs_follow_each_other_and_nothing_to_do_writes_nothing(images, tmp_path):
    latentprep.encode(images, tmp_path / "c", **OPTIONS)
    before = read_log(tmp_path / "c.log")
    latentprep.encode(images, tmp_path / "c", **OPTIONS)
    latentprep.encode(images, tmp_path / "c", dry_run=True, **{**OPTIONS, "flip": False})
    assert read_log(tmp_path / "c.log") == before
    (images / "tall0.txt").write_text("another")
    latentprep.encode(images, tmp_path / "c", **OPTIONS)
    after = read_log(tmp_path / "c.log")
    assert after[: len(before)] == before
    assert sum("latentprep" in line and " encode {" in line for line in after) == 2


def test_another_file_or_none(images, tmp_path):
    latentprep.encode(images, tmp_path / "c", log=tmp_path / "my.log", **OPTIONS)
    latentprep.encode(images, tmp_path / "d", log="none", **OPTIONS)
    assert sorted(path.name for path in tmp_path.glob("*.log")) == ["my.log"]
    assert "my.log" not in (tmp_path / "c" / "cache.json").read_text()


@pytest.mark.parametrize(
    ("log", "out", "rank", "size", "wanted"),
    [
        (None, "a/b", 0, 1, "a/b.log"),
        (None, "a/b/", 0, 1, "a/b.log"),
        (None, "a/b", 1, 2, "a/b.rank-1.log"),
        (None, "s3://a/b", 0, 1, None),
        ("x.log", "s3://a/b", 0, 1, "x.log"),
        ("none", "a/b", 0, 1, None),
    ],
)
def test_where_it_is(log, out, rank, size, wanted, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = log_path(log, out, rank, size)
    assert (found and os.path.relpath(found, tmp_path)) == wanted


def test_a_log_that_cannot_be_written_stops_no_run(run, images, tmp_path):
    result = run("encode", images, "--out", tmp_path / "c", "--log", tmp_path / "no" / "x.log", *SMALL)
    assert result.code == 0
    assert result.err.count("x.log: cannot be written (No such file or directory); --log FILE takes another") == 1


@pytest.mark.parametrize(
    "text",
    [
        "what latentprep does\n",
        "2026-01-01 latentprep notes\n",
        "2026-01-01 10:00:00 latentprep is slow\n",
        " latentprep ",
    ],
)
def test_notes_that_speak_of_us_are_no_log(images, tmp_path, text):
    (tmp_path / "c.log").write_text(text)
    latentprep.encode(images, tmp_path / "c", **OPTIONS)
    assert (tmp_path / "c.log").read_text() == text


def test_how_a_run_ended_stands_in_it(images, tmp_path, monkeypatch):
    from latentprep.prepare import encode

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(encode, "finish", stop)
    with pytest.raises(KeyboardInterrupt):
        latentprep.encode(images, tmp_path / "c", **OPTIONS)
    assert [line.partition(" ")[2] for line in read_log(tmp_path / "c.log")[-2:]] == [
        "ended    stopped by the user",
        f"         Stopped; 1 finished shard is safe in {tmp_path / 'c'}. The same call goes on from there.",
    ]


def test_a_log_names_the_command_that_goes_on(run, images, tmp_path, monkeypatch):
    from latentprep.prepare import encode

    def stop(*_):
        raise KeyboardInterrupt(2)

    monkeypatch.setattr(encode, "finish", stop)
    result = run("encode", images, "--out", tmp_path / "a b", *SMALL)
    assert result.code == 130
    lines = [line.partition(" ")[2] for line in read_log(tmp_path / "a b.log")]
    assert lines[-3] == "ended    stopped by the user"
    assert "1 finished shard is safe in" in lines[-2]
    assert lines[-1].strip() == result.err.splitlines()[-1].strip()
    monkeypatch.undo()
    assert lines[-1].startswith(f"         latentprep encode {images} --out '{tmp_path / 'a b'}' --model tiny")


def test_a_strange_name_is_escaped(images, tmp_path):
    (images / "tall0.txt").write_text("\x1b[31mred")
    latentprep.encode(images, tmp_path / "c\x1b", **OPTIONS)
    (log,) = tmp_path.glob("*.log")
    assert "\x1b" not in log.read_text()


def test_quiet_says_nothing_unless_something_went_wrong(run, images, tmp_path):
    command = ("encode", images, "--out", tmp_path / "c", "--quiet", *SMALL)
    for silent in (run(*command), run("verify", tmp_path / "c", "--quiet")):
        assert (silent.code, silent.out, silent.err) == (0, "", "")
    (shard,) = [*(tmp_path / "c" / "shards").glob("*.latents.*")][:1]
    shard.write_bytes(shard.read_bytes()[:-1])
    found = run("verify", tmp_path / "c", "--quiet")
    assert (found.code, "size" in found.out) == (1, True)
    (images / "broken.png").write_bytes(b"no image")
    strict = run(*command, "--strict")
    assert (strict.code, "broken.png" in strict.out) == (1, True)
    assert "--quiet with --dry-run" in run(*command, "--dry-run").err


def test_json_is_one_object_a_line_on_both_streams(run, images, tmp_path):
    (images / "broken.png").write_bytes(b"no image")
    result = run("encode", images, "--out", tmp_path / "c", "--json", *SMALL)
    found = [json.loads(line) for line in result.out.splitlines()]
    assert found[-1]["totals"]["ok"] is True
    assert {value["key"] for value in found if "reason" in value} == {"broken.png"}
    meanwhile = [json.loads(line) for line in result.err.splitlines()]
    assert any("model    tiny" in value.get("said", "") for value in meanwhile)
    ends = {value["stage"]: value for value in meanwhile if value.get("is_over")}
    assert (ends["latents"]["done"], ends["latents"]["total"], ends["text"]["done"]) == (8, 8, 8)
    verified = run("verify", tmp_path / "c", "--json")
    assert json.loads(verified.out)["problems"] == []
    assert [json.loads(line)["stage"] for line in verified.err.splitlines()] == ["hash"]
    refused = run("encode", tmp_path / "nowhere", "--json")
    assert (refused.code, json.loads(refused.err)["error"].startswith("SOURCE")) == (1, True)


class Kept:
    def __init__(self):
        self.bars = []

    def say(self, text):
        pass

    def bar(self, total, stage, unit="img"):
        self.bars.append((total, stage, unit))
        return progress.Lines(total, stage, unit, lambda line: None)


def test_a_short_stage_shows_no_bar(monkeypatch):
    kept, now = Kept(), [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    with LateBar(kept, 10, "list") as bar:
        for _ in range(3):
            bar.update(1)
            now[0] += 0.9
        assert kept.bars == []
        bar.update(2)
        assert kept.bars == [(10, "list", "img")]
        assert (bar.bar.num_done, bar.bar.initial) == (5, 5)
        bar.update(1)
        assert bar.bar.num_done == 6


def test_listing_hashing_reading_and_compact_say_how_far_they_are(images, tmp_path, monkeypatch):
    monkeypatch.setattr(progress, "LATE", 0)
    kept = Kept()
    latentprep.encode(images, tmp_path / "c", **{**OPTIONS, "progress": kept})
    for path in images.glob("tall*.png"):
        path.unlink()
    for path in images.glob("*.png"):
        os.utime(path, ns=(1, 1))
    latentprep.encode(images, tmp_path / "c", **{**OPTIONS, "progress": kept})
    latentprep.compact(tmp_path / "c", progress=kept)
    latentprep.verify(tmp_path / "c", source=images, re_encode=2, progress=kept)
    stages = [stage for _, stage, _ in kept.bars]
    assert stages == [
        "list", "latents", "text",
        "read", "list", "hash", "latents", "text",
        "compact",
        "hash", "source", "latents", "cond",
    ]  # fmt: skip
    assert isinstance(Silent().bar(1, "x").total, int)


def test_nothing_is_written_into_another_file(run, images, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(images / "tall0.png")
    (tmp_path / "cut.log").write_bytes(b"")
    for log in (images / "tall0.png", tmp_path / "pipe", tmp_path / "link", tmp_path, "/dev/full"):
        before = (images / "tall0.png").read_bytes()
        result = run("encode", images, "--out", tmp_path / "c", "--overwrite", "--log", log, *SMALL)
        assert (result.code, result.err.count("cannot be written (")) == (0, 1)
        assert (images / "tall0.png").read_bytes() == before
    result = run("encode", images, "--out", tmp_path / "c", "--overwrite", "--log", tmp_path / "cut.log", *SMALL)
    assert len(read_log(tmp_path / "cut.log")) > 3
    assert latentprep.encode(images, tmp_path / "d", log="a\0b", **OPTIONS).ok


def test_the_home_folder_is_known_and_nothing_is_the_default(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert log_path("~/my.log", "x", 0, 1) == tmp_path / "my.log"
    (tmp_path / "a" / "b").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "a" / "b")
    assert log_path("", "..", 0, 1) == tmp_path / "a.log"


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs Linux")
def test_json_that_cannot_be_written_is_a_failure(images, tmp_path):
    latentprep.encode(images, tmp_path / "c", **OPTIONS)
    command = [sys.executable, "-m", "latentprep", "verify", str(tmp_path / "c"), "--json"]
    with open("/dev/full", "wb") as full:
        assert subprocess.run(command, stdout=full, stderr=subprocess.DEVNULL, check=False).returncode == 1
        assert subprocess.run(command[:-1], stdout=full, stderr=subprocess.DEVNULL, check=False).returncode == 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        process.stdout.close()  # nobody listens
    assert process.returncode == 0
