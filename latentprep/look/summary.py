"""What is in a cache: counts, recipe, buckets, statistics, skips. A plain dict for machines, tables for people."""

from collections import Counter
from typing import Any

import numpy as np
import torch
from rich.console import Group
from rich.table import Table

from latentprep.cache.manifest import Manifest, open_manifest, read_skips
from latentprep.cache.shard import (
    cond_of,
    latents_name,
    open_shard,
    read_captions,
    read_keys,
    strings_of,
    text_name,
)
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.units import human_bytes

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
        "buckets": {label: buckets[label] for label in sorted(buckets)},
        "latents": latent_statistics(storage, manifest),
        "text": text_statistics(storage, manifest),
        "skipped": dict(sorted(Counter(skip.reason for skip in skips).items())),
        "skipped_examples": [f"{skip.key}: {skip.reason} ({skip.detail})" for skip in skips[:5]],
    }


def latent_statistics(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Per channel, over all pixels of the rows read: mean and std of latent_mean, and mean of latent_std; unscaled."""
    channels = manifest.latent["channels"]
    count, total, squares, spread = 0, torch.zeros(channels).double(), torch.zeros(channels).double(), None
    rows_read, weighted = 0, 0
    for shard in manifest.shards:
        if rows_read >= STATISTICS_ROWS:
            break
        latents = open_shard(storage, latents_name(shard.unit))
        for label, rows in latents.groups():
            mean, std = latents.tensors[f"{label}/latent_mean"].double(), latents.get(label, "latent_std")
            count += mean.numel() // channels
            total += mean.sum((0, 1, 3, 4))
            squares += mean.square().sum((0, 1, 3, 4))
            if std is not None:
                spread = (0 if spread is None else spread) + std.double().sum((0, 1, 3, 4))
            weighted += rows if latents.get(label, "weight") is not None else 0
            rows_read += rows
    mean = total / max(count, 1)
    return {
        "rows_read": rows_read,
        "mean": _rounded(mean),
        "std": _rounded((squares / max(count, 1) - mean.square()).clamp(min=0).sqrt()),
        "posterior_std": _rounded(spread / count) if spread is not None else None,
        "rows_with_weight": weighted,
    }


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
        prompt = strings_of(text.tensors, "prompt")
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
                "prompt": strings_of(text.tensors, "prompt", chosen),
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


def bucket_name(label: str) -> str:
    """WxH, as people write sizes, of a group label such as h512w768."""
    height, _, width = label.removeprefix("h").partition("w")
    return f"{width}x{height}"


def render_summary(summary: dict[str, Any]) -> Group:
    """The summary as tables for a terminal."""
    made, recipe, text, latents = (summary[name] for name in ("made_with", "recipe", "text", "latents"))
    total = sum(summary["bytes"].values())
    geometry = recipe["latents"]["geometry"]
    facts = _table(None)
    views = f" x {len(summary['views'])} views ({', '.join(summary['views'])})" if len(summary["views"]) > 1 else ""
    facts.add_row("images", f"{summary['images']:,}{views}")
    facts.add_row("shards", f"{summary['shards']:,}")
    per_image = f", {human_bytes(total / summary['images'])} an image" if summary["images"] else ""
    parts = ", ".join(f"{name} {human_bytes(count)}" for name, count in summary["bytes"].items())
    facts.add_row("on disk", f"{human_bytes(total)} ({parts}){per_image}")
    facts.add_row("model", made["model"] + (f", VAE {made['vae']}" if made["vae"] else ""))
    facts.add_row("geometry", ", ".join(f"{name} {_plain(value)}" for name, value in geometry.items()))
    facts.add_row("precision", f"encoded in {recipe['latents']['dtype']}, stored as {recipe['latents']['store_dtype']}")
    scaling = (
        f"scaling_factor {summary['latent']['scaling_factor']:g}, shift_factor {summary['latent']['shift_factor']:g}"
    )
    facts.add_row("for the UNet", f"(latent - shift) x scale: {scaling}")
    facts.add_row("made by", f"latentprep {made['latentprep']}, torch {made['torch']}, diffusers {made['diffusers']}")
    facts.add_row(
        "weights", f"{latents['rows_with_weight']:,} of {latents['rows_read']:,} rows are in groups with weight maps"
    )

    buckets = _table("Buckets")
    buckets.add_column("pixels")
    buckets.add_column("images", justify="right")
    for label, count in summary["buckets"].items():
        buckets.add_row(bucket_name(label), f"{count:,}")

    read = (
        f" ({latents['rows_read']:,} of {summary['images']:,} images)"
        if latents["rows_read"] < summary["images"]
        else ""
    )
    channels = _table(f"Latents per channel, unscaled{read}")
    channels.add_column("channel")
    for column in ("mean", "std", "posterior std"):
        channels.add_column(column, justify="right")
    posterior = latents["posterior_std"] or ["not stored"] * len(latents["mean"])
    for n, (mean, std, spread) in enumerate(zip(latents["mean"], latents["std"], posterior, strict=True)):
        channels.add_row(str(n), f"{mean:.4f}", f"{std:.4f}", spread if isinstance(spread, str) else f"{spread:.4f}")

    words = _table("Text")
    words.add_row(
        "captions", f"{text['captions']:,}" + (f", {text['empty_captions']:,} empty" if text["empty_captions"] else "")
    )
    words.add_row(
        "prompts", f"{text['distinct_prompts']:,} distinct in their shards, such as {text['example_prompt']!r}"
    )
    words.add_row("cond", ", ".join(f"{name} {shape}" for name, shape in text["cond"].items()) or "none (--no-cond)")
    if text["tokens"] is not None:
        tokens = text["tokens"]
        words.add_row(
            "tokens", f"{tokens['min']} to {tokens['max']}, median {tokens['median']}, of {text['max_tokens']}"
        )
        words.add_row("truncated", f"{text['truncated_prompts']:,} prompts; the longest is {text['longest_prompt']!r}"
                      if text["truncated_prompts"] else "none")  # fmt: skip

    skips = _table("Skipped")
    for reason, count in summary["skipped"].items():
        skips.add_row(reason, f"{count:,}")
    for example in summary["skipped_examples"]:
        skips.add_row("", example)
    return Group(facts, buckets, channels, words, *([skips] if summary["skipped"] else []))


def render_sample(sample: dict[str, Any]) -> Table:
    """One sample as a table for a terminal."""
    table = _table(None)
    for name, value in sample.items():
        is_size = name in ("original_size", "resized_size")
        table.add_row(name.replace("_", " "), f"{value[1]}x{value[0]}" if is_size else _plain(value))
    return table


def _table(title: str | None) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=title is not None
    )


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_plain(inner)}" for name, inner in value.items())
    if isinstance(value, list):
        return ", ".join(str(inner) for inner in value)
    return str(value)
