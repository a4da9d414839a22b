"""read/rows.py: rows of any open files, gathered by their addresses, are the rows themselves."""

import json
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import latentprep
from latentprep import LatentDataset, LatentLoader
from latentprep.errors import UserError
from latentprep.read import rows as reading
from latentprep.read.rows import Addresses, read_memory
from latentprep.read.shards import OpenShards
from tests.conftest import gradient


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.int64, torch.uint8, torch.bool])
@pytest.mark.parametrize("shape", [(), (1,), (3,), (4, 5, 7), (8, 8)])
@pytest.mark.parametrize("count", [1, 2, 33])
def test_rows_at_addresses_are_the_rows(dtype, shape, count):
    random = np.random.default_rng(0)
    tensors = [(torch.randn(n, *shape) * 100).to(dtype) for n in (5, 17, 40)]
    which = random.integers(3, size=count)
    rows = np.array([random.integers(len(tensors[n])) for n in which])
    known = Addresses(3)
    for number, tensor in enumerate(tensors):
        known.put(number, tensor)
    found = known.of(which).read(rows, slice(0, count))
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack([tensors[n][row] for n, row in zip(which, rows, strict=True)]))
    some = slice(count // 2, count)
    assert torch.equal(known.of(which).read(rows[some], some), found[some])


@pytest.mark.parametrize("offset", range(9))
def test_files_of_a_stranger_s_may_lie_at_odd_addresses(offset):
    memory = torch.arange(256, dtype=torch.uint8)
    start = memory.data_ptr() + offset
    found = read_memory(np.array([start + 48, start, start + 96]), torch.int16, (4, 3))
    wanted = np.stack([memory.numpy()[offset + n : offset + n + 24].view(np.int16) for n in (48, 0, 96)])
    assert np.array_equal(found.numpy().reshape(3, 12), wanted)


def test_what_does_not_lie_row_behind_row_has_no_addresses():
    tensors = [
        torch.ones(3, 4), torch.ones(3, 5), torch.ones(()).expand(3, 4), torch.ones(4, 3).T,
        torch.ones(3, 4).bfloat16(), torch.ones(3, 2, 2), torch.ones(3, 4, device="meta"), torch.ones(3, 8).half(),
    ]  # fmt: skip
    known = Addresses(len(tensors) + 1)
    for number, tensor in enumerate(tensors):
        known.put(number, tensor)

    def read(*groups):
        return known.of(np.array(groups)).read(np.zeros(len(groups), np.int64), slice(0, len(groups)))

    assert read(0, 0) is not None
    for other in range(1, len(tensors) + 1):  # of other rows, turned, of another dtype, shape, device; not open
        assert read(0, other) is None, other
        assert (read(other) is not None) == (other in (1, 4, 5, 7)), other
    known.put(0, None)
    assert read(0) is None
    known.put(0, tensors[0])
    known.put(1, torch.ones(3, 4))
    known.first[1] = known.first[0] + 2**59  # too far apart for one table
    assert read(0, 1) is None


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Many small shards of two buckets, some with weights, two with dead rows; three prompts for each image."""
    folder = tmp_path_factory.mktemp("rows")
    images = folder / "images"
    images.mkdir()
    for n in range(30):
        gradient(64, 64).rotate(n * 7).save(images / f"more{n:02}.png")
    for n in range(4):
        gradient(128, 40).save(images / f"wide{n}.png")
        tall = gradient(64, 80)
        if n % 2:
            tall.putalpha(gradient(64, 80, "L"))
        tall.save(images / f"tall{n}.png")
        (images / f"tall{n}.txt").write_text("a, b, c")
    options = {
        "model": "tiny", "device": "cpu", "resolution": 64, "bucket_step": 32, "min_side": 32, "shard_size": "30kB",
        "flip": True, "prompts_per_image": 3, "shuffle_tags": True, "progress": False,
    }  # fmt: skip
    latentprep.encode(images, folder / "c", **options)
    (images / "more03.png").unlink()
    (images / "more17.png").unlink()
    latentprep.encode(images, folder / "c", **options)
    return folder / "c"


def open_data(cache, **options):
    return LatentDataset(cache, latent_sampling_method="random", use_weight="raw", flip_p=0.5, seed=3, **options)


def same(batch, other):
    assert batch.index.tolist() == other.index.tolist()
    assert batch.cond_text == other.cond_text
    for name in (
        "latent_mean",
        "latent_std",
        "noise_seed",
        "stored_weight",
        "original_size",
        "resized_size",
        "crop",
        "flipped",
    ):
        assert torch.equal(getattr(batch, name), getattr(other, name)), name
    for name, value in batch.stored_cond.items():
        assert torch.equal(value, other.stored_cond[name])


@pytest.mark.parametrize("max_open", [2, 16_000])
def test_a_batch_of_many_shards_holds_the_samples_that_each_alone_gives(cache, monkeypatch, max_open):
    monkeypatch.setattr("latentprep.read.shards.MAX_OPEN", max_open)
    data, alone = open_data(cache, repeats=2), open_data(cache, repeats=2)
    assert len(data.manifest.shards) > 8
    assert data.manifest.num_dead == 2
    for batch in LatentLoader(data, 8):
        ones = [alone[index] for index in batch.index.tolist()]
        assert batch.cond_text == [one.cond_text[0] for one in ones]
        for name in ("latent_mean", "latent_std", "stored_weight", "original_size", "crop", "flipped"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(one, name) for one in ones])), name
        assert torch.equal(batch.cond["prompt_embeds"], torch.cat([one.cond["prompt_embeds"] for one in ones]))
        assert len(data._shards.opened) <= max(max_open, 2)
        assert data._shards.is_open.sum() == len(data._shards.opened)


def test_the_slow_way_gives_the_same(cache, monkeypatch):
    fast = [list(LatentLoader(open_data(cache), 5)) for _ in range(2)][1]
    monkeypatch.setattr(reading.RowAddresses, "read", lambda *_: None)
    for batch, other in zip(LatentLoader(open_data(cache), 5), fast, strict=True):
        same(batch, other)


def test_no_file_is_opened_before_a_batch_needs_it(cache):
    data = open_data(cache)
    batch = next(iter(LatentLoader(data, 2)))
    assert len(data._shards.opened) <= 2
    assert data._shards.is_open.sum() <= 2
    same(batch, next(iter(LatentLoader(data, 2))))


def test_a_batch_keeps_its_prompts_when_its_files_are_closed(cache, monkeypatch):
    wanted = [batch.cond_text for batch in LatentLoader(open_data(cache), 4)]
    monkeypatch.setattr("latentprep.read.shards.MAX_OPEN", 1)
    batches = list(LatentLoader(open_data(cache), 4))
    assert [batch.cond_text for batch in batches] == wanted


@pytest.mark.parametrize("max_open", [3, 16_000])
def test_threads_may_read_one_dataset(cache, monkeypatch, max_open):
    """Two that open one group at once, and one that closes what another reads, must not read memory that is gone."""
    monkeypatch.setattr("latentprep.read.shards.MAX_OPEN", max_open)
    wanted = {batch.index[0].item(): batch for batch in LatentLoader(open_data(cache), 5)}
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(6):
            data = open_data(cache)

            def read(data=data):
                return [data.__getitems__(batch.index.tolist()) for batch in wanted.values()]

            with ThreadPoolExecutor(4) as pool:
                for found in [pool.submit(read) for _ in range(4)]:
                    for batch in found.result():
                        same(batch, wanted[batch.index[0].item()])
    finally:
        sys.setswitchinterval(interval)


def test_the_default_device_of_a_training_loop_changes_nothing(cache):
    wanted = list(LatentLoader(open_data(cache), 5))
    samples = [batch.latent_sample for batch in wanted]
    with torch.device("meta"):
        data = open_data(cache)
        batches = list(LatentLoader(data, 5))
        found = [batch.latent_sample for batch in batches]
        assert data.uncond()["prompt_embeds"].device.type == "cpu"
    for batch, other, sample, drawn in zip(batches, wanted, samples, found, strict=True):
        same(batch, other)
        assert torch.equal(sample, drawn)


def test_a_std_of_another_dtype_than_the_mean_is_refused(cache, tmp_path):
    """Rows of 16 bits are of one size, whatever they mean."""
    cache = shutil.copytree(cache, tmp_path / "c")
    shards = json.loads((cache / "cache.json").read_text())["shards"]
    living = next(shard["id"] for shard in shards if not shard["dead"])  # one that is read
    path = cache / "shards" / f"{living}.latents.safetensors"
    with safe_open(path, "pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    changed = {n: t.bfloat16() if n.endswith("latent_std") else t for n, t in tensors.items()}
    save_file(changed, path, metadata)
    with pytest.raises(UserError, match="this shard and its text do not fit the others"):
        list(LatentLoader(open_data(cache), 5))


def test_a_sample_that_was_drawn_in_inference_mode_may_be_trained_on(cache):
    batch, other = open_data(cache)[0], open_data(cache)[0]
    with torch.inference_mode():
        assert batch.latent_sample.shape == other.latent_sample.shape
    weight = torch.ones((), requires_grad=True)
    (batch.latent_sample * weight).sum().backward()
    assert weight.grad is not None


def test_a_batch_holds_no_other_files_than_its_own(cache):
    data = open_data(cache)
    list(LatentLoader(data, 1))  # all are open now
    for batch in LatentLoader(data, 1):
        assert len(batch.prompts.rows.opened) == 1


def test_threads_that_want_one_file_open_it_once(cache, monkeypatch):
    """Else each has its own mapping, and the addresses may be those of one that is gone."""
    opened, open_group = [], OpenShards._open

    def slow_open(shards, number):
        opened.append(number)
        time.sleep(0.005)
        return open_group(shards, number)

    monkeypatch.setattr(OpenShards, "_open", slow_open)
    data = open_data(cache)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: data[0], range(4)))
    assert len(opened) == 1
