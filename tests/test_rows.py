"""read/rows.py: rows of any open files, gathered by their addresses, are the rows themselves."""

import numpy as np
import pytest
import torch

from latentprep import LatentDataset, LatentLoader
from latentprep.read import rows as reading
from latentprep.read.rows import Addresses, read_memory
from tests.conftest import SMALL, gradient


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
    found = read_memory(known.find(which, rows), dtype, shape)
    assert found.dtype == dtype
    assert torch.equal(found, torch.stack([tensors[n][row] for n, row in zip(which, rows, strict=True)]))


@pytest.mark.parametrize("offset", range(9))
def test_files_of_a_stranger_s_may_lie_at_odd_addresses(offset):
    memory = torch.arange(256, dtype=torch.uint8)
    start = memory.data_ptr() + offset
    found = read_memory(np.array([start + 48, start, start + 96]), torch.int16, (4, 3))
    wanted = np.stack([memory.numpy()[offset + n : offset + n + 24].view(np.int16) for n in (48, 0, 96)])
    assert np.array_equal(found.numpy().reshape(3, 12), wanted)


def test_what_does_not_lie_row_behind_row_has_no_addresses():
    known = Addresses(5)
    known.put(0, torch.ones(3, 4))
    known.put(1, torch.ones(3, 5))
    known.put(2, torch.ones(()).expand(3, 4))
    known.put(3, torch.ones(4, 3).T)
    assert known.find(np.array([0, 0]), np.array([0, 2])) is not None
    for other in (1, 2, 3, 4):  # another size, no rows of its own, turned, not open
        assert known.find(np.array([0, other]), np.array([0, 0])) is None
        if other > 1:
            assert known.find(np.array([other]), np.array([0])) is None
    known.put(0, None)
    assert known.find(np.array([0]), np.array([0])) is None
    known.first[:2], known.row_bytes[:2] = (2**12, 2**46), 2**20  # too far apart for one table
    assert known.find(np.array([0, 1]), np.array([0, 0])) is None


@pytest.fixture
def cache(run, images, tmp_path):
    for n in range(30):
        gradient(64, 64).rotate(n * 7).save(images / f"more{n:02}.png")
    for n in range(4):
        (images / f"tall{n}.txt").write_text("a, b, c")
    options = (*SMALL, "--shard-size", "30kB", "--flip", "--prompts-per-image", 3, "--shuffle-tags")
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    (images / "more03.png").unlink()
    (images / "more17.png").unlink()
    assert run("encode", images, "--out", tmp_path / "c", *options).code == 0
    return tmp_path / "c"


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
    monkeypatch.setattr(reading.Addresses, "find", lambda *_: None)
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
