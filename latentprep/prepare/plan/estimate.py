"""How long a plan will take on this machine: measured on a few of its images and prompts, and not guessed."""

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from latentprep.prepare.encode import make_job
from latentprep.prepare.images.load import load_pixels
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
    plan, job = prepared.plan, make_job(prepared)
    rows = [
        pair for unit in plan.new if unit.id not in prepared.found
        for pair in zip(unit.items, unit.placements, strict=True)
    ]  # fmt: skip
    seconds, measured = 0.0, []
    if rows:
        buckets = Counter(placement.bucket for _, placement in rows)
        pixels = sum(height * width * count for (height, width), count in buckets.items())
        (height, width), count = buckets.most_common(1)[0]
        batch = min(job.batch_size, count)
        images = np.random.default_rng(0).integers(0, 256, (batch, height, width, 3), np.uint8)
        per_batch = time_twice(lambda: job.vae().encode(images)) * len(prepared.recipe["latents"]["views"])
        encode = per_batch / (batch * height * width) * pixels

        sample = rows[:: -(-len(rows) // SAMPLES)]
        load_options = prepared.load_options
        started = time.perf_counter()
        for item, placement in sample:
            load_pixels(item, placement, load_options)
        decode = (time.perf_counter() - started) / len(sample) * len(rows) / prepared.workers
        seconds += max(encode, decode)
        measured.append(f"{batch / per_batch:.1f} images/s at {width}x{height} in batches of {batch}")
    prompts = count_prompts(prepared)
    if prompts and job.text is not None:
        encoder = job.text()
        texts = [f"a prompt number {n}" for n in range(min(prompts, 32))]
        per_prompt = time_twice(lambda: encoder.encode(texts)) / len(texts)
        seconds += per_prompt * prompts
        measured.append(f"{1 / per_prompt:.0f} prompts/s")
    return Estimate(seconds, prompts if job.text is not None else 0, ", ".join(measured)) if measured else None


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
    return sum(count([item.row for item in unit.items]) for unit in plan.new) + sum(
        count([row for row in retext.rows if row.key in retold]) for retext in plan.retext
    )
