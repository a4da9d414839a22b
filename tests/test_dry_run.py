"""encode --dry-run: a summary that says what the run will do, its parts for machines, and a bounded measurement."""

import json
import os

import pytest
import torch

import latentprep
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.plan import estimate
from latentprep.prepare.speed import timing
from tests.conftest import SMALL, gradient


def encode(run, images, cache, *options):
    result = run("encode", images, "--out", cache, *SMALL, *options)
    assert result.code == 0, result.err
    return result


def prompts_of(run, images, cache, *options):
    """Prompts that a dry run counts, and then those that the run has encoded."""
    found = latentprep_json(encode(run, images, cache, "--dry-run", "--json", *options))
    return found["prompts"], encode_counts(images, cache, options)


def latentprep_json(result):
    return json.loads(result.out.splitlines()[-1])["totals"]


def encode_counts(images, cache, options):
    names = {"--" + name.replace("_", "-"): name for name in ("prompts_per_image", "shard_size", "trigger", "model")}
    given = {names[option]: value for option, value in zip(options[::2], options[1::2], strict=True)}
    small = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32}
    return latentprep.encode(images, cache, **{**small, **given}, progress=False).num_prompts


def test_kinds_of_changes_are_counted_and_one_is_named(run, images, tmp_path):
    encode(run, images, tmp_path / "c")
    (images / "wide0.png").rename(images / "z.png")
    (images / "tall0.txt").write_text("another")
    (images / "tall1.txt").write_text("another")
    lines = encode(run, images, tmp_path / "c", "--dry-run").out.splitlines()
    assert lines[0].startswith("renamed  1 image: z.png (was wide0.png): the same content under another name")
    assert lines[1].startswith("caption  2 images, such as tall0.png: another caption")
    assert lines[2] == "         --list names them all"


def test_a_page_does_not_grow_with_the_folder(run, images, tmp_path):
    few = encode(run, images, tmp_path / "c", "--dry-run").out.count("\n")
    for n in range(60):
        (images / f"copy{n}.png").write_bytes((images / "wide0.png").read_bytes())
    assert encode(run, images, tmp_path / "c", "--dry-run").out.count("\n") <= few + estimate.SAMPLES + 12


def test_list_has_a_line_for_every_image_and_skip(run, images, tmp_path):
    (images / "bad.png").write_text("x")
    lines = encode(run, images, tmp_path / "c", "--dry-run", "--list").out.splitlines()
    assert lines[:8] == [f"new      {name}{n}.png" for name in ("tall", "wide") for n in range(4)]
    assert (
        lines[8]
        == "skipped  bad.png (not_an_image: its bytes are of no image format that Pillow knows, whatever its .png says)"
    )


def test_what_the_list_says_is_not_said_again(run, images, tmp_path):
    (images / "bad.png").write_text("x")
    out = encode(run, images, tmp_path / "c", "--dry-run", "--list").out
    assert out.count("not in the cache") == out.count("--list") == 0
    assert out.count("new      tall0.png") == out.count("not_an_image") == 1
    assert f"\n\nplan     {tmp_path / 'c'}: 8 new\n" in out
    assert "\nnothing was written (--dry-run)\n" in out


def test_json_is_an_object_a_line_and_nothing_else(run, images, tmp_path):
    encode(run, images, tmp_path / "c")
    (images / "wide0.png").rename(images / "z.png")
    (images / "bad.png").write_text("x")
    result = encode(run, images, tmp_path / "c", "--dry-run", "--json")
    *each, last = map(json.loads, result.out.splitlines())
    assert each[0] == {"key": "z.png", "what": "renamed", "detail": "was wide0.png"}
    assert each[1]["key"] == "bad.png"
    assert each[1]["reason"] == "not_an_image"
    assert last["totals"]["changes"] == {"renamed": 1}
    assert last["totals"]["skipped"] == {"not_an_image": 1}
    assert last["totals"]["cached"] == 8


