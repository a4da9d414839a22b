"""On CUDA: the same cache as on a CPU, but for rounding; several devices; nothing waits for a transfer."""

import json
import signal
import subprocess
import sys

import pytest
import torch

from latentprep import LatentDataset, LatentLoader
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.prepare.models.find import find_model
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.models.vae_folder import open_vae
from latentprep.prepare.work.events import Failure
from tests.conftest import SMALL, gradient
from tests.test_encode import overflowing_model
from tests.test_latents_worker import prepared

pytestmark = pytest.mark.gpu
FLOAT32 = ("--dtype", "float32", "--store-dtype", "float32")
SHARDS = ("--shard-size", "60kB")


def rows(cache):
    """key -> mean, std and cond of each image."""
    storage = Storage(cache)
    found = {}
    for shard in open_manifest(storage).shards:
        latents, text = shard.open_latents(storage), shard.open_text(storage)
        for group, words in zip(latents.groups, text.groups, strict=True):
            for n, key in enumerate(group.key):
                cond = {name: value[int(words.prompt_of[n, 0])] for name, value in text.cond.items()}
                found[key] = (group.latent_mean[n], group.latent_std[n], cond["prompt_embeds"])
    return found


def shards(cache):
    """name -> bytes of each shard's files."""
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


def encode(run, images, out, *options):
    result = run("encode", images, "--out", out, *SMALL, *options)
    assert result.code == 0, result.err
    return rows(out)


@pytest.mark.parametrize(
    ("options", "tolerance"), [(FLOAT32, 0.003), (("--store-dtype", "float32"), 0.02)], ids=["float32", "float16"]
)
def test_a_cache_made_on_cuda_is_that_of_a_cpu(run, images, tmp_path, options, tolerance):
    wanted = encode(run, images, tmp_path / "cpu", "--device", "cpu", *FLOAT32)
    found = encode(run, images, tmp_path / "cuda", "--device", "cuda", "--batch-size", 3, *options)
    assert found.keys() == wanted.keys()
    for key, (mean, std, cond) in wanted.items():
        assert (found[key][0] - mean).abs().mean() < tolerance * mean.std()
        assert (found[key][1] - std).abs().mean() < tolerance * std.mean() + 1e-4
        assert (found[key][2] - cond).abs().mean() < tolerance * cond.std()
    assert json.loads((tmp_path / "cuda" / "cache.json").read_text())["made_with"]["device"].startswith("cuda")
    result = run("verify", tmp_path / "cuda", "--source", images, "--re-encode", 3, "--device", "cpu")
    assert result.code == 0, result.out


def test_the_same_command_gives_the_same_bytes(run, images, tmp_path):
    for name in "ab":
        encode(run, images, tmp_path / name, "--device", "cuda")
    assert shards(tmp_path / "a") == shards(tmp_path / "b")


