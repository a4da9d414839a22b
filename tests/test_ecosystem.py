"""The reader in the loops that people have: DataLoader workers, accelerate, Lightning, torchdata, torch.distributed."""

import json
import subprocess
import sys
from collections import Counter

import lightning
import pytest
import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader
from torchdata.stateful_dataloader import StatefulDataLoader

from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
from tests.conftest import SMALL, gradient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings(
        "ignore:.*pin_memory", "ignore:.*worker", "ignore:.*num_workers", "ignore::FutureWarning"
    ),
]


@pytest.fixture
def cache(run, images, tmp_path):
    for n in range(9):
        gradient(64, 64).rotate(n * 7).save(images / f"more{n}.png")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, "--flip", "--shard-size", "60kB").code == 0
    return str(tmp_path / "c")


def open_data(cache):
    return LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, use_weight=True, seed=3)


def plain_loader(data, kind=DataLoader, **options):
    """As somebody would write it who wants no LatentLoader."""
    sampler = BucketBatchSampler(data, 3, seed=1)
    return kind(data, batch_sampler=sampler, collate_fn=LatentDataset.collate, **options)


def same(batches, others):
    assert len(batches) == len(others)
    for one, other in zip(batches, others, strict=True):
        assert one.index.tolist() == other.index.tolist()
        assert torch.equal(one.latent_sample, other.latent_sample)
        assert torch.equal(one.weight, other.weight)
        assert torch.equal(one.cond["prompt_embeds"], other.cond["prompt_embeds"])
        assert one.cond_text == other.cond_text
        assert torch.equal(one.time_ids, other.time_ids)


class Model(torch.nn.Module):
    """Some steps of training: a convolution that predicts noise, with the cond's mean as a bias."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(4, 4, 3, padding=1)
        self.text = torch.nn.Linear(64, 4)

    def forward(self, batch):
        noise = torch.ones_like(batch.latent_sample)
        bias = self.text(batch.cond["prompt_embeds"].mean(1))[:, :, None, None]
        return (batch.weight * (self.conv(batch.latent_sample) + bias - noise) ** 2).mean()


def train(loader):
    """Two epochs of training steps: the loss falls."""
    torch.manual_seed(0)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    losses = []
    for _ in range(2):
        for batch in loader:
            loss = model(batch.to("cpu", non_blocking=True))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert len(losses) == 2 * len(loader)
    assert sum(losses[-3:]) < sum(losses[:3])


@pytest.mark.parametrize(
    ("start", "persistent"),
    [
        ("fork", False),
        ("fork", True),
        pytest.param("spawn", False, marks=pytest.mark.long),
        pytest.param("spawn", True, marks=pytest.mark.long),
    ],
)
def test_workers_give_the_same_batches(cache, start, persistent):
    wanted = LatentLoader(open_data(cache), 3)
    loader = LatentLoader(
        open_data(cache),
        3,
        num_workers=2,
        multiprocessing_context=start,
        persistent_workers=persistent,
        pin_memory=True,
    )
    for _ in range(2):
        same(list(loader), list(wanted))
    train(loader)


def test_a_plain_dataloader(cache):
    data = open_data(cache)
    loader = plain_loader(data)
    loader.batch_sampler.set_epoch(1)
    wanted = LatentLoader(open_data(cache), 3, seed=1)
    wanted.set_epoch(1)
    same(list(loader), list(wanted))
    train(loader)


@pytest.mark.parametrize("workers", [(0, 2), (2, 0), (2, 1)])
def test_an_interrupted_epoch_goes_on_with_another_number_of_workers(cache, workers):
    whole = list(LatentLoader(open_data(cache), 3))
    loader = LatentLoader(open_data(cache), 3, num_workers=workers[0])
    batches = iter(loader)
    first = [next(batches) for _ in range(2)]
    state = json.loads(json.dumps(loader.state_dict()))  # as it goes into a checkpoint
    rest = LatentLoader(open_data(cache), 3, num_workers=workers[1])
    rest.load_state_dict(state)
    same(first + list(rest), whole)


@pytest.mark.parametrize("workers", [0, 2])
def test_torchdata_stateful_dataloader_goes_on_in_mid_epoch(cache, workers):
    whole = list(plain_loader(open_data(cache)))
    loader = plain_loader(open_data(cache), StatefulDataLoader, num_workers=workers)
    batches = iter(loader)
    first = [next(batches) for _ in range(2)]
    state = loader.state_dict()
    rest = plain_loader(open_data(cache), StatefulDataLoader, num_workers=workers)
    rest.load_state_dict(state)
    same(first + list(rest), whole)
    wanted = plain_loader(open_data(cache))
    wanted.batch_sampler.set_epoch(1)
    same(list(rest), list(wanted))  # and then the next epoch, though nobody said so
    train(rest)


def test_accelerate_prepares_it_and_every_epoch_has_an_order_of_its_own(cache):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    data, model = open_data(cache), Model()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, plain_loader(data))
    orders, losses = [], []
    for _ in range(3):
        orders.append([])
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(batch)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            orders[-1] += batch.index.tolist()
            losses.append(loss.item())
    assert all(sorted(order) == list(range(len(data))) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert losses[-1] < losses[0]


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model, self.orders, self.losses = Model(), {}, []

    def training_step(self, batch, number):
        loss = self.model(batch)
        self.orders.setdefault(self.current_epoch, []).extend(batch.index.tolist())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


@pytest.mark.parametrize("kind", ["LatentLoader", "DataLoader"])
def test_lightning_trains_on_it(cache, tmp_path, kind):
    data, module = open_data(cache), Module()
    loader = LatentLoader(data, 3) if kind == "LatentLoader" else plain_loader(data)
    trainer = lightning.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, loader)
    assert all(sorted(order) == list(range(len(data))) for order in module.orders.values())
    assert len({tuple(order) for order in module.orders.values()}) == 3
    assert module.losses[-1] < module.losses[0]


RANK = """
import json, sys
import torch.distributed as dist
from latentprep import LatentDataset, LatentLoader
cache, file, rank = sys.argv[1:]
dist.init_process_group("gloo", init_method=f"file://{file}", rank=int(rank), world_size=2)
loader = LatentLoader(LatentDataset(cache), 3)
print(json.dumps([[batch.index.tolist(), list(batch.latent_sample.shape[1:])] for batch in loader]))
dist.barrier()
dist.destroy_process_group()
"""


def test_two_processes_share_an_epoch(cache, tmp_path):
    command = [sys.executable, "-W", "ignore", "-c", RANK, cache, str(tmp_path / "meeting")]
    ranks = [subprocess.Popen([*command, str(rank)], stdout=subprocess.PIPE, text=True) for rank in range(2)]
    one, other = (json.loads(process.communicate(timeout=120)[0].splitlines()[-1]) for process in ranks)
    assert [shape for _, shape in one] == [shape for _, shape in other]  # the same bucket at the same step
    seen = Counter(index for rank in (one, other) for batch, _ in rank for index in batch)
    assert seen == Counter(range(17))
