"""read/loader.py: epoch after epoch, with any number of workers, and on in mid-epoch."""

import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
from latentprep.errors import UserError
from tests.conftest import SMALL


@pytest.fixture
def data(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip").code == 0
    return LatentDataset(str(tmp_path / "c"), latent_sampling_method="random", repeats=4)


def read(loader):
    return [(batch.index.tolist(), batch.latent_sample.sum().item()) for batch in loader]


@pytest.mark.parametrize("workers", [0, 2])
def test_loader_goes_on_in_mid_epoch_with_any_number_of_workers(data, workers):
    loader = LatentLoader(data, 3, seed=4)
    read(loader)  # epoch 0
    whole = read(loader)  # epoch 1
    loader.set_epoch(1)
    seen = []
    for batch in loader:
        seen.append((batch.index.tolist(), batch.latent_sample.sum().item()))
        if len(seen) == 5:
            break
    other = LatentLoader(data, 3, seed=4, num_workers=workers)
    other.load_state_dict(loader.state_dict())
    assert seen + read(other) == whole
    assert other.epoch == 2
    assert len(read(other)) == len(whole)  # and the epoch after is whole again


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 1}, "dataset_seed=0, this sampler has dataset_seed=1"),
        ({"flip_p": 0.5}, r"flip_p=0.0, this sampler has flip_p=0.5"),
        (
            {"latent_sampling_method": "once"},
            "latent_sampling_method=random, this sampler has latent_sampling_method=once",
        ),
        ({"repeats": 2}, "num_samples=32, this sampler has num_samples=16"),
        ({"caption_dropout": 0.1}, "caption_dropout=0.0, this sampler has caption_dropout=0.1"),
    ],
)
def test_a_loader_refuses_the_state_of_another_dataset(data, options, message):
    state = LatentLoader(data, 3, seed=4).state_dict()
    other = LatentDataset(data.storage.root, **{"latent_sampling_method": "random", "repeats": 4, **options})
    with pytest.raises(UserError, match=f"^load_state_dict: saved with {message}"):
        LatentLoader(other, 3, seed=4).load_state_dict(state)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}])
def test_a_loop_that_was_left_is_an_epoch_too(data, options):
    """Loops of so many steps, zips, and Lightning's limit_train_batches would see a few batches for ever."""
    loader, wanted = LatentLoader(data, 3, **options), LatentLoader(data, 3)
    epochs = [read(wanted) for _ in range(4)]
    for epoch in epochs[:3]:
        first = next(iter(loader))
        assert (first.index.tolist(), first.latent_sample.sum().item()) == epoch[0]
        assert loader.state_dict()["next_batch"] == 1
    assert read(loader) == epochs[3]
    assert loader.epoch == 4
    own = own_loader(data, **options)
    assert [next(iter(own)).index.tolist() for _ in range(3)] == [epoch[0][0] for epoch in epochs[:3]]
    counted = own_loader(data, **options)  # a loop that counts batches, and never asks for one more
    for epoch in epochs[:3]:
        batches = iter(counted)
        assert [next(batches).index.tolist() for _ in range(len(counted))] == [index for index, _ in epoch]


def test_batch_size_and_gradient_step_are_clamped_to_the_data(data):
    loader = LatentLoader(data, 1000, gradient_step=7)
    assert (loader.batch_size, loader.gradient_step) == (32, 1)
    assert LatentLoader(data, 10, gradient_step=7).gradient_step == 3
    assert [len(batch) for batch in loader] == [16, 16]


def own_loader(data, **options):
    return DataLoader(data, batch_sampler=BucketBatchSampler(data, 3), collate_fn=LatentDataset.collate, **options)


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"num_workers": 1, "persistent_workers": True}])
def test_a_dataloader_of_one_s_own_draws_afresh_in_every_epoch(data, options):
    loader, wanted = own_loader(data, **options), LatentLoader(data, 3)
    epochs = [read(loader) for _ in range(3)]
    assert epochs == [read(wanted) for _ in range(3)]
    assert len({samples[0][1] for samples in epochs}) == 3
    loader.batch_sampler.set_epoch(1)  # as Lightning and accelerate do: it counts
    assert read(loader) == epochs[1]
    loader.batch_sampler.set_epoch(1)
    next(iter(loader))
    loader.batch_sampler.set_epoch(2)
    assert read(loader) == epochs[2]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}])
def test_two_loops_over_one_loader_have_each_their_epoch(data, options):
    wanted = LatentLoader(data, 3)
    epochs = [read(wanted) for _ in range(2)]
    loader = LatentLoader(data, 3, **options)
    both = list(zip(iter(loader), iter(loader), strict=True))
    for number, epoch in enumerate(epochs):
        assert [(pair[number].index.tolist(), pair[number].latent_sample.sum().item()) for pair in both] == epoch


def test_set_epoch_of_the_loader_and_of_its_sampler_are_one(data):
    wanted = LatentLoader(data, 3)
    epochs = [read(wanted) for _ in range(3)]
    loader = LatentLoader(data, 3)
    loader.sampler.set_epoch(2)  # as DDP's recipes do, and Lightning
    assert loader.epoch == 2
    assert read(loader) == epochs[2]
    loader.set_epoch(1)
    batches = iter(loader)
    for _ in range(4):
        next(batches)
    state = loader.state_dict()
    assert state == loader.sampler.state_dict()
    other = LatentLoader(data, 3)
    other.load_state_dict(state)
    assert other.state_dict() == state
    other.set_epoch(1)  # of the same epoch: the position stays
    assert read(other) == epochs[1][4:]
    other.set_epoch(1)
    assert read(other) == epochs[1]


