"""read/loader.py: epoch after epoch, with any number of workers, and on in mid-epoch."""

import pytest

from latentprep import LatentDataset, LatentLoader
from latentprep.errors import UserError
from tests.conftest import SMALL


@pytest.fixture
def data(run, images, tmp_path):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL).code == 0
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


def test_a_loader_refuses_the_state_of_another(data):
    with pytest.raises(UserError, match="load_state_dict: saved with batch_size=3, this sampler has batch_size=4"):
        LatentLoader(data, 4, seed=4).load_state_dict(LatentLoader(data, 3, seed=4).state_dict())


def test_a_loop_that_was_left_starts_its_epoch_again(data):
    loader = LatentLoader(data, 3)
    first = next(iter(loader)).index.tolist()
    assert read(loader)[0][0] == first
    assert loader.epoch == 1


def test_batch_size_and_gradient_step_are_clamped_to_the_data(data):
    loader = LatentLoader(data, 1000, gradient_step=7)
    assert (loader.batch_size, loader.gradient_step) == (32, 1)
    assert LatentLoader(data, 10, gradient_step=7).gradient_step == 3
    assert [len(batch) for batch in loader] == [16, 16]
