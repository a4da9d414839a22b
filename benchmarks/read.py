"""How fast a training loop reads: `LatentLoader` against tensors in memory, and against how other tools store latents.

    python benchmarks/read.py                # MosaicML streaming takes part where it is installed

Samples are as of Stable Diffusion 1.5 at 512x512 (mean, std and cond in float16: 184 kB each), of random numbers. They
are read in random order, in one process, from warm files. All contenders of a table run in turn on the same samples;
the ratio is to the first row. Then: smaller samples in five times as many shards, what workers change, of which each
hands its batches over through shared memory, and what it costs when no file is in memory yet.

`index_select` takes mean, std and cond of a batch from one tensor each in RAM. "deterministic" reads mean and cond,
"random" the std too; the draw comes on top, on the CPU. The `.npz` are one for each image and one for its text, in
float32, as kohya's sd-scripts caches them.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import numpy as np
import torch
import typer
from results import Results, run

from latentprep import LatentDataset, LatentLoader
from latentprep.cache.cond import write_uncond
from latentprep.cache.group import LatentGroup, TextGroup
from latentprep.cache.latents import Latents, write_latents
from latentprep.cache.manifest import LatentFacts, MadeWith, Manifest, Uncond, commit
from latentprep.cache.normalization import Normalization
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text, write_text
from latentprep.geometry import Geometry
from latentprep.options import ImageOptions, TextOptions
from latentprep.recipe import LatentsRecipe, Recipe, TextRecipe

SHAPE = (4, 64, 64)


def write_cache(
    folder: Path, num_shards: int, rows: int, shape: tuple[int, int, int] = SHAPE, width: int = 768
) -> None:
    """A cache of random numbers in the real format, a prompt of its own for each sample."""
    storage = Storage(folder)
    generator = torch.Generator().manual_seed(0)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).half()

    shards = []
    for n in range(num_shards):
        sizes = torch.full((rows, 2), 512, dtype=torch.int32)
        crop = torch.tensor([0, 0, 512, 512], dtype=torch.int32).repeat(rows, 1, 1)
        latents = LatentGroup(
            label="h512w512",
            latent_mean=noise(rows, 1, *shape),
            latent_std=noise(rows, 1, *shape).abs(),
            weight=None,
            original_size=sizes,
            resized_size=sizes[:, None].clone(),
            crop=crop,
            flipped=torch.zeros(1, dtype=torch.uint8),
            digest=torch.randint(0, 256, (rows, 16), dtype=torch.uint8, generator=generator),
            key=[f"{n}/{row}.jpg" for row in range(rows)],
            nbytes=torch.zeros(rows, dtype=torch.int64),
            version=torch.zeros(rows, dtype=torch.int64),
        )
        names = list(latents.key)
        group = TextGroup(
            "h512w512", key=names, caption=[[name] for name in names], nbytes=np.zeros(rows, np.int64),
            version=np.zeros(rows, np.int64), prompt_of=np.arange(rows, dtype=np.int32)[:, None],
        )  # fmt: skip
        text = Text([group], names, {"prompt_embeds": noise(rows, 77, width)})
        latents_file = write_latents(storage, f"u{n}", Latents([latents], {}))
        shard = Shard(f"u{n}", (("h512w512", rows, shape),), latents_file)
        shards.append(shard.with_text("t", write_text(storage, f"u{n}", "t", text)))
    uncond = Uncond("0" * 16, write_uncond(storage, "0" * 16, {"prompt_embeds": noise(1, 77, width)}, {}))
    recipe = Recipe(
        LatentsRecipe("", Geometry("native"), ImageOptions(), ("plain",), "float32", "mean+std", "float16"),
        TextRecipe.of(
            text_encoder="x", settings={}, options=TextOptions(), seed=0, dtype="float32", store_dtype="float16"
        ),
    )
    facts = LatentFacts(Normalization((0.0,), (0.18215,)), 8, shape[0], ("plain",))
    commit(storage, Manifest(recipe, facts, MadeWith(""), shards, uncond=uncond), [])


Ram = dict[str, torch.Tensor]  # latent_mean, latent_std, cond: [count,...] float16


def read_ram(ram: Ram, batch_size: int) -> Callable[[], None]:
    """The yardstick: an index_select of every tensor, from one tensor in memory."""

    def epoch() -> None:
        for chosen in torch.randperm(len(ram["cond"])).split(batch_size):
            _ = [tensor.index_select(0, chosen) for tensor in ram.values()]

    return epoch


def read_cache(
    folder: Path, batch_size: int, method: str, *, draw: bool = False, workers: int = 0
) -> Callable[[], None]:
    loader = LatentLoader(
        LatentDataset(folder, latent_sampling_method=method), batch_size, num_workers=workers,
        persistent_workers=workers > 0,
    )  # fmt: skip

    def epoch() -> None:
        for batch in loader:
            if draw:
                _ = batch.latent_sample

    return epoch


def load(folder: Path) -> Ram:
    """All of a cache's numbers, in memory."""
    data = LatentDataset(folder, latent_sampling_method="random")
    whole = data.__getitems__(list(range(len(data))))
    assert whole.latent_std is not None
    assert whole.stored_cond is not None
    cond = whole.stored_cond["prompt_embeds"]
    return {"latent_mean": whole.latent_mean, "latent_std": whole.latent_std, "cond": cond}


