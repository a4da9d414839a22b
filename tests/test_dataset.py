"""read/dataset.py: what a batch holds, against the cache and against the ancestor's arithmetic."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
from latentprep.cache.manifest import commit, open_manifest
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text, write_text
from latentprep.errors import UserError
from latentprep.read.counters import hash_numbers
from latentprep.read.weight import rescale_weight
from tests.conftest import SMALL


@pytest.fixture
def cache(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "cache", *SMALL, "--flip").code == 0
    return str(tmp_path / "cache")


def by_key(data):
    return {data.key(index): index for index in range(data.num_images)}


def test_a_sample_is_what_was_encoded(cache):
    data = LatentDataset(cache, latent_sampling_method="deterministic", use_weight=True)
    assert len(data) == 8
    assert data.buckets == [(4, 4, 12), (4, 8, 8)]
    batch = data[by_key(data)["tall2.png"]]
    assert batch.latent_sample.shape == (1, 4, 8, 8)
    assert batch.latent_sample.dtype == torch.float32
    assert torch.equal(batch.latent_sample, data.normalization.apply(batch.latent_mean.float()))
    assert batch.cond_text == ["picture number 2"]
    assert batch.cond["prompt_embeds"].shape == (1, 77, 64)
    assert batch.cond["prompt_embeds"].dtype == torch.float32
    assert batch.weight.shape == (1, 1, 8, 8)
    assert batch.weight.dtype == torch.float32
    assert LatentDataset(cache, use_weight="raw")[0].weight.dtype == torch.float32
    assert batch.original_size.tolist() == [[80, 64]]
    assert data.caption(by_key(data)["tall2.png"]) == ["picture number 2"]
    assert data.uncond()["prompt_embeds"].shape == (1, 77, 64)


def test_once_is_one_draw_per_image_in_every_epoch_process_and_batch(cache):
    data = LatentDataset(cache, latent_sampling_method="once")
    first = data.__getitems__([4, 5, 6]).latent_sample
    data.set_epoch(3)
    assert torch.equal(data.__getitems__([6, 4]).latent_sample, first[[2, 0]])
    again = pickle.loads(pickle.dumps(data))
    assert torch.equal(again[5].latent_sample[0], first[1])
    assert not torch.equal(LatentDataset(cache, latent_sampling_method="once", seed=1)[5].latent_sample[0], first[1])


def test_random_is_fresh_per_epoch_and_follows_from_the_seed(cache):
    data, other = (LatentDataset(cache, latent_sampling_method="random", seed=7) for _ in range(2))
    first = data[4].latent_sample
    assert torch.equal(other[4].latent_sample, first)
    data.set_epoch(1)
    assert not torch.equal(data[4].latent_sample, first)
    data.set_epoch(0)
    assert torch.equal(data[4].latent_sample, first)


def test_draws_have_the_posteriors_mean_and_std(cache):
    data = LatentDataset(cache, latent_sampling_method="random")
    draws = []
    for epoch in range(400):
        data.set_epoch(epoch)
        draws.append(data[4].latent_sample[0] / data.normalization.scale[0])
    draws = torch.stack(draws)
    batch = data[4]
    mean, std = batch.latent_mean[0].float(), batch.latent_std[0].float()
    assert (((draws.mean(0) - mean) / std).abs().mean() - np.sqrt(2 / np.pi / 400)).abs() < 0.02
    assert ((draws.std(0) / std).mean() - 1).abs() < 0.02


def test_the_same_batch_gives_the_same_sample(cache):
    batch = LatentDataset(cache, latent_sampling_method="random")[4]
    assert batch.latent_sample is batch.latent_sample
    fresh = LatentDataset(cache, latent_sampling_method="random")[4]
    assert torch.equal(fresh.to("cpu").latent_sample, batch.latent_sample)


def test_flip_p_chooses_between_the_stored_views(cache):
    data = LatentDataset(cache, latent_sampling_method="deterministic", flip_p=0.25, use_weight="raw", seed=5)
    plain = LatentDataset(cache, latent_sampling_method="deterministic")[6]
    flipped = LatentDataset(cache, latent_sampling_method="deterministic", flip_p=1.0)[6]
    assert not plain.flipped.any()
    assert flipped.flipped.all()
    assert not torch.equal(plain.latent_mean, flipped.latent_mean)
    count = 0
    for epoch in range(200):
        data.set_epoch(epoch)
        batch = data[6]
        count += int(batch.flipped)
        assert torch.equal(batch.latent_mean, flipped.latent_mean if batch.flipped else plain.latent_mean)
    assert 30 <= count <= 70


def test_repeats_lengthen_the_epoch_and_draw_anew(cache):
    data = LatentDataset(cache, latent_sampling_method="random", repeats=3)
    assert len(data) == 24
    batch = data.__getitems__([4, 12, 20])
    assert torch.equal(batch.latent_mean[0], batch.latent_mean[2])
    assert not torch.equal(batch.latent_sample[0], batch.latent_sample[2])
    once = LatentDataset(cache, latent_sampling_method="once", repeats=3).__getitems__([4, 12])
    assert torch.equal(once.latent_sample[0], once.latent_sample[1])


def test_weight_is_rescaled_as_the_ancestor_did(cache):
    raw = LatentDataset(cache, use_weight="raw")
    index = by_key(raw)["tall1.png"]
    weight = raw[index].weight[0, 0]
    assert 0 <= weight.min() < weight.max() <= 1
    # stable-diffusion-webui: weight -= weight.min(); weight /= weight.mean()
    wanted = weight - weight.min()
    wanted = wanted / wanted.mean()
    assert torch.allclose(LatentDataset(cache, use_weight=True)[index].weight[0, 0], wanted)
    assert LatentDataset(cache)[index].weight is None


def test_images_without_alpha_weigh_one(cache):
    data = LatentDataset(cache, use_weight=True)
    for key in ("tall0.png", "wide0.png"):
        assert (data[by_key(data)[key]].weight == 1).all()


@pytest.mark.parametrize("value", [0.0, 0.2, 1.0])
def test_constant_weight_gives_ones_and_never_nan(value):
    assert torch.equal(rescale_weight(torch.full((2, 1, 3, 5), value)), torch.ones(2, 1, 3, 5))


def test_include_cond(cache):
    assert LatentDataset(cache, include_cond=False)[0].cond is None


def test_opening_touches_no_shard_and_pickles_without_maps(cache, tmp_path):
    data = LatentDataset(cache)
    assert not data._shards.opened
    assert data[0] is not None
    assert data._shards.opened
    assert not pickle.loads(pickle.dumps(data))._shards.opened
    for path in (tmp_path / "cache" / "shards").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"missing. Run the same latentprep encode again"):
        LatentDataset(cache)[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"latent_sampling_method": "often"},
            "latent_sampling_method='often': expected one of once, deterministic, random.",
        ),
        ({"flip_p": 1.5}, "flip_p=1.5: a probability, expected 0 to 1."),
        ({"use_weight": "some"}, "use_weight='some': expected True, False, 'raw' or a floor such as 0.1."),
        ({"repeats": 0}, "repeats=0: expected at least 1."),
    ],
)
def test_wrong_arguments(cache, options, message):
    with pytest.raises(UserError) as error:
        LatentDataset(cache, **options)
    assert str(error.value) == message


def test_what_a_cache_lacks_is_said_with_the_way_to_get_it(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--store", "mean").code == 0
    with pytest.raises(UserError, match=r"holds no mirrored views. Encode with --flip."):
        LatentDataset(str(tmp_path / "c"), latent_sampling_method="deterministic", flip_p=0.5)
    with pytest.raises(UserError, match=r"holds means only. Use 'deterministic'; or encode with --store mean\+std, if"):
        LatentDataset(str(tmp_path / "c"), latent_sampling_method="random")
    assert LatentDataset(str(tmp_path / "c"), latent_sampling_method="deterministic")[0].latent_std is None
    with pytest.raises(UserError, match=r"not a latent cache"):
        LatentDataset(str(tmp_path))


def test_a_batch_of_two_buckets_is_refused(cache):
    with pytest.raises(UserError, match=r"a batch of 2 indices mixes latents of 2 shapes. Read with LatentLoader"):
        LatentDataset(cache).__getitems__([0, 7])
    with pytest.raises(IndexError):
        LatentDataset(cache)[8]
    with pytest.raises(IndexError):
        LatentDataset(cache)[-9]
    data = LatentDataset(cache)
    assert torch.equal(data[-1].latent_mean, data[7].latent_mean)


@pytest.mark.parametrize("where", [None, "", 3])
def test_what_is_no_place_of_a_cache_is_refused(where):
    with pytest.raises(UserError, match=f"^cache={where!r}: expected a folder or a URL"):
        LatentDataset(where)


def test_a_batch_of_no_samples_is_refused(cache):
    with pytest.raises(UserError, match="a batch of no indices: expected at least one"):
        LatentDataset(cache).__getitems__([])


def test_plain_dataloader_with_the_sampler(cache):
    data = LatentDataset(cache)
    loader = DataLoader(data, batch_sampler=BucketBatchSampler(data, 3), collate_fn=LatentDataset.collate)
    assert sorted(index for batch in loader for index in batch.index.tolist()) == list(range(8))
    assert len(next(iter(DataLoader(data, batch_size=1, collate_fn=LatentDataset.collate)))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_give_the_same_batches(cache, context):
    def read(**options):
        loader = LatentLoader(
            LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, seed=3), 3, seed=2, **options
        )
        return [(batch.index.tolist(), batch.latent_sample) for _ in range(2) for batch in loader]

    alone = read()
    for (index, sample), (other_index, other) in zip(
        alone, read(num_workers=2, multiprocessing_context=context, persistent_workers=True), strict=True
    ):
        assert index == other_index
        assert torch.equal(sample, other)
    assert alone[0][0] != alone[len(alone) // 2][0]  # the second epoch has another order


def test_counters_are_spread_evenly_and_depend_on_every_part():
    numbers = hash_numbers(0, 1, 0, np.arange(100_000))
    assert len(np.unique(numbers)) == 100_000
    assert abs((numbers >> np.uint64(11)).astype(float).mean() * 2.0**-53 - 0.5) < 0.005
    for other in (
        hash_numbers(1, 1, 0, np.arange(4)),
        hash_numbers(0, 2, 0, np.arange(4)),
        hash_numbers(0, 1, 1, np.arange(4)),
    ):
        assert not (other == numbers[:4]).any()


def texts(data, epochs=1):
    found = []
    for epoch in range(epochs):
        data.set_epoch(epoch)
        found.append([data[index].cond_text[0] for index in range(len(data))])
    return found


@pytest.fixture
def tagged(run, images, tmp_path):
    (images / "tall0.txt").write_text("girl, red hair,smile ,  hat, outdoors, tree", encoding="utf-8")
    assert run("encode", images, "--out", tmp_path / "cache", *SMALL).code == 0
    return str(tmp_path / "cache")


def test_tags_are_shuffled_anew_in_every_epoch_and_follow_from_the_seed(tagged):
    data = LatentDataset(tagged, shuffle_tags=True, keep_tags=2, include_cond=False)
    here = by_key(data)["tall0.png"]
    found = [epoch[here] for epoch in texts(data, 8)]
    assert len(set(found)) > 3
    for text in found:
        assert text.startswith("girl, red hair, ")
        assert sorted(text.split(", ")) == ["girl", "hat", "outdoors", "red hair", "smile", "tree"]
    again = LatentDataset(tagged, shuffle_tags=True, keep_tags=2, include_cond=False)
    assert texts(again, 8) == texts(data, 8)
    assert texts(LatentDataset(tagged, shuffle_tags=True, include_cond=False, seed=1), 8) != texts(data, 8)


def test_tag_drop_out_leaves_out_as_many_as_it_says(tagged):
    data = LatentDataset(tagged, tag_drop_out=0.25, keep_tags=1, include_cond=False)
    here, kept = by_key(data)["tall0.png"], []
    for epoch in range(400):
        data.set_epoch(epoch)
        tags = data[here].cond_text[0].split(", ")
        assert tags[0] == "girl"
        kept.append(len(tags) - 1)
    assert abs(np.mean(kept) / 5 - 0.75) < 0.03


def test_a_template_at_read_time(tagged, tmp_path):
    (tmp_path / "lines.txt").write_text("a photo of [name], [filewords]\na painting of [name]\n")
    data = LatentDataset(tagged, template=tmp_path / "lines.txt", placeholder_token="sks", include_cond=False)
    found = {text for epoch in texts(data, 6) for text in epoch}
    assert "a painting of sks" in found
    assert "a photo of sks, wide0" in found
    assert "a photo of sks, girl, red hair,smile ,  hat, outdoors, tree" in found  # nothing is shuffled: as it stands


def test_cond_model_makes_the_cond_in_the_training_process(tagged):
    asked = []

    def cond_model(prompts):
        asked.append(list(prompts))
        return torch.full((len(prompts), 3, 2), float(len(asked)))

    data = LatentDataset(tagged, shuffle_tags=True, cond_model=cond_model)
    batch = data[0]
    assert asked == []
    assert batch.cond["prompt_embeds"].shape == (1, 3, 2)
    assert torch.equal(batch.to("cpu").cond["prompt_embeds"], batch.cond["prompt_embeds"])
    assert asked == [batch.cond_text]
    for workers in (0, 2):
        loader = LatentLoader(data, 2, num_workers=workers)
        for batch in loader:
            assert batch.cond["prompt_embeds"].shape == (len(batch), 3, 2)
            assert asked[-1] == batch.cond_text
    pooled = LatentDataset(tagged, shuffle_tags=True, cond_model=lambda prompts: {"a": torch.zeros(len(prompts), 1)})
    assert pooled[0].cond["a"].shape == (1, 1)


def test_caption_dropout_gives_the_stored_cond_of_the_empty_prompt(cache):
    data = LatentDataset(cache, caption_dropout=0.3, repeats=50)
    plain = LatentDataset(cache, repeats=50)
    wide = [i for i in range(len(data)) if data.key(i).startswith("wide")]
    batch, full = data.__getitems__(wide), plain.__getitems__(wide)
    dropped = torch.tensor([text == "" for text in batch.cond_text])
    assert abs(dropped.float().mean() - 0.3) < 0.1
    cond, whole = batch.cond["prompt_embeds"], full.cond["prompt_embeds"]
    assert torch.equal(cond[~dropped], whole[~dropped])
    assert (cond[dropped] == data.uncond()["prompt_embeds"].half().float()).all()
    data.set_epoch(1)
    assert data.__getitems__(wide).cond_text != batch.cond_text


def test_use_weight_with_a_floor(cache):
    raw, floor = (LatentDataset(cache, use_weight=use) for use in ("raw", 0.25))
    here = by_key(raw)["tall1.png"]
    assert raw[here].weight.min() < 0.25
    assert torch.equal(floor[here].weight, raw[here].weight.clamp(min=0.25))


def test_time_ids_are_those_of_diffusers_sdxl_training(cache):
    """original size + crop corner + target size; for a mirrored image its corner as that script counts it."""
    data = LatentDataset(cache)
    here = by_key(data)["wide0.png"]  # 128x40 resized to 102x32, of which 96x32 from the left 3 are kept
    assert data[here].time_ids.tolist() == [[40, 128, 0, 3, 32, 96]]
    mirrored = LatentDataset(cache, flip_p=1.0)
    assert mirrored[here].flipped.tolist() == [True]
    assert mirrored[here].time_ids.tolist() == [[40, 128, 0, 3, 32, 96]]
    shifted = mirrored[here]
    shifted.crop = torch.tensor([[0, 1, 32, 96]])
    assert shifted.time_ids.tolist() == [[40, 128, 0, 5, 32, 96]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shuffle_tags": True}, "make prompts anew, which the stored cond does not fit. Give cond_model="),
        ({"tag_drop_out": 2.0, "include_cond": False}, "tag_drop_out=2.0: a probability, expected 0 to 1."),
        ({"caption_dropout": -1}, "caption_dropout=-1: a probability"),
        ({"cond_model": print}, "cond_model: the cond is stored already."),
        ({"template": "style", "include_cond": False}, "template: uses [name]. Say what it stands for"),
        ({"template": "nope"}, "--template nope: neither a file nor a shipped template."),
        ({"placeholder_token": "x"}, "placeholder_token: without a template there is no [name]."),
        ({"keep_tags": 3}, "keep_tags=3: nothing is shuffled or dropped."),
        ({"use_weight": 1.5}, "use_weight=1.5: expected True, False, 'raw' or a floor such as 0.1."),
        ({"use_weight": []}, "use_weight=[]: expected True, False, 'raw' or a floor such as 0.1."),
        ({"flip_p": True}, "flip_p=True: a probability, expected 0 to 1."),
        ({"shuffle_tags": "no"}, "shuffle_tags='no': expected True or False."),
        ({"wildcards": 2}, "wildcards=2: expected True or False."),
        ({"include_cond": None}, "include_cond=None: expected True or False."),
        ({"placeholder_token": 3}, "placeholder_token=3: expected a text."),
        ({"cond_model": 3, "shuffle_tags": True}, "cond_model: a int, expected a callable from prompts to cond."),
    ],
)
def test_options_that_do_not_go_together(cache, options, message):
    with pytest.raises(UserError) as error:
        LatentDataset(cache, **options)
    assert message in str(error.value)


def test_of_several_stored_prompts_each_epoch_takes_one_with_its_cond(cache):
    """A cache with K = 3 prompts for each image, as the format has them."""
    storage = Storage(cache)
    manifest = open_manifest(storage)
    (entry,) = manifest.shards
    text = entry.open_text(storage)
    prompts = [f"prompt {n}" for n in range(24)]
    numbers = np.arange(24, dtype=np.int32).reshape(8, 3)
    edges = np.cumsum([len(group) for group in text.groups])[:-1]
    parts = np.split(numbers, edges)
    groups = [group.having(prompt_of=own) for group, own in zip(text.groups, parts, strict=True)]
    cond = {"prompt_embeds": torch.arange(24.0).half()[:, None, None].repeat(1, 77, 64)}
    made = Text(groups, prompts, cond, np.zeros(24, np.int32), 77, {"recipe": {}})
    stamp = write_text(storage, entry.id, "k3", made)
    commit(storage, replace(manifest, shards=[entry.with_text("k3", stamp)]), [])
    data = LatentDataset(cache)
    seen = set()
    for epoch in range(30):
        data.set_epoch(epoch)
        for index in range(8):
            batch = data[index]
            number = int(batch.cond["prompt_embeds"][0, 0, 0])
            assert batch.cond_text == [f"prompt {number}"]
            assert number // 3 == index
            seen.add(number)
    assert seen == set(range(24))


def test_cond_that_is_not_made_yet_matters_to_those_who_ask_for_it(cache):
    storage = Storage(cache)
    manifest = open_manifest(storage)
    (entry,) = manifest.shards
    text = replace(entry.open_text(storage), cond={}, metadata={"recipe": {}})
    stamp = write_text(storage, entry.id, "bare", text)
    commit(storage, replace(manifest, shards=[entry.with_text("bare", stamp)]), [])
    with pytest.raises(UserError, match=r"its images have no cond yet, .* Run the same latentprep encode with --only"):
        LatentDataset(cache)[0]
    assert LatentDataset(cache, include_cond=False)[0].cond is None


def test_no_more_shards_stay_open_than_the_system_allows(run, images, tmp_path, monkeypatch):
    assert run("encode", images, "--out", tmp_path / "many", *SMALL, "--shard-size", "1kB").code == 0
    wanted = [LatentDataset(tmp_path / "many")[index] for index in range(8)]
    monkeypatch.setattr("latentprep.read.shards.MAX_OPEN", 3)
    data = LatentDataset(tmp_path / "many")
    for index in [*range(8), *range(8)]:
        assert torch.equal(data[index].latent_sample, wanted[index].latent_sample)
        assert len(data._shards.opened) <= 3


def test_every_tensor_of_a_batch_moves(run, images, tmp_path):
    run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip")
    data = LatentDataset(tmp_path / "c", latent_sampling_method="random", use_weight=True, flip_p=0.5)
    moved = data.__getitems__([0, 1]).to("meta")
    tensors = {name: value for name, value in vars(moved).items() if isinstance(value, torch.Tensor)}
    tensors |= {f"cond/{name}": value for name, value in moved.stored_cond.items()}
    assert {name for name, value in tensors.items() if value.device.type != "meta"} == set()
    assert len(tensors) > 8


def test_weights_are_rescaled_image_by_image():
    weight = torch.stack([torch.linspace(0, 1, 64).view(1, 8, 8), torch.linspace(0.5, 0.6, 64).view(1, 8, 8)])
    found = rescale_weight(weight)
    assert torch.allclose(found.mean((1, 2, 3)), torch.ones(2))
    assert torch.equal(found.amin((1, 2, 3)), torch.zeros(2))


def test_dropout_and_flips_are_drawn_apart(run, images, tmp_path):
    run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip")
    data = LatentDataset(tmp_path / "c", flip_p=0.5, caption_dropout=0.5, repeats=50)
    pairs = set()
    for n in range(len(data)):
        batch = data[n]
        pairs.add((bool(batch.flipped), batch.cond_text[0] == ""))
    assert pairs == {(a, b) for a in (False, True) for b in (False, True)}
