"""prepare/buckets.py: the arithmetic, over grids, against what must hold for every size."""

import itertools
import math
import random
import re

import pytest

from latentprep.errors import UserError
from latentprep.geometry import Geometry
from latentprep.prepare.plan.buckets import cropped_away, describe_square, list_buckets, make_place, nearest_bucket
from latentprep.records import Placement

SIZES = [*itertools.product((48, 63, 64, 65, 200, 333, 512, 777, 1024, 4000), repeat=2), (100, 3000)]


def test_buckets_of_512_are_those_of_sd_scripts():
    found = list_buckets(Geometry.from_options(resolution="512"))
    wide = [576, 640, 704, 768, 832, 896, 960, 1024]
    wanted = {(512, 512), *zip((448, 384, 320, 320, 256, 256, 256, 256), wide, strict=True)}
    assert set(found) == wanted | {(width, height) for height, width in wanted}


@pytest.mark.parametrize(("resolution", "step"), [("512", 64), ("768", 64), ("1024", 32), ("500", 8)])
def test_buckets_are_multiples_of_the_step_and_never_too_large(resolution, step):
    geometry = Geometry.from_options(resolution=resolution, bucket_step=step)
    for height, width in list_buckets(geometry):
        assert height % step == 0
        assert width % step == 0
        assert height * width <= int(resolution) ** 2
        assert geometry.min_side <= min(height, width)
        assert max(height, width) <= geometry.max_side
        grown = [(height + step, width), (height, width + step)]  # one way round at least, there is no larger one
        assert height == width or any(h * w > int(resolution) ** 2 or max(h, w) > geometry.max_side for h, w in grown)


def test_max_aspect_and_sides_limit_the_buckets():
    geometry = Geometry.from_options(resolution="512", max_aspect=1.5, min_side=384, max_side=640)
    assert list_buckets(geometry) == [(448, 576), (512, 512), (576, 448)]


def test_no_bucket_is_an_error_that_says_what_to_change():
    with pytest.raises(UserError, match=r"no bucket fits. Lower --min-side"):
        list_buckets(Geometry.from_options(resolution="512", min_side=800, max_side=1000))


def test_nearest_bucket_crops_least():
    buckets = list_buckets(Geometry.from_options(resolution="512"))
    for size in SIZES:
        aspect = size[1] / size[0]
        lost = {b: 1 - min(aspect * b[0] / b[1], b[1] / (aspect * b[0])) for b in buckets}
        assert lost[nearest_bucket(size, buckets)] == pytest.approx(min(lost.values()))


