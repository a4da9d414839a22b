"""bench: every stage has a number, what limits is the slowest, advice really helps, and no file is left."""

import json
import os
from collections import Counter
from dataclasses import replace
from pathlib import Path

import fsspec
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

import latentprep
from latentprep import UserError, benches
from latentprep.prepare.devices import BatchLimit, default_threads
from latentprep.prepare.source.sources import open_source
from latentprep.prepare.speed import decode, models, samples
from latentprep.prepare.speed.models import OneVae, list_dtypes, list_sizes
from latentprep.prepare.speed.peaks import peak_of
from latentprep.prepare.speed.samples import Sample
from latentprep.prepare.speed.timing import rate, repeat
from latentprep.speeds import (
    BatchSpeed,
    DecodeSpeed,
    Rates,
    TextSpeed,
    VaeSpeed,
    WriteSpeed,
    advise,
    choose_evenly,
)
from tests.conftest import TINY, gradient

SHORT = {"model": "tiny", "resolution": 128, "seconds": 1, "device": "cpu", "progress": False, "workers": 2}


def left_in(folder):
    return [name for name in os.listdir(folder) if name.startswith(".latentprep")]


@pytest.fixture
def desk(images, monkeypatch):
    """The folder that `images` lies in, as the one to be in; shards are small."""
    monkeypatch.chdir(images.parent)
    monkeypatch.setitem(SHORT, "shard_size", "1MB")
    return images.parent


# whole runs


def test_every_stage_of_a_folder_is_measured_and_no_file_is_left(images, desk):
    (images / "broken.png").write_bytes((images / "tall0.png").read_bytes()[:200])
    (images / "no image.png").write_bytes(b"text")
    found = latentprep.bench("images", **SHORT)
    own = found.decode
    assert (own.num_images, own.num_broken, own.threads) == (8, 2, 2)
    assert min(own.per_core, own.with_threads, own.num_measured) > 0
    assert dict(own.images) == {"PNG 128x40": 4, "PNG 64x80": 4}
    assert {batch.dtype for batch in found.vae.batches} == {"float32"}
    assert all(min(batch.per_second, batch.num_measured, batch.flops) > 0 for batch in found.vae.batches)
    assert found.text.tokens > 2
    assert min(found.text.per_second, found.text.num_bytes, found.text.num_prompts) > 0
    assert found.write.shard_bytes < 1_200_000
    assert min(found.write.per_second, found.write.bytes_per_second, found.read.per_second) > 0
    assert found.now.images_per_second <= found.best.images_per_second
    assert sorted(os.listdir(desk)) == ["images"]
    assert repr(found).startswith("decode   ")
    assert "2 images passed over" in repr(found)
    assert "peak not known" in repr(found)
    assert found.line in repr(found)
    assert "\n" not in found.line


def test_the_command_prints_json_with_every_part(images, desk, run):
    options = ("--model", "tiny", "--resolution", 128, "--seconds", 1, "--shard-size", "1MB", "--workers", 1, "--json")
    result = run("bench", "images", "--no-cond", "--out", "there/c", *options)
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert found.keys() == {
        "model", "source", "versions", "seconds", "load", "decode", "vae", "text", "write", "read", "now", "best",
        "advice", "unsure", "tried", "limit", "line",
    }  # fmt: skip
    assert found["text"] is None
    assert found["now"]["text_share"] == 0
    assert found["limit"] in ("decode", "VAE", "write")
    assert found["source"] == "images"
    assert sorted(os.listdir(desk)) == ["images"]


def test_without_a_source_pictures_are_drawn(desk, monkeypatch, run):
    monkeypatch.setattr(samples, "DRAWN", (((120, 160), 3), ((300, 400), 1)))
    result = run("bench", "--model", "tiny", "--resolution", 128, "--seconds", 1, "--shard-size", "1MB", "--workers", 1)
    assert result.code == 0, result.err
    assert "4 images drawn: 3 JPG 160x120, 1 JPG 400x300" in result.out
    assert "the text encoders take" in result.out
    assert sorted(os.listdir(desk)) == ["images"]


