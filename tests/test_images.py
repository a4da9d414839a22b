"""Images as folders have them: colour profiles, CMYK, several frames, reduced JPEGs, transparency, masks and crops."""

import io
import json
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageDraw, ImageOps, features

from latentprep import LatentDataset
from latentprep.prepare.images.crops import choose_crops, saliency_map
from latentprep.prepare.images.pillow import formats
from latentprep.records import Placement
from tests.conftest import PHOTOS, SMALL, find_photo, gradient
from tests.test_encode import rows
from tests.test_load import load, load_views, save

SRGB = ImageCms.createProfile("sRGB")


def cmyk_profile() -> bytes:
    """An ICC profile of a press whose inks are dull: CMYK -> Lab through a table of two steps an ink."""
    corners = []
    for n in range(16):
        cyan, magenta, yellow, black = (n >> 3 & 1, n >> 2 & 1, n >> 1 & 1, n & 1)
        light = 95 - 30 * cyan - 35 * magenta - 8 * yellow
        a, b = -35 * cyan + 70 * magenta - 5 * yellow, -45 * cyan - 5 * magenta + 85 * yellow
        shade = 0.12 if black else 1.0
        corners += [round(light * shade * 2.55), round(a * shade) + 128, round(b * shade) + 128]
    line = bytes(range(256))
    identity = struct.pack(">9i", *(1 << 16 if n in (0, 4, 8) else 0 for n in range(9)))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + identity + line * 4
    table += bytes(min(255, max(0, value)) for value in corners) + line * 3
    text = b"text" + bytes(4) + b"none\0"
    name = b"desc" + bytes(4) + struct.pack(">I", 5) + b"test\0" + bytes(78)
    white = b"XYZ " + bytes(4) + struct.pack(">3i", 63190, 65536, 54061)
    tags = {b"desc": name, b"cprt": text, b"wtpt": white, b"A2B0": table}
    offset, entries, body = 128 + 4 + 12 * len(tags), b"", b""
    for signature, data in tags.items():
        data += bytes(-len(data) % 4)
        entries += signature + struct.pack(">II", offset + len(body), len(data))
        body += data
    rest = struct.pack(">I", len(tags)) + entries + body
    header = struct.pack(">I4sI4s4s4s", 128 + len(rest), bytes(4), 0x02400000, b"prtr", b"CMYK", b"Lab ")
    header += struct.pack(">6H", 2026, 1, 1, 0, 0, 0) + b"acsp" + bytes(28) + struct.pack(">3i", 63190, 65536, 54061)
    return header + bytes(128 - len(header)) + rest


@pytest.mark.parametrize("name", ["x.jpg", "x.tif"])
def test_a_cmyk_profile_is_honoured(tmp_path, name):
    profile = cmyk_profile()
    path = save(tmp_path, gradient(64, 64).convert("CMYK"), name, icc_profile=profile)
    opened = Image.open(path)
    wanted = ImageCms.profileToProfile(opened, io.BytesIO(profile), SRGB, outputMode="RGB")
    found = load(path, resolution="native")
    assert np.array_equal(found.pixels, np.array(wanted))
    assert np.abs(found.pixels.astype(int) - np.array(opened.convert("RGB"))).mean() > 10  # and it matters
    assert found.notes == ("icc_to_srgb",)


def test_cmyk_without_a_profile_is_pillows_and_adobes_inversion_is_undone(tmp_path):
    image = gradient(64, 64).convert("CMYK")
    path = save(tmp_path, image, "x.jpg", quality=100, subsampling=0)
    assert Image.open(path).info["adobe"]  # such files hold 255 - ink
    found = load(path, resolution="native")
    assert np.array_equal(found.pixels, np.array(Image.open(path).convert("RGB")))
    assert np.abs(found.pixels.astype(int) - np.array(gradient(64, 64))).mean() < 3
    assert found.notes == ("cmyk_without_profile",)