def test_the_list_goes_with_a_dry_run_alone(run, images, tmp_path):
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--list")
    assert result.code == 1
    assert "error: --list without --dry-run" in result.err
    assert not (tmp_path / "c").exists()


@pytest.mark.slow
def test_prompts_that_are_counted_are_those_that_are_encoded(run, images, tmp_path):
    cache = tmp_path / "c"
    assert prompts_of(run, images, cache, "--shard-size", "30kB") == (9, 9)
    assert prompts_of(run, images, cache, "--prompts-per-image", 2) == (0, 0)  # what is stored has them all
    (images / "tall0.txt").write_text("picture number 1")  # its shard may have that prompt already
    gradient(64, 80).rotate(7).save(images / "touched.png")
    counted, encoded = prompts_of(run, images, cache, "--prompts-per-image", 2)
    assert counted == encoded
    image = images / "tall2.png"
    image.touch()  # another time, and another caption: two reasons, of which one is said
    (images / "tall2.txt").write_text("both")
    assert prompts_of(run, images, cache, "--prompts-per-image", 2) == (1, 1)
    counted, encoded = prompts_of(run, images, cache, "--trigger", "sks")
    assert counted == encoded > 0
    for path in cache.glob("uncond.*"):
        path.unlink()
    assert prompts_of(run, images, cache, "--trigger", "sks") == (1, 1)


@pytest.mark.slow
def test_prompts_of_a_run_that_was_killed_are_not_counted_again(run, images, tmp_path):
    cache = tmp_path / "c"
    (images / "bad.png").write_bytes((images / "wide0.png").read_bytes()[:-40])
    encode(run, images, cache)
    for name in ("cache.json", "skipped.jsonl"):  # as after a kill just before the commit
        (cache / name).unlink()
    assert prompts_of(run, images, cache) == (0, 0)
    (cache / "cache.json").unlink()
    next(cache.glob("shards/*.text.*")).unlink()
    assert prompts_of(run, images, cache) == (8, 8)
    assert latentprep_json(encode(run, images, cache, "--dry-run", "--json", "--overwrite"))["prompts"] == 10


def test_a_busy_machine_is_told_behind_the_time(run, images, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 0, 0))
    lines = encode(run, images, tmp_path / "c", "--dry-run").out.splitlines()
    number = next(n for n, line in enumerate(lines) if line.startswith("time: about "))
    assert lines[number + 1].startswith("note     other programs were at work (load 7.2 on ")
    assert lines[number + 1].endswith("): without them it may take much less")
    monkeypatch.setattr(os, "getloadavg", lambda: (0.1, 0, 0))
    assert "other programs" not in encode(run, images, tmp_path / "c", "--dry-run").out


def test_a_moment_in_which_others_had_the_processor_does_not_count(monkeypatch):
    clock, seconds = [0.0], iter([9.0, 0.8, 0.1, 0.9, 0.2, 0.3])

    def work():
        clock[0] += next(seconds)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    assert estimate.time_again(work, 60) == pytest.approx(0.1)
    assert next(seconds, None) is None  # the first warms up, and REPEATS count


@pytest.mark.slow
def test_what_would_take_long_is_measured_on_less(run, images, tmp_path, monkeypatch):
    clock = [0.0]

    class Clock:
        def perf_counter(self):
            return clock[0]

    def slow(self, vae, pixels):
        count, _, height, width = pixels.shape
        clock[0] += height * width * 1e-5  # 0.7 s for 256x256
        return torch.zeros(count, 4, height // 8, width // 8), torch.ones(count, 4, height // 8, width // 8)

    monkeypatch.setattr(VaeEncoder, "_posterior", slow)
    monkeypatch.setattr(estimate, "time", Clock())
    monkeypatch.setattr(timing, "time", Clock())
    options = ("--model", "tiny", "--resolution", 5120, "--no-cond", "--dry-run")
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert result.code == 0
    assert clock[0] < 2 * estimate.LIMIT
    seconds = 8 * 5120 * 5120 * 1e-5
    assert f"time: about {seconds / 60:.0f} min on this machine" in result.out
    assert ", by its area: measured at " in result.out