def test_a_busy_machine_is_told(images, desk, monkeypatch):
    monkeypatch.setattr(os, "getloadavg", lambda: (7.25, 0, 0))
    found = latentprep.bench("images", **{**SHORT, "no_cond": True})
    assert "note     other programs were at work (load 7.2 on " in repr(found)
    assert ", load 7.2; " in found.line
    idle = replace(found, load=0.1)
    assert "other programs" not in repr(idle)
    assert "load" not in idle.line
    assert "load" not in replace(found, load=None).line


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
def test_no_file_is_left_when_a_stage_ends_in_the_middle(images, desk, monkeypatch, error):
    def fail(*_):
        assert left_in(desk)
        raise error

    monkeypatch.setattr("latentprep.read.speed.measure_read", fail)
    with pytest.raises(error):
        latentprep.bench("images", **SHORT)
    assert sorted(os.listdir(desk)) == ["images"]


def test_a_stop_is_told_in_one_line(images, desk, monkeypatch, run):
    def stop(*_):
        raise KeyboardInterrupt(15)

    monkeypatch.setattr("latentprep.prepare.speed.models.measure_vae", stop)
    result = run("bench", "images", "--model", "tiny", "--seconds", 1)
    assert result.code == 128 + 15
    assert result.err.splitlines()[-1] == "stopped; the temporary files are deleted"
    assert not left_in(desk)


@pytest.mark.slow
def test_what_other_programs_have_set_stays(images, desk):
    before = torch.get_num_threads(), Image.MAX_IMAGE_PIXELS
    latentprep.bench("images", **SHORT)
    assert (torch.get_num_threads(), Image.MAX_IMAGE_PIXELS) == before


@pytest.mark.slow
def test_a_remote_place_is_left_as_it_was(images, desk):
    found = latentprep.bench("images", "memory://bench/c", **SHORT)
    assert found.write.where == "memory://bench/c"
    assert not [name for name in fsspec.filesystem("memory").find("/bench") if "latentprep" in name]


@pytest.mark.slow
def test_a_cache_that_is_there_stays(images, desk):
    latentprep.encode("images", "c", model="tiny", resolution=64, device="cpu", progress=False)
    before = {path: path.read_bytes() for path in Path("c").rglob("*") if path.is_file()}
    latentprep.bench("images", "c", **SHORT)
    assert {path: path.read_bytes() for path in Path("c").rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"source": "nowhere"}, "source='nowhere': no such folder"),
        ({"source": "sets.toml"}, "source='sets.toml': a file of sets"),
        ({"source": "images", "out": "images/tall0.png"}, "is a file, expected a folder"),
        ({"source": "images", "seconds": 0}, "expected 1 to 3600"),
        ({"source": "images", "dtype": "float64"}, "expected one of auto, float32"),
        ({"source": "images", "device": "tpu"}, "expected auto, cuda"),
        ({"source": "broken"}, "none of its images can be decoded"),
        ({"source": "text"}, "none of its 1 images can be used"),
    ],
)
def test_wrong_options_are_told_in_one_line(images, desk, options, words):
    for name, data in (("broken", (images / "tall0.png").read_bytes()[:200]), ("text", b"text")):
        (desk / name).mkdir()
        (desk / name / "1.png").write_bytes(data)
    with pytest.raises(UserError) as error:
        latentprep.bench(**{**SHORT, **options})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
    assert not left_in(desk)
    assert not left_in(images)


# parts