def test_a_gray_image_with_the_profile_of_a_screen(tmp_path):
    profile = Image.open(find_photo("skimage/data/rocket.jpg")).info["icc_profile"]  # Adobe RGB
    gray = gradient(64, 64).convert("L")
    found = load(save(tmp_path, gray, icc_profile=profile), resolution="native")
    wanted = ImageCms.profileToProfile(gray.convert("RGB"), io.BytesIO(profile), SRGB, outputMode="RGB")
    assert np.array_equal(found.pixels, np.array(wanted))


def test_a_profile_of_another_color_space_is_noted_and_passed_over(tmp_path):
    found = load(save(tmp_path, gradient(64, 64), icc_profile=cmyk_profile()), resolution="native")
    assert np.array_equal(found.pixels, np.array(gradient(64, 64)))
    assert found.notes == ("icc_unusable",)


def test_lab_without_a_profile(tmp_path):
    lab = ImageCms.createProfile("LAB")
    image = ImageCms.profileToProfile(gradient(64, 64), SRGB, lab, outputMode="LAB")
    image.info.clear()
    path = save(tmp_path, image, "x.tif")
    assert "icc_profile" not in Image.open(path).info
    found = load(path, resolution="native")
    wanted = ImageCms.profileToProfile(Image.open(path), lab, SRGB, outputMode="RGB")
    assert np.array_equal(found.pixels, np.array(wanted))
    assert np.abs(found.pixels.astype(int) - np.array(gradient(64, 64))).mean() < 3


# --- several frames


def need(name):
    """Skip what needs a library that is not here: Pillow reads AVIF since 11.3."""
    if name.endswith(".heic"):
        pytest.importorskip("pillow_heif")
    if name.endswith(".avif") and "avif" not in features.get_supported():
        pytest.skip("this Pillow has no AVIF")


