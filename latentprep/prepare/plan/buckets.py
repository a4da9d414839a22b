"""Pure arithmetic: which buckets there are, which one an image takes, and how it is scaled and cropped to it."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.records import Placement, Size

Verdict = tuple[str, str]  # reason, detail of a Skip
SMALLEST_PART = 0.02  # of an image, that its crop must keep
PlaceImage = Callable[[Size], Placement | Verdict]


def list_buckets(geometry: Geometry) -> list[Size]:
    """Every bucket of at most max_area pixels whose sides are multiples of bucket_step.

    For each side between min_side and max_side the largest other side that fits, both ways round, as in
    kohya-ss/sd-scripts (`make_bucket_resolutions`) and, before it, NovelAI's aspect ratio bucketing.
    Raises UserError where nothing fits.
    """
    assert geometry.resolution is not None
    assert geometry.bucket_step is not None
    assert geometry.min_side is not None
    assert geometry.max_side is not None
    step, area = geometry.bucket_step, geometry.max_area
    low, high = math.ceil(geometry.min_side / step) * step, geometry.max_side // step * step
    square = min(geometry.resolution // step * step, high)
    buckets = {(square, square)} if square >= low else set()
    for width in range(low, high + 1, step):
        height = min(high, area // width // step * step)
        if height >= low and max(height, width) <= (geometry.max_aspect or math.inf) * min(height, width):
            buckets |= {(height, width), (width, height)}
    if not buckets:
        raise UserError(
            f"--resolution {geometry.resolution} --bucket-step {step} --min-side {geometry.min_side} "
            f"--max-side {geometry.max_side}: no bucket fits. Lower --min-side or raise --resolution."
        )
    return sorted(buckets)


def describe_square(geometry: Geometry, factor: int) -> str | None:
    """What to say if square images do not get the resolution that was asked for; None if they do."""
    side, step = geometry.resolution, geometry.bucket_step
    if geometry.mode != "buckets" or side is None or step is None or side % step == 0 or geometry.area:
        return None
    square = side // step * step
    exact = next((n for n in range(step, 0, -1) if n % factor == 0 and side % n == 0), None)
    advice = f"--bucket-step {exact} gives {side}x{side}" if exact else f"{side} is no multiple of the model's {factor}"
    return (
        f"buckets  a square image becomes {square}x{square}: --resolution {side} is no multiple of --bucket-step "
        f"{step}; {advice}"
    )


def nearest_bucket(size: Size, buckets: list[Size]) -> Size:
    """The bucket nearest in aspect ratio (in its logarithm: least is cropped away); of equals the largest."""
    aspect = math.log(size[1] / size[0])
    return min(buckets, key=lambda b: (round(abs(math.log(b[1] / b[0]) - aspect), 9), -b[0] * b[1], b))


def make_place(geometry: Geometry, factor: int) -> PlaceImage:
    """A function from an image's size to its Placement, or to (reason, detail) where it has none."""
    geometry.check_factor(factor)
    if geometry.mode == "native":
        return lambda size: _check_sides(size, geometry) or _place_native(size, factor)
    if geometry.mode == "fixed":
        assert geometry.size is not None
        bucket = geometry.size
        return lambda size: _check_sides(size, geometry) or _check_kept(size, _place_fixed(size, bucket, geometry))
    buckets = list_buckets(geometry)
    return lambda size: _check_kept(size, _place_bucket(size, buckets, geometry))


def _check_sides(size: Size, geometry: Geometry) -> Verdict | None:
    height, width = size
    if geometry.min_side and min(size) < geometry.min_side:
        return "too_small", f"{width}x{height} < --min-side {geometry.min_side}"
    if geometry.max_side and max(size) > geometry.max_side:
        return "too_large", f"{width}x{height} > --max-side {geometry.max_side}"
    return None


def _check_kept(size: Size, found: Placement | Verdict) -> Placement | Verdict:
    """The placement, unless nearly all of the image would be cropped away: a strip shows nothing of what it was."""
    if isinstance(found, Placement) and (kept := 1 - cropped_away(found)) < SMALLEST_PART:
        (height, width), bucket = size, found.bucket
        return "extreme_aspect", f"of {width}x{height} its bucket {bucket[1]}x{bucket[0]} would keep {kept:.2%}"
    return found


