"""What is in a cache, as plain JSON values: counts, recipe, buckets, statistics, skips; or one sample of it."""

from collections import Counter
from dataclasses import asdict
from heapq import nlargest
from typing import Any

import numpy as np
import torch

from latentprep.cache.borrowed import CondFiles
from latentprep.cache.compact import would_rewrite
from latentprep.cache.group import LatentGroup
from latentprep.cache.int8 import scales_of
from latentprep.cache.manifest import Manifest, open_manifest, read_skips
from latentprep.cache.schema import num_values
from latentprep.cache.sets import take_runs
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.look.images import image_statistics
from latentprep.look.rows import find_duplicates
from latentprep.look.words import list_texts

NUM_SKIPS = 5  # that are named
STATISTICS_ROWS = 4096  # rows whose latents are read for the statistics; more change no digit that is shown


def summarize(storage: Storage, num_cropped: int = 5) -> dict[str, Any]:
    """Everything that `latentprep inspect` shows, as plain JSON values; names the most cropped images.

    Raises UserError.
    """
    manifest = open_manifest(storage)
    skips = read_skips(storage)
    buckets = count_buckets(manifest)
    notes, cropped = image_statistics(storage, manifest, num_cropped)
    return {
        "cache": storage.root,
        "images": manifest.num_images,
        "views": list(manifest.latent.views),
        "control_images": manifest.recipe.latents.num_controls or 0,
        "shards": len(manifest.shards),
        "bytes": {
            "latents": sum(shard.latents_file.nbytes for shard in manifest.shards),
            "text": manifest.nbytes - sum(shard.latents_file.nbytes for shard in manifest.shards),
        },
        "dead_rows": manifest.num_dead,
        "dead_bytes": sum(map(dead_bytes, manifest.shards)),
        "can_compact": any(map(would_rewrite, manifest.shards)),
        "made_with": asdict(manifest.made_with),
        "recipe": manifest.recipe.to_json(),
        "latent": manifest.latent.to_json(),
        "sets": describe_sets(manifest),
        "buckets": {f"{width}x{height}": count for (height, width), count in sorted(buckets.items()) if count},
        "notes": notes,
        "cropped": cropped,
        "duplicates": find_duplicates(storage, manifest),
        "latents": latent_statistics(storage, manifest),
        "text": text_statistics(storage, manifest),
        "skipped": dict(sorted(Counter(skip.reason for skip in skips).items())),
        "skipped_examples": [
            *(f"{skip.key}: {skip.reason} ({skip.detail})" for skip in skips[:NUM_SKIPS]),
            *([f"and {len(skips) - NUM_SKIPS:,} more in skipped.jsonl"] if len(skips) > NUM_SKIPS else []),
        ],
    }


def count_buckets(manifest: Manifest) -> Counter[tuple[int, int]]:
    """(height, width) in pixels -> images."""
    factor, buckets = manifest.latent.factor, Counter[tuple[int, int]]()
    for shard in manifest.shards:
        for (_, _, (_, height, width, *_)), live in zip(shard.groups, shard.live_rows(), strict=True):
            buckets[height * factor, width * factor] += len(live)
    return buckets


def describe_sets(manifest: Manifest) -> list[dict[str, Any]]:
    """Of each set its images, and what readers know of it; [] if all images are of one source."""
    counts: Counter[int] = Counter()
    for shard in manifest.shards if manifest.sets else ():
        for number, count in take_runs(shard.sets, shard.live_numbers()):
            counts[number] += count
    return [{**asdict(facts), "images": counts[number]} for number, facts in enumerate(manifest.sets)]


def dead_bytes(shard: Shard) -> int:
    """About how many bytes of a shard's files are of dead rows: their share of the latents."""
    sizes = [num_values(shape) for _, _, shape in shard.groups]
    whole = sum(size * rows for size, (_, rows, _) in zip(sizes, shard.groups, strict=True))
    live = sum(size * len(rows) for size, rows in zip(sizes, shard.live_rows(), strict=True))
    return shard.nbytes * (whole - live) // whole


