"""read/shards.py: a field of the table that the reader does not know comes with every batch, image by image."""

import pickle

import numpy as np
import pytest
import torch

from latentprep import LatentDataset, LatentLoader
from latentprep.read import shards
from tests.conftest import SMALL


@pytest.fixture
def cache(run, images, tmp_path):
    options = ("--flip", "--crops", "2", "--crop", "random")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *options).code == 0
    return tmp_path / "c"


@pytest.fixture
def more_fields(monkeypatch):
    """Fields beside those of the table, one of each kind of shape, made of the numbers of the others."""
    list_columns = shards.list_columns

    def with_more(group, words):
        yield from list_columns(group, words)
        yield "depth", "NVhw", group.latent_mean.mean(2)
        yield "corner", "NV2", group.crop[..., :2] + 1
        yield "size", "N2", group.original_size * 2
        yield "side", "V", torch.arange(group.latent_mean.shape[1])
        yield "channel", "C", torch.arange(group.latent_mean.shape[2])
        if group.latent_mean.shape[3] < group.latent_mean.shape[4]:
            yield "wide_only", "N", torch.ones(len(words))

    monkeypatch.setattr(shards, "list_columns", with_more)


def test_what_the_reader_does_not_know_comes_with_every_batch(cache, more_fields):
    data = LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, repeats=6)
    sides = set()
    for batch in LatentLoader(data, 5):
        is_wide = batch.latent_mean.shape[2] < batch.latent_mean.shape[3]
        assert batch.fields.keys() == {"depth", "corner", "size", "side", "channel"} | (
            {"wide_only"} if is_wide else set()
        )
        assert torch.equal(batch.fields["depth"], batch.latent_mean.mean(1))
        assert torch.equal(batch.fields["corner"], batch.crop[:, :2] + 1)
        assert torch.equal(batch.fields["size"], batch.original_size * 2)
        assert (batch.fields["side"] % 2 == 1).tolist() == batch.flipped.tolist()
        assert batch.fields["channel"].tolist() == [[0, 1, 2, 3]] * len(batch)
        assert all(value.is_meta for value in batch.to("meta").fields.values())
        assert torch.equal(pickle.loads(pickle.dumps(batch)).fields["depth"], batch.fields["depth"])
        sides |= set(batch.fields["side"].tolist())
    assert sides == {0, 1, 2, 3}


def test_a_field_that_some_samples_lack_is_left_out(cache, more_fields):
    data = LatentDataset(cache)
    groups = [data._shards[n] for n in range(2)]
    assert sorted("wide_only" in group.others for group in groups) == [False, True]
    (wide,) = (n for n, group in enumerate(groups) if "wide_only" in group.others)
    one = np.array([0])
    assert data._shards.rows(one + wide, one, one).take_if_there("wide_only") is not None
    for both in (np.array([0, 1]), np.array([1, 0])):  # fields depend on the bucket, so that no batch has both
        rows = data._shards.rows(both, np.zeros(2, np.int64), np.zeros(2, np.int64))
        assert rows.take_if_there("wide_only") is None
        assert rows.take("original_size").shape == (2, 2)


def test_what_it_knows_is_no_further_field(cache):
    data = LatentDataset(cache)
    assert data[0].fields == {}
    (group,) = data._shards.opened.values()
    assert {*group.of_view, *group.of_image} >= {"latent_mean", "latent_std", "crop", "digest", "prompt_of"}
    assert {*group.of_view, *group.of_image} <= shards.KNOWN
