"""read/noise.py: normal numbers that a seed alone decides."""

import numpy as np
import pytest
import torch
from scipy import stats

from latentprep.read.counters import hash_numbers
from latentprep.read.noise import draw_noise, make_words, quantiles


def seeds_of(count, start=0):
    return torch.from_numpy((hash_numbers(7, np.arange(start, start + count)) >> np.uint64(1)).astype(np.int64))


def test_words_are_splitmix64_s():
    """The numbers that its authors' C gives for the seed 1234567."""
    words = make_words(torch.tensor([1234567]), 5)[0].tolist()
    assert [word % 2**64 for word in words] == [
        6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821,
    ]  # fmt: skip


def test_quantiles_have_the_moments_of_the_normal_distribution():
    values = quantiles(torch.device("cpu")).double()
    assert len(values) == 65_536
    assert values.mean().abs() < 1e-6
    assert (values.square().mean() - 1).abs() < 1e-6
    assert (values.pow(4).mean() - 3).abs() < 2e-3
    assert 4.3 < values.max() < 4.35
    assert torch.equal(values, values.sort().values)


def test_numbers_are_normal_and_do_not_depend_on_each_other():
    noise = draw_noise(seeds_of(64), torch.empty(64, 4, 64, 64)).flatten(1).double().numpy()
    assert stats.kstest(noise.flatten()[:200_000], "norm").pvalue > 0.001
    assert stats.kstest(noise.std(1) ** 2 * 16_384, "chi2", args=(16_384,)).pvalue > 0.001  # row by row
    for lag in (1, 2, 4, 64, 4096):
        assert abs((noise[:, lag:] * noise[:, :-lag]).mean()) < 5 / np.sqrt(noise.size)
        assert abs((np.abs(noise[:, lag:]) * np.abs(noise[:, :-lag])).mean() - 2 / np.pi) < 5 / np.sqrt(noise.size)
    between = noise @ noise.T / noise.shape[1] - np.eye(64)
    assert np.abs(between).max() < 6 / np.sqrt(noise.shape[1])
    close = draw_noise(torch.arange(64), torch.empty(64, 16_384)).double().numpy()  # seeds one after the other
    assert np.abs(close @ close.T / 16_384 - np.eye(64)).max() < 6 / np.sqrt(16_384)


@pytest.mark.parametrize("shape", [(4, 8, 8), (3, 5, 7), (1,), (16, 3)])
def test_a_row_is_its_seed_s_wherever_it_stands(shape):
    seeds = seeds_of(6)
    whole = draw_noise(seeds, torch.empty(6, *shape))
    assert whole.shape == (6, *shape)
    assert whole.dtype == torch.float32
    for row, seed in zip(whole, seeds, strict=True):
        assert torch.equal(draw_noise(seed[None], torch.empty(1, *shape))[0], row)
    assert torch.equal(draw_noise(seeds, torch.empty(6, *shape, dtype=torch.float16)), whole)
    if len(shape) > 1:
        assert len({tuple(row.flatten().tolist()) for row in whole}) == 6


@pytest.mark.gpu
def test_a_gpu_draws_the_same_numbers():
    seeds = seeds_of(5)
    here = draw_noise(seeds, torch.empty(5, 4, 33, 7))
    assert torch.equal(draw_noise(seeds.cuda(), torch.empty(5, 4, 33, 7, device="cuda")).cpu(), here)


def test_other_devices_go_another_way_to_the_same_numbers(monkeypatch):
    seeds, like, table = seeds_of(3), torch.empty(3, 4, 9), quantiles(torch.device("cpu"))

    class Device:
        type = "other"

    class Elsewhere:
        """A tensor that says it is on another device."""

        shape, device = like.shape, Device()

        def __getitem__(self, index):
            return like[index]

    monkeypatch.setattr("latentprep.read.noise.quantiles", lambda device: table)
    assert torch.equal(draw_noise(seeds, Elsewhere()), draw_noise(seeds, like))
