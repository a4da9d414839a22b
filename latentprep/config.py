"""Options, checked once where they enter; and the recipe: everything that decides the numbers in a cache."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.records import Size

FITS = ("crop", "stretch", "pad")
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
STORES = ("mean+std", "mean")
DTYPES = ("float32", "float16", "bfloat16")
DEFAULT_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


@dataclass(frozen=True)
class Geometry:
    """How an image becomes a bucket of pixels. `mode` says which of the fields count."""

    mode: str  # buckets | fixed | native
    resolution: int | None = None  # buckets: a bucket has at most resolution x resolution pixels
    size: Size | None = None  # fixed: (height, width)
    bucket_step: int | None = None  # buckets: both sides are multiples of it
    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None  # buckets: longer side over shorter side
    upscale: bool = True
    fit: str = "crop"
    filter: str = "lanczos"

    @classmethod
    def from_options(
        cls,
        *,
        resolution: str = "512",
        width: int | None = None,
        height: int | None = None,
        bucket_step: int = 64,
        min_side: int | None = None,
        max_side: int | None = None,
        max_aspect: float = 4.0,
        upscale: bool = True,
        fit: str = "crop",
        filter: str = "lanczos",  # noqa: A002
    ) -> "Geometry":
        """The geometry that the options of the command line ask for. Raises UserError."""
        check_choice("--fit", fit, FITS)
        check_choice("--filter", filter, FILTERS)
        for option, value in (("--min-side", min_side), ("--max-side", max_side), ("--bucket-step", bucket_step)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: must be at least 1 pixel.")
        if min_side is not None and max_side is not None and min_side > max_side:
            raise UserError(f"--min-side {min_side}: larger than --max-side {max_side}.")
        if (width is None) != (height is None):
            given, missing = ("--width", "--height") if height is None else ("--height", "--width")
            raise UserError(f"{given} without {missing}: a fixed size needs both.")
        if width is not None and height is not None:
            if width < 1 or height < 1:
                raise UserError(f"--width {width} --height {height}: both must be at least 1 pixel.")
            return cls(
                "fixed", size=(height, width), min_side=min_side, max_side=max_side,
                upscale=upscale, fit=fit, filter=filter,
            )  # fmt: skip
        if resolution == "native":
            if fit != "crop":
                raise UserError(f"--resolution native --fit {fit}: a native image is not resized. Leave --fit out.")
            return cls("native", min_side=min_side, max_side=max_side)
        if not resolution.isdigit() or int(resolution) < 1:
            raise UserError(f"--resolution {resolution}: expected a number of pixels, such as 512, or 'native'.")
        side = int(resolution)
        if side < bucket_step:
            raise UserError(
                f"--resolution {side}: smaller than --bucket-step {bucket_step}, so there is no bucket. "
                f"Try --bucket-step {max(8, side // 8 // 8 * 8)}."
            )
        if max_aspect < 1:
            raise UserError(f"--max-aspect {max_aspect:g}: longer side over shorter side, so at least 1.")
        return cls(
            "buckets",
            resolution=side,
            bucket_step=bucket_step,
            min_side=min_side if min_side is not None else max(bucket_step, side // 2),
            max_side=max_side if max_side is not None else side * 2,
            max_aspect=max_aspect,
            upscale=upscale,
            fit=fit,
            filter=filter,
        )

    @property
    def longest_side(self) -> int | None:
        """Longest side of a bucket in pixels; None: as long as the images."""
        return max(self.size) if self.size is not None else self.max_side

    def check_factor(self, factor: int) -> None:
        """Raise UserError where this VAE's spatial factor does not divide the sides."""
        sides: list[tuple[str, int]] = []
        if self.bucket_step is not None:
            sides.append(("--bucket-step", self.bucket_step))
        if self.size is not None:
            sides += [("--width", self.size[1]), ("--height", self.size[0])]
        for option, value in sides:
            if value % factor:
                raise UserError(
                    f"{option} {value}: not a multiple of {factor}, this VAE's factor. "
                    f"Try {(value // factor + 1) * factor}."
                )


