"""read/mix.py: several caches in one loader: whole, in proportions, and the same images in turn."""

import pickle
import shutil
from collections import Counter
from fractions import Fraction

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, Subset

import latentprep
from latentprep import BucketBatchSampler, LatentDataset, LatentLoader, LatentMix
from latentprep.errors import UserError
from latentprep.read.order import count_samples
from tests.conftest import gradient


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    """20 images at a small resolution, 16 of them at a larger one too; and 7 others."""
    folder = tmp_path_factory.mktemp("mix")
    for name, sizes in (("small", [(128, 128)] * 12 + [(200, 100)] * 8), ("others", [(64, 64)] * 7)):
        (folder / name).mkdir()
        for n, size in enumerate(sizes):
            gradient(*size).rotate(n * 5 + len(name)).save(folder / name / f"{n}.png")
    shutil.copytree(folder / "small", folder / "large")
    for n in range(4):
        (folder / "large" / f"{n}.png").unlink()
    common = {"model": "tiny", "device": "cpu", "progress": False, "bucket_step": 32, "min_side": 32}
    for name, resolution in (("small", 64), ("large", 128), ("others", 64)):
        latentprep.encode(folder / name, folder / f"{name}.latents", resolution=resolution, **common)
    return folder, {f"{n}.png" for n in range(4, 20)}


def open_data(caches, name, **options):
    return LatentDataset(caches[0] / f"{name}.latents", latent_sampling_method="random", **options)


def read(loader):
    """(dataset, key) of each sample of an epoch, batch by batch, and a number that shows its draw."""
    mix = loader.data
    found = []
    for batch in loader:
        data = mix.datasets[batch.member]
        assert len({tuple(mean.shape) for mean in batch.latent_mean}) == 1
        draws = batch.latent_sample.sum((1, 2, 3)).tolist()
        found += [
            (batch.member, data.key(index), draw) for index, draw in zip(batch.index.tolist(), draws, strict=True)
        ]
    return found


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_has_every_sample_of_every_dataset(caches, workers):
    small, others = open_data(caches, "small"), open_data(caches, "others", repeats=3, sample_weight=0.25)
    loader = LatentLoader([small, others], 4, seed=1, num_workers=workers)
    assert len(loader.data) == 20 + 21
    for _ in range(2):
        counts = Counter((member, key) for member, key, _ in read(loader))
        assert set(counts.values()) == {1, 3}
        assert all(count == (3 if member else 1) for (member, _), count in counts.items())
    for batch in loader:
        assert batch.sample_weight.tolist() == [0.25 if batch.member else 1.0] * len(batch)


def test_a_sample_is_drawn_as_in_a_loader_of_its_own(caches):
    small, others = open_data(caches, "small", seed=2), open_data(caches, "others", seed=5, flip_p=0.0)
    mixed = {(member, key): draw for member, key, draw in read(LatentLoader([small, others], 4))}
    for number, data in enumerate((small, others)):
        for batch in LatentLoader(data, 4):
            draws = batch.latent_sample.sum((1, 2, 3)).tolist()
            for index, draw in zip(batch.index.tolist(), draws, strict=True):
                assert mixed[number, data.key(index)] == pytest.approx(draw, abs=1e-4)


def test_proportions_hold_and_nothing_is_left_out_for_ever(caches):
    small, others = open_data(caches, "small"), open_data(caches, "others")
    mix = LatentMix([small, others], proportions=[1, 2])
    assert len(mix) == 27
    loader = LatentLoader(mix, 4)
    totals, draws = Counter(), []
    for _ in range(20):
        epoch = read(loader)
        assert abs(sum(member for member, _, _ in epoch) - 18) <= 2
        assert abs(len(epoch) - 27) <= 4
        totals.update((member, key) for member, key, _ in epoch)
        draws += [draw for member, key, draw in epoch if (member, key) == (1, "0.png")]
    often = {number: [n for (member, _), n in totals.items() if member == number] for number in (0, 1)}
    assert len(often[0]) == 20
    assert len(often[1]) == 7
    assert max(often[0]) - min(often[0]) <= 2  # each as often as the others
    assert max(often[1]) - min(often[1]) <= 2
    assert sum(often[0]) == pytest.approx(9 * 20, abs=4)
    assert len(set(draws)) == len(draws)  # each time it comes it is drawn anew