@pytest.mark.parametrize("fit", ["crop", "stretch", "pad"])
@pytest.mark.parametrize("upscale", [True, False])
@pytest.mark.parametrize("fixed", [True, False])
def test_every_placement_is_consistent(fit, upscale, fixed):
    options = {"width": 320, "height": 192} if fixed else {"resolution": "256"}
    place = make_place(Geometry.from_options(**options, fit=fit, upscale=upscale), 8)
    for size in SIZES:
        placement = place(size)
        if not isinstance(placement, Placement):
            if placement[0] == "extreme_aspect":
                assert fit == "crop"
                assert max(size) / min(size) > 50 / (320 / 192)
                continue
            assert placement[0] == "too_small"
            assert not upscale
            continue
        (height, width), (top, left, box_height, box_width) = placement.resized_size, placement.crop
        assert (box_height, box_width) == placement.bucket
        assert placement.bucket[0] % 8 == placement.bucket[1] % 8 == 0
        if fit == "crop":
            assert 0 <= top <= height - box_height
            assert 0 <= left <= width - box_width
            assert top in ((height - box_height) // 2, (height - box_height + 1) // 2)
            assert box_height in (height, box_height)
            assert height == box_height or width == box_width or size == placement.resized_size
        if fit == "pad":
            assert top <= 0
            assert left <= 0
            assert height <= box_height
            assert width <= box_width
        if fit == "stretch":
            assert placement.resized_size == placement.bucket
            assert (top, left) == (0, 0)
        else:  # the aspect ratio is kept, but for rounding to whole pixels
            assert abs(height * size[1] / size[0] - width) <= max(1, size[1] / size[0]) * 0.51 + 0.5
        if not upscale:
            assert not placement.enlarges(size)
        assert 0 <= cropped_away(placement) < 1


def test_no_upscale_keeps_a_small_images_own_pixels():
    place = make_place(Geometry.from_options(resolution="512", upscale=False, min_side=128), 8)
    assert place((300, 200)) == Placement((256, 192), (300, 200), (22, 4, 256, 192))
    assert place((100, 200)) == ("too_small", "200x100 < --min-side 128")
    long = place((240, 3000))  # of more pixels than a bucket: shrunk to one of its own, and never enlarged
    assert long == Placement((128, 1600), (128, 1600), (0, 0, 128, 1600))
    assert place((400, 1400)).resized_size == (256, 896)


def test_native_cuts_to_the_factor_and_resizes_nothing():
    place = make_place(Geometry.from_options(resolution="native"), 8)
    assert place((123, 457)) == Placement((120, 456), (123, 457), (1, 0, 120, 456))
    assert place((7, 100))[0] == "too_small"
    place = make_place(Geometry.from_options(resolution="native", min_side=64, max_side=1000), 8)
    assert place((63, 100)) == ("too_small", "100x63 < --min-side 64")
    assert place((64, 1001)) == ("too_large", "1001x64 > --max-side 1000")


def test_fixed_size_is_height_and_width_not_width_and_height():
    place = make_place(Geometry.from_options(width=640, height=320, fit="stretch"), 8)
    assert place((100, 100)).bucket == (320, 640)


def test_cropped_away_is_the_lost_area():
    place = make_place(Geometry.from_options(width=64, height=64), 8)
    assert cropped_away(place((64, 128))) == pytest.approx(0.5)
    assert cropped_away(place((128, 128))) == 0
    assert math.isclose(
        cropped_away(make_place(Geometry.from_options(width=64, height=64, fit="pad"), 8)((64, 128))), 0
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bucket_step": 20}, "--bucket-step 20: not a multiple of 8, this model's factor. Try 24."),
        ({"width": 500, "height": 512}, "--width 500: not a multiple of 8, this model's factor. Try 504."),
        ({"width": 512, "height": 1}, "--height 1: not a multiple of 8, this model's factor. Try 8."),
    ],
)
def test_sides_that_the_factor_does_not_divide(options, message):
    with pytest.raises(UserError) as error:
        make_place(Geometry.from_options(**options), 8)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"resolution": "big"}, "--resolution big: expected a number of pixels, such as 512 or 768x512, or 'native'."),
        ({"resolution": "32"}, "--resolution 32: smaller than --bucket-step 64"),
        ({"resolution": "0"}, "--resolution 0: expected a number"),
        ({"width": 512}, "--width without --height: a fixed size needs both."),
        ({"height": 512}, "--height without --width: a fixed size needs both."),
        ({"fit": "squash"}, "--fit squash: expected one of crop, stretch, pad."),
        ({"filter": "sinc"}, "--filter sinc: expected one of nearest, box,"),
        ({"min_side": 600, "max_side": 500}, "--min-side 600: larger than --max-side 500."),
        ({"bucket_step": 0}, "--bucket-step 0: must be at least 1 pixel."),
        ({"max_aspect": 0.5}, "--max-aspect 0.5: longer side over shorter side, so at least 1."),
        ({"resolution": "native", "fit": "pad"}, "--resolution native --fit pad: a native image is not resized."),
    ],
)
def test_wrong_options_are_one_clear_line(options, message):
    with pytest.raises(UserError) as error:
        Geometry.from_options(**options)
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def kohya_bucket(size, area, step):
    """sd-scripts' rule for bucket_no_upscale, written anew: scale to the area, round one side or the other down."""
    height, width = size
    if height * width > area:
        aspect = width / height
        ideal_width, ideal_height = math.sqrt(area * aspect), math.sqrt(area / aspect)
        by_width = int(ideal_width + 0.5) // step * step
        by_width = (int(by_width / aspect + 0.5) // step * step, by_width)
        by_height = int(ideal_height + 0.5) // step * step
        by_height = (by_height, int(by_height * aspect + 0.5) // step * step)
        errors = [abs(w / h - aspect) if h and w else math.inf for h, w in (by_width, by_height)]
        return by_width if errors[0] < errors[1] else by_height
    return height // step * step, width // step * step


def loss_of(size, bucket):
    """What is cropped away once an image covers a bucket; of one that is not scaled, what lies outside of it."""
    if not all(bucket):
        return None
    scale = max(bucket[0] / size[0], bucket[1] / size[1])
    if size[0] * size[1] <= 512 * 512:
        scale = 1
    return 1 - bucket[0] * bucket[1] / (size[0] * size[1] * scale**2)


def test_no_upscale_crops_no_more_than_kohyas_rule():
    dice = random.Random(0)
    geometry = Geometry.from_options(upscale=False)
    place = make_place(geometry, 8)
    ours, theirs, skipped = [], [], 0
    for _ in range(5000):
        size = round(math.exp(dice.uniform(4.2, 8.3))), round(math.exp(dice.uniform(4.2, 8.3)))
        found, wanted = place(size), loss_of(size, kohya_bucket(size, 512 * 512, 64))
        if not isinstance(found, Placement):
            skipped += 1
            assert wanted is None or wanted > 0.9, size
            continue
        height, width = found.bucket
        assert height % 64 == width % 64 == 0
        assert height * width <= 512 * 512
        assert not found.enlarges(size)
        ours.append(cropped_away(found))
        theirs.append(wanted if wanted is not None else 1)
    assert skipped < 250
    assert sum(ours) <= sum(theirs)
    assert max(ours) <= 0.75  # 127 pixels cut to 64, both ways


def test_an_image_that_is_long_and_low_keeps_nearly_all():
    found = make_place(Geometry.from_options(upscale=False), 8)((395, 3509))
    assert cropped_away(found) < 0.05


@pytest.mark.parametrize(
    ("resolution", "step", "factor", "said"),
    [
        (512, 64, 8, None),
        (500, 64, 8, "becomes 448x448: --resolution 500 is no multiple of --bucket-step 64; 500 is no"),
        (
            520,
            64,
            8,
            "becomes 512x512: --resolution 520 is no multiple of --bucket-step 64; --bucket-step 40 gives 520x",
        ),
        (1000, 64, 8, "becomes 960x960: --resolution 1000 is no multiple of --bucket-step 64; --bucket-step 40 gives"),
        (100, 64, 4, "becomes 64x64: --resolution 100 is no multiple of --bucket-step 64; --bucket-step 20 gives 100x"),
    ],
)
def test_a_resolution_that_square_images_do_not_get_is_said(resolution, step, factor, said):
    geometry = Geometry.from_options(resolution=str(resolution), bucket_step=step)
    found = describe_square(geometry, factor)
    assert found is None if said is None else said in found
    if said is not None and "gives" in said:
        exact = int(re.search(r"--bucket-step (\d+) gives", found)[1])
        assert (resolution, resolution) in list_buckets(
            Geometry.from_options(resolution=str(resolution), bucket_step=exact)
        )
    assert describe_square(Geometry.from_options(resolution="native"), 8) is None
    assert describe_square(Geometry.from_options(width=500, height=500), 8) is None


def test_it_is_said_before_anything_is_encoded(run, images):
    result = run("encode", images, "--model", "tiny", "--resolution", 100, "--dry-run")
    assert "buckets  a square image becomes 64x64: --resolution 100 is no multiple of --bucket-step 64" in result.err


@pytest.mark.parametrize("text", ["768x512", "512X768", "768,512"])
def test_a_resolution_of_two_sides_is_so_many_pixels(text):
    geometry = Geometry.from_options(resolution=text)
    buckets = list_buckets(geometry)
    assert geometry.max_area == 768 * 512
    assert {(512, 768), (768, 512)} <= set(buckets)
    assert max(height * width for height, width in buckets) == 768 * 512
    assert max(b for b in buckets if b[0] == b[1]) == (576, 576)  # the root of it is 627
    plan = make_place(Geometry.from_options(resolution=text, upscale=False), 8)
    assert plan((2000, 3000)).bucket == (512, 768)


def test_two_equal_sides_are_one():
    assert Geometry.from_options(resolution="512x512") == Geometry.from_options(resolution="512")


@pytest.mark.parametrize("text", ["512x", "x512", "0x512", "1x2x3", "512*512", "-5", "5.5", "1e3", "512 x 512"])
def test_what_is_no_resolution_is_refused(text):
    with pytest.raises(UserError, match="expected a number of pixels, such as 512 or 768x512"):
        Geometry.from_options(resolution=text)