def animation(folder, name):
    frames = [gradient(64, 64).rotate(90 * n) for n in range(3)]
    return save(folder, frames[0], name, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("name", ["x.gif", "x.png", "x.webp", "x.tif", "x.avif"])
def test_images_of_several_frames_are_taken_or_left_out(tmp_path, name):
    need(name)
    path = animation(tmp_path, name)
    with Image.open(path) as image:
        first = np.array(image.convert("RGB"))
    found = load(path, resolution="native")
    assert np.array_equal(found.pixels, first)
    assert "first_frame" in found.notes
    skip = load(path, resolution="native", animated="skip")
    assert (skip.reason, skip.detail) == (
        "animated",
        f"a {Image.open(path).format} of several frames, and --animated skip",
    )


def test_the_previews_in_a_phones_jpeg_are_no_frames(tmp_path):
    image = gradient(64, 64)
    image.save(tmp_path / "x.jpg", "MPO", save_all=True, append_images=[image.resize((16, 16))])
    assert Image.open(tmp_path / "x.jpg").n_frames == 2
    assert load(tmp_path / "x.jpg", resolution="native", animated="skip").notes == ()


@pytest.mark.parametrize("name", ["x.avif", "x.webp", "x.heic"])
def test_modern_formats(tmp_path, name):
    need(name)
    assert formats()  # registers what is installed
    image = Image.open(find_photo(PHOTOS[0])).convert("RGB").resize((128, 128))
    found = load(save(tmp_path, image, name, quality=90), resolution="native")
    assert np.array_equal(found.pixels, np.array(Image.open(tmp_path / name).convert("RGB")))
    assert np.abs(found.pixels.astype(int) - np.array(image)).mean() < 6


def test_heic_without_the_plugin_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr("latentprep.prepare.images.pillow.formats", lambda: ("JPEG", "PNG"))
    (tmp_path / "x.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(100))
    skip = load(tmp_path / "x.heic")
    assert skip.reason == "not_an_image"
    assert (
        skip.detail
        == "its bytes are of no image format that Pillow knows, whatever its .heic says; pip install 'latentprep[heif]'"
    )


def test_heic_with_the_plugin_is_not_told_to_install_it(tmp_path):
    need("x.heic")
    for name, content, detail in (
        ("no.heic", b"no image", "its bytes are of no image format that Pillow knows, whatever its .heic says"),
        ("empty.heic", b"", "empty file"),
    ):  # fmt: skip
        (tmp_path / name).write_bytes(content)
        assert load(tmp_path / name).detail == detail


# --- JPEGs at a fraction of their size


def large_jpeg(folder, size=(903, 601), **options):
    photo = Image.open(find_photo(PHOTOS[2])).convert("RGB").resize(size, Image.LANCZOS)
    return save(folder, photo, "x.jpg", quality=92, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_reduced_jpeg_is_nearly_the_whole_one_whichever_way_it_lies(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = large_jpeg(tmp_path, exif=exif)
    options = {"resolution": "128", "bucket_step": 32, "min_side": 32}
    found, whole = load(path, **options), load(path, **options, draft=False)
    assert "draft" in found.notes
    assert "draft" not in whole.notes
    error = np.abs(found.pixels.astype(int) - whole.pixels)
    assert error.mean() < 0.5
    assert error.max() <= 8


def test_without_draft_pixels_are_pillows(tmp_path):
    path = large_jpeg(tmp_path)
    found = load(path, width=128, height=64, fit="stretch", draft=False)
    assert np.array_equal(found.pixels, np.array(Image.open(path).resize((128, 64), Image.LANCZOS)))


@pytest.mark.parametrize(("width", "divisor"), [(232, 1), (224, 2), (112, 4), (56, 8), (8, 8)])
def test_a_reduced_jpeg_has_twice_the_pixels_that_are_asked_for(tmp_path, width, divisor):
    path = large_jpeg(tmp_path, (903, 903))
    found = load(path, width=width, height=8, fit="stretch")
    opened = Image.open(path)
    opened.draft(None, (903 // divisor, 903 // divisor))
    assert opened.width == -(-903 // divisor)
    wanted = opened.resize((width, 8), Image.LANCZOS, box=(0, 0, 903 / divisor, 903 / divisor))
    error = np.abs(found.pixels.astype(int) - np.array(wanted))
    assert error.max() <= 1  # torch rounds otherwise than Pillow
    assert error.mean() < 0.02
    assert ("draft" in found.notes) == (divisor > 1)


def test_nearest_is_not_reduced(tmp_path):
    assert "draft" not in load(large_jpeg(tmp_path), "nearest", width=64, height=64).notes


# --- transparency


def cutout(hidden, level=0):
    """A photo with a round alpha; `hidden` is what stands where it is transparent, None for the photo itself."""
    image = Image.open(find_photo(PHOTOS[0])).convert("RGBA").resize((64, 64))
    alpha = Image.new("L", image.size, level)
    ImageDraw.Draw(alpha).ellipse((16, 16, 47, 47), fill=255)
    if hidden is not None:
        image = Image.composite(image, Image.new("RGBA", image.size, hidden), alpha)
    image.putalpha(alpha)
    return image


def test_a_picture_below_transparency_is_kept_and_a_filling_is_white(tmp_path):
    photo = cutout(None)
    found = load(save(tmp_path, photo), resolution="native")
    assert np.array_equal(found.pixels, np.array(photo.convert("RGB")))
    assert found.notes == ()
    filled = cutout("black")
    found = load(save(tmp_path, filled), resolution="native")
    wanted = np.array(filled.convert("RGB"))
    wanted[np.array(filled.getchannel("A")) == 0] = 255
    assert np.array_equal(found.pixels, wanted)
    assert found.notes == ("whitened",)


@pytest.mark.parametrize(
    ("background", "color"), [("white", "white"), ("#102030", "#102030"), ("rgb(9,8,7)", (9, 8, 7))]
)
def test_background_is_pillows_composite(tmp_path, background, color):
    image = cutout("black", level=100)
    found = load(save(tmp_path, image), resolution="native", background=background)
    wanted = Image.composite(image.convert("RGB"), Image.new("RGB", image.size, color), image.getchannel("A"))
    assert np.array_equal(found.pixels, np.array(wanted))
    assert found.notes == ("laid_over_background",)
    assert found.weight is not None  # alpha weighs all the same


def test_where_alpha_is_no_weight_images_are_laid_over_white(tmp_path, run, images):
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", "none")
    assert result.code == 0
    assert "2 images with transparency, laid over the background" in result.out
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["notes"]["laid_over_background"] == 2
    assert "2  with transparency, laid over the background" in run("inspect", tmp_path / "c").out
    assert json.loads(run("inspect", tmp_path / "c", "--json").out)["latents"]["rows_with_weight"] == 0


def test_background_that_is_no_color(run, images):
    result = run("encode", images, *SMALL, "--background", "octarine")
    assert result.code == 1
    assert "--background octarine: expected auto, keep or a colour such as white" in result.err


# --- masks


@pytest.fixture
def masks(tmp_path, images):
    """Masks for two of the images, one of them half as large and one with alpha."""
    folder = tmp_path / "masks"
    folder.mkdir()
    half = Image.new("L", (64, 20), 0)
    half.paste(255, (0, 0, 32, 20))
    half.save(folder / "wide0.jpg", quality=100)
    Image.merge("LA", [Image.new("L", (64, 80), 7), Image.linear_gradient("L").resize((64, 80))]).save(
        folder / "tall0.png"
    )
    return folder


def test_masks_are_weights(run, images, masks, tmp_path):
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", masks)
    assert result.code == 0
    assert f"masks    {masks}: 2 of 8 images have one" in result.err
    assert "2 images weighted by a mask" in result.out
    data = LatentDataset(tmp_path / "c", include_cond=False, use_weight="raw")
    weights = {data.key(n): data[n].weight[0, 0] for n in range(len(data))}
    wide, tall = weights["wide0.png"], weights["tall0.png"]
    middle = wide.shape[1] // 2
    assert (wide[:, : middle - 1] > 0.99).all()
    assert (wide[:, middle + 1 :] < 0.01).all()
    assert (tall.diff(dim=0) > 0).all()  # its alpha, and not its grey
    assert all((weight == 1).all() for key, weight in weights.items() if key not in ("wide0.png", "tall0.png"))


def test_a_mask_that_is_a_dead_link_is_a_skip_and_heals(run, images, masks, tmp_path):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", masks)
    (masks / "tall0.png").rename(tmp_path / "away.png")
    (masks / "tall0.png").symlink_to(tmp_path / "nothing")
    result = run(*command)
    assert result.code == 0
    assert "skipped  1 io_error (tall0.png: its mask " in result.out
    assert len(rows(tmp_path / "c")) == 7
    (masks / "tall0.png").unlink()
    (tmp_path / "away.png").rename(masks / "tall0.png")
    assert run(*command).code == 0
    assert len(rows(tmp_path / "c")) == 8
    (masks / "tall0.png").unlink()
    (masks / "tall0.png").symlink_to(tmp_path / "nothing")
    result = run(*command)
    assert "unread   1 image cannot be read now, what the cache has stays: tall0.png" in result.err
    assert len(rows(tmp_path / "c")) == 8


def test_a_changed_mask_is_a_changed_image(run, images, masks, tmp_path):
    command = ("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", masks)
    run(*command)
    assert "nothing to do" in run(*command).out
    Image.new("L", (64, 80), 99).save(masks / "tall0.png")
    Image.new("L", (64, 80), 9).save(masks / "tall1.png")
    result = run(*command, "--dry-run", "--list")
    assert "changed  tall0.png\nchanged  tall1.png\n" in result.out
    assert run(*command).code == 0
    assert run("verify", tmp_path / "c", "--source", images, "--re-encode", "8").code == 0
    masks.rename(tmp_path / "elsewhere")
    result = run("verify", tmp_path / "c", "--source", images)
    assert result.err == f"error: --masks {masks}: no such folder. Give that of this cache's masks.\n"
    assert run("verify", tmp_path / "c", "--source", images, "--masks", tmp_path / "elsewhere").code == 0
    (tmp_path / "elsewhere").rename(masks)
    (masks / "tall1.png").unlink()
    assert run("verify", tmp_path / "c", "--source", images).code == 1
    assert "2 changed" not in run(*command).out
    assert run("verify", tmp_path / "c", "--source", images).code == 0


def test_masks_inside_the_image_folder_are_no_images(run, images, masks, tmp_path):
    masks.rename(images / "masks")
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", images / "masks")
    assert result.code == 0
    assert len(rows(tmp_path / "c")) == 8


@pytest.mark.parametrize(
    ("damage", "detail"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "OSError"),
        (lambda path: Image.new("L", (80, 64)).save(path), "is 80x64, its image 64x80: not the same shape"),
    ],
)
def test_a_bad_mask_is_a_skip(run, images, masks, tmp_path, damage, detail):
    damage(masks / "tall0.png")
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", masks)
    assert result.code == 0
    assert f"skipped  1 bad_mask (tall0.png: {masks}/tall0.png: {detail}" in result.out


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("nowhere", [], "expected alpha, none or a folder of masks, and there is no such folder"),
        ("empty", ["notes.txt"], "no masks in it"),
        ("double", ["tall0.png", "tall0.jpg"], "tall0.jpg and tall0.png are two masks of one image"),
        ("others", ["somebody.png"], "none of its masks has the path and stem of an image in SOURCE"),
    ],
)
def test_folders_that_are_no_masks(run, images, tmp_path, name, files, message):
    for file in files:
        (tmp_path / name).mkdir(exist_ok=True)
        Image.new("L", (8, 8)).save(tmp_path / name / file) if "." in file and "txt" not in file else (
            tmp_path / name / file
        ).write_text("")
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", tmp_path / name)
    assert result.code == 1
    assert message in result.err


# --- crops


def placement(resized, box):
    (height, width), (box_height, box_width) = resized, box
    middle = ((height - box_height) // 2, (width - box_width) // 2, box_height, box_width)
    return Placement(box, resized, middle)


def test_random_crops_depend_on_seed_and_key_and_share_out_the_way():
    image, place = gradient(200, 64), placement((64, 200), (64, 64))
    first = choose_crops(image, None, place, "random", 4, 0, "a.png")
    assert first == choose_crops(image, None, place, "random", 4, 0, "a.png")
    assert first != choose_crops(image, None, place, "random", 4, 1, "a.png")
    assert first != choose_crops(image, None, place, "random", 4, 0, "b.png")
    assert [34 * k <= box[1] <= 34 * (k + 1) for k, box in enumerate(first)] == [True] * 4
    lefts = [choose_crops(image, None, place, "random", 1, 0, f"{n}.png")[0][1] for n in range(2000)]
    assert (min(lefts), max(lefts)) == (0, 136)
    assert abs(np.mean(lefts) - 68) < 4


@pytest.mark.parametrize("place", [placement((64, 64), (64, 64)), placement((80, 64), (64, 64))])
def test_boxes_lie_inside_the_image(place):
    for mode in ("random", "focus"):
        for top, left, height, width in choose_crops(gradient(64, place.resized_size[0]), None, place, mode, 3, 0, "x"):
            assert (height, width) == (64, 64)
            assert 0 <= top <= place.resized_size[0] - 64
            assert left == 0


def thing_on_a_table(x):
    """A small colourful thing on an even grey, at x of 300."""
    image = Image.new("RGB", (300, 100), (120, 120, 125))
    draw = ImageDraw.Draw(image)
    for n in range(4):
        draw.ellipse(
            (x - 20 + 5 * n, 30 + 5 * n, x + 20 - 5 * n, 70 - 5 * n), fill=[(200, 40, 30), (250, 220, 60)][n % 2]
        )
    return image


@pytest.mark.parametrize("x", [30, 100, 150, 270])
def test_focus_keeps_what_there_is_to_see(x):
    place = placement((100, 300), (100, 100))
    ((_, left, _, _),) = choose_crops(thing_on_a_table(x), None, place, "focus", 1, 0, "x")
    assert left <= max(0, x - 20)
    assert left + 100 >= min(300, x + 20)


def test_focus_follows_the_weight_map_and_falls_back_to_the_middle():
    place = placement((100, 300), (100, 100))
    weight = Image.new("L", (300, 100), 0)
    weight.paste(255, (180, 0, 300, 100))
    image = Image.blend(thing_on_a_table(60), thing_on_a_table(240), 0.3)  # the right one is fainter
    assert choose_crops(image, None, place, "focus", 1, 0, "x")[0][1] < 100
    assert choose_crops(image, weight, place, "focus", 1, 0, "x")[0][1] >= 150
    flat = Image.new("RGB", (300, 100), "red")
    assert choose_crops(flat, None, place, "focus", 1, 0, "x") == ((0, 100, 100, 100),)
    assert saliency_map(flat).shape == (43, 128)


def test_views_hold_what_their_boxes_say(tmp_path):
    path = save(tmp_path, gradient(300, 64))
    found = load_views(path, width=64, height=64, crop="random", crops=3)
    assert len({box[1] for box in found.crops}) == 3
    for pixels, (top, left, height, width) in zip(found.pixels, found.crops, strict=True):
        assert np.array_equal(pixels, np.array(gradient(300, 64))[top : top + height, left : left + width])


def test_crops_are_views_and_an_epoch_takes_one_of_them(run, images, tmp_path):
    out = tmp_path / "c"
    result = run("encode", images, "--out", out, *SMALL, "--crop", "random", "--crops", "3", "--flip")
    assert result.code == 0
    found = json.loads(run("inspect", out, "--json").out)
    assert found["views"] == ["crop0", "crop0-flipped", "crop1", "crop1-flipped", "crop2", "crop2-flipped"]
    data = LatentDataset(out, flip_p=0.5, latent_sampling_method="deterministic")
    key = next(n for n in range(len(data)) if data.key(n) == "wide1.png")
    seen = set()
    for epoch in range(60):
        data.set_epoch(epoch)
        batch = data[key]
        seen.add((int(batch.crop[0, 1]), bool(batch.flipped)))
        top, left = batch.time_ids[0, 2:4].tolist()
        assert top == int(batch.crop[0, 0])
        mirrored = int(batch.resized_size[0, 1] - batch.crop[0, 1] - batch.crop[0, 3])
        assert left == (mirrored if batch.flipped else int(batch.crop[0, 1]))
    assert len(seen) == 6
    assert run("verify", out, "--source", images, "--re-encode", "8").code == 0
    sample = json.loads(run("inspect", out, "--key", "wide1.png", "--json").out)
    assert {left for _, left, _, _ in sample["crop"]} == {left for left, _ in seen}


def test_repetitions_of_an_image_take_its_crops_and_prompts_in_turn(run, images, tmp_path):
    for path in images.glob("*.png"):
        path.with_suffix(".txt").write_text("one\ntwo\nthree", encoding="utf-8")
    crops = ("--crop", "random", "--crops", "3", "--prompts-per-image", "3", "--caption-lines")
    assert run("encode", images, "--out", tmp_path / "c", *SMALL, *crops).code == 0
    data = LatentDataset(tmp_path / "c", repeats=3)
    key = next(n for n in range(8) if data.key(n) == "wide1.png")
    pairs = set()
    for epoch in range(12):
        data.set_epoch(epoch)
        batches = [data[key + 8 * repeat] for repeat in range(3)]
        assert len({int(batch.crop[0, 1]) for batch in batches}) == 3
        assert {batch.cond_text[0] for batch in batches} == {"one", "two", "three"}
        pairs |= {(int(batch.crop[0, 1]), batch.cond_text[0]) for batch in batches}
    assert len(pairs) == 9  # and in another pairing in other epochs


def test_crops_equal_the_vae_on_pillows_crops(run, images, tmp_path):
    import torch
    from diffusers import AutoencoderKL

    from tests.conftest import TINY

    out = tmp_path / "c"
    exact = ("--store-dtype", "float32", "--no-draft")
    run("encode", images, "--out", out, *SMALL, "--crop", "focus", "--crops", "2", *exact)
    vae = AutoencoderKL.from_pretrained(TINY / "vae").float().eval()
    data = LatentDataset(out, latent_sampling_method="deterministic", include_cond=False)
    key = next(n for n in range(len(data)) if data.key(n) == "wide2.png")
    for epoch in range(8):
        data.set_epoch(epoch)
        batch = data[key]
        (height, width), (top, left, box_height, box_width) = batch.resized_size[0].tolist(), batch.crop[0].tolist()
        image = Image.open(images / "wide2.png").resize((width, height), Image.LANCZOS)
        image = image.crop((left, top, left + box_width, top + box_height))
        pixels = torch.from_numpy(np.array(image).astype(np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        with torch.inference_mode():
            wanted = vae.encode(pixels).latent_dist.mean
        assert torch.allclose(batch.latent_mean, wanted, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--crops", "2"], "--crops 2: there is only one centre. Add --crop random or --crop focus."),
        (["--crops", "0"], "--crops 0: must be at least 1."),
        (["--crop", "left"], "--crop left: expected one of center, random, focus."),
        (["--crop", "focus", "--fit", "pad"], "--crop focus with --fit pad: nothing is cropped there."),
        (["--animated", "all"], "--animated all: expected one of first, skip."),
    ],
)
def test_options_that_make_no_sense(run, images, options, message):
    result = run("encode", images, *SMALL, *options)
    assert result.code == 1
    assert message in result.err


def test_what_is_cropped_away_is_said_worst_first(run, images, tmp_path):
    gradient(256, 32).save(images / "strip.png")  # 8:1 into 3:1
    gradient(96, 64).save(images / "fits nearly.png")
    plan = run("encode", images, "--out", tmp_path / "c", *SMALL, "--dry-run").out
    lost = {
        line.split(maxsplit=1)[1]: line.split()[0]
        for line in plan.splitlines()
        if line.endswith(".png") and "%" in line
    }
    assert next(iter(lost)) == "strip.png"
    shares = [float(share.rstrip("%")) for share in lost.values()]
    assert shares == sorted(shares, reverse=True)
    run("encode", images, "--out", tmp_path / "c", *SMALL)
    found = json.loads(run("inspect", tmp_path / "c", "--json", "--most-cropped", 3).out)["cropped"]
    assert [image["key"] for image in found["images"]] == list(lost)[:3]
    for image in found["images"]:
        sample = json.loads(run("inspect", tmp_path / "c", "--key", image["key"], "--json").out)
        (height, width), (_, _, kept_height, kept_width) = sample["resized_size"], sample["crop"][0]
        assert image["cropped_away"] == pytest.approx(1 - kept_height * kept_width / (height * width), abs=1e-4)
        assert lost[image["key"]] == f"{image['cropped_away']:.1%}"
    page = run("inspect", tmp_path / "c").out
    assert "Most cropped" in page
    assert page.index("strip.png") < page.index(found["images"][1]["key"])


def test_exif_and_crops_together(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path, gradient(300, 64), exif=exif)
    upright = np.array(ImageOps.exif_transpose(Image.open(path)))
    found = load_views(path, width=64, height=64, crop="random", crops=2)
    for pixels, (top, left, height, width) in zip(found.pixels, found.crops, strict=True):
        assert np.array_equal(pixels, upright[top : top + height, left : left + width])
