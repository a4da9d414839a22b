"""How much `--no-upscale` crops away, against `bucket_no_upscale` of sd-scripts, over 5,000 random sizes.

    python benchmarks/buckets.py

Sides are drawn evenly in their logarithm, 64 to 4,000 pixels. The rule of sd-scripts is written anew from its
description.
"""

import math
import random

from results import Results, run

from latentprep.geometry import Geometry
from latentprep.prepare.plan.buckets import cropped_away, make_place
from latentprep.records import Placement, Size

COUNT, STEP = 5000, 64


def kohya_bucket(size: Size, area: int) -> Size:
    """BucketManager.select_bucket without upscaling: scale to the area, then round one side or the other down."""
    height, width = size
    if height * width <= area:
        return height // STEP * STEP, width // STEP * STEP
    aspect = width / height
    columns = int(math.sqrt(area * aspect) + 0.5) // STEP * STEP
    rows = int(math.sqrt(area / aspect) + 0.5) // STEP * STEP
    choices = [(int(columns / aspect + 0.5) // STEP * STEP, columns), (rows, int(rows * aspect + 0.5) // STEP * STEP)]
    return min(choices, key=lambda b: abs(b[1] / b[0] - aspect) if all(b) else math.inf)


def kohya_loss(size: Size, area: int) -> float | None:
    """The share of an image that is cropped away; None if no bucket fits."""
    bucket = kohya_bucket(size, area)
    if not all(bucket):
        return None
    scale = max(b / s for b, s in zip(bucket, size, strict=True)) if size[0] * size[1] > area else 1.0
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)


def main(results: Results) -> None:
    dice = random.Random(0)
    sizes = [tuple(round(math.exp(dice.uniform(math.log(64), math.log(4000)))) for _ in "hw") for _ in range(COUNT)]
    table = results.table("what is cropped away", {"on average": "%", "at most": "%", "images skipped": ""})
    for resolution in (512, 1024):
        place = make_place(Geometry.from_options(resolution=str(resolution), upscale=False), 8)
        own = [place((size[0], size[1])) for size in sizes]
        losses = {
            "latentprep": [cropped_away(found) if isinstance(found, Placement) else None for found in own],
            "sd-scripts": [kohya_loss((size[0], size[1]), resolution**2) for size in sizes],
        }
        for name, found in losses.items():
            kept = [loss for loss in found if loss is not None]
            mean, worst = sum(kept) / len(kept), max(kept)
            table.add(f"at {resolution}, {name}", 100 * mean, 100 * worst, len(found) - len(kept))


if __name__ == "__main__":
    run(main)