def test_a_state_is_of_the_ranks_that_the_loop_had(data, monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    loader = LatentLoader(data, 3)
    batches = iter(loader)
    next(batches), next(batches)
    state = loader.state_dict()
    monkeypatch.delenv("RANK")
    assert loader.state_dict() == state
    assert (state["world_size"], state["next_batch"]) == (2, 2)
    other = LatentLoader(data, 3)
    other.load_state_dict(state)  # before the ranks are known
    assert other.state_dict() == state


@pytest.mark.slow
def test_a_cond_model_behind_workers_is_an_error_that_names_the_loader(data):
    def cond_model(prompts):
        return torch.zeros(len(prompts), 1, 1)

    made = LatentDataset(data.storage.root, shuffle_tags=True, cond_model=cond_model)
    for context in ("fork", "spawn"):
        loader = own_loader(made, num_workers=1, multiprocessing_context=context)
        batch = next(iter(loader))
        with pytest.raises(UserError, match=r"^batch.cond: cond_model stays.*Read with LatentLoader"):
            batch.cond  # noqa: B018
        again = pickle.loads(pickle.dumps(batch))
        with pytest.raises(UserError, match=r"^batch.cond: cond_model stays"):
            again.cond  # noqa: B018
        assert next(iter(LatentLoader(made, 3, num_workers=1))).cond["prompt_embeds"].shape[1:] == (1, 1)


def test_a_batch_gives_its_numbers_in_a_dtype(data):
    data = LatentDataset(data.storage.root, latent_sampling_method="random", use_weight=True)
    batch = data[0]
    half = batch.to("cpu", torch.bfloat16)
    assert half.latent_sample.dtype == half.weight.dtype == half.cond["prompt_embeds"].dtype == torch.bfloat16
    assert torch.equal(half.latent_sample, batch.latent_sample.bfloat16())  # computed in float32 all the same
    assert torch.equal(half.cond["prompt_embeds"], batch.cond["prompt_embeds"].bfloat16())
    assert half.time_ids.dtype == torch.float32
    assert half.latent_mean.dtype == batch.latent_mean.dtype
    assert batch.to(torch.float16).latent_sample.dtype == torch.float16
    assert batch.to(dtype=torch.float64).latent_sample.dtype == torch.float64
    assert half.to("cpu").latent_sample.dtype == torch.bfloat16
    assert batch.latent_sample.dtype == torch.float32
    with pytest.raises(UserError, match=r"^batch.to: dtype=torch.int64, expected a floating-point dtype"):
        batch.to("cpu", torch.int64)
    assert batch.to("meta", non_blocking=True).latent_mean.is_meta


def test_ranks_are_torchrun_s_and_looked_up_when_an_epoch_begins(data, monkeypatch):
    loader, sampler = LatentLoader(data, 3), BucketBatchSampler(data, 3)
    alone = [index for batch in loader for index in batch.index.tolist()]
    loader.set_epoch(0)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert len(loader) == len(sampler) == 12  # Lightning's own processes have no RANK before there is a group
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        loader.set_epoch(0)
        sampler.set_epoch(0)
        shares.append([index for batch in loader for index in batch.index.tolist()])
        assert shares[-1] == [index for batch in sampler for index in batch]
        assert (sampler.rank, sampler.world_size) == (rank, 2)
        assert f", rank {rank} of 2, epoch 1,\n" in repr(loader)
    assert sorted(shares[0] + shares[1]) == sorted(alone)
    for rank, size in (("2", "2"), ("x", "2"), ("0", ""), ("-1", "1")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", size)
        with pytest.raises(UserError, match=rf"^RANK='{rank}', WORLD_SIZE='{size}': expected 0 <= RANK < WORLD_SIZE"):
            next(iter(loader))
        assert len(LatentLoader(data, 3, rank=0, world_size=1)) == 12


def test_what_a_loader_has_of_its_own_is_not_given_and_it_is_no_dataset(data):
    for name in ("sampler", "batch_sampler", "collate_fn"):
        with pytest.raises(UserError, match=rf"^{name}: LatentLoader has its own"):
            LatentLoader(data, 3, **{name: None})
    with pytest.raises(UserError, match=r"^a LatentLoader is no dataset: loop over it"):
        next(iter(DataLoader(LatentLoader(data, 3), batch_size=2)))


def test_options_of_a_dataloader_are_its_own_without_workers_too(data):
    loader = LatentLoader(data, 3, generator=torch.Generator(), pin_memory=False)
    assert loader.generator is loader.dataloader.generator
    assert not loader._is_plain
    assert read(loader) == read(LatentLoader(data, 3))


def test_warnings_name_the_line_that_made_the_sampler_and_come_once(data):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sampler = BucketBatchSampler(data, 5, drop_last=True)
        for _ in range(3):
            list(sampler)
            repr(sampler)
    # other libraries' threads may warn meanwhile
    ours = [warning for warning in said if "drop_last=True leaves out" in str(warning.message)]
    assert [Path(warning.filename).name for warning in ours] == [Path(__file__).name]