def latent_statistics(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Per channel, over all pixels of the rows read: mean and std of latent_mean, and mean of latent_std; unscaled."""
    channels = manifest.latent.channels
    count, rows_read, weighted = 0, 0, 0
    total, squares, spread = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    groups = (
        pair
        for shard in spread_out(manifest)
        for pair in zip(shard.open_latents(storage).groups, shard.live_rows(), strict=True)
    )
    for group, live in groups:
        mean = group.latent_mean[live].double()
        count += mean.numel() // channels
        total += mean.sum((0, 1, 3, 4))
        squares += mean.square().sum((0, 1, 3, 4))
        if group.latent_std is not None:
            spread += group.latent_std[live].double().sum((0, 1, 3, 4))
        if group.weight is not None:
            weighted += int((group.weight[live] != 1).flatten(1).any(1).sum())
        rows_read += len(live)
    mean = total / max(count, 1)
    return {
        "rows_read": rows_read,
        "mean": _rounded(mean),
        "std": _rounded((squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()),
        "posterior_std": _rounded(spread / max(count, 1)) if manifest.recipe.latents.store != "mean" else None,
        "rows_with_weight": weighted,
    }


def spread_out(manifest: Manifest) -> list[Shard]:
    """Shards of about STATISTICS_ROWS rows together, evenly spread over the cache, so that no bucket is left out."""
    shards = manifest.shards
    wanted = min(len(shards), -(-STATISTICS_ROWS * len(shards) // max(1, manifest.num_images)))
    return [shards[round(n)] for n in np.linspace(0, len(shards) - 1, wanted)]


def _rounded(values: torch.Tensor) -> list[float]:
    return [round(value, 4) for value in values.tolist()]


def text_statistics(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Captions, prompts and their lengths in tokens, over the whole cache."""
    captions, prompts, empty, cut = 0, 0, 0, 0
    lengths: list[np.ndarray] = []
    cond: dict[str, list[int | None]] = {}
    max_tokens = None
    longest: list[tuple[int, str]] = []  # of the prompts that were cut
    example = ""
    for shard, text, of_text, new in list_texts(storage, manifest):
        for group, live in zip(text.groups, shard.live_rows(), strict=True):
            found = [caption for row in live for caption in group.caption[row]]
            captions += len(found)
            empty += found.count("")
        example = example or next(filter(str.strip, text.prompt), "")
        prompts += len(new)
        scales = scales_of({name: dtype for name, (dtype, _) in of_text.kinds.items()})
        cond = cond or {name: list(shape) for name, (_, shape) in of_text.kinds.items() if name not in scales}
        num_tokens = of_text.num_tokens
        if num_tokens is not None and of_text.max_tokens is not None:
            max_tokens = of_text.max_tokens
            lengths.append(num_tokens[new])
            too_long = [n for n in new if num_tokens[n] > max_tokens]
            cut += len(too_long)
            longest = nlargest(5, {*longest, *((int(num_tokens[n]), text.prompt[n]) for n in too_long)})
    tokens_all = np.concatenate(lengths) if lengths else None
    return {
        "captions": captions,
        "empty_captions": empty,
        "distinct_prompts": prompts,
        "example_prompt": example,
        "cond": cond,
        "cond_dtype": manifest.recipe.text.store_dtype,
        "max_tokens": max_tokens,
        "tokens": None
        if tokens_all is None
        else {"min": int(tokens_all.min()), "median": int(np.median(tokens_all)), "max": int(tokens_all.max())},
        "truncated_prompts": cut if tokens_all is not None else None,
        "longest_truncated": [{"tokens": tokens, "prompt": prompt} for tokens, prompt in longest],
    }


def describe_sample(storage: Storage, key: str) -> dict[str, Any]:
    """Everything the cache says of one image. Raises UserError where it holds no such key."""
    manifest = open_manifest(storage)
    for shard in manifest.shards:
        text = shard.open_text(storage)
        for number, (words, live) in enumerate(zip(text.groups, shard.live_rows(), strict=True)):
            row = next((row for row in live.tolist() if words.key[row] == key), None)
            if row is None:
                continue
            group = shard.open_latents(storage).groups[number]
            chosen = words.prompt_of[row].tolist()
            num_tokens = CondFiles(storage).of(text).num_tokens
            return {
                "key": key,
                "shard": shard.latents_name,
                "group": group.label,
                "row": row,
                "views": list(manifest.latent.views),
                **describe_latents(group, row),
                "caption": words.caption[row],
                "prompt": [text.prompt[n] for n in chosen],
                "tokens": num_tokens[chosen].tolist() if num_tokens is not None else None,
            }
    for skip in read_skips(storage):
        if skip.key == key:
            raise UserError(f"--key {key}: was skipped when this cache was made: {skip.reason} ({skip.detail}).")
    raise UserError(
        f"--key {key}: not in {storage.root}. A key is the path relative to the image folder, such as a/b.jpg."
    )


def describe_latents(group: LatentGroup, row: int) -> dict[str, Any]:
    """Geometry and statistics of one row: of its first view, but the crops of all views."""
    mean, std, weight = group.latent_mean[row, 0].float(), group.latent_std, group.weight
    plane = weight[row, 0].float() if weight is not None else None
    controls = [(name, values[row, 0].float()) for name, values in group.controls.items()]
    return {
        "original_size": _list(group.original_size[row]),
        "resized_size": _list(group.resized_size[row, 0]),
        "crop": group.crop[row].tolist(),
        "latent_shape": list(mean.shape),
        "latent_mean": {"mean": _rounded(mean.mean((1, 2))), "std": _rounded(mean.std((1, 2)))},
        "posterior_std": _rounded(std[row, 0].float().mean((1, 2))) if std is not None else None,
        **{name: {"mean": _rounded(own.mean((1, 2))), "std": _rounded(own.std((1, 2)))} for name, own in controls},
        "weight": {name: round(float(getattr(plane, name)()), 4) for name in ("min", "mean", "max")}
        if plane is not None
        else None,
        "digest": bytes(group.digest[row].tolist()).hex(),
    }


def _list(row: torch.Tensor) -> list[int]:
    return [int(value) for value in row.tolist()]
