"""How a cache of 50,000 shards opens, and how an epoch over 100 million samples begins: time and memory.

    python benchmarks/scale.py

Only cache.json is made up; the shards it names share one pair of real files. It is read in a process of its own; its
memory is the maximum resident set size.
"""

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from read import write_cache
from results import Results, run

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
import json, resource, sys, time
def report(what, started):
    seconds, memory = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(json.dumps([what, seconds, memory]))
started = time.perf_counter()
import torch
report("import torch", started)
from latentprep import BucketBatchSampler, LatentDataset
started = time.perf_counter()
data = LatentDataset(sys.argv[1], latent_sampling_method="deterministic")
report("opening the cache", started)
started = time.perf_counter()
sampler = BucketBatchSampler(data, 32)
batches = iter(sampler)
first = next(batches)
report("the sampler's first batch", started)
started = time.perf_counter()
data.__getitems__(first)
report("reading that batch, of as many shards", started)
started = time.perf_counter()
for _ in range(10_000):
    next(batches)
report("10,000 more of the sampler", started)
"""


def main(
    results: Results,
    num_shards: Annotated[int, typer.Option(help="Shards of the cache.")] = 50_000,
    rows: Annotated[int, typer.Option(help="Samples in each.")] = 2_000,
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_manifest(Path(folder), num_shards, rows)
        size = results.table("the cache", {"shards": "", "samples": "", "cache.json": "MB"})
        size.add("", num_shards, num_shards * rows, os.path.getsize(Path(folder) / "cache.json") / 1e6)
        command = [sys.executable, "-c", MEASURE, folder]
        lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
    steps = results.table("one after the other", {"time": "s", "memory at most so far": "MB"})
    for line in lines:
        steps.add(*json.loads(line))


if __name__ == "__main__":
    run(main)