@dataclass(frozen=True)
class TextOptions:
    """How captions are found and become prompts."""

    template: tuple[str, ...] | None = None  # the lines of a template; None: the prompt is the caption
    placeholder: str = ""  # for [name]
    word_regex: str = ""  # for captions from file names
    joiner: str = " "
    include_cond: bool = True


@dataclass(frozen=True)
class EncodeOptions:
    """Everything that `latentprep encode` was told."""

    source: Path
    out: str
    geometry: Geometry
    text: TextOptions
    model: str = DEFAULT_MODEL
    vae: str | None = None
    flip: bool = False
    store: str = "mean+std"
    store_dtype: str = "float16"
    device: str = "auto"
    dtype: str = "auto"
    tiling: int | None = None  # larger images are encoded in tiles of this side in pixels; None: none are
    compile: bool = False  # torch.compile the VAE's encoder
    batch_size: int | None = None
    workers: int | None = None
    shard_bytes: int | None = None  # None: devices.default_shard_bytes
    max_pixels: int = 180_000_000  # of an image file; a little more than Pillow's own limit
    seed: int = 0
    overwrite: bool = False
    strict: bool = False

    def __post_init__(self) -> None:
        check_choice("--store", self.store, STORES)
        check_choice("--store-dtype", self.store_dtype, DTYPES)
        check_choice("--dtype", self.dtype, ("auto", *DTYPES))
        for option, value in (("--batch-size", self.batch_size), ("--workers", self.workers)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: must be at least 1.")
        if self.max_pixels < 1:
            raise UserError("--max-megapixels: must be more than 0.")
        lines = self.text.template or ()
        if any("[name]" in line for line in lines) and not self.text.placeholder:
            raise UserError(
                '--template uses [name], without a --placeholder. Say what [name] stands for: --placeholder "sks dog".'
            )

    def check_tiling(self, factor: int) -> None:
        """Raise UserError where tiles of a VAE of this factor cannot have that side, or no image would be cut."""
        if self.tiling is None:
            return
        step = 4 * factor  # tiles overlap by a quarter (diffusers' tile_overlap_factor), which is to be whole latents
        if self.tiling < step or self.tiling % step:
            raise UserError(
                f"--tiling {self.tiling}: not a multiple of {step}, four of this VAE's latents, of which tiles share "
                f"one. Try {max(1, self.tiling // step + 1) * step}."
            )
        longest = self.geometry.longest_side
        if longest is not None and longest <= self.tiling:
            raise UserError(
                f"--tiling {self.tiling}: no bucket is larger, their sides are at most {longest} pixels. "
                "Give fewer, or leave it out."
            )


def check_choice(option: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{option} {value}: expected one of {', '.join(choices)}.")


def digest_of(value: Any) -> str:
    """32 hex digits: BLAKE2b of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def latents_recipe(
    *, vae: str, geometry: Geometry, flip: bool, dtype: str, store: str, store_dtype: str, tiling: int | None = None
) -> dict[str, Any]:
    """What decides the numbers in the latents files; `vae` is the hash of its weights and config."""
    used = {name: value for name, value in asdict(geometry).items() if value is not None}
    if geometry.size is not None:
        used["size"] = list(geometry.size)
    return {
        "vae": vae,
        "geometry": used,
        "views": ["plain", "flipped"] if flip else ["plain"],
        "dtype": dtype,
        "store": store,
        "store_dtype": store_dtype,
        **({"tiling": tiling} if tiling is not None else {}),
    }


def text_recipe(
    *, text_encoder: str | None, options: TextOptions, seed: int, dtype: str, store_dtype: str
) -> dict[str, Any]:
    """What decides the text files, captions aside; `text_encoder` is the hash of its weights, config and tokenizer."""
    return {
        "text_encoder": text_encoder,
        "template": list(options.template) if options.template is not None else None,
        "placeholder": options.placeholder,
        "seed": seed if options.template is not None else None,
        "dtype": dtype if text_encoder else None,
        "store_dtype": store_dtype if text_encoder else None,
    }


def recipe_changes(before: Any, after: Any, at: str = "") -> Iterator[str]:
    """'field: value before -> value after' for every leaf that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from recipe_changes(before.get(name), after.get(name), f"{at}.{name}" if at else name)
    elif before != after:
        yield f"{at}: {json.dumps(before)} -> {json.dumps(after)}"
