"""How fast shards are written, and a small cache of random numbers, to be read: both with a model's shapes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from latentprep.cache.cond import write_uncond
from latentprep.cache.group import LatentGroup, TextGroup
from latentprep.cache.latents import Latents, write_latents
from latentprep.cache.manifest import MadeWith, Manifest, Uncond, commit
from latentprep.cache.ragged import Conds, take_conds
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text, write_text
from latentprep.prepare.devices import default_shard_bytes
from latentprep.prepare.speed.timing import repeat
from latentprep.prepare.survey import Prepared
from latentprep.prepare.work.rows import group_label
from latentprep.records import Size, is_flipped
from latentprep.speeds import WriteSpeed

DIFFERENT = 64  # rows whose numbers differ: a disk that compresses finds nothing, and drawing takes no time
SMALL = 64_000_000  # bytes of the cache that is read
FEWEST, MOST = 16, 1024  # samples in it
UNCOND = "0" * 16  # a name in place of a digest


def make_latents(prepared: Prepared, bucket: Size, num_rows: int, first: int = 0) -> Latents:
    """Rows of random numbers, as those of images in this bucket are."""
    recipe, facts = prepared.recipe.latents, prepared.facts
    height, width = bucket
    views, dtype = len(recipe.views), TORCH_DTYPES[recipe.store_dtype]
    shape = views, facts.channels, height // facts.factor, width // facts.factor
    generator = torch.Generator().manual_seed(first)
    numbers = torch.randn(min(num_rows, DIFFERENT), *shape, generator=generator).to(dtype)
    mean = numbers[torch.arange(num_rows) % len(numbers)]
    columns: dict[str, Any] = {"latent_std": mean.abs()} if recipe.store == "mean+std" else {}
    sizes = torch.tensor(bucket, dtype=torch.int32).repeat(num_rows, 1)
    group = LatentGroup(
        group_label(bucket),
        latent_mean=mean,
        original_size=sizes,
        resized_size=sizes[:, None].repeat(1, views, 1),
        crop=torch.tensor([0, 0, *bucket], dtype=torch.int32).repeat(num_rows, views, 1),
        flipped=torch.tensor([is_flipped(view) for view in recipe.views], dtype=torch.uint8),
        digest=torch.randint(0, 256, (num_rows, 16), dtype=torch.uint8, generator=generator),
        key=[f"{first + n}.jpg" for n in range(num_rows)],
        nbytes=torch.zeros(num_rows, dtype=torch.int64),
        version=torch.zeros(num_rows, dtype=torch.int64),
        **columns,
    )
    return Latents([group], {})


def make_text(latents: Latents, cond: Conds) -> Text:
    """The text of the same rows: each has a prompt of its own, with the cond of one of P."""
    (group,) = latents.groups
    keys, nothing = list(group.key), np.zeros(len(group), np.int64)
    text = TextGroup(
        group.label, key=keys, caption=[[key] for key in keys], nbytes=nothing, version=nothing.copy(),
        prompt_of=np.arange(len(keys), dtype=np.int32)[:, None],
    )  # fmt: skip
    num_there = len(next(iter(cond.values()))) if cond else 0
    return Text([text], keys, take_conds(cond, np.arange(len(keys)) % num_there) if cond else {})


def measure_write(
    prepared: Prepared, storage: Storage, bucket: Size, seconds: float, count: Callable[[int], object]
) -> WriteSpeed:
    """Whole shards of latents, again and again under one name. Raises UserError, and what a remote raises."""
    image_bytes = prepared.row_bytes.latents(bucket)
    shard_bytes = prepared.options.shard_bytes or default_shard_bytes(prepared.where.devices[0])
    latents = make_latents(prepared, bucket, max(1, shard_bytes // image_bytes))
    stamps = []

    def write() -> None:
        stamps.append(write_latents(storage, "0", latents))
        count(stamps[-1].nbytes)

    first = repeat(write, 0)
    times = first if first[0] > seconds / 2 else repeat(write, seconds - first[0])
    nbytes = stamps[-1].nbytes
    speed = nbytes / max(float(np.median(times)), 1e-9)
    return WriteSpeed(storage.root, speed, nbytes, nbytes / len(latents.groups[0]), len(times))


def write_small(prepared: Prepared, storage: Storage, bucket: Size, cond: Conds, text_bytes: float) -> None:
    """A cache of two shards."""
    per_row = prepared.row_bytes.latents(bucket) + text_bytes
    num_rows = max(FEWEST, min(MOST, int(SMALL / per_row))) // 2
    shards = []
    for n in range(2):
        latents = make_latents(prepared, bucket, num_rows, n * num_rows)
        shard = Shard(f"{n}", latents.table(), write_latents(storage, f"{n}", latents))
        shards.append(shard.with_text("0", write_text(storage, f"{n}", "0", make_text(latents, cond))))
    uncond = None
    if cond:
        uncond = Uncond(UNCOND, write_uncond(storage, UNCOND, take_conds(cond, [0]), {}))
    commit(storage, Manifest(prepared.recipe, prepared.facts, MadeWith(""), shards, uncond=uncond), [])
