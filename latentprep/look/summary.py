"""What is in a cache, as plain JSON values: counts, recipe, buckets, statistics, skips; or one sample of it."""

from collections import Counter
from typing import Any

import numpy as np
import torch

from latentprep.cache.manifest import Manifest, ShardEntry, open_manifest, read_skips
from latentprep.cache.shard import (
    Strings,
    cond_of,
    latents_name,
    open_shard,
    read_captions,
    read_keys,
    text_name,
)
from latentprep.cache.storage import Storage
from latentprep.errors import UserError

STATISTICS_ROWS = 4096  # rows whose latents are read for the statistics; more change no digit that is shown


def summarize(storage: Storage) -> dict[str, Any]:
    """Everything that `latentprep inspect` shows, as plain JSON values. Raises UserError."""
    manifest = open_manifest(storage)
    skips = read_skips(storage)
    buckets: Counter[str] = Counter()
    for shard in manifest.shards:
        for label, rows, _ in shard.groups:
            buckets[label] += rows
    return {
        "cache": storage.root,
        "images": manifest.num_images,
        "views": manifest.latent["views"],
        "shards": len(manifest.shards),
        "bytes": {
            "latents": sum(shard.latents_bytes for shard in manifest.shards),
            "text": sum(shard.text_bytes for shard in manifest.shards),
        },
        "made_with": manifest.made_with,
        "recipe": manifest.recipe,
        "latent": manifest.latent,
        "buckets": dict(sorted(buckets.items())),
        "latents": latent_statistics(storage, manifest),
        "text": text_statistics(storage, manifest),
        "skipped": dict(sorted(Counter(skip.reason for skip in skips).items())),
        "skipped_examples": [f"{skip.key}: {skip.reason} ({skip.detail})" for skip in skips[:5]],
    }


def latent_statistics(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Per channel, over all pixels of the rows read: mean and std of latent_mean, and mean of latent_std; unscaled."""
    channels = manifest.latent["channels"]
    count, rows_read, weighted = 0, 0, 0
    total, squares, spread = (torch.zeros(channels, dtype=torch.float64) for _ in range(3))
    for shard in spread_out(manifest):
        latents = open_shard(storage, latents_name(shard.unit))
        for label, rows in latents.groups():
            mean, std = latents.tensors[f"{label}/latent_mean"].double(), latents.get(label, "latent_std")
            count += mean.numel() // channels
            total += mean.sum((0, 1, 3, 4))
            squares += mean.square().sum((0, 1, 3, 4))
            if std is not None:
                spread += std.double().sum((0, 1, 3, 4))
            weight = latents.get(label, "weight")
            weighted += int((weight != 1).flatten(1).any(1).sum()) if weight is not None else 0
            rows_read += rows
    mean = total / max(count, 1)
    return {
        "rows_read": rows_read,
        "mean": _rounded(mean),
        "std": _rounded((squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()),
        "posterior_std": _rounded(spread / max(count, 1)) if manifest.recipe["latents"]["store"] != "mean" else None,
        "rows_with_weight": weighted,
    }


def spread_out(manifest: Manifest) -> list[ShardEntry]:
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
    cond: dict[str, list[int]] = {}
    max_tokens = None
    longest = (0, "")
    example = ""
    for shard in manifest.shards:
        text = open_shard(storage, text_name(shard.unit, shard.text))
        for label, _ in text.groups():
            found = [caption for row in read_captions(text, label) for caption in row]
            captions += len(found)
            empty += found.count("")
        prompt = list(Strings(text.tensors, "prompt"))
        example = example or prompt[0]
        prompts += len(prompt)
        cond = cond or {name: list(value.shape[1:]) for name, value in cond_of(text.tensors).items()}
        tokens = text.tensors.get("num_tokens")
        if tokens is not None:
            max_tokens = text.metadata["max_tokens"]
            lengths.append(tokens.numpy())
            cut += int((tokens > max_tokens).sum())
            most = int(tokens.argmax())
            longest = max(longest, (int(tokens[most]), prompt[most]))
    tokens_all = np.concatenate(lengths) if lengths else None
    return {
        "captions": captions,
        "empty_captions": empty,
        "distinct_prompts": prompts,
        "example_prompt": example,
        "cond": cond,
        "max_tokens": max_tokens,
        "tokens": None
        if tokens_all is None
        else {"min": int(tokens_all.min()), "median": int(np.median(tokens_all)), "max": int(tokens_all.max())},
        "truncated_prompts": cut if tokens_all is not None else None,
        "longest_prompt": longest[1] if tokens_all is not None else None,
    }


def describe_sample(storage: Storage, key: str) -> dict[str, Any]:
    """Everything the cache says of one image. Raises UserError where it holds no such key."""
    manifest = open_manifest(storage)
    for shard in manifest.shards:
        text = open_shard(storage, text_name(shard.unit, shard.text))
        for label, _ in text.groups():
            keys = read_keys(text, label)
            if key not in keys:
                continue
            row = keys.index(key)
            latents = open_shard(storage, latents_name(shard.unit))
            mean, std, weight = (latents.get(label, name) for name in ("latent_mean", "latent_std", "weight"))
            assert mean is not None
            chosen = text.tensors[f"{label}/prompt_of"][row].numpy()
            first = mean[row, 0].float()
            return {
                "key": key,
                "shard": latents.name,
                "group": label,
                "row": row,
                "views": manifest.latent["views"],
                "original_size": _list(latents.tensors[f"{label}/original_size"][row]),
                "resized_size": _list(latents.tensors[f"{label}/resized_size"][row, 0]),
                "crop": _list(latents.tensors[f"{label}/crop"][row, 0]),
                "latent_shape": list(first.shape),
                "latent_mean": {"mean": _rounded(first.mean((1, 2))), "std": _rounded(first.std((1, 2)))},
                "posterior_std": _rounded(std[row, 0].float().mean((1, 2))) if std is not None else None,
                "weight": {
                    name: round(float(getattr(weight[row, 0].float(), name)()), 4) for name in ("min", "mean", "max")
                }
                if weight is not None
                else None,
                "caption": read_captions(text, label)[row],
                "prompt": [Strings(text.tensors, "prompt")[number] for number in chosen],
                "tokens": text.tensors["num_tokens"].numpy()[chosen].tolist() if "num_tokens" in text.tensors else None,
                "digest": bytes(latents.tensors[f"{label}/digest"][row].tolist()).hex(),
            }
    for skip in read_skips(storage):
        if skip.key == key:
            raise UserError(f"--key {key}: was skipped when this cache was made: {skip.reason} ({skip.detail}).")
    raise UserError(
        f"--key {key}: not in {storage.root}. A key is the path relative to the image folder, such as a/b.jpg."
    )


def _list(row: torch.Tensor) -> list[int]:
    return [int(value) for value in row.tolist()]
