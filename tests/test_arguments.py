"""Odd folders, locations, epochs, seeds and sizes: they work, or one line says what was expected."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from latentprep.errors import UserError
from latentprep.options import count_pixels
from latentprep.prepare.models.vae_encoder import Posterior
from latentprep.read.dataset import LatentDataset
from latentprep.read.loader import LatentLoader
from latentprep.read.sampler import BucketBatchSampler
from tests.conftest import SMALL
from tests.test_cli import refused

LONG = "a" * 256


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("foo://x", "foo://x: cannot open this location (Protocol not known: foo)."),
        ("github://x", "github://x: cannot open this location"),
        ("ftp://localhost:1/x", "cannot open this location"),
        ("data:,x", "this kind of location has no folders, expected one that has."),
        (LONG, "File name too long"),
        (f"{LONG}/b", "File name too long"),
    ],
)
def test_locations_that_cannot_hold_a_cache(run, images, tmp_path, monkeypatch, where, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(run("encode", images, "--out", where, *SMALL))
    assert refused(run("inspect", where))
    assert run("verify", where).code == 1


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--max-megapixels", "nan", "--max-megapixels nan: expected a number of more than 0."),
        ("--max-megapixels", "inf", "--max-megapixels inf: expected a number of more than 0."),
        ("--max-megapixels", "-1", "--max-megapixels -1: expected a number of more than 0."),
        ("--max-aspect", "nan", "--max-aspect nan: longer side over shorter side, so at least 1."),
        ("--max-aspect", "inf", "--max-aspect inf: longer side over shorter side, so at least 1."),
        ("--resolution", "16385", "--resolution 16385: expected at most 16,384 pixels."),
    ],
)
def test_numbers_without_measure(run, images, tmp_path, option, value, message):
    assert refused(run("encode", images, "--out", tmp_path / "c", "--model", "tiny", option, value)) == message
    assert count_pixels(1e-9) == 1


@pytest.fixture
def cache(run, images, tmp_path) -> Path:
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip").code == 0
    return tmp_path / "c"


@pytest.mark.parametrize("seed", [-1, 2**64 + 5])
def test_any_whole_seed_will_do(run, images, cache, seed):
    assert run("encode", images, "--out", cache.parent / "d", *SMALL, "--crop", "random", "--seed", seed).code == 0
    assert run("verify", cache, "--source", images, "--re-encode", 2, "--seed", seed).code == 0
    data = LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, seed=seed)
    loader = LatentLoader(data, 2, seed=seed)
    wanted = [batch.latent_sample for batch in loader]
    again = LatentLoader(LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, seed=seed), 2, seed=seed)
    assert all(torch.equal(batch.latent_sample, sample) for batch, sample in zip(again, wanted, strict=True))


def test_a_bucket_of_millions_takes_any_whole_seed_too(cache, monkeypatch):
    monkeypatch.setattr("latentprep.read.order.LARGE", 1)
    for seed in (-1, 2**70):
        sampler = BucketBatchSampler(LatentDataset(cache), 2, seed=seed)
        assert sorted(n for batch in sampler for n in batch) == list(range(8))


@pytest.mark.parametrize("bad", [None, 1.0, "1", True])
def test_what_is_no_whole_number_is_refused_by_name(cache, bad):
    data = LatentDataset(cache)
    sampler, loader = BucketBatchSampler(data, 2), LatentLoader(data, 2)
    attempts = {
        "seed": [lambda: LatentDataset(cache, seed=bad), lambda: LatentLoader(data, 2, seed=bad)],
        "repeats": [lambda: LatentDataset(cache, repeats=bad)],
        "keep_tags": [lambda: LatentDataset(cache, shuffle_tags=True, include_cond=False, keep_tags=bad)],
        "batch_size": [lambda: BucketBatchSampler(data, bad), lambda: LatentLoader(data, bad)],
        "gradient_step": [lambda: LatentLoader(data, 2, gradient_step=bad)],
        "epoch": [lambda: data.set_epoch(bad), lambda: sampler.set_epoch(bad), lambda: loader.set_epoch(bad)],
        "rank": [lambda: BucketBatchSampler(data, 2, rank=bad, world_size=2)] * (bad is not None),
        "world_size": [lambda: BucketBatchSampler(data, 2, world_size=bad)] * (bad is not None),
        "load_state_dict: next_batch": [lambda: loader.load_state_dict({**loader.state_dict(), "next_batch": bad})],
        "load_state_dict: epoch": [lambda: loader.load_state_dict({**loader.state_dict(), "epoch": bad})],
    }
    for name, acts in attempts.items():
        for act in acts:
            with pytest.raises(UserError, match=f"^{name}={bad!r}: expected a whole number"):
                act()
    assert sampler.epoch == loader.epoch == 0


def test_numbers_outside_their_range_are_refused_by_name(cache):
    data = LatentDataset(cache)
    loader = LatentLoader(data, 2)
    for epoch in (-1,):
        for act in (data.set_epoch, loader.set_epoch, loader.sampler.set_epoch):
            with pytest.raises(UserError, match=f"^epoch={epoch}: expected at least 0"):
                act(epoch)
    for size in (0, -3):
        for make in (LatentLoader, BucketBatchSampler):
            with pytest.raises(UserError, match=f"^batch_size={size}: expected at least 1\\."):
                make(data, size)
    with pytest.raises(UserError, match=r"^gradient_step=0: "):
        LatentLoader(data, 2, gradient_step=0)
    for next_batch in (-1, len(loader) + 1):
        with pytest.raises(UserError, match=f"next_batch={next_batch}: expected "):
            loader.load_state_dict({**loader.state_dict(), "next_batch": next_batch})
    for value in (float("nan"), "0.5", None, -0.1, 1.1):
        with pytest.raises(UserError, match=r"^flip_p=.*: a probability, expected 0 to 1"):
            LatentDataset(cache, flip_p=value)


@pytest.mark.parametrize("ranks", [{"rank": 0}, {"world_size": 2}])
def test_a_rank_is_given_with_the_number_of_ranks(cache, ranks):
    for make in (LatentLoader, BucketBatchSampler):
        with pytest.raises(UserError, match=r"^rank=(None|0), world_size=(None|2): give both, or neither"):
            make(LatentDataset(cache), 2, **ranks)


def test_numpy_s_integers_count(cache):
    data = LatentDataset(cache, seed=np.int64(-3), repeats=np.int32(2), flip_p=np.float32(0.5))
    loader = LatentLoader(data, np.int64(2), seed=np.uint64(7), gradient_step=np.int16(1))
    loader.set_epoch(np.int64(2**62))
    found = [batch.index.tolist() for batch in loader]
    plain = LatentLoader(LatentDataset(cache, seed=-3, repeats=2, flip_p=0.5), 2, seed=7)
    plain.set_epoch(2**62)
    assert found == [batch.index.tolist() for batch in plain]
    assert json.dumps(loader.state_dict())
    loader.set_epoch(2**63 - 1)
    assert len(list(loader.sampler)) == len(loader)


class AllAlike:
    """An encoder whose latents have no deviation, or are no numbers."""

    def __init__(self, value):
        self.value = value

    def encode(self, pixels):
        shape = (len(pixels), 4, pixels.shape[1] // 8, pixels.shape[2] // 8)
        return Posterior(torch.full(shape, self.value), torch.zeros(shape))


@pytest.mark.parametrize("value", [0.0, float("nan")])
def test_latents_without_deviation_are_compared(run, images, cache, monkeypatch, value):
    monkeypatch.setattr("latentprep.prepare.models.vae_folder.VaeFolder.open", lambda *_, **__: AllAlike(value))
    result = run("verify", cache, "--source", images, "--re-encode", 2, "--json")
    assert result.code == 1
    found = json.loads(result.out)
    assert [problem["problem"] for problem in found["problems"]] == ["latents", "latents"]
