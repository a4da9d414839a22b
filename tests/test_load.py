"""prepare/images/load.py: pixels and weight maps, against Pillow's own results."""

import hashlib
import io
import struct
import zlib
from dataclasses import replace

import numpy as np
import PIL
import pytest
from PIL import Image, ImageCms, ImageOps

from latentprep.geometry import FILTERS, Geometry
from latentprep.options import ImageOptions
from latentprep.prepare.images.load import LoadOptions, load_pixels
from latentprep.prepare.models.vae_encoder import LEVELS
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.source.masks import add_masks, list_masks
from latentprep.prepare.source.sources import open_source
from latentprep.recipe import LatentsRecipe
from latentprep.records import Pixels, Skip
from tests.conftest import PHOTOS, find_photo, gradient, read_item


def load_views(path, *, folder=None, masks=None, animated="first", background="auto", draft=True, **geometry):
    """What load_pixels makes of a file, by the options of the command line; `masks` is a folder."""
    geometry = Geometry.from_options(**geometry)
    found_masks = list_masks(masks) if masks is not None else None
    images = ImageOptions.from_options(
        background=background, weights=str(masks or "alpha"), animated=animated, draft=draft
    )
    recipe = LatentsRecipe.of(
        vae="", geometry=geometry, images=images, flip=False, dtype="float32", store="mean", store_dtype="float32"
    )
    item = read_item(path, path.name)
    if isinstance(item, Skip):
        return item
    if found_masks is not None:
        ((item,), _) = add_masks([item], found_masks)
    placement = make_place(geometry, 8)(item.size)
    return load_pixels(item, placement, LoadOptions.from_recipe(open_source(path.parent), 8, found_masks, recipe))


def load(path, filter_name="lanczos", **options):
    """The same of the first crop: pixels [H,W,3], weight [h,w]."""
    found = load_views(path, filter=filter_name, **options)
    if isinstance(found, Skip):
        return found
    return replace(found, pixels=found.pixels[0], weight=None if found.weight is None else found.weight[0])


def save(folder, image, name="x.png", **options):
    path = folder / name
    image.save(path, **options)
    return path


@pytest.mark.parametrize("name", [name for name in PHOTOS if "rocket" not in name])  # that one is in Adobe RGB
def test_stretch_with_bicubic_gives_the_ancestors_pixels(name):
    # stable-diffusion-webui: Image.open(path).convert("RGB").resize((w, h), BICUBIC), then / 127.5 - 1
    path = find_photo(name)
    found = load(path, "bicubic", width=320, height=192, fit="stretch")
    wanted = np.array(Image.open(path).convert("RGB").resize((320, 192), Image.BICUBIC)).astype(np.uint8)
    assert np.array_equal(found.pixels, wanted)
    normalized = (wanted / 127.5 - 1.0).astype(np.float32)
    assert np.array_equal(LEVELS[found.pixels.astype(np.int64)].numpy(), normalized)


def test_crop_is_resize_then_the_middle():
    path = find_photo("skimage/data/coffee.png")  # 600x400
    found = load(path, resolution="256", draft=False)
    resized = Image.open(path).convert("RGB").resize((320, 213), Image.LANCZOS)
    assert np.array_equal(found.pixels, np.array(resized)[10:202])


def test_native_leaves_pixels_alone(tmp_path):
    image = gradient(45, 30)
    found = load(save(tmp_path, image), resolution="native")
    assert np.array_equal(found.pixels, np.array(image)[3:27, 2:42])


def test_pad_repeats_the_border_and_weighs_nothing(tmp_path):
    image = gradient(64, 32)
    found = load(save(tmp_path, image), width=64, height=64, fit="pad")
    pixels = np.array(image)
    assert np.array_equal(found.pixels[16:48], pixels)
    assert (found.pixels[:16] == pixels[0]).all()
    assert (found.pixels[48:] == pixels[-1]).all()
    assert found.weight.tolist() == [[0.0] * 8] * 2 + [[1.0] * 8] * 4 + [[0.0] * 8] * 2