def test_two_processes_on_one_machine_give_the_bytes_of_one(run, images, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    encode(run, images, tmp_path / "one", "--device", "cuda:0", *SHARDS)
    encode(run, images, tmp_path / "two", "--devices", "cuda:0,cuda:1", *SHARDS)
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_two_ranks_on_one_device_give_the_bytes_of_one(run, images, tmp_path):
    encode(run, images, tmp_path / "one", "--device", "cuda", *SHARDS)
    share = ("--out", tmp_path / "two", *SMALL, "--device", "cuda", *SHARDS, "--world-size", 2)
    for rank in range(2):
        assert run("encode", images, *share, "--rank", rank).code == 0
    assert shards(tmp_path / "one") == shards(tmp_path / "two")


def test_processes_for_several_devices_open_theirs(run, images, tmp_path):
    encode(run, images, tmp_path / "c", "--devices", "cuda:0,cpu", *FLOAT32, *SHARDS)
    wanted = encode(run, images, tmp_path / "cpu", "--device", "cpu", *FLOAT32, *SHARDS)
    found = rows(tmp_path / "c")
    assert found.keys() == wanted.keys()
    for key, (mean, _, _) in wanted.items():
        assert (found[key][0] - mean).abs().mean() < 0.003 * mean.std()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_run_that_is_stopped_goes_on_to_the_same_cache(run, tmp_path, number):
    images = tmp_path / "images"
    images.mkdir()
    for n in range(40):
        gradient(96 + n, 96).save(images / f"{n:02}.png")
    options = ("--device", "cuda", "--batch-size", 4, "--shard-size", "20kB")
    encode(run, images, tmp_path / "whole", *options)
    command = ["encode", images, "--out", tmp_path / "c", *SMALL, *options]
    process = subprocess.Popen([sys.executable, "-m", "latentprep", *map(str, command)], stderr=subprocess.PIPE)
    while not list(tmp_path.glob("c/shards/*.latents.safetensors")):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    _, told = process.communicate(timeout=60)
    assert b"Traceback" not in told
    encode(run, images, tmp_path / "c", *options)
    assert shards(tmp_path / "c") == shards(tmp_path / "whole")
    assert run("verify", tmp_path / "c").code == 0


@pytest.fixture
def small_memory():
    """small_memory(bytes): what torch may take of the device from now on, for this test."""
    total = torch.cuda.get_device_properties(0).total_memory
    yield lambda size: torch.cuda.set_per_process_memory_fraction(size / total)
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.cuda.empty_cache()


def test_a_batch_that_does_not_fit_is_halved(small_memory):
    encoder = open_vae(find_model("tiny", "--model", print)).open(torch.device("cuda"), torch.float32)
    pixels = torch.randint(0, 256, (8, 512, 512, 3), dtype=torch.uint8)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    wanted = torch.cat([encoder.encode(pixels[n : n + 1]).mean for n in range(8)])
    taken = torch.cuda.max_memory_reserved()
    torch.cuda.empty_cache()
    small_memory(3 * taken)
    found = encoder.encode(pixels.pin_memory())
    assert "out of memory with 8 images of 512x512 at once" in encoder.limit.said
    assert (found.mean - wanted).abs().mean() < 0.003 * wanted.std()


def test_an_image_that_does_not_fit_is_a_skip_that_heals(run, tmp_path, small_memory):
    images = tmp_path / "images"
    images.mkdir()
    gradient(64, 64).save(images / "small.png")
    gradient(64, 64).resize((2048, 2048)).save(images / "large.png")
    options = ("--model", "tiny", "--resolution", 2048, "--no-upscale", "--device", "cuda")
    torch.cuda.empty_cache()
    small_memory(100_000_000)
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert "does not fit into the device's memory" in result.out + result.err
    assert len(rows(tmp_path / "c")) == 1
    small_memory(torch.cuda.get_device_properties(0).total_memory)
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    assert len(rows(tmp_path / "c")) == 2


def test_what_overflows_is_encoded_again_in_float32(run, images, tmp_path):
    options = ("--model", overflowing_model(tmp_path / "model"), *SMALL[2:])
    result = run("encode", images, "--out", tmp_path / "cuda", *options, "--device", "cuda")
    assert result.code == 0
    assert "8 encodings done again in float32, after an overflow" in result.out
    assert run("encode", images, "--out", tmp_path / "cpu", *options, "--device", "cpu").code == 0
    found, wanted = rows(tmp_path / "cuda"), rows(tmp_path / "cpu")
    for key, (mean, _, _) in wanted.items():
        assert (found[key][0].float() - mean).abs().mean() < 0.01 * mean.std()


@pytest.mark.slow
def test_a_compiled_encoder_gives_the_numbers_of_one_that_is_not(run, images, tmp_path):
    wanted = encode(run, images, tmp_path / "c", "--device", "cuda", *FLOAT32)
    found = encode(run, images, tmp_path / "compiled", "--device", "cuda", "--compile", *FLOAT32)
    for key, (mean, _, _) in wanted.items():
        assert (found[key][0] - mean).abs().mean() < 0.003 * mean.std()


def test_numbers_come_through_pinned_memory_and_are_not_waited_for():
    device = torch.device("cuda")
    encoder = open_vae(find_model("tiny", "--model", print)).open(device, torch.float32)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8)
    encoder.encode(pixels)  # warms up
    torch.cuda.set_sync_debug_mode("error")  # from here on a synchronization raises
    try:
        started = encoder.start(pixels.pin_memory())
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert started.mean.is_pinned()
    assert started.std.is_pinned()
    assert started.is_there is not None
    assert torch.equal(encoder.finish(started, pixels).mean, encoder.encode(pixels).mean)


def test_no_batch_of_a_run_is_waited_for(images, tmp_path, monkeypatch):
    """While torch would raise for a synchronization, all but the events of finished batches, the run is whole."""
    start, pinned = VaeEncoder.start, []

    def watched(encoder, pixels):
        pinned.append(pixels.is_pinned())
        torch.cuda.set_sync_debug_mode("error")
        try:
            return start(encoder, pixels)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    worker = prepared(images, tmp_path / "c", device="cuda", batch_size=2)
    list(worker.latents_worker().run(worker.plan.units))  # warms up
    again = prepared(images, tmp_path / "d", device="cuda", batch_size=2)
    monkeypatch.setattr(VaeEncoder, "start", watched)
    told = list(again.latents_worker().run(again.plan.units))
    assert len(pinned) >= 8
    assert all(pinned)
    assert not [event for event in told if isinstance(event, Failure)]


def test_pixels_are_copied_beside_the_batch_before():
    """A batch is at work for a second; the next one's pixels are on the device before it ends."""
    encoder = open_vae(find_model("tiny", "--model", print)).open(torch.device("cuda"), torch.float32)
    pixels = torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8).pin_memory()
    encoder.encode(pixels)  # warms up
    torch.cuda._sleep(2_000_000_000)  # clock cycles
    busy = torch.cuda.Event()
    busy.record()
    started = encoder.start(pixels)
    encoder.copies.synchronize()
    assert not busy.query()
    assert not started.is_there.query()
    assert encoder.finish(started, pixels).mean.isfinite().all()


def test_batches_move_to_the_device_and_are_drawn_there(run, images, tmp_path):
    encode(run, images, tmp_path / "c", "--device", "cuda")
    data = LatentDataset(tmp_path / "c", latent_sampling_method="random", use_weight=True)
    for batch in LatentLoader(data, 4):
        moved = batch.pin_memory().to("cuda", non_blocking=True)
        assert moved.latent_sample.device.type == "cuda"
        assert moved.weight.device.type == "cuda"
        assert all(value.device.type == "cuda" for value in moved.cond.values())
        assert (moved.latent_mean.cpu() == batch.latent_mean).all()
