"""The reader in loops of two and three processes, which are started: every image of every epoch is counted."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import latentprep
from tests.conftest import gradient

pytestmark = pytest.mark.slow

LOOPS = Path(__file__).with_name("loops.py")
COUNT = 24  # images: 15 of one bucket, 9 of another


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Two buckets, of which neither comes out even for two ranks."""
    folder = tmp_path_factory.mktemp("processes")
    images = folder / "images"
    images.mkdir()
    for n in range(15):
        gradient(64, 64).rotate(n * 7).save(images / f"square{n}.png")
    for n in range(9):
        gradient(128, 40).rotate(n).save(images / f"wide{n}.png")
    latentprep.encode(images, folder / "c", model="tiny", device="cpu", resolution=64, flip=True, progress=False)
    return folder / "c"


def start(name, cache, folder, num_ranks, launcher=True):
    """What each rank of a loop has written."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}"] if launcher else []
    command = [sys.executable, *torchrun, str(LOOPS), name, str(cache), str(folder)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(LOOPS.parent.parent), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(num_ranks)]


def check_epochs(ranks, num_epochs, count=COUNT):
    """Every image once an epoch, all ranks together; one bucket a step; each epoch in another order."""
    orders = []
    for epoch in range(num_epochs):
        steps = list(zip(*(rank[epoch] for rank in ranks), strict=True))  # as many on each rank
        for step in steps:
            assert len({tuple(batch[1]) for batch in step}) == 1
        indices = [index for step in steps for batch in step for index in batch[0]]
        assert Counter(indices) == Counter(range(count))
        orders.append(tuple(indices))
    assert len(set(orders)) == num_epochs


def draws_of(ranks, epoch):
    """Of each image what shows its draw in an epoch."""
    return {
        index: draw for rank in ranks for batch in rank[epoch] for index, draw in zip(batch[0], batch[2], strict=True)
    }


@pytest.fixture(scope="module", params=[2, 3])
def accelerate(request, cache, tmp_path_factory):
    return start("use_accelerate", cache, tmp_path_factory.mktemp("accelerate"), request.param)


@pytest.mark.parametrize("batch_size", [3, 5])
@pytest.mark.parametrize("even", [True, False])
def test_a_loader_that_accelerate_prepares_gives_every_image_once(accelerate, batch_size, even):
    name = f"{batch_size} even_batches={even}"
    loops = [rank[f"DataLoader {name}"] for rank in accelerate]
    check_epochs(loops, 3)
    for rank in accelerate:
        assert rank[f"length {name}"] == [len(loops[0][0])] * 2


def test_also_with_workers_and_as_a_latent_loader(accelerate):
    plain = [rank["DataLoader 3 even_batches=True"] for rank in accelerate]
    for name, epochs in (("DataLoader with a worker", 2), ("LatentLoader", 3)):
        loops = [rank[name] for rank in accelerate]
        check_epochs(loops, epochs)
        for epoch in range(epochs):
            assert draws_of(loops, epoch) == draws_of(plain, epoch)
    assert draws_of(plain, 0) != draws_of(plain, 1)


def test_a_batch_sampler_around_ours_is_seen_through(accelerate):
    check_epochs([rank["wrapped"] for rank in accelerate], 2)


@pytest.mark.parametrize("name", ["DataLoader 3 even_batches=True", "DataLoader 5 even_batches=False", "LatentLoader"])
def test_gradients_that_accumulate_make_a_step_at_the_end_of_an_epoch(accelerate, name):
    for rank in accelerate:
        for epoch in rank[name]:
            number = len(epoch)
            assert [batch[3] for batch in epoch] == [n % 2 == 0 or n == number for n in range(1, number + 1)]


def test_an_epoch_goes_on_where_accelerate_has_saved_it(accelerate):
    whole = [rank["LatentLoader"] for rank in accelerate]
    for rank, own in zip(accelerate, whole, strict=True):
        assert rank["saved"][1] + rank["loaded"][0] == own[1]
        assert [batch[:3] for batch in rank["loaded"][1]] == [batch[:3] for batch in own[2]]
        for name in ("skipped", "skipped, LatentLoader"):
            assert [batch[:3] for batch in rank[name][0]] == [batch[:3] for batch in own[1][2:]]


def test_what_accelerate_cannot_do_is_refused(accelerate):
    for rank in accelerate:
        assert rank["split_batches"].startswith("ValueError: ")
        assert "batch_size" in rank["split_batches"]
    assert accelerate[0]["dispatch_batches"].startswith("accelerate's dispatch_batches: one process would read")


@pytest.fixture(scope="module")
def ddp(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ddp")
    return start("use_ddp", cache, folder, 2), folder


@pytest.mark.parametrize("name", ["LatentLoader", "LatentLoader with a worker", "DataLoader", "StatefulDataLoader"])
def test_ranks_share_an_epoch(ddp, name):
    loops = [rank[name] for rank in ddp[0]]
    check_epochs(loops, len(loops[0]))
    for epoch in range(len(loops[0])):
        assert draws_of(loops, epoch) == draws_of([rank["LatentLoader"] for rank in ddp[0]], epoch)


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_another_number_of_ranks_goes_on_with_the_rest_of_an_epoch(ddp, cache, num_ranks):
    ranks, folder = ddp
    others = start("go_on", cache, folder, num_ranks)
    for name in ("position", "stateful"):
        before = [index for rank in ranks for batch in rank[f"{name}: before"][0] for index in batch[0]]
        rest = [index for rank in others for batch in rank[f"{name}: rest"][0] for index in batch[0]]
        assert len(before) == 12
        repeated = len(rest) - len(set(rest))  # buckets of which a step cannot give each rank one
        assert repeated <= 2 * (num_ranks - 1)  # of each of two buckets
        assert len(set(before) & set(rest)) <= 2 * (num_ranks - 1)
        assert set(before) | set(rest) == set(range(COUNT))
        check_epochs([rank[f"{name}: rest"][1:] for rank in others], 1)


def test_torchrun_s_variables_are_enough(cache, tmp_path):
    check_epochs([rank["LatentLoader"] for rank in start("use_no_group", cache, tmp_path, 3)], 1)


def test_lightning_s_ranks_share_an_epoch(cache, tmp_path):
    ranks = start("use_lightning", cache, tmp_path, 2, launcher=False)
    for name in ("LatentLoader", "DataLoader"):
        check_epochs([rank[name] for rank in ranks], 3)
    check_epochs([rank["mix"] for rank in ranks], 3)
    check_seen = [
        {index for rank in ranks for batch in rank["with validation"][e] for index in batch[0]} for e in range(3)
    ]
    assert all(len(seen) == ranks[0]["count"] for seen in check_seen)
    limited = [index for rank in ranks for epoch in rank["limited"] for batch in epoch for index in batch[0]]
    assert len(set(limited)) > 12  # and not the same two batches in every epoch
    for rank in ranks:
        assert "set `Trainer(use_distributed_sampler=False)`" in rank["use_distributed_sampler"]
