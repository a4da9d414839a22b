"""How a cache of 50,000 shards opens, and how an epoch over 100 million samples begins: time and memory.

    python benchmarks/scale.py

Only cache.json is made up; the shards it names share one pair of real files.
"""

import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from read import write_cache

from latentprep.cache.manifest import commit, open_manifest
from latentprep.cache.storage import Storage


def write_manifest(folder: Path, num_shards: int, rows: int) -> None:
    """A cache that names so many shards of so many rows; the first few have files, which are links to one pair."""
    write_cache(folder, 1, rows, shape=(4, 4, 4), width=8)
    storage = Storage(folder)
    manifest = open_manifest(storage)
    (first,) = manifest.shards
    shards = [replace(first, id=f"u{n:05}x") for n in range(num_shards)]
    for shard in shards:
        os.link(storage.locate(first.latents_name), storage.locate(shard.latents_name))
        os.link(storage.locate(first.text_name), storage.locate(shard.text_name))
    commit(storage, replace(manifest, shards=shards), [])


MEASURE = """
import resource, sys, time
from latentprep import BucketBatchSampler, LatentDataset, LatentLoader
def report(what, started):
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(f"{what:44} {seconds:7.2f} s   {memory:7,.0f} MB at most so far", flush=True)
import torch
started = time.perf_counter()
report("after import torch", started)
started = time.perf_counter()
data = LatentDataset(sys.argv[1], latent_sampling_method="deterministic")
report(f"opened: {len(data.manifest.shards):,} shards, {len(data):,} samples", started)
started = time.perf_counter()
sampler = BucketBatchSampler(data, 32)
batches = iter(sampler)
first = next(batches)
report("the sampler's first batch", started)
started = time.perf_counter()
data.__getitems__(first)
report("that batch, of as many shards, read", started)
started = time.perf_counter()
for _ in range(10_000):
    next(batches)
report("10,000 batches more of the sampler", started)
"""


def main(
    num_shards: Annotated[int, typer.Option(help="Shards of the cache.")] = 50_000,
    rows: Annotated[int, typer.Option(help="Samples in each.")] = 2_000,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), num_shards, rows)
        print(f"cache.json: {os.path.getsize(Path(folder) / 'cache.json') / 1e6:.0f} MB")
        subprocess.run([sys.executable, "-c", MEASURE, folder], check=True)


if __name__ == "__main__":
    typer.run(main)
