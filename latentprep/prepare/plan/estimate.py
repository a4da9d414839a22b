"""How long a plan will take on this machine: measured on a few of its images and prompts, and not guessed."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from latentprep.cache.schema import TORCH_DTYPES
from latentprep.prepare.images.load import load_pixels
from latentprep.prepare.models.open_encoder import open_encoder
from latentprep.prepare.survey import Prepared
from latentprep.prompts import make_prompts
from latentprep.records import Row

SAMPLES = 8  # images decoded for the estimate


@dataclass(frozen=True)
class Estimate:
    seconds: float
    num_prompts: int  # to encode
    measured: str


def estimate_time(prepared: Prepared) -> Estimate | None:
    """Seconds for the images and prompts of a plan; None where no model is needed. Loads models, writes nothing."""
    plan, device, models = prepared.plan, torch.device(prepared.where.devices[0]), prepared.models
    rows = [
        pair for unit in plan.units if unit.id not in plan.leftovers
        for pair in zip(unit.items, unit.placements, strict=True)
    ]  # fmt: skip
    seconds, measured = 0.0, []
    if rows:
        buckets = Counter(placement.bucket for _, placement in rows)
        pixels = sum(height * width * count for (height, width), count in buckets.items())
        (height, width), count = buckets.most_common(1)[0]
        batch = min(prepared.batch_size, count)
        images = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)
        recipe = prepared.recipe.latents
        vae = open_encoder(models.vae, recipe, str(device), prepared.options.compile)
        per_batch = time_twice(lambda: vae.encode(images)) * len(recipe.views)
        encode = per_batch / (batch * height * width) * pixels

        sample = rows[:: -(-len(rows) // SAMPLES)]
        load_options = prepared.load_options
        started = time.perf_counter()
        for item, placement in sample:
            load_pixels(item, placement, load_options)
        decode = (time.perf_counter() - started) / len(sample) * len(rows) / prepared.threads
        seconds += max(encode, decode)
        measured.append(f"{batch / per_batch:.1f} images/s at {width}x{height} in batches of {batch}")
    prompts = count_prompts(prepared)
    if prompts and models.text is not None:
        dtype = TORCH_DTYPES[prepared.recipe.text.dtype or "float32"]
        encoder = models.text.open(device, dtype, prepared.options.text)
        texts = [f"a prompt number {n}" for n in range(min(prompts, 32))]
        per_prompt = time_twice(lambda: encoder.encode(texts)) / len(texts)
        seconds += per_prompt * prompts
        measured.append(f"{1 / per_prompt:.0f} prompts/s")
    return Estimate(seconds, prompts if models.text is not None else 0, ", ".join(measured)) if measured else None


def time_twice(work: Callable[[], object]) -> float:
    """Seconds of the second call: the first warms up."""
    work()
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def count_prompts(prepared: Prepared) -> int:
    """Distinct prompts of the shards to write, each counted once a shard, as it is encoded."""
    options, plan = prepared.options, prepared.plan

    def count(rows: list[Row]) -> int:
        return len({p for row in rows for p in make_prompts(row.captions, row.key, options.text, options.seed)})

    retold = {change.key for change in plan.changes if change.what in ("caption", "prompt", "renamed")}
    return sum(count([item.row for item in unit.items]) for unit in plan.units) + sum(
        count([row for row in task.rows if row.key in retold or not task.shard.text_id]) for task in plan.text_tasks
    )