def read_in_each_way(folder: Path, ram: Ram, batch_size: int) -> dict[str, Callable[[], None]]:
    return {
        "`index_select` from RAM": read_ram(ram, batch_size),
        "`LatentLoader`, deterministic": read_cache(folder, batch_size, "deterministic"),
        "`LatentLoader`, random": read_cache(folder, batch_size, "random"),
        "`LatentLoader`, random, and the draw": read_cache(folder, batch_size, "random", draw=True),
    }


def read_npz(folder: Path, ram: Ram, batch_size: int) -> Callable[[], None]:
    """An .npz in float32 for the latents of an image and one for its text, as kohya's sd-scripts caches them."""
    folder.mkdir()
    count = len(ram["cond"])
    for n in range(count):
        latents = {name: ram[name][n].float().numpy() for name in ("latent_mean", "latent_std")}
        np.savez(folder / f"{n}.npz", **latents)
        np.savez(folder / f"{n}_te.npz", cond=ram["cond"][n].float().numpy())

    def load(n: int) -> dict[str, torch.Tensor]:
        with np.load(folder / f"{n}.npz") as latents, np.load(folder / f"{n}_te.npz") as text:
            return {name: torch.from_numpy(file[name]) for file in (latents, text) for name in file.files}

    def epoch() -> None:
        for chosen in torch.randperm(count).split(batch_size):
            samples = [load(n) for n in chosen.tolist()]
            for name in samples[0]:
                torch.stack([sample[name] for sample in samples])

    return epoch


class StandIn(ModuleType):
    """A module in which every name is an empty class."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)

    def __getattr__(self, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def import_streaming() -> ModuleType | None:
    """MosaicML streaming, or None where it is not installed."""
    try:
        import torchvision  # noqa: F401 (it is only looked for: streaming imports it, and nothing here needs it)
    except (ImportError, RuntimeError):  # many torchvisions do not fit their torch
        for name in ("", ".datasets", ".transforms", ".transforms.functional"):
            sys.modules["torchvision" + name] = StandIn("torchvision" + name)
    try:
        import streaming
    except ImportError:
        return None
    return streaming


def read_mds(folder: Path, ram: Ram, batch_size: int, streaming: Any) -> Callable[[], None]:
    """MosaicML's MDS shards, local, shuffled by the same random order, and collated as its own loaders do."""
    columns = {name: f"ndarray:float16:{','.join(map(str, value.shape[1:]))}" for name, value in ram.items()}
    with streaming.MDSWriter(out=str(folder), columns=columns, size_limit="64mb") as writer:
        for n in range(len(ram["cond"])):
            writer.write({name: value[n].numpy() for name, value in ram.items()})
    data = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=batch_size)

    def epoch() -> None:
        for chosen in torch.randperm(len(ram["cond"])).split(batch_size):
            samples = [data[n] for n in chosen.tolist()]
            for name in ram:
                torch.from_numpy(np.stack([sample[name] for sample in samples]))

    return epoch


def drop_pages(folder: Path) -> None:
    """Have the kernel forget a folder's files, so that the next read is from the disk."""
    for path in folder.rglob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def compare(results: Results, title: str, contenders: dict[str, Callable[[], None]], rounds: int, count: int) -> None:
    """Samples/s of every contender, and of the first one's; all take turns, and the first turn is not counted."""
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for n in range(rounds + 1):
        for name, epoch in contenders.items():
            started = time.perf_counter()
            epoch()
            if n:
                times[name].append(time.perf_counter() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    base = next(iter(medians.values()))
    table = results.table(title, {"rate": "samples/s", "of the first": "%"})
    for name, seconds in medians.items():
        table.add(name, count / seconds, 100 * base / seconds)


def main(
    results: Results,
    num_shards: Annotated[int, typer.Option(help="Shards of the cache.")] = 4,
    rows: Annotated[int, typer.Option(help="Samples in each.")] = 500,
    batch_size: Annotated[int, typer.Option(help="Samples in a batch.")] = 32,
    rounds: Annotated[int, typer.Option(help="Counted epochs of each contender.")] = 5,
) -> None:
    count = num_shards * rows
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "cache"
        write_cache(folder, num_shards, rows)
        ram = load(folder)
        contenders = read_in_each_way(folder, ram, batch_size)
        contenders["`.npz` files"] = read_npz(Path(temporary) / "npz", ram, batch_size)
        streaming = import_streaming()
        if streaming is not None:
            contenders["MosaicML streaming, local"] = read_mds(Path(temporary) / "mds", ram, batch_size, streaming)
        compare(results, "184 kB a sample", contenders, rounds, count)

        small = Path(temporary) / "small"
        write_cache(small, num_shards * 5, rows // 5 * 2, (4, 32, 32), width=156)
        number = num_shards * 5 * (rows // 5 * 2)
        compare(results, "40 kB a sample", read_in_each_way(small, load(small), batch_size), rounds, number)

        with_workers = {f"{n} workers": read_cache(folder, batch_size, "random", workers=n) for n in (0, 1, 2, 4)}
        compare(results, "workers, random", with_workers, rounds, count)

        other = Path(temporary) / "other"
        write_cache(other, num_shards, rows)

        def cold() -> None:
            drop_pages(other)
            read_cache(other, batch_size, "random")()

        both = {"warm": lambda: read_cache(other, batch_size, "random")(), "cold": cold}
        compare(results, "a cache that is opened anew for every epoch", both, rounds, count)


if __name__ == "__main__":
    run(main)
