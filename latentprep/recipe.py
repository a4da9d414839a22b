"""The recipe: everything that decides the numbers in a cache, its digest, and how two of them differ."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

from latentprep.geometry import Geometry
from latentprep.options import ImageOptions, TextOptions
from latentprep.records import list_views


def digest_of(value: Any) -> str:
    """32 hex digits: BLAKE2b of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def latents_recipe(
    *,
    vae: str,
    geometry: Geometry,
    images: ImageOptions,
    flip: bool,
    dtype: str,
    store: str,
    store_dtype: str,
    tiling: int | None = None,
) -> dict[str, Any]:
    """What decides the numbers in the latents files; `vae` is the hash of its weights and config."""
    used = {name: value for name, value in asdict(geometry).items() if value is not None}
    if geometry.size is not None:
        used["size"] = list(geometry.size)
    return {
        "vae": vae,
        "geometry": used,
        "images": asdict(images),
        "views": list_views(geometry.crops, flip),
        "dtype": dtype,
        "store": store,
        "store_dtype": store_dtype,
        **({"tiling": tiling} if tiling is not None else {}),
    }


def text_recipe(
    *,
    text_encoder: str | None,
    settings: dict[str, Any],
    options: TextOptions,
    seed: int,
    dtype: str,
    store_dtype: str,
) -> dict[str, Any]:
    """What decides the text files, captions aside; `text_encoder` is the hash of its weights, config and tokenizer.

    `settings` are those of max_tokens, clip_skip and emphasis that are not the default.
    """
    return {
        "text_encoder": text_encoder,
        "template": list(options.template) if options.template is not None else None,
        "placeholder": options.placeholder,
        "prompts_per_image": options.prompts_per_image,
        "shuffle_tags": options.shuffle_tags,
        "tag_drop_out": float(options.tag_drop_out),
        "keep_tags": options.keep_tags,
        "wildcards": options.wildcards,
        "seed": seed if options.has_choices else None,
        "dtype": dtype if text_encoder else None,
        "store_dtype": store_dtype if text_encoder else None,
        **settings,
    }


def recipe_changes(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """'field: value before -> value after' for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from recipe_changes(before.get(name), after.get(name), f"{at}.{name}" if at else name)
    elif before != after:
        yield f"{at}: {json.dumps(before)} -> {json.dumps(after)}"
