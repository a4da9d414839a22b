"""What differs between two recipes, in the words of options."""

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from latentprep.recipe import recipe_changes

# leaf of a recipe -> its option. A flag is said as yes or no; those in NEGATED are yes if the leaf is false
OPTIONS = {
    "geometry.resolution": "--resolution", "geometry.area": "--resolution", "geometry.size": "--width, --height",
    "geometry.mode": "--resolution, --width, --height", "geometry.bucket_step": "--bucket-step",
    "geometry.min_side": "--min-side", "geometry.max_side": "--max-side", "geometry.max_aspect": "--max-aspect",
    "geometry.upscale": "--no-upscale", "geometry.fit": "--fit", "geometry.filter": "--filter",
    "geometry.crop": "--crop", "geometry.crops": "--crops", "geometry.crop_seed": "--seed",
    "images.background": "--background", "images.weights": "--weights", "images.animated": "--animated",
    "images.draft": "--no-draft", "dtype": "--dtype", "store": "--store", "store_dtype": "--store-dtype",
    "tiling": "--tiling", "num_controls": "control images",
    "control_size": "--control-size",
}  # fmt: skip
# leaf of a text recipe -> its option, if that is not its name; without dashes what is none
TEXT_OPTIONS = {
    "text_encoder": "another text encoder (--model, --text-encoder):", "dtype": "--dtype of text encoders",
    "store_dtype": "--cond-dtype", "fill": "filling of short prompts", "pad_to": "padding of prompts",
}  # fmt: skip
NEGATED = ("geometry.upscale", "images.draft")


def describe_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """'--option before -> after' for all that differs between two latents recipes in JSON."""
    if before.get("vae") != after.get("vae"):
        yield f"another VAE (--model, --vae): {before.get('vae')} -> {after.get('vae')}"
    if before.get("views") != after.get("views"):
        yield from describe_views(before.get("views") or [], after.get("views") or [])
    for at, old, new in recipe_changes(before, after):
        if at not in ("vae", "views") and not (at == "geometry.crops" and before.get("views") != after.get("views")):
            yield describe_change(at, old, new)


def describe_change(at: str, old: Any, new: Any) -> str:
    if at in NEGATED:
        old, new = old is False, new is False
    if isinstance(old, bool) or isinstance(new, bool):
        return f"{OPTIONS.get(at, at)}: {'yes' if old else 'no'} -> {'yes' if new else 'no'}"
    old, new = (value_in_words(at, value) for value in (old, new))
    return f"{OPTIONS.get(at, at)} {old} -> {new}"


def value_in_words(at: str, value: Any) -> str:
    if value is None:
        return "target" if at == "control_size" else "none"
    if at == "geometry.size" and isinstance(value, list):
        return "x".join(map(str, reversed(value)))
    return value if isinstance(value, str) and value else json.dumps(value)


def describe_views(before: list[str], after: list[str]) -> Iterator[str]:
    """Views differ by --flip, or by --crops."""
    old, new = (any(view.endswith("flipped") for view in views) for views in (before, after))
    if old != new:
        yield f"--flip: {'yes' if old else 'no'} -> {'yes' if new else 'no'}"
    num_old, num_new = len(before) // (1 + old), len(after) // (1 + new)
    if num_old != num_new:
        yield f"--crops {num_old} -> {num_new}"


# fact of a set -> its name in tables, and how its value is said
SET_FACTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "repeats": ("repeats", str),
    "sample_weight": ("weight of the loss", "{:g}".format),
    "caption_dropout": ("captions left out", "{:.0%}".format),
    "flip": ("may be mirrored", lambda value: "yes" if value else "no"),
}


def describe_set_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """'weight of the loss 1 -> 0.5' for all that differs between what readers know of two sets."""
    for fact, (name, say) in SET_FACTS.items():
        if before[fact] != after[fact]:
            yield f"{name} {say(before[fact])} -> {say(after[fact])}"


def describe_text_changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    """'--option before -> after' for all that differs between two text recipes in JSON, also for each set."""
    sets, own = before.get("sets", {}), after.get("sets", {})
    parts = [("", {**before, "sets": None}, {**after, "sets": None})]
    parts += [(f"set {name}: ", sets[name], own[name]) for name in sorted(sets.keys() & own.keys())]
    for where, old_part, new_part in parts:
        for at in sorted(old_part.keys() | new_part.keys()):
            old, new = old_part.get(at), new_part.get(at)
            if old != new:
                option = TEXT_OPTIONS.get(at, "--" + at.replace("_", "-"))
                if isinstance(old, bool) or isinstance(new, bool):
                    yield f"{where}{option}: {'yes' if old else 'no'} -> {'yes' if new else 'no'}"
                else:
                    yield f"{where}{option} {value_in_words(at, old)} -> {value_in_words(at, new)}"
