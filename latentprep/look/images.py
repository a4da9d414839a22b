"""What was done to the images: how much of each its bucket crops away, the worst first; and what else had to be."""

from collections import Counter, defaultdict
from heapq import nlargest
from typing import Any

import numpy as np

from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.records import NOTES


def image_statistics(storage: Storage, manifest: Manifest, num_named: int) -> tuple[dict[str, int], dict[str, Any]]:
    """How many images had which of records.NOTES when they were encoded; and shares of the images, 0..1, that lie
    outside their crop: mean and worst by bucket, and the worst images. Of several crops of an image all lose the same.
    """
    factor = manifest.latent.factor
    by_bucket: defaultdict[tuple[int, int], list[np.ndarray]] = defaultdict(list)
    worst: list[tuple[float, int, int, int]] = []  # share, -shard, -group, -row: of equals the first is the largest
    notes: Counter[str] = Counter()
    for n, shard in enumerate(manifest.shards):
        latents = shard.open_latents(storage)
        found = latents.metadata.get("notes")
        if isinstance(found, dict):
            notes.update({note: found[note] for note in NOTES if isinstance(found.get(note), int)})
        for number, (group, live) in enumerate(zip(latents.groups, shard.live_rows(), strict=True)):
            losses = cropped_away(group)[live]
            if len(losses):
                _, _, _, height, width = group.latent_mean.shape
                by_bucket[height * factor, width * factor].append(losses)
                most = np.argsort(-losses, kind="stable")[:num_named]
                worst_here = [(float(losses[m]), -n, -number, -int(live[m])) for m in most if losses[m] > 0]
                worst = nlargest(num_named, worst + worst_here)  # of equals the first
    images = []
    for loss, n, number, row in worst:
        shard = manifest.shards[-n]
        text = shard.open_text(storage)
        images.append({"key": text.groups[-number].key[-row], "cropped_away": round(loss, 4)})
    buckets = {size: np.concatenate(parts) for size, parts in sorted(by_bucket.items())}
    return dict(notes.most_common()), {
        "buckets": {
            f"{width}x{height}": {"mean": round(float(losses.mean()), 4), "worst": round(float(losses.max()), 4)}
            for (height, width), losses in buckets.items()
        },
        "images": images,
    }


def cropped_away(group: LatentGroup) -> np.ndarray:
    """[N] float64: the share of each image that lies outside its first crop."""
    resized = group.resized_size[:, 0].numpy().astype(np.float64)
    kept = np.minimum(resized, group.crop[:, 0, 2:].numpy())
    found: np.ndarray = 1 - kept.prod(axis=1) / resized.prod(axis=1)
    return found