def _place_native(size: Size, factor: int) -> Placement | Verdict:
    bucket = (size[0] // factor * factor, size[1] // factor * factor)
    if min(bucket) == 0:
        return "too_small", f"{size[1]}x{size[0]} < {factor}, the model's factor"
    return _centre(size, bucket)


def _place_fixed(size: Size, bucket: Size, geometry: Geometry) -> Placement | Verdict:
    if not geometry.upscale and geometry.fit != "pad" and (size[0] < bucket[0] or size[1] < bucket[1]):
        return "too_small", f"{size[1]}x{size[0]} < {bucket[1]}x{bucket[0]} and --no-upscale"
    return fit_to(size, bucket, geometry.fit, geometry.upscale)


def _place_bucket(size: Size, buckets: list[Size], geometry: Geometry) -> Placement | Verdict:
    if not geometry.upscale and geometry.fit != "pad":
        return _place_own(size, geometry)
    return fit_to(size, nearest_bucket(size, buckets), geometry.fit, geometry.upscale)


def _place_own(size: Size, geometry: Geometry) -> Placement | Verdict:
    """Placement of an image that is not to be enlarged, in a bucket of its own: its size cut to the step, or shrunk.

    As sd-scripts' bucket_no_upscale does (BucketManager.select_bucket), with a few more buckets to choose from.
    """
    assert geometry.resolution is not None
    assert geometry.bucket_step is not None
    assert geometry.min_side is not None
    assert geometry.max_side is not None
    step = geometry.bucket_step
    is_whole = size[0] * size[1] <= geometry.max_area and max(size) <= geometry.max_side
    if is_whole:
        bucket = (size[0] // step * step, size[1] // step * step)
    else:
        bucket = own_bucket(size, geometry.max_area, step, geometry.min_side, geometry.max_side)
    if min(bucket) < geometry.min_side:
        cut = f", cut to {bucket[1]}x{bucket[0]}," if min(size) >= geometry.min_side else ""
        return "too_small", f"{size[1]}x{size[0]}{cut} < --min-side {geometry.min_side}"
    if geometry.fit == "crop" and is_whole:
        return _centre(size, bucket)
    return fit_to(size, bucket, geometry.fit)


def own_bucket(size: Size, area: int, step: int, low: int, high: int) -> Size:
    """The bucket of at most `area` pixels that a larger image is shrunk to with the least loss; of equals the largest.

    Its sides are multiples of `step` from `low` to `high`, and no longer than the image's. It is one of the buckets
    around the image's own shape at that area: a side is rounded down, or by one step less or more, and the other is
    what then fits the aspect best, rounded down or up. (0, 0) if there is none.
    """
    height, width = size
    scale = min(1.0, math.sqrt(area / (height * width)), high / max(size))
    found: set[Size] = set()
    for more in (-1, 0, 1):
        rows = (int(height * scale) // step + more) * step
        columns = (int(width * scale) // step + more) * step
        for up in (0, 1):
            found.add((rows, (int(rows * width / height) // step + up) * step))
            found.add(((int(columns * height / width) // step + up) * step, columns))
    fitting = [
        (h, w) for h, w in found
        if h * w <= area and low <= min(h, w) and max(h, w) <= high and h <= height and w <= width
    ]  # fmt: skip

    def loss(bucket: Size) -> float:
        """Of the image, 0..1, by the crop."""
        aspect = (bucket[1] / bucket[0]) / (width / height)
        return 1 - min(aspect, 1 / aspect)

    return min(fitting, key=lambda bucket: (round(loss(bucket), 3), -bucket[0] * bucket[1], bucket), default=(0, 0))


def fit_to(size: Size, bucket: Size, fit: str, upscale: bool = True) -> Placement:
    """Placement of an image in a bucket. crop: cover it and cut evenly; pad: fit inside, centred; stretch: distort."""
    if fit == "stretch":
        return Placement(bucket, bucket, (0, 0, *bucket))
    scales = bucket[0] / size[0], bucket[1] / size[1]
    if fit == "pad":
        scale = min(scales) if upscale else min(1.0, *scales)
        inside = tuple(min(b, max(1, round(s * scale))) for b, s in zip(bucket, size, strict=True))
        return _centre((inside[0], inside[1]), bucket)
    scale = max(scales)
    covering = tuple(max(b, round(s * scale)) for b, s in zip(bucket, size, strict=True))
    return _centre((covering[0], covering[1]), bucket)


def _centre(resized: Size, bucket: Size) -> Placement:
    """The bucket's box in the middle of the resized image."""
    return Placement(bucket, resized, ((resized[0] - bucket[0]) // 2, (resized[1] - bucket[1]) // 2, *bucket))


def place_control(size: Size, target: Size, placement: Placement, fit: str, upscale: bool) -> Placement | Verdict:
    """Placement of a control image in the bucket of its target, or (reason, detail) where it has none.

    If both have one shape it is the target's own, so that what lies at one place in both stays at one place. Else the
    control image is fitted to the bucket by itself.
    """
    if has_shape_of(size, target):
        return placement
    return _check_kept(size, fit_to(size, placement.bucket, fit, upscale))


def place_own_control(size: Size, target: Size, placement: Placement, place: PlaceImage) -> Placement | Verdict:
    """Placement of a control image in a bucket of its own, or (reason, detail) where it has none.

    If both have one shape it is the target's, as in place_control.
    """
    return placement if has_shape_of(size, target) else place(size)


def with_controls(placement: Placement, buckets: Sequence[Size]) -> Placement:
    """The placement of a target whose control images have these buckets."""
    return replace(placement, controls=() if set(buckets) <= {placement.bucket} else tuple(buckets))


def has_shape_of(one: Size, other: Size) -> bool:
    """Whether two images have one aspect ratio, but for one pixel of the smaller: sides of a copy are rounded."""
    return abs(one[0] * other[1] - other[0] * one[1]) <= max(*one, *other)


def cropped_away(placement: Placement) -> float:
    """The part of the image, 0..1, that lies outside the crop."""
    (height, width), (_, _, box_height, box_width) = placement.resized_size, placement.crop
    return 1 - min(height, box_height) * min(width, box_width) / (height * width)
