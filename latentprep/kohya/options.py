"""A dataset of sd-scripts -> what its cache has for all of its images: sizes, views, weights, filter."""

from collections.abc import Mapping, Sequence
from typing import Any

from latentprep.errors import UserError
from latentprep.human import shortened

FILTERS = {
    "lanczos": "lanczos", "lanczos4": "lanczos", "bicubic": "bicubic", "cubic": "bicubic", "bilinear": "bilinear",
    "linear": "bilinear", "nearest": "nearest", "area": "box", "box": "box",
}  # fmt: skip


def bucket_options(where: str, dataset: Mapping[str, Any], width: int, height: int) -> dict[str, Any]:
    """Sizes as options: one size, or buckets. Raises UserError."""
    if not dataset.get("enable_bucket", False):
        return {"width": width, "height": height}
    step = dataset.get("bucket_reso_steps", 64)
    if step < 1:
        raise UserError(f"{where}: bucket_reso_steps = {step}: expected at least 1.")
    options = {"resolution": width if width == height else f"{width}x{height}", "bucket_step": step}
    if dataset.get("bucket_no_upscale", False):  # sd-scripts looks at no limits then
        return {**options, "no_upscale": True}
    least, most = dataset.get("min_bucket_reso", 256), dataset.get("max_bucket_reso", 1024)
    low, high = least - least % step, -(-most // step) * step
    if not 0 < low <= min(width, height) or high < max(width, height):
        raise UserError(
            f"{where}: min_bucket_reso = {least} and max_bucket_reso = {most}: the resolution {width}x{height} is to "
            "lie between them."
        )
    return {**options, "min_side": low, "max_side": high, "max_aspect": float(high) / low}


def common_options(where: str, subsets: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Options that a cache has once: on if a subset asks for them. Raises UserError if resize_interpolation differs."""
    options: dict[str, Any] = {
        "flip": any(subset.get("flip_aug") for subset in subsets),
        "weights": "alpha" if any(subset.get("alpha_mask") for subset in subsets) else "none",
    }
    if any(subset.get("random_crop") for subset in subsets):
        options["crop"] = "random"
    names = {subset.get("resize_interpolation") for subset in subsets}
    if len(names) > 1:
        raise UserError(f"{where}: resize_interpolation differs between its subsets, and a cache has one. Part them.")
    if (name := names.pop()) is not None:
        if name not in FILTERS:
            raise UserError(f"{where}: resize_interpolation = {shortened(name)}: expected one of {', '.join(FILTERS)}.")
        options["filter"] = FILTERS[name]
    return options