def test_the_same_images_come_once_an_epoch_each_time_from_another_dataset(caches):
    small, large = open_data(caches, "small"), open_data(caches, "large")
    both = caches[1]
    loader = LatentLoader(LatentMix([small, large], same_images="in turn"), 4, seed=3)
    assert len(loader.data) == 20
    turns = []
    for _ in range(4):
        epoch = read(loader)
        assert Counter(key for _, key, _ in epoch) == Counter(small.key(n) for n in range(20))
        turns.append({key: member for member, key, _ in epoch})
        assert 0 < sum(turns[-1].values()) < len(both)
    for key in both:
        assert [turn[key] for turn in turns] in ([0, 1, 0, 1], [1, 0, 1, 0])
    assert all(turn[key] == 0 for turn in turns for key in turns[0].keys() - both)


@pytest.mark.filterwarnings("ignore:.*come again in an epoch")
@pytest.mark.parametrize("options", [{}, {"proportions": [3, 1]}, {"same_images": "in turn"}])
def test_a_mix_goes_on_in_mid_epoch_and_on_other_ranks(caches, options):
    def open_loader(batch_size, rank=0, world_size=1):
        datasets = [open_data(caches, "small"), open_data(caches, "large")]
        return LatentLoader(LatentMix(datasets, **options), batch_size, seed=3, rank=rank, world_size=world_size)

    whole = open_loader(4)
    read(whole)
    wanted = Counter((member, key) for member, key, _ in read(whole))
    begun = open_loader(4)
    begun.set_epoch(1)
    first = []
    for batch in begun:
        first += [(batch.member, begun.data.datasets[batch.member].key(n)) for n in batch.index.tolist()]
        if len(first) >= 8:
            break
    rest = []
    for rank in range(2):
        loader = open_loader(1, rank, 2)
        loader.load_state_dict(begun.state_dict())
        rest += [(member, key) for member, key, _ in read(loader)]
    assert set(first) | set(rest) == set(wanted)
    if not options:  # of an odd rest of a bucket one comes again
        assert sum((Counter(first + rest) - wanted).values()) <= len(begun.data.sizes_of_buckets())
    datasets = [open_data(caches, "small"), open_data(caches, "large", seed=9)]
    other = LatentLoader(LatentMix(datasets, **options), 4, seed=3)
    with pytest.raises(UserError, match="load_state_dict: saved with dataset_seed of dataset 1=0"):
        other.load_state_dict(begun.state_dict())


@pytest.mark.parametrize("context", ["fork", pytest.param("spawn", marks=pytest.mark.slow)])
def test_a_mix_in_a_dataloader_of_one_s_own(caches, context):
    mix = LatentMix([open_data(caches, "small"), open_data(caches, "others")])
    loader = DataLoader(
        mix, batch_sampler=BucketBatchSampler(mix, 4), collate_fn=LatentDataset.collate, num_workers=2,
        multiprocessing_context=context,
    )  # fmt: skip
    wanted = LatentLoader(pickle.loads(pickle.dumps(mix)), 4)
    for _ in range(2):
        for batch, other in zip(loader, wanted, strict=True):
            assert (batch.member, batch.index.tolist()) == (other.member, other.index.tolist())
            assert torch.equal(batch.latent_sample, other.latent_sample)


def test_each_dataset_s_own_cond_model_is_called(caches):
    def model(value):
        return lambda prompts: torch.full((len(prompts), 1, 1), value)

    datasets = [
        open_data(caches, name, shuffle_tags=True, cond_model=model(n + 1.0))
        for n, name in enumerate(("small", "others"))
    ]
    for workers in (0, 1):
        for batch in LatentLoader(datasets, 4, num_workers=workers):
            assert (batch.cond["prompt_embeds"] == batch.member + 1).all()


def test_a_repr_of_few_lines(caches):
    small, others = open_data(caches, "small"), open_data(caches, "others")
    assert repr(LatentMix([small, others])) == f"LatentMix(27 samples of 2 datasets:\n  {small!r}\n  {others!r})"


