"""On CUDA: the same cache as on a CPU, but for rounding; several devices; nothing waits for a transfer."""

import json

import pytest
import torch

from latentprep import LatentDataset, LatentLoader
from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.prepare.models.find import find_model
from latentprep.prepare.models.vae_folder import open_vae
from tests.conftest import SMALL

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
    one, other = ({path.name: path.read_bytes() for path in (tmp_path / name / "shards").iterdir()} for name in "ab")
    assert one == other


def test_two_processes_on_one_machine_give_the_bytes_of_one(run, images, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two devices")
    encode(run, images, tmp_path / "one", "--device", "cuda:0", *SHARDS)
    encode(run, images, tmp_path / "two", "--devices", "cuda:0,cuda:1", *SHARDS)
    one, other = ({p.name: p.read_bytes() for p in (tmp_path / name / "shards").iterdir()} for name in ("one", "two"))
    assert one == other


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


def test_batches_move_to_the_device_and_are_drawn_there(run, images, tmp_path):
    encode(run, images, tmp_path / "c", "--device", "cuda")
    data = LatentDataset(tmp_path / "c", latent_sampling_method="random", use_weight=True)
    for batch in LatentLoader(data, 4):
        moved = batch.pin_memory().to("cuda", non_blocking=True)
        assert moved.latent_sample.device.type == "cuda"
        assert moved.weight.device.type == "cuda"
        assert all(value.device.type == "cuda" for value in moved.cond.values())
        assert (moved.latent_mean.cpu() == batch.latent_mean).all()