def test_images_are_chosen_evenly_by_a_seed(tmp_path):
    for n in range(100):
        gradient(8, 8).save(tmp_path / f"{n:03}.png")
        (tmp_path / f"{n:03}.txt").write_text("words")
    (tmp_path / "@eaDir").mkdir()
    gradient(8, 8).save(tmp_path / "@eaDir" / "050.png")
    keys = [file.key for file in Sample(open_source(tmp_path), 0).list()]
    chosen = [int(key.partition(".")[0]) for key in keys if key.endswith(".png") and "eaDir" not in key]
    assert len(chosen) == 32
    assert all(n * 100 // 32 <= number < (n + 1) * 100 // 32 for n, number in enumerate(chosen))
    assert len([key for key in keys if key.endswith(".txt")]) == 100
    assert choose_evenly(100, 32, 0) == chosen != choose_evenly(100, 32, 1)
    assert choose_evenly(3, 32, 5) == [0, 1, 2]


def test_work_is_repeated_until_its_time_is_up():
    calls = []
    assert len(repeat(lambda: calls.append(0), 0)) == len(calls) == 1
    assert len(repeat(lambda: None, 60, most=7)) == 7
    assert rate(6, [1.0, 3.0, 2.0]) == 3


def test_threads_decode_all_images_in_turn(images, desk, monkeypatch):
    seen = Counter()
    load = decode.load_pixels

    def note(item, *rest):
        seen[item.key] += 1
        return load(item, *rest)

    monkeypatch.setattr("latentprep.prepare.work.batches.load_pixels", note)
    latentprep.bench("images", **SHORT)
    assert len(seen) == 8
    assert max(seen.values()) - min(seen.values()) <= 1


def count_by_layers(size):
    """Operations of tiny's encoder for an image: two for each weight and place of convolutions and linear layers."""
    counts = []

    def note(layer, inputs, output):
        places = output.shape[2:].numel() if isinstance(layer, torch.nn.Conv2d) else output[..., 0].numel()
        counts.append(2 * layer.weight.numel() * places)

    vae = AutoencoderKL.from_pretrained(TINY / "vae")
    for layer in vae.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.register_forward_hook(note)
    vae.encode(torch.zeros(1, 3, *size))
    return sum(counts)


def test_operations_are_those_of_the_layers(images, desk):
    vae = latentprep.bench("images", no_cond=True, **SHORT).vae
    wanted = count_by_layers(vae.bucket)
    for batch in vae.batches:
        found = round(batch.flops / batch.per_second)
        assert wanted <= found < 1.05 * wanted  # and the products of attention


class StandIn:
    """An encoder that takes no time, and whose memory is full with more than 4 images at once."""

    def __init__(self):
        self.limit, self.num_retried, self.seen = BatchLimit(), 0, []

    def start(self, pixels):
        self.seen.append(tuple(pixels.shape[:3]))
        if len(pixels) > 4:
            self.limit.said = f"out of memory with {len(pixels)} images of 512x512 at once: went on with 4"

    def finish(self, started, pixels):
        pass


def measure_stand_in(seconds):
    encoder = StandIn()
    pixels = np.zeros((2, 512, 512, 3), np.uint8)
    one = OneVae(encoder, "cpu", "float32", pixels, 8, int)
    return one, list(one.measure(list_sizes(64), 64, seconds)), encoder


def test_a_number_type_that_does_not_fit_is_told_and_the_others_count(images, desk, monkeypatch):
    open_it = models.open_encoder

    def fail(vae, recipe, device):
        if recipe.dtype == "float16":
            raise UserError("--device cpu: its memory is too small for the VAE")
        return open_it(vae, recipe, device)

    monkeypatch.setattr(models, "open_encoder", fail)
    monkeypatch.setattr(models, "list_dtypes", lambda *_: ["float32", "float16"])
    found = latentprep.bench("images", no_cond=True, **SHORT)
    assert {batch.dtype for batch in found.vae.batches} == {"float32"}
    assert found.vae.ends[1] == "float16: --device cpu: its memory is too small for the VAE"
    assert found.vae.ends[1] in repr(found)
    monkeypatch.setattr(models, "list_dtypes", lambda *_: ["float16", "float32"])
    with pytest.raises(UserError, match="too small for the VAE"):
        latentprep.bench("images", no_cond=True, **SHORT)


def test_the_line_for_an_issue_names_no_folder(images, desk):
    found = latentprep.bench("images", no_cond=True, **SHORT)
    for name in ("/home/me/secret/sd", "C:\\Users\\me\\sd", "somebody/sd", "sd/"):
        assert replace(found, model=name).line == found.line.replace("; tiny ", "; sd ")


def test_a_full_memory_ends_the_batches():
    one, found, encoder = measure_stand_in(60)
    assert [batch.batch_size for batch in found] == [1, 2, 4]
    assert one.end == "out of memory with 8 images of 512x512 at once"
    assert encoder.seen[-1] == (8, 512, 512)


def test_what_takes_too_long_is_measured_on_less_and_told():
    one, (found,), encoder = measure_stand_in(0)
    assert set(encoder.seen) == {(1, 256, 256)}
    assert one.size == (256, 256)
    assert "takes too long" in one.end
    assert found.batch_size == found.num_measured == 1


def test_number_types_and_batches_that_are_tried():
    assert list_dtypes("float32", "cpu") == ["float32"]
    assert list_dtypes("bfloat16", "cpu") == ["bfloat16", "float32"]
    assert list_dtypes("float32", "cuda:1") == ["float32", "float16", "bfloat16"]
    assert list_sizes(3)[:5] == [1, 2, 3, 4, 8]
    assert list_sizes(8) == [1, 2, 4, 8, 16, 32, 64, 128, 256]


@pytest.mark.parametrize(
    ("name", "dtype", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "float16", 989.4),
        ("NVIDIA H100 80GB HBM3", "float32", 494.7),
        ("NVIDIA A100-SXM4-40GB", "bfloat16", 312.0),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16", None),
        ("NVIDIA L4", "float16", 121.0),
        ("NVIDIA L40", "float16", None),
        ("NVIDIA A10G", "float16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "float16", None),
        ("Tesla T4", "bfloat16", None),
    ],
)
def test_peaks_are_those_of_the_very_card(name, dtype, tera):
    assert peak_of(name, dtype) == (tera * 1e12 if tera is not None else None)


# what limits, and what would help: pure

DECODE = DecodeSpeed((("JPG 1600x1200", 8),), 0, 50.0, 4, 180.0, 40, 4, 5)
WRITE = WriteSpeed("/", 1e9, 10**8, 1e6, 5)
TEXT = TextSpeed("cuda", "float16", 1000.0, 32, 5, 12.0, 118_000.0, "float16")


def make_vae(*batches, batch_size=8):
    """A VAE in float16: (number type, batch size, images/s, images that overflowed), each measured five times."""
    made = [BatchSpeed(dtype, size, rate_, 5, 1e12, None, retried) for dtype, size, rate_, retried in batches]
    return VaeSpeed("cuda", "a GPU", (512, 512), (512, 512), "float16", batch_size, tuple(made))


@pytest.mark.parametrize(
    ("rates", "limit", "speed"),
    [
        (Rates(100, 50, 80), "VAE", 50),
        (Rates(20, 50, 80), "decode", 20),
        (Rates(100, 50, 8), "write", 8),
        (Rates(100, 50, 80, text=1, write_text=9), "VAE", 50),
    ],
)
def test_what_limits_is_the_slowest(rates, limit, speed):
    assert (rates.limit, rates.images_per_second) == (limit, speed)


def test_a_runs_time_is_that_of_both_passes():
    rates = Rates(100, 50, 80, text=200, write_text=100)
    assert rates.seconds == pytest.approx(1 / 50 + 1 / 100)
    assert rates.text_share == pytest.approx(1 / 3)
    assert Rates(100, 50, 80).text_share == 0


def test_a_run_as_it_stands_has_its_own_batch_size_or_the_next_smaller_one():
    vae = make_vae(("float16", 4, 40, 0), ("float16", 8, 50, 0), ("float16", 16, 60, 0), ("float32", 8, 90, 0))
    assert vae.own().per_second == 50
    assert replace(vae, batch_size=12).own().per_second == 50
    assert vae.best().per_second == 60


def advice(now, *, decode=DECODE, vae=None, text=None, num_devices=1):
    vae = vae or make_vae(("float16", 8, now.vae, 0))
    return {own.what: own.gain for own in advise(now, decode, vae, text, WRITE, num_devices).found}


MORE_CORES = replace(DECODE, threads=4, cores=16, with_cores=400.0)
OTHER_TYPE = make_vae(("float16", 8, 50, 0), ("bfloat16", 8, 75, 0))
TWO_SIZES = make_vae(("float16", 8, 50, 0), ("float16", 16, 60, 0))


@pytest.mark.parametrize(
    ("now", "given", "wanted"),
    [
        (Rates(180, 50, 900), {}, {}),  # there is but one way to do it
        (Rates(180, 50, 900), {"decode": MORE_CORES}, {}),  # decode does not limit
        (Rates(25, 50, 900), {"decode": MORE_CORES}, {"--workers 16": 2.0}),
        (Rates(180, 50, 900), {"vae": TWO_SIZES}, {"--batch-size 16": 1.2}),
        (Rates(50, 50, 900), {"vae": TWO_SIZES}, {}),  # decode would limit at once
        (Rates(180, 50, 900), {"vae": make_vae(("float16", 8, 50, 0), ("float16", 16, 51, 0))}, {}),  # 2%
        (Rates(180, 50, 900), {"vae": OTHER_TYPE}, {"--dtype bfloat16": 1.5}),
        (Rates(180, 50, 900), {"vae": make_vae(("float16", 8, 50, 0), ("bfloat16", 8, 75, 3))}, {}),  # overflows
        (Rates(180, 50, 900), {"num_devices": 2}, {"--devices all": 2.0}),
        (Rates(75, 50, 900), {"num_devices": 8}, {"--devices all": 1.5}),
        (Rates(180, 50, 900), {"num_devices": 2, "vae": replace(TWO_SIZES, device="cpu", batch_size=16)}, {}),
        (Rates(180, 50, 25), {}, {"a faster disk for --out": 2.0}),
        (Rates(180, 50, 900, 1000, 900), {"text": TEXT}, {}),
        (Rates(100, 100, 900, 1000, 53), {"text": TEXT}, {"a faster disk for --out": 1.96, "--cond-dtype int8": 1.45}),
        (Rates(100, 100, 900, 1000, 53), {"text": replace(TEXT, cond_dtype="int8")}, {"a faster disk for --out": 1.96}),
        (Rates(100, 100, 900, 10, 900), {"text": replace(TEXT, device="cpu")}, {"--text-device cuda": None}),
        (Rates(100, 100, 900, 10, 900), {"text": replace(TEXT, device="cpu"), "num_devices": 0}, {}),
        (Rates(100, 100, 900, 9000, 9000), {"text": replace(TEXT, device="cpu")}, {}),
    ],
)  # fmt: skip
def test_only_what_makes_a_whole_run_faster_is_advised(now, given, wanted):
    assert advice(now, **given) == {
        what: gain if gain is None else pytest.approx(gain, rel=0.01) for what, gain in wanted.items()
    }


ONCE = replace(TWO_SIZES, batches=(TWO_SIZES.batches[0], replace(TWO_SIZES.batches[1], num_measured=1)))


@pytest.mark.parametrize(
    ("now", "given", "unsure"),
    [
        (Rates(180, 50, 900), {"vae": ONCE}, "--batch-size 16"),
        (Rates(180, 50, 900), {"vae": replace(ONCE, batches=ONCE.batches[::-1])}, "--batch-size 16"),
        (Rates(25, 50, 900), {"decode": replace(MORE_CORES, num_rounds=1)}, "--workers 16"),
        (Rates(180, 50, 25), {"write": replace(WRITE, num_measured=1)}, "a faster disk for --out"),
    ],
)
def test_no_advice_rests_on_one_measurement(now, given, unsure):
    more = {"decode": DECODE, "vae": make_vae(("float16", 8, 50, 0)), "text": None, "write": WRITE, **given}
    advised = advise(now, **more, num_devices=1)
    assert (advised.found, advised.unsure) == ((), (unsure,))


def test_what_was_tried_is_named_if_nothing_helps(images, desk):
    found = latentprep.bench("images", **{**SHORT, "no_cond": True})
    one = replace(found, advice=(), unsure=(), tried=("--batch-size 1, 4", "--workers 2"))
    assert "\nhelps    none of --batch-size 1, 4; --workers 2\n" in repr(one)
    once = replace(one, unsure=("--workers 2",))
    assert "\nhelps    none for certain of --batch-size 1, 4; --workers 2\n" in repr(once)
    assert "\nunsure   --workers 2: was measured once; more --seconds measure more often\n" in repr(once)
    vae = make_vae(("float16", 8, 60, 0), ("float16", 1, 50, 0), ("float16", 4, 50, 0), ("float32", 8, 9, 0))
    assert advise(Rates(180, 60, 900, 1000, 900), MORE_CORES, vae, TEXT, WRITE, 2).tried == (
        "--workers 16", "--batch-size 1, 4", "--dtype float32", "--devices all", "--cond-dtype int8",
        "a faster disk for --out",
    )  # fmt: skip


def test_the_best_advice_comes_first():
    found = advice(Rates(100, 100, 900, 1000, 53), text=TEXT)
    assert [*found] == ["a faster disk for --out", "--cond-dtype int8"]


def test_files_beyond_one_folder_are_made_where_the_cache_would_be(tmp_path):
    with benches.scratch(str(tmp_path / "a" / "b")) as made:
        assert Path(made).parent == tmp_path
    (tmp_path / "a").mkdir()
    with benches.scratch(str(tmp_path / "a")) as made:
        assert Path(made).parent == tmp_path / "a"
    assert os.listdir(tmp_path / "a") == []


def test_there_is_a_thread_for_each_core_up_to_sixteen(monkeypatch):
    monkeypatch.setattr("latentprep.prepare.devices.count_cores", lambda: 40)
    assert (default_threads(1), default_threads(4)) == (16, 10)