def open_small(small, **options):
    return LatentDataset(small.storage.root, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda a, b: LatentMix([]), "LatentMix: the list is empty, expected at least one LatentDataset"),
        (lambda a, b: LatentMix([a, "x"]), r"LatentMix: \[1\] is a str, expected a LatentDataset"),
        (lambda a, b: LatentMix([a, b], proportions=[1]), r"proportions=\[1\]: expected 2 numbers above 0"),
        (lambda a, b: LatentMix([a, b], proportions=[1, 0]), r"proportions=\[1, 0\]: expected 2 numbers"),
        (
            lambda a, b: LatentMix([a, b], proportions=[1, 2], same_images="in turn"),
            "proportions cannot be combined with same_images",
        ),
        (lambda a, b: LatentMix([a, b], same_images="once"), "same_images='once': expected one of each, in turn"),
        (lambda a, b: LatentMix([a] * 9, same_images="in turn"), "same_images: 9 datasets, expected at most 4"),
        (lambda a, b: LatentMix([a, b]).__getitems__([0, 25]), "a batch mixes samples of several datasets"),
        (
            lambda a, b: LatentLoader("photos.latents"),
            r"LatentLoader: got a str, expected a LatentDataset: LatentLoader\(LatentDataset\('photos.latents'\)",
        ),
        (
            lambda a, b: LatentLoader(ConcatDataset([a, b])),
            r"LatentLoader: got a ConcatDataset, expected a LatentDataset, or several in a list",
        ),
        (
            lambda a, b: LatentLoader(Subset(a, [1])),
            r"LatentLoader: got a Subset, expected a LatentDataset, or a part of one: data.select",
        ),
        (
            lambda a, b: BucketBatchSampler(ConcatDataset([a, b]), 4),
            "BucketBatchSampler: got a ConcatDataset, expected a LatentDataset",
        ),
        (
            lambda a, b: next(iter(DataLoader(a, batch_size=2))),
            r"a LatentBatch has no \[0\]: it is a whole batch, with latent_sample, cond and weight. To a DataL",
        ),
        (
            lambda a, b: next(iter(DataLoader(ConcatDataset([a, b]), 2, collate_fn=LatentDataset.collate))),
            "collate: DataLoader did not fetch a whole batch at once",
        ),
        (lambda a, b: open_small(a, sample_weight=-1), "sample_weight=-1: expected a number of 0 or more"),
    ],
)
def test_what_cannot_be_meant_is_one_line(caches, make, message):
    with pytest.raises(UserError, match=f"^{message}"):
        make(open_data(caches, "small"), open_data(caches, "large"))


@pytest.mark.parametrize("proportions", [[1, 1, 1], [1, 3, 7], [1e308, 1e308, 1], [0.1, 0.2, 100]])
def test_small_buckets_come_as_often_as_their_share_says(caches, proportions):
    """However small a bucket is, no epoch is empty, and none has much more than another."""
    keys = [f"{n}.png" for n in range(20)]
    ones = [open_data(caches, "small").select([key]) for key in (keys[0], keys[15])]
    mix = LatentMix([*ones, open_data(caches, "small").select(keys[:7])], proportions=proportions)
    counts = [count_samples(mix, epoch) for epoch in range(40)]
    assert all(count.sum() > 0 for count in counts)
    assert max(count.sum() for count in counts) - min(count.sum() for count in counts) <= len(counts[0])
    total = sum(counts)
    rates = [9 * own / sum(map(Fraction, proportions)) for own in map(Fraction, proportions)]
    for member, rate in enumerate(rates):
        own = sum(int(n) for n, number in zip(total, mix._member_of, strict=True) if number == member)
        assert abs(own - 40 * rate) <= 2
    loader = LatentLoader(mix, 4)
    lengths = [len(list(loader)) for _ in range(10)]
    assert max(lengths) <= len(loader)
    assert loader.epoch == 10


def test_indices_of_a_mix_are_checked(caches):
    mix = LatentMix([open_data(caches, "small"), open_data(caches, "others")])
    assert sum(1 for _ in mix) == 27
    for index in (27, 10**6, -28):
        with pytest.raises(IndexError, match=f"index {index} of datasets of 27"):
            mix[index]
    assert torch.equal(mix[-1].latent_sample, mix[26].latent_sample)
    assert mix[-1].member == 1
    for wrong in ("x", slice(0, 2), 1.5):
        with pytest.raises(UserError, match="expected the index of one sample"):
            mix[wrong]
    with pytest.raises(UserError, match="a batch of no indices"):
        mix.__getitems__([])


def test_the_length_is_that_of_the_longest_epoch(caches):
    """Lightning counts the batches of the first epoch, and stops there in all others."""
    loader = LatentLoader(LatentMix([open_data(caches, "small"), open_data(caches, "large")], same_images="in turn"), 3)
    lengths = [len(list(loader)) for _ in range(4)]
    assert len(loader) == max(lengths)
    assert lengths[0] == lengths[2] != 0