@pytest.mark.parametrize("name", FILTERS)
def test_every_filter_is_pillows(tmp_path, name):
    image = gradient(100, 70)
    found = load(save(tmp_path, image), name, width=64, height=48, fit="stretch", draft=False)
    assert np.array_equal(found.pixels, np.array(image.resize((64, 48), Image.Resampling[name.upper()])))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_to_pixels_and_alpha(tmp_path, orientation):
    image = gradient(64, 32, "RGBA")
    image.putalpha(Image.linear_gradient("L").resize((64, 32)))
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = save(tmp_path, image, exif=exif)
    upright = ImageOps.exif_transpose(Image.open(path))
    found = load(path, resolution="native")
    assert np.array_equal(found.pixels, np.array(upright.convert("RGB")))
    alpha = np.array(upright.getchannel("A")).astype(np.float32) / 255
    height, width = alpha.shape
    assert np.allclose(found.weight, alpha.reshape(height // 8, 8, width // 8, 8).mean((1, 3)))
    assert found.notes == (("oriented",) if orientation > 1 else ())


@pytest.mark.parametrize("down", [True, False])
def test_weight_rows_and_columns_are_not_swapped(tmp_path, down):
    ramp = np.linspace(0, 255, 64 if down else 128).round().astype(np.uint8)
    alpha = np.repeat(ramp[:, None], 128, 1) if down else np.repeat(ramp[None], 64, 0)
    image = gradient(128, 64, "RGBA")
    image.putalpha(Image.fromarray(alpha))
    weight = load(save(tmp_path, image), resolution="native").weight
    assert weight.shape == (8, 16)  # h, w of the latent
    along, across = (0, 1) if down else (1, 0)
    assert (np.diff(weight, axis=along) > 0.05).all()
    assert np.allclose(np.diff(weight, axis=across), 0)


def test_weight_is_cut_like_the_pixels(tmp_path):
    image = gradient(128, 64, "RGBA")
    alpha = np.zeros((64, 128), np.uint8)
    alpha[:, 32:64] = 255  # the left half of what a square crop keeps
    image.putalpha(Image.fromarray(alpha))
    weight = load(save(tmp_path, image), width=64, height=64).weight
    assert weight.tolist() == [[1.0] * 4 + [0.0] * 4] * 8


def palette_image():
    """A palette image whose colour 0 is transparent, on its left half."""
    image = Image.new("P", (64, 64), 1)
    image.putpalette([10, 20, 30, 200, 100, 50])
    image.paste(0, (0, 0, 32, 64))
    return image


@pytest.mark.parametrize("suffix", ["png", "gif"])
def test_palette_transparency_counts_as_alpha(tmp_path, suffix):
    path = save(tmp_path, palette_image(), f"x.{suffix}", transparency=0)
    found = load(path, resolution="native")
    assert found.weight.tolist() == [[0.0] * 4 + [1.0] * 4] * 8
    assert found.pixels[0, 0].tolist() == [255, 255, 255]  # the transparent colour of a palette means nothing
    assert found.pixels[0, 63].tolist() == [200, 100, 50]
    assert load(path, resolution="native", background="keep").pixels[0, 0].tolist() == [10, 20, 30]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_a_transparent_colour_counts_as_alpha(tmp_path, mode):
    image = Image.new(mode, (64, 64), 7 if mode == "L" else (7, 7, 7))
    image.paste(200 if mode == "L" else (200, 200, 200), (0, 0, 64, 32))
    path = save(tmp_path, image, transparency=7 if mode == "L" else (7, 7, 7))
    found = load(path, resolution="native", background="keep")
    assert found.weight.tolist() == [[1.0] * 8] * 4 + [[0.0] * 8] * 4
    assert found.pixels[63, 0].tolist() == [7, 7, 7]


def test_opaque_alpha_is_no_weight_map_and_constant_alpha_is_one(tmp_path):
    image = gradient(64, 64, "RGBA")
    image.putalpha(255)
    assert load(save(tmp_path, image), resolution="native").weight is None
    image.putalpha(51)
    assert np.allclose(load(save(tmp_path, image), resolution="native").weight, 0.2)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "P", "CMYK", "YCbCr"])
