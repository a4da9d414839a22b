"""Training loops as people write them, to be started as several processes: each writes what it saw as JSON.

torchrun --nproc_per_node 2 tests/loops.py NAME CACHE FOLDER
"""

import json
import os
import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from latentprep import BucketBatchSampler, LatentBatch, LatentDataset, LatentLoader, LatentMix
from latentprep.errors import UserError

warnings.simplefilter("ignore")
torch.set_num_threads(1)
Epochs = list[list[list[Any]]]  # [epoch][batch]: what was seen
Found = dict[str, Any]


def open_data(cache: str) -> LatentDataset[Any, Any]:
    return LatentDataset(cache, latent_sampling_method="random", flip_p=0.5, seed=3)


def own_loader(data: LatentDataset[Any, Any], batch_size: int, kind: Any = DataLoader, **options: Any) -> Any:
    sampler = BucketBatchSampler(data, batch_size, seed=1)
    return kind(data, batch_sampler=sampler, collate_fn=LatentDataset.collate, **options)


def seen(batch: LatentBatch) -> list[Any]:
    """What tells a batch: its samples, the shape of its latents, and numbers that show its draws."""
    return [batch.index.tolist(), list(batch.latent_mean.shape[1:]), batch.latent_sample.sum((1, 2, 3)).tolist()]


def small_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Conv2d(4, 4, 1)


def use_accelerate(cache: str, folder: Path) -> Found:
    from accelerate import Accelerator
    from accelerate.utils import DataLoaderConfiguration

    found: Found = {}
    data = open_data(cache)

    def train(
        accelerator: Any, loader: Any, epochs: int, optimizer: Any, model: Any, stop: int | None = None
    ) -> Epochs:
        """[epoch][batch]: what was seen, and whether the optimizer made a step behind it."""
        epochs_seen = []
        for _ in range(epochs):
            own = []
            for batch in loader:
                with accelerator.accumulate(model):
                    loss = model(batch.to(accelerator.device).latent_sample).square().mean()
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                own.append([*seen(batch), accelerator.sync_gradients])
                if len(own) == stop:
                    break
            epochs_seen.append(own)
        return epochs_seen

    def prepare(loader: Any, **config: Any) -> tuple[Any, ...]:
        accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=2, dataloader_config=DataLoaderConfiguration(**config)
        )
        model = small_model()
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        return accelerator, *accelerator.prepare(model, optimizer, loader)

    Accelerator(cpu=True)
    for batch_size in (3, 5):
        for even in (True, False):
            accelerator, model, optimizer, loader = prepare(own_loader(data, batch_size), even_batches=even)
            lengths = [len(loader), len(own_loader(data, batch_size).batch_sampler)]
            found[f"DataLoader {batch_size} even_batches={even}"] = train(accelerator, loader, 3, optimizer, model)
            found[f"length {batch_size} even_batches={even}"] = lengths
    with_workers = own_loader(data, 3, num_workers=1, persistent_workers=True)
    accelerator, model, optimizer, loader = prepare(with_workers)
    found["DataLoader with a worker"] = train(accelerator, loader, 2, optimizer, model)
    accelerator, model, optimizer, loader = prepare(LatentLoader(data, 3, seed=1))
    found["LatentLoader"] = train(accelerator, loader, 3, optimizer, model)

    # an epoch is left in the middle, and goes on in other objects
    accelerator, model, optimizer, loader = prepare(LatentLoader(data, 3, seed=1))
    accelerator.register_for_checkpointing(loader)
    found["saved"] = train(accelerator, loader, 1, optimizer, model) + train(
        accelerator, loader, 1, optimizer, model, 2
    )
    accelerator.save_state(folder / "state")
    accelerator.wait_for_everyone()
    accelerator, model, optimizer, loader = prepare(LatentLoader(data, 3, seed=1))
    accelerator.register_for_checkpointing(loader)
    accelerator.load_state(folder / "state")
    found["loaded"] = train(accelerator, loader, 2, optimizer, model)

    accelerator, model, optimizer, loader = prepare(own_loader(data, 3))
    loader.set_epoch(1)
    skipped = accelerator.skip_first_batches(loader, 2)
    found["skipped"] = train(accelerator, skipped, 1, optimizer, model)

    class Wrapper:
        """A batch sampler around another, as people write them."""

        def __init__(self, inner: Any) -> None:
            self.inner = inner

        def __iter__(self) -> Iterator[list[int]]:
            yield from self.inner

        def __len__(self) -> int:
            return len(self.inner)

    wrapped = DataLoader(
        data, batch_sampler=Wrapper(own_loader(data, 3).batch_sampler), collate_fn=LatentDataset.collate
    )
    accelerator, model, optimizer, loader = prepare(wrapped)
    found["wrapped"] = train(accelerator, loader, 2, optimizer, model)
    own = LatentLoader(data, 3, seed=1)
    own.set_epoch(1)
    found["skipped, LatentLoader"] = train(accelerator, accelerator.skip_first_batches(own, 2), 1, optimizer, model)

    try:
        prepare(own_loader(data, 4 * accelerator.num_processes), split_batches=True)
    except Exception as error:
        found["split_batches"] = f"{type(error).__name__}: {error}"
    accelerator, model, optimizer, loader = prepare(own_loader(data, 3), dispatch_batches=True)
    try:
        if accelerator.is_main_process:  # the others would wait for it
            next(iter(loader))
    except UserError as error:
        found["dispatch_batches"] = str(error)
    return found


