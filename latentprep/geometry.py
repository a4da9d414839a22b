"""How an image becomes a bucket of pixels: sizes, fit and crops, checked."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from latentprep.errors import UserError, check_choice
from latentprep.records import Size

Fit = Literal["crop", "stretch", "pad"]
Crop = Literal["center", "random", "focus"]
Filter = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos"]
FITS, CROPS, FILTERS = (get_args(choices) for choices in (Fit, Crop, Filter))
LONGEST_SIDE = 2**20  # pixels, of --max-side and the like
MAX_SIDE = 2**14  # pixels; with twice this side, and a bucket for every step, a table takes seconds to make


@dataclass(frozen=True)
class Geometry:
    """How an image becomes a bucket of pixels. `mode` says which of the fields count."""

    mode: str  # buckets | fixed | native
    resolution: int | None = None  # buckets: a bucket has at most resolution x resolution pixels
    area: int | None = None  # buckets: at most so many instead, of which resolution is the root, rounded down
    size: Size | None = None  # fixed: (height, width)
    bucket_step: int | None = None  # buckets: both sides are multiples of it
    min_side: int | None = None
    max_side: int | None = None
    max_aspect: float | None = None  # buckets: longer side over shorter side
    upscale: bool = True
    fit: str = "crop"
    filter: str = "lanczos"
    crop: str = "center"
    crops: int = 1  # crops of each image, as views
    crop_seed: int | None = None  # of --crop random

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
        crop: str = "center",
        crops: int = 1,
        seed: int = 0,
    ) -> "Geometry":
        """The geometry that the options of the command line ask for. Raises UserError."""
        check_choice("--fit", fit, FITS)
        check_choice("--filter", filter, FILTERS)
        check_choice("--crop", crop, CROPS)
        if crops < 1:
            raise UserError(f"--crops {crops}: must be at least 1.")
        if crops > 1 and crop == "center":
            raise UserError(f"--crops {crops}: there is only one centre. Add --crop random or --crop focus.")
        if crop != "center" and (fit != "crop" or resolution == "native"):
            what = "--resolution native" if resolution == "native" else f"--fit {fit}"
            raise UserError(f"--crop {crop} with {what}: nothing is cropped there. Leave --crop out.")
        cropping: dict[str, Any] = {"crop": crop, "crops": crops, "crop_seed": seed if crop == "random" else None}
        for option, value in (("--min-side", min_side), ("--max-side", max_side), ("--bucket-step", bucket_step)):
            if value is not None and value < 1:
                raise UserError(f"{option} {value}: must be at least 1 pixel.")
            if value is not None and value > LONGEST_SIDE:
                raise UserError(f"{option} {value:.4g}: expected at most {LONGEST_SIDE:,} pixels.")
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
                upscale=upscale, fit=fit, filter=filter, **cropping,
            )  # fmt: skip
        if resolution == "native":
            if fit != "crop":
                raise UserError(f"--resolution native --fit {fit}: a native image is not resized. Leave --fit out.")
            return cls("native", min_side=min_side, max_side=max_side)
        side, area = parse_resolution(resolution)
        if side < bucket_step:
            raise UserError(
                f"--resolution {side}: smaller than --bucket-step {bucket_step}, so there is no bucket. "
                f"Try --bucket-step {max(8, side // 8 // 8 * 8)}."
            )
        if side > MAX_SIDE:
            raise UserError(f"--resolution {resolution}: expected at most {MAX_SIDE:,} pixels.")
        if not 1 <= max_aspect < math.inf:
            raise UserError(f"--max-aspect {max_aspect:g}: longer side over shorter side, so at least 1.")
        return cls(
            "buckets",
            resolution=side,
            area=area,
            bucket_step=bucket_step,
            min_side=min_side if min_side is not None else max(bucket_step, side // 2 if upscale else 0),
            max_side=max_side if max_side is not None else side * 2 if upscale else (area or side**2) // bucket_step,
            max_aspect=max_aspect,
            upscale=upscale,
            fit=fit,
            filter=filter,
            **cropping,
        )

    @property
    def max_area(self) -> int:
        """Pixels of a bucket, at most. Only of mode "buckets"."""
        assert self.resolution is not None
        return self.area or self.resolution**2

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
                    f"{option} {value}: not a multiple of {factor}, this model's factor. "
                    f"Try {(value // factor + 1) * factor}."
                )


def parse_resolution(text: str) -> tuple[int, int | None]:
    """--resolution as the side of a square in pixels; of WIDTHxHEIGHT also the product. Raises UserError."""
    width, height = parse_sides(text)
    side = math.isqrt(width * height)
    return side, None if side**2 == width * height else width * height


def parse_sides(text: str) -> tuple[int, int]:
    """--resolution as width and height in pixels; one number is both. Raises UserError.

    A comma between them will do too, as in kohya's sd-scripts.
    """
    sides = text.lower().replace(",", "x").split("x")
    if len(sides) > 2 or not all(side.isdecimal() and len(side) < 9 and int(side) for side in sides):
        raise UserError(f"--resolution {text}: expected a number of pixels, such as 512 or 768x512, or 'native'.")
    return int(sides[0]), int(sides[-1])