def test_other_modes_are_pillows_rgb(tmp_path, mode):
    image = gradient(64, 64).convert(mode)
    # Pillow before 13 cannot read its own YCbCr TIFF if it is not compressed
    options = {"compression": "tiff_lzw"} if mode == "YCbCr" and int(PIL.__version__.split(".")[0]) < 13 else {}
    path = save(tmp_path, image, "x.tif" if mode in ("CMYK", "YCbCr") else "x.png", **options)
    found = load(path, resolution="native")
    opened = Image.open(path)
    assert np.array_equal(found.pixels, np.array(opened.convert("RGB")))


def test_16_bit_grey_is_scaled_and_not_clipped(tmp_path):
    values = (np.arange(64 * 64, dtype=np.uint32) * 16).astype(np.uint16).reshape(64, 64)
    path = save(tmp_path, Image.fromarray(values))
    found = load(path, resolution="native")
    assert np.abs(found.pixels[..., 0].astype(float) - values / 257).max() <= 0.5


@pytest.mark.parametrize(
    ("values", "detail"),
    [
        (np.linspace(0, 2, 4096, dtype=np.float32), "float numbers from 0 to 2, expected 0 to 1"),
        (np.full(4096, np.nan, np.float32), "float numbers from nan to nan, expected 0 to 1"),
        (np.arange(4096, dtype=np.int32), "32-bit integers from 0 to 4095, which have no known range"),
    ],
)
def test_numbers_without_a_known_range_are_skipped_and_said_so(tmp_path, values, detail):
    found = load(save(tmp_path, Image.fromarray(values.reshape(64, 64)), "x.tif"), resolution="native")
    assert (found.reason, found.detail) == ("unsupported_mode", detail)


def test_floats_from_0_to_1_are_scaled(tmp_path):
    values = np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64)
    found = load(save(tmp_path, Image.fromarray(values), "x.tif"), resolution="native")
    assert np.abs(found.pixels[..., 1] - values * 255).max() <= 0.5
    assert found.notes == ("scaled_to_8_bits",)


def png_of_16_bits(values, path):
    """Write [H,W,3] uint16 as PNG, which Pillow cannot."""
    height, width, _ = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    ]
    body = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body))
    return path


def test_16_bit_color_is_scaled_and_not_clipped(tmp_path):
    values = np.random.default_rng(0).integers(0, 65536, (64, 64, 3)).astype(np.uint16)
    found = load(png_of_16_bits(values, tmp_path / "x.png"), resolution="native")
    assert np.abs(found.pixels - values / 257).max() <= 1  # Pillow takes the upper byte


@pytest.mark.parametrize("dtype", ["<u2", ">u2"])
def test_16_bit_tiff_is_scaled_in_both_byte_orders(tmp_path, dtype):
    values = (np.arange(64 * 64) * 16).astype(np.uint16).reshape(64, 64)
    order = {"<u2": b"II", ">u2": b"MM"}[dtype]
    head = {"<u2": "<", ">u2": ">"}[dtype]
    tags = [
        (256, 64),
        (257, 64),
        (258, 16),
        (259, 1),
        (262, 1),
        (273, 8 + 2 + 12 * 8 + 4),
        (278, 64),
        (279, 64 * 64 * 2),
    ]
    directory = b"".join(
        struct.pack(
            f"{head}HHII" if n in (273, 279) else f"{head}HHIHH",
            n,
            4 if n in (273, 279) else 3,
            1,
            value,
            *(() if n in (273, 279) else (0,)),
        )
        for n, value in tags
    )
    path = tmp_path / "x.tif"
    path.write_bytes(
        order
        + struct.pack(f"{head}HI", 42, 8)
        + struct.pack(f"{head}H", len(tags))
        + directory
        + struct.pack(f"{head}I", 0)
        + values.astype(dtype).tobytes()
    )
    found = load(path, resolution="native")
    assert np.abs(found.pixels[..., 0].astype(float) - values / 257).max() <= 0.5


