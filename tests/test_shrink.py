"""prepare/images/shrink.py, decode.decode_plain: the fast way gives what Pillow gives, the same notes and skips."""

import io
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image, ImageCms

from latentprep.cache.manifest import commit, open_manifest
from latentprep.cache.storage import Storage
from latentprep.prepare.images import decode as decode_module
from latentprep.prepare.images import load as load_module
from latentprep.prepare.images.color import is_srgb_profile
from latentprep.prepare.images.jpeg import decode_sound
from latentprep.prepare.images.shrink import shrink, shrink_image, torch_has_lanczos
from latentprep.records import Skip
from tests.conftest import PHOTOS, SMALL, find_photo, gradient
from tests.test_damage import DAMAGE, as_jpeg, jpegs
from tests.test_load import load, load_views, save

needs_lanczos = pytest.mark.skipif(
    not torch_has_lanczos(), reason="this torch has no LANCZOS, or this processor no AVX2"
)


def sharp(width, height):
    """Real photos side by side, at their own pixels: sharper than any photo of that size."""
    parts = [Image.open(find_photo(name)).convert("RGB").crop((0, 0, 300, 200)) for name in PHOTOS]
    image = Image.new("RGB", (width, height))
    for n in range(-(-width // 300) * -(-height // 200)):
        across, down = n % -(-width // 300), n // -(-width // 300)
        image.paste(parts[(n * 5 + down) % len(parts)], (300 * across, 200 * down))
    return image


def zone_plate(side):
    """Rings that become finer from the middle to the edge, where they are as fine as pixels can show."""
    rows, columns = np.mgrid[0:side, 0:side] - (side - 1) / 2
    rings = 127.5 + 127.5 * np.cos(np.pi * (rows**2 + columns**2) / side)
    return Image.fromarray(rings.round().astype(np.uint8)).convert("RGB")


def distance(found, wanted):
    """Mean and largest difference in levels of 0 to 255, and the mean with its sign."""
    error = np.asarray(found).astype(int) - np.asarray(wanted)
    return np.abs(error).mean(), np.abs(error).max(), error.mean()


@needs_lanczos
@pytest.mark.parametrize("make", [sharp, lambda width, height: zone_plate(height)], ids=["photos", "zone plate"])
@pytest.mark.parametrize("scale", [1.01, 1.5, 2, 3.35, 7.7, 20, 100])
def test_torch_is_within_two_levels_of_pillow(make, scale):
    image = make(1003, 701)
    size = max(1, round(image.height / scale)), max(1, round(image.width / scale))
    wanted = image.resize(size[::-1], Image.LANCZOS)
    for whole in (True, False):
        extent = (image.height, image.width) if whole else (image.height - 0.5, image.width - 0.25)
        if not whole:
            wanted = image.resize(size[::-1], Image.LANCZOS, box=(0, 0, extent[1], extent[0]))
        found = shrink(np.array(image), size, extent)
        mean, largest, signed = distance(found, wanted)
        assert largest <= 2
        assert mean < 0.05
        assert abs(signed) < 0.05
        assert np.array_equal(shrink_image(image, size, extent), found)


@needs_lanczos
def test_images_of_many_strips_have_no_seams():
    image = sharp(3000, 1100)
    assert distance(shrink_image(image, (333, 909), (1100, 3000)), image.resize((909, 333), Image.LANCZOS))[1] <= 1


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA", "P", "I;16", "LA"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_files_of_every_mode_are_near_pillow(tmp_path, mode, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = sharp(607, 403)
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257)
    else:
        image = image.convert(mode)
    if mode in ("RGBA", "LA"):
        image.putalpha(Image.linear_gradient("L").resize(image.size))
    path = save(tmp_path, image, exif=exif)
    found, exact = load(path, resolution="128"), load(path, resolution="128", draft=False)
    assert distance(found.pixels, exact.pixels)[1] <= 1
    assert (found.notes, found.crops) == (exact.notes, exact.crops)
    assert np.array_equal(found.weight, exact.weight) if exact.weight is not None else found.weight is None


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("options", [{"resolution": "400"}, {"width": 400, "height": 248, "fit": "pad"}])
def test_a_jpeg_lies_as_pillow_has_it(tmp_path, orientation, options):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, sharp(607, 403), "x.jpg", exif=exif)
    found, exact = load(path, **options), load(path, **options, draft=False)
    assert distance(found.pixels, exact.pixels)[1] <= 2
    assert distance(found.pixels, exact.pixels)[0] < 0.02
    assert (found.notes, found.crops) == (exact.notes, exact.crops)


@pytest.mark.parametrize("options", [{"resolution": "native"}, {"width": 800, "height": 800, "fit": "stretch"}])
def test_a_jpeg_that_is_not_shrunk_is_pillows(tmp_path, options):
    path = save(tmp_path, sharp(607, 403), "x.jpg")
    assert np.array_equal(load(path, **options).pixels, load(path, **options, draft=False).pixels)


@pytest.mark.parametrize("name", ["nearest", "box", "bilinear", "bicubic"])
@pytest.mark.parametrize("orientation", [1, 6])
def test_other_filters_are_pillows(tmp_path, name, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, sharp(607, 403), "x.jpg", exif=exif)
    found, exact = (load(path, name, width=320, height=320, fit="stretch", draft=draft) for draft in (True, False))
    assert np.array_equal(found.pixels, exact.pixels)


@pytest.mark.parametrize("name", ["x.png", "x.jpg"])
def test_without_lanczos_in_torch_pixels_are_pillows(tmp_path, monkeypatch, name):
    monkeypatch.setattr(load_module, "torch_has_lanczos", lambda: False)
    path = save(tmp_path, sharp(607, 403), name)
    options = {"width": 320, "height": 320, "fit": "stretch"}
    assert np.array_equal(load(path, **options).pixels, load(path, **options, draft=False).pixels)


# --- JPEGs in one pass


WAYS = (
    {}, {"progressive": True}, {"subsampling": 0}, {"subsampling": 1}, {"quality": 30}, {"restart_marker_rows": 1},
    {"keep_rgb": True, "subsampling": 0}, {"optimize": True},
)  # fmt: skip


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.parametrize("size", [(607, 403), (608, 400), (9, 1), (17, 16)])
def test_a_sound_jpeg_has_pillows_pixels(mode, size):
    for way in WAYS:
        if mode == "L" and "keep_rgb" in way:
            continue
        data = as_jpeg(sharp(*size).convert(mode), **way)
        for divisor in (1, 2, 4, 8):
            image = Image.open(io.BytesIO(data))
            width, height = (-(-side // divisor) for side in size)
            image.draft(None, (max(1, size[0] // divisor), max(1, size[1] // divisor)))
            if image.size != (width, height):  # Pillow's draft goes by the shorter side
                continue
            assert np.array_equal(decode_sound(data, size[::-1], divisor), np.asarray(image.convert("RGB"))), way


def never(*_, **__):
    raise AssertionError


@pytest.mark.parametrize("draft", [True, False])
def test_a_sound_jpeg_is_decoded_once_unless_it_is_to_be_pillows(tmp_path, monkeypatch, draft):
    path = save(tmp_path, sharp(607, 403), "x.jpg")
    monkeypatch.setattr(decode_module, "check_jpeg" if draft else "decode_sound", never)
    assert load(path, resolution="128", draft=draft).notes == ()


def test_a_jpeg_of_another_size_than_pillow_reads_is_not_decoded(monkeypatch):
    data = as_jpeg(sharp(607, 403))
    monkeypatch.setattr("simplejpeg.decode_jpeg", never)
    assert decode_sound(data, (8, 8), 1) is None


def slowly(path, monkeypatch, **options):
    """What the usual way makes of a file."""
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "decode_plain", lambda *_: None)
        return load_views(path, **options)


def agree(found, wanted):
    """Whether two results are the same, pixels within a level."""
    if isinstance(found, Skip) or isinstance(wanted, Skip):
        return found == wanted
    return found.notes == wanted.notes and distance(found.pixels, wanted.pixels)[1] <= 1


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_jpegs_are_told_as_before(tmp_path, monkeypatch, kind):
    for n, data in enumerate(jpegs()[:6]):
        path = tmp_path / f"{n}.jpg"
        path.write_bytes(DAMAGE[kind](data))
        assert agree(load_views(path, resolution="64"), slowly(path, monkeypatch, resolution="64"))


def test_jpegs_of_every_kind_are_told_as_before(tmp_path, monkeypatch):
    for n, data in enumerate(jpegs()):
        path = tmp_path / f"{n}.jpg"
        for end in (len(data), len(data) - 2, len(data) // 2, 300):
            path.write_bytes(data[:end])
            assert agree(load_views(path, resolution="128"), slowly(path, monkeypatch, resolution="128"))


def test_a_profile_is_read_before_the_fast_way_is_taken(tmp_path, monkeypatch):
    adobe = Image.open(find_photo("skimage/data/rocket.jpg")).info["icc_profile"]
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert [is_srgb_profile(profile) for profile in (adobe, srgb, b"no profile")] == [False, True, False]
    for profile, notes in ((adobe, ("icc_to_srgb",)), (srgb, ()), (b"no profile", ("icc_unusable",))):
        path = save(tmp_path, gradient(300, 200), "x.jpg", icc_profile=profile)
        found = load_views(path, resolution="128")
        assert found.notes == notes
        assert agree(found, slowly(path, monkeypatch, resolution="128"))


# --- what a cache says of it


@needs_lanczos
def test_a_cache_says_what_shrank_its_images_and_an_older_one_goes_on(run, images, tmp_path):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL)
    assert run(*command).code == 0
    storage = Storage(tmp_path / "c")
    manifest = open_manifest(storage)
    assert manifest.recipe.libraries["resize"] == "torch"
    older = {name: version for name, version in manifest.recipe.libraries.items() if name != "resize"}
    commit(storage, replace(manifest, recipe=replace(manifest.recipe, libraries=older)), [])
    gradient(64, 96).save(images / "more.png")
    result = run(*command)
    assert result.code == 0
    assert 'versions resize: null -> "torch": latents that are new may differ from the others' in result.err
    assert run(*command, "--dry-run").err.count("versions") == 0
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", "9").code == 0


@pytest.mark.parametrize("options", [("--no-draft",), ("--filter", "bicubic")])
def test_pixels_that_are_pillows_are_not_said_to_be_torchs(run, images, tmp_path, options):
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *options).code == 0
    assert "resize" not in open_manifest(Storage(tmp_path / "c")).recipe.libraries