def use_ddp(cache: str, folder: Path) -> Found:
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = open_data(cache)
    early = LatentLoader(data, 3, seed=1)  # made before there is a process group
    dist.init_process_group("gloo")
    rank, world_size = dist.get_rank(), dist.get_world_size()
    found: Found = {}

    def train(loader: Iterable[LatentBatch], epochs: int, stop: int | None = None) -> Epochs:
        model = DistributedDataParallel(small_model())
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        epochs_seen = []
        for _ in range(epochs):
            own = []
            for batch in loader:
                model(batch.latent_sample).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
                own.append(seen(batch))
                if len(own) == stop:
                    break
            epochs_seen.append(own)
        return epochs_seen

    found["LatentLoader"] = train(early, 3)
    found["LatentLoader with a worker"] = train(LatentLoader(data, 3, seed=1, num_workers=1), 2)
    found["DataLoader"] = train(own_loader(data, 3), 3)
    stateful = own_loader(data, 3, StatefulDataLoader, num_workers=1)
    found["StatefulDataLoader"] = train(stateful, 2)

    # saved here in mid-epoch; who goes on are other numbers of ranks, in the test
    for name, loader in (
        ("position", LatentLoader(data, 2, seed=1)),
        ("stateful", own_loader(data, 2, StatefulDataLoader)),
    ):
        train(loader, 1)
        found[f"{name}: before"] = train(loader, 1, stop=3)
        torch.save(loader.state_dict(), folder / f"{name}{rank}of{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()
    return found


def go_on(cache: str, folder: Path) -> Found:
    """What another number of ranks makes of the positions that use_ddp has saved."""
    from torchdata.stateful_dataloader import StatefulDataLoader

    data = open_data(cache)
    dist.init_process_group("gloo")
    found: Found = {}
    loader = LatentLoader(data, 1, seed=1)
    loader.load_state_dict(torch.load(folder / "position0of2.pt"))
    found["position: rest"] = [[seen(batch) for batch in loader] for _ in range(2)]
    stateful = own_loader(data, 1, StatefulDataLoader)
    stateful.load_state_dict(torch.load(folder / "stateful0of2.pt"))
    found["stateful: rest"] = [[seen(batch) for batch in stateful] for _ in range(2)]
    dist.barrier()
    dist.destroy_process_group()
    return found


def use_no_group(cache: str, folder: Path) -> Found:
    """torchrun, and a script that never makes a process group."""
    return {"LatentLoader": [[seen(batch) for batch in LatentLoader(open_data(cache), 3, seed=1)]]}


def use_lightning(cache: str, folder: Path) -> Found:
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = small_model()
            self.epochs: Epochs = []

        def validation_step(self, batch: LatentBatch, number: int) -> None:
            assert batch.latent_sample.isfinite().all()

        def training_step(self, batch: LatentBatch, number: int) -> torch.Tensor:
            if number == 0:
                self.epochs.append([])
            self.epochs[-1].append(seen(batch))
            return self.model(batch.latent_sample).square().mean()  # type: ignore[no-any-return]

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 1e-3)

    def fit(loader: Any, *more: Any, **options: Any) -> Epochs:
        module = Module()
        lightning.Trainer(
            max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=folder, **options,
        ).fit(module, loader, *more)  # fmt: skip
        return module.epochs

    data = open_data(cache)
    found: Found = {"LatentLoader": fit(LatentLoader(data, 3, seed=1))}
    found["DataLoader"] = fit(own_loader(data, 3), use_distributed_sampler=False)
    train, val = data.split(0.4)
    found["with validation"] = fit(LatentLoader(train, 3, seed=1), LatentLoader(val, 3, shuffle=False))
    found["count"] = train.num_images
    mix = LatentMix([data, LatentDataset(cache, seed=5)], same_images="in turn")
    found["mix"] = fit(LatentLoader(mix, 3, seed=1))
    found["limited"] = fit(LatentLoader(data, 3, seed=1), limit_train_batches=2)
    try:
        fit(own_loader(data, 3))
    except TypeError as error:
        found["use_distributed_sampler"] = str(error)
    return found


def main(name: str, cache: str, folder: Path) -> None:
    found = globals()[name](cache, folder)
    rank = os.environ.get("RANK", os.environ.get("LOCAL_RANK", "0"))
    (folder / f"{name}.{rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Path(sys.argv[3]))