def test_a_photo_in_adobe_rgb_is_converted_to_srgb():
    path = find_photo("skimage/data/rocket.jpg")
    opened = Image.open(path)
    profile = io.BytesIO(opened.info["icc_profile"])
    wanted = ImageCms.profileToProfile(opened, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    found = load(path, resolution="native")
    assert np.array_equal(found.pixels, np.array(wanted)[1:425])
    assert np.abs(found.pixels.astype(int) - np.array(opened.convert("RGB"))[1:425]).mean() > 2  # and it matters
    assert found.notes == ("icc_to_srgb",)


def test_a_lab_image_is_converted_by_its_profile(tmp_path):
    lab, srgb = ImageCms.createProfile("LAB", 5000), ImageCms.createProfile("sRGB")
    image = ImageCms.profileToProfile(gradient(64, 64), srgb, lab, outputMode="LAB")
    path = save(tmp_path, image, "x.tif", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())
    found = load(path, resolution="native")
    opened = Image.open(path)
    wanted = ImageCms.profileToProfile(opened, io.BytesIO(opened.info["icc_profile"]), srgb, outputMode="RGB")
    assert np.array_equal(found.pixels, np.array(wanted))


def test_an_srgb_profile_changes_no_pixel(tmp_path):
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    found = load(save(tmp_path, gradient(64, 64), icc_profile=profile), resolution="native")
    assert np.array_equal(found.pixels, np.array(gradient(64, 64)))
    assert found.notes == ()


def test_a_linear_profile_that_calls_itself_srgb_is_converted(tmp_path):
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    curve = profile.find(b"para")
    while curve >= 0:  # the tone curves: gamma 1 in place of sRGB's
        profile[curve + 8 : curve + 16] = struct.pack(">HHi", 0, 0, 1 << 16)
        curve = profile.find(b"para", curve + 1)
    linear = ImageCms.ImageCmsProfile(io.BytesIO(bytes(profile)))
    assert "sRGB" in linear.profile.profile_description
    found = load(save(tmp_path, gradient(64, 64), icc_profile=bytes(profile)), resolution="native")
    wanted = ImageCms.profileToProfile(gradient(64, 64), linear, ImageCms.createProfile("sRGB"), outputMode="RGB")
    assert np.array_equal(found.pixels, np.array(wanted))
    assert found.notes == ("icc_to_srgb",)


@pytest.mark.parametrize("name", [name for name in PHOTOS if "rocket" not in name])
def test_the_srgb_profiles_of_real_photos_change_no_pixel(name):
    assert "icc_to_srgb" not in load(find_photo(name), resolution="native").notes


def test_a_broken_profile_is_noted_and_passed_over(tmp_path):
    found = load(save(tmp_path, gradient(64, 64), icc_profile=b"not a profile"), resolution="native")
    assert np.array_equal(found.pixels, np.array(gradient(64, 64)))
    assert found.notes == ("icc_unusable",)


def test_first_frame_of_an_animation(tmp_path):
    frames = [gradient(64, 64).rotate(90 * n) for n in range(3)]
    path = save(tmp_path, frames[0], "x.webp", save_all=True, append_images=frames[1:], lossless=True)
    found = load(path, resolution="native")
    assert np.array_equal(found.pixels, np.array(frames[0]))
    assert found.notes == ("first_frame",)


def test_enlarging_is_noted(tmp_path):
    path = save(tmp_path, gradient(64, 64))
    assert load(path, width=128, height=64).notes == ("enlarged",)
    assert load(path, width=32, height=64).notes == ()


def test_digest_is_of_the_files_bytes(tmp_path):
    path = save(tmp_path, gradient(64, 64))
    found = load(path, resolution="native")
    assert isinstance(found, Pixels)
    assert found.digest == hashlib.blake2b(path.read_bytes(), digest_size=16).digest()


def load_item(folder, item):
    """An item that was listed before, in its own size."""
    geometry = Geometry.from_options(resolution="native")
    recipe = LatentsRecipe.of(
        vae="", geometry=geometry, images=ImageOptions(), flip=False, dtype="", store="mean", store_dtype=""
    )
    return load_pixels(
        item, make_place(geometry, 8)(item.size), LoadOptions.from_recipe(open_source(folder), 8, None, recipe)
    )


def cut(data):
    return data[: len(data) // 2]


def scramble(data):
    return data[:60] + bytes(reversed(data[60:]))


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "tif"])
@pytest.mark.parametrize("damage", [cut, scramble])
def test_damage_behind_the_header_is_a_skip_and_never_an_exception(tmp_path, suffix, damage):
    path = save(tmp_path, Image.effect_noise((64, 64), 90).convert("RGB"), f"x.{suffix}")
    item = read_item(path, path.name)
    data = damage(path.read_bytes())
    path.write_bytes(data + bytes(item.nbytes - len(data)))
    found = load_item(tmp_path, item)
    if isinstance(found, Skip):
        assert found.reason in ("unreadable", "truncated", "changed", "too_large")
        assert found.key == path.name
        assert "\n" not in found.detail
    else:  # a JPEG's pixels may be wrong without anybody's being able to tell
        assert suffix in ("jpg", "gif", "webp", "tif")


