"""repr of the reader's classes: one or two telling lines, for which nothing is opened or computed."""

import shutil

import pytest
import torch

from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
from latentprep.personalized import PersonalizedBase, PersonalizedDataLoader
from tests.conftest import SMALL
from tests.test_ancestor import LatentDiffusion, vae  # noqa: F401 (a fixture)


@pytest.fixture
def cache(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip").code == 0
    return tmp_path / "c"


def test_of_a_dataset(cache):
    data = LatentDataset(cache, repeats=3)
    wanted = f"LatentDataset({cache}: 8 images x 3 repeats, 2 buckets [4,4,12] [4,8,8], 2 views, once, cond "
    assert repr(data) == f"{wanted}stored)"
    data[0]
    assert repr(data) == f"{wanted}prompt_embeds [77,64] float16)"
    assert repr(LatentDataset(cache, include_cond=False)).endswith(", no cond)")
    made = LatentDataset(cache, shuffle_tags=True, cond_model=lambda prompts: torch.zeros(len(prompts), 1, 1))
    assert repr(made).endswith(", cond by cond_model)")


def test_nothing_is_opened_for_one(cache):
    loader = LatentLoader(LatentDataset(cache), 4)
    shutil.rmtree(cache)
    assert "8 images" in repr(loader)
    assert loader.data._shards.opened == {}


def test_of_a_sampler_and_a_loader(cache):
    data = LatentDataset(cache)
    sampler = BucketBatchSampler(data, 3, rank=1, world_size=2, shuffle=False)
    sampler.set_epoch(4)
    assert repr(sampler) == "BucketBatchSampler(2 batches of at most 3, in order, rank 1 of 2, epoch 4)"
    assert repr(BucketBatchSampler(data, 3, drop_last=True)) == (
        "BucketBatchSampler(2 batches of at most 3, shuffled, 2 samples left out, epoch 0)"
    )
    loader = LatentLoader(data, 4, num_workers=2)
    loader.set_epoch(7)
    assert repr(loader) == f"LatentLoader(2 batches of at most 4, shuffled, epoch 7, by 2 workers,\n  {data!r})"
    one = LatentLoader(LatentDataset(cache, include_cond=False), 4, drop_last=True, shuffle=False)
    assert repr(one).startswith("LatentLoader(2 batches of at most 4, in order, epoch 0,\n")


def test_of_a_batch(cache):
    batch = LatentDataset(cache, use_weight=True).__getitems__([0, 1])
    wanted = "LatentBatch(2 samples of [4,4,12] float16, mean and std, cond prompt_embeds [2,77,64], weight, on cpu)"
    assert repr(batch) == wanted
    assert batch._drawn is None

    def cond_model(prompts):
        raise AssertionError("a repr asks for nothing")

    made = LatentDataset(cache, shuffle_tags=True, cond_model=cond_model, latent_sampling_method="deterministic")[0]
    assert repr(made) == "LatentBatch(1 sample of [4,4,12] float16, mean, cond by cond_model, on cpu)"


def test_a_stranger_s_text_is_escaped(run, images, tmp_path):
    folder = tmp_path / "a\x1b[31mb"
    assert run("encode", images, "--out", folder, *SMALL).code == 0
    assert "\x1b" not in repr(LatentDataset(folder))


def test_of_the_ancestor_s_classes(images, vae, tmp_path):  # noqa: F811
    data = PersonalizedBase(
        images, 64, 64, repeats=1, flip_p=0, model=LatentDiffusion(vae), cache=tmp_path / "c", use_weight=True,
        latent_sampling_method="random",
    )  # fmt: skip
    assert repr(data) == f"PersonalizedBase({images}, {data.data!r})"
    loader = PersonalizedDataLoader(data, batch_size=4)
    assert repr(loader) == (f"PersonalizedDataLoader(2 batches of at most 4, shuffled, next epoch 0,\n  {data!r})")
    assert repr(next(iter(loader))) == "BatchLoader(4 samples of [4,8,8])"
    entry = data[0]
    assert repr(entry) == (
        f"DatasetEntry({entry.filename}, '{entry.cond_text}', latent_sample [4,8,8], weight [4,8,8])"
    )
    assert repr(entry.latent_dist) == "LatentDist(mean [1,4,8,8], std [1,4,8,8])"
    assert repr(data.dataset) == "<8 that are read when touched>"
