"""Parts of a dataset: by key, and by content, which decides the same whatever else the cache holds."""

import copy
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
        ("no*", r"keys='no\*': no image here has such a key"),
        (["tall0.png", "gone.png"], r"keys: 1 of 2 are not here, such as 'gone.png'"),
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
    from latentprep.read.counters import SPLIT, fractions, hash_numbers

    digests = hash_numbers(5, np.arange(100_000))
    assert abs((fractions(hash_numbers(0, SPLIT, digests)) < 0.05).mean() - 0.05) < 0.003


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_split_without_one_side_is_refused(cache, share):
    with pytest.raises(UserError, match=r"^split: the (rest|share) would have none of 48 images"):
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
    with pytest.raises(UserError, match=r"^data\[.*\]: expected the index of one sample. Batches come"):
        LatentDataset(cache)[index]


def test_a_side_can_be_split_again_by_its_own_share(cache):
    data = LatentDataset(cache)
    rest, test = data.split(0.3)
    train, val = rest.split(0.3)
    sides = [set(keys_of(side)) for side in (train, val, test)]
    assert sum(map(len, sides)) == len(set.union(*sides)) == 48
    assert 0.1 < len(sides[1]) / rest.num_images < 0.5
    half, other = test.split(0.5)
    assert half.num_images + other.num_images == test.num_images
    again = LatentDataset(cache).split(0.3)[0].split(0.3)
    assert [set(keys_of(side)) for side in again] == sides[:2]
    assert len(data.split(0.3, seed=5)[0].split(0.3)[1]) > 0  # by another seed: of all of it


def test_a_part_and_a_copy_keep_the_cond_model(cache):
    data = LatentDataset(cache, shuffle_tags=True, cond_model=lambda prompts: torch.ones(len(prompts), 1, 1))
    for part in (data.select("*"), *data.split(0.3), copy.copy(data)):
        assert part[0].cond["prompt_embeds"].shape == (1, 1, 1)
        assert copy.copy(part[0]).cond["prompt_embeds"].shape == (1, 1, 1)
        assert next(iter(LatentLoader(part, 2))).cond["prompt_embeds"].shape[1:] == (1, 1)


@pytest.mark.parametrize("keys", [5, None, [["a"]], b"abc", [1, 2]])
def test_what_are_no_keys_is_one_line(cache, keys):
    with pytest.raises(UserError, match=r"^keys=.*: expected a pattern, a list of keys, or a function"):
        LatentDataset(cache).select(keys)


@pytest.mark.parametrize("indices", [[0.9], ["0"], [[1, 2]], [None]])
def test_what_are_no_indices_of_a_batch_is_one_line(cache, indices):
    with pytest.raises(UserError, match=r"^a batch of .*: expected indices of samples"):
        LatentDataset(cache).__getitems__(indices)


def test_a_cond_model_makes_the_cond_of_stored_prompts_that_have_none(run, folder, tmp_path):
    assert run("encode", folder, "--out", tmp_path / "bare", *SMALL, "--no-cond").code == 0
    asked = []

    def cond_model(prompts):
        asked.extend(prompts)
        return torch.zeros(len(prompts), 1, 1)

    batch = LatentDataset(tmp_path / "bare", cond_model=cond_model)[0]
    assert batch.cond["prompt_embeds"].shape == (1, 1, 1)
    assert asked == batch.cond_text
    with pytest.raises(UserError, match=r"^cond_model: include_cond=False asks for no cond"):
        LatentDataset(tmp_path / "bare", cond_model=cond_model, include_cond=False)


@pytest.mark.parametrize("include_cond", [True, False])
def test_a_cond_model_beside_stored_cond_is_refused(cache, include_cond):
    with pytest.raises(UserError, match=r"^cond_model: the cond is stored already"):
        LatentDataset(cache, cond_model=lambda prompts: prompts, include_cond=include_cond)