def test_a_file_that_changed_since_it_was_listed_is_a_skip(tmp_path):
    path = save(tmp_path, gradient(64, 64))
    item = read_item(path, path.name)
    save(tmp_path, gradient(128, 64))
    assert load_item(tmp_path, item).reason == "changed"
    path.unlink()
    assert load_item(tmp_path, item).reason == "io_error"


def test_a_jpeg_of_endless_scans_is_not_decoded(tmp_path):
    path = save(tmp_path, gradient(64, 64), "x.jpg", progressive=True)
    data = path.read_bytes()
    last_scan = data[data.rfind(b"\xff\xda") : -2]
    path.write_bytes(data[:-2] + last_scan * 50 + data[-2:])
    assert isinstance(load(path, resolution="64"), Pixels)
    path.write_bytes(data[:-2] + last_scan * 5000 + data[-2:])
    skip = load(path, resolution="64")
    assert (skip.reason, skip.detail) == ("too_large", "a JPEG of 5,010 scans, expected at most 100")


def test_an_animation_without_end_gives_its_first_frame(tmp_path):
    frames = [gradient(64, 64).rotate(n) for n in range(40)]
    path = save(tmp_path, frames[0], "x.gif", save_all=True, append_images=frames[1:], loop=0)
    data = path.read_bytes()
    path.write_bytes(data[:-1] + data[-3000:-1] * 3000)  # 9 MB of it, and no end
    found = load(path, resolution="64")
    assert "first_frame" in found.notes


def test_an_icon_that_holds_a_bomb(tmp_path):
    from tests.test_source import bomb

    png = bomb(40_000, 40_000)
    entry = struct.pack("<BBBBHHII", 64, 64, 0, 0, 1, 32, len(png), 22)
    (tmp_path / "x.ico").write_bytes(struct.pack("<HHH", 0, 1, 1) + entry + png)
    item = read_item(tmp_path / "x.ico", "x.ico")
    assert item.reason == "too_large" if isinstance(item, Skip) else load(tmp_path / "x.ico").reason == "too_large"


def test_a_mask_is_turned_by_its_own_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "masks").mkdir()
    image = save(tmp_path, gradient(64, 128))
    mask = Image.linear_gradient("L").resize((64, 128))
    mask.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "masks" / "x.png", exif=exif)
    turned = load(image, masks=tmp_path / "masks", resolution="128").weight
    mask.save(tmp_path / "masks" / "x.png")
    assert np.array_equal(turned, load(image, masks=tmp_path / "masks", resolution="128").weight)
    assert turned[0].mean() < turned[-1].mean()
