"""Parts of a dataset: by key, and by content, which decides the same whatever else the cache holds."""

import pickle

import numpy as np
import pytest
import torch

from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
from latentprep.errors import UserError
from tests.conftest import SMALL, gradient


@pytest.fixture
def folder(images):
    for n in range(40):
        gradient(64, 64).rotate(n * 7).save(images / f"more{n:02}.png")
    return images


@pytest.fixture
def cache(run, folder, tmp_path):
    assert run("encode", folder, "--out", tmp_path / "c", *SMALL, "--shard-size", "60kB").code == 0
    return tmp_path / "c"


def keys_of(data):
    return [data.key(n) for n in range(data.num_images)]


def read(data, batch_size=4):
    """The keys that an epoch gives, and the latents of each."""
    batches = list(LatentLoader(data, batch_size))
    assert all(len({tuple(latent.shape) for latent in batch.latent_mean}) == 1 for batch in batches)
    pairs = (
        (data.key(index), mean)
        for batch in batches
        for index, mean in zip(batch.index.tolist(), batch.latent_mean, strict=True)
    )
    return dict(pairs)


@pytest.mark.parametrize(
    ("keys", "wanted"),
    [
        ("tall*", ["tall0.png", "tall1.png", "tall2.png", "tall3.png"]),
        (["wide1.png", "tall0.png"], ["tall0.png", "wide1.png"]),
        (lambda key: key.endswith("9.png"), [f"more{n}9.png" for n in range(4)]),
    ],
)
def test_select_is_a_dataset_of_the_chosen_images(cache, keys, wanted):
    data = LatentDataset(cache, latent_sampling_method="deterministic", repeats=2)
    part = data.select(keys)
    assert sorted(keys_of(part)) == wanted
    assert len(part) == 2 * len(wanted)
    whole = read(data)
    for key, mean in read(part).items():
        assert torch.equal(mean, whole[key])
    assert sorted(keys_of(pickle.loads(pickle.dumps(part)))) == wanted
    assert (
        sorted(keys_of(part.select("*0*"))) == [key for key in wanted if "0" in key]
        if callable(keys) is False
        else True
    )
    assert len(data) == 2 * len(keys_of(data))  # the whole is as it was


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ("no*", r"keys='no\*': no image of the cache has such a key"),
        (["tall0.png", "gone.png"], r"keys: 1 are not in the cache, such as 'gone.png'"),
        ([], "keys: the list is empty"),
        (lambda key: False, "keys: the function chose no image"),
    ],
)
def test_a_part_of_nothing_is_refused(cache, keys, message):
    with pytest.raises(UserError, match=f"^{message}"):
        LatentDataset(cache).select(keys)


def test_split_goes_by_content_whatever_comes_or_goes(run, folder, cache):
    rest, part = (set(keys_of(side)) for side in LatentDataset(cache).split(0.25))
    assert len(rest) + len(part) == 48
    assert not rest & part
    assert 4 <= len(part) <= 20
    for n in range(20):
        gradient(60, 70).rotate(n * 11).save(folder / f"added{n}.png")
    (folder / "more00.png").unlink()
    (folder / "more01.png").rename(folder / "renamed.png")
    assert run("encode", folder, "--out", cache, *SMALL, "--shard-size", "60kB").code == 0
    rest_now, part_now = (set(keys_of(side)) for side in LatentDataset(cache).split(0.25))
    moved = {"more00.png": None, "more01.png": "renamed.png"}
    for before, now in ((rest, rest_now), (part, part_now)):
        assert {moved.get(key, key) for key in before} - {None} == {key for key in now if not key.startswith("added")}
    assert LatentDataset(cache).split(0.25, seed=1)[1].num_images != 0
    assert set(keys_of(LatentDataset(cache).split(0.25, seed=1)[1])) != part_now


def test_the_share_is_about_what_was_asked_for():
    from latentprep.read.counters import SPLIT, fractions, mix

    digests = mix(5, np.arange(100_000))
    assert abs((fractions(mix(0, SPLIT, digests)) < 0.05).mean() - 0.05) < 0.003


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_split_without_one_side_is_refused(cache, share):
    with pytest.raises(UserError, match=rf"^split\({share}\): the (rest|share) would have none of 48 images"):
        LatentDataset(cache).split(share)
    with pytest.raises(UserError, match=r"^share=2: a probability"):
        LatentDataset(cache).split(2)


def test_parts_have_epochs_and_positions_of_their_own(cache):
    data = LatentDataset(cache, latent_sampling_method="random")
    train, val = data.split(0.3)
    train.set_epoch(5)
    assert int(val._epoch) == int(data._epoch) == 0
    state = LatentLoader(train, 4).state_dict()
    with pytest.raises(UserError, match="load_state_dict: saved with num_samples="):
        LatentLoader(val, 4).load_state_dict(state)
    other = data.select(keys_of(train)[1:] + keys_of(val)[:1])
    assert len(other) == len(train)
    with pytest.raises(UserError, match="load_state_dict: saved with cache="):
        LatentLoader(other, 4).load_state_dict(state)
    LatentLoader(data.select(keys_of(train)), 4).load_state_dict(state)
    assert len(list(BucketBatchSampler(train, 4))) > 0


@pytest.mark.parametrize("index", [slice(0, 3), slice(None), "x", None, 1.5])
def test_what_is_no_index_is_one_line(cache, index):
    with pytest.raises(UserError, match=r"^data\[.*\]: expected the index of one sample. Several are"):
        LatentDataset(cache)[index]
