"""prepare/images/jpeg.py, pillow.py and cicp.py: damage that Pillow is silent about, hostile files, colour and bits."""

import io
import os
import random
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from latentprep.prepare.images.cicp import Cicp, apply_cicp
from latentprep.prepare.images.jpeg import check_jpeg
from latentprep.prepare.images.pillow import MAX_CHUNKS, PNG_MAGIC, DecodeError
from latentprep.records import Skip
from tests.conftest import PHOTOS, SMALL, find_photo, gradient, read_item
from tests.test_load import load, save

WAYS = ({}, {"progressive": True}, {"restart_marker_rows": 1}, {"subsampling": 0}, {"quality": 30})


def jpegs():
    """Good JPEGs: real ones, and real photos written in many ways."""
    found = [find_photo(name).read_bytes() for name in PHOTOS if name.endswith(".jpg")]
    for name in PHOTOS[:3]:
        photo = Image.open(find_photo(name)).convert("RGB")
        found += [as_jpeg(photo, **{"quality": 90, **way}) for way in WAYS]
        found += [as_jpeg(photo.convert("L")), as_jpeg(photo.convert("CMYK"))]
    return found


def as_jpeg(image, **options):
    file = io.BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def scan_of(data):
    """Where the compressed data of the first scan begins."""
    start = data.index(b"\xff\xda")
    return start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")


def in_the_middle(data, make):
    start = scan_of(data)
    at = start + random.Random(len(data)).randrange((len(data) - start) // 10, (len(data) - start) * 8 // 10)
    return make(data, at)


def taller(data):
    at = next(found for mark in (b"\xff\xc0", b"\xff\xc2") if (found := data.find(mark)) > 0) + 5
    return data[:at] + (2 * int.from_bytes(data[at : at + 2], "big")).to_bytes(2, "big") + data[at + 2 :]


DAMAGE = {
    "200 bytes missing": lambda data: in_the_middle(data, lambda d, at: d[:at] + d[at + 200 :]),
    "4096 bytes zeroed": lambda data: in_the_middle(data, lambda d, at: d[:at] + bytes(4096) + d[at + 4096 :]),
    "a scan that ends early": lambda data: in_the_middle(data, lambda d, at: d[:at] + b"\xff\xd9"),
    "a header taller than the data": taller,
}


def test_good_jpegs_give_no_warning():
    for data in jpegs():
        assert check_jpeg(data) == (data, "")
        assert check_jpeg(data + bytes(1000)) == (data + bytes(1000), "")  # cameras write things behind the end


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_jpegs_are_found(kind):
    found = 0
    files = jpegs()
    for data in files:
        try:
            found += bool(check_jpeg(DAMAGE[kind](data))[1])
        except DecodeError:
            found += 1
    assert found >= 0.9 * len(files)


def test_a_jpeg_that_lacks_only_its_end_marker_is_whole(tmp_path):
    for n, data in enumerate(jpegs()):
        assert data.endswith(b"\xff\xd9")
        assert check_jpeg(data[:-2]) == (data, "")
        with pytest.raises(DecodeError, match="ends before its pixels do"):
            check_jpeg(data[: len(data) * 2 // 3])
        (tmp_path / f"{n}.jpg").write_bytes(data)
        (tmp_path / f"cut{n}.jpg").write_bytes(data[:-2])
        whole, cut = (load(tmp_path / f"{name}{n}.jpg", resolution="64") for name in ("", "cut"))
        assert np.array_equal(whole.pixels, cut.pixels)
        assert "damaged" not in cut.notes


def test_damage_is_a_note_and_with_strict_images_a_skip(run, tmp_path, images):
    photo = Image.open(find_photo(PHOTOS[0])).convert("RGB")
    (images / "bad.jpg").write_bytes(taller(as_jpeg(photo)))
    encode = ("encode", images, "--out", tmp_path / "c", "--model", "tiny", "--resolution", 64, "--device", "cpu")
    result = run(*encode)
    assert (result.code, "1 image with damage in the JPEG data" in result.out) == (0, True)
    result = run(*encode, "--strict-images", "--overwrite")
    assert (result.code, "skipped  1 damaged (bad.jpg: Corrupt JPEG data" in result.out) == (0, True)
    assert "1 new" in run(*encode).out  # without the option it is tried again


def png(*chunks):
    return PNG_MAGIC + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def with_cicp(image, *points):
    file = io.BytesIO()
    image.save(file, "PNG")
    data = file.getvalue()
    return data[:33] + png((b"cICP", bytes(points)))[8:] + data[33:]  # behind IHDR


def test_cicp_of_display_p3_is_converted(tmp_path):
    image = gradient(64, 64)
    path = tmp_path / "p3.png"
    path.write_bytes(with_cicp(image, 12, 13, 0, 1))
    found = load(path, resolution="64")
    assert "cicp_to_srgb" in found.notes
    assert not np.array_equal(found.pixels, np.asarray(image))
    red = apply_cicp(Image.new("RGB", (1, 1), (200, 50, 50)), Cicp(12, 13, 0, 1), [])
    # the matrix from linear Display P3 to linear sRGB, to four digits
    matrix = np.array([[1.2249, -0.2247, 0], [-0.0420, 1.0419, 0], [-0.0197, -0.0786, 1.0979]])
    linear = matrix @ [((v / 255 + 0.055) / 1.055) ** 2.4 for v in (200, 50, 50)]
    wanted = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(np.asarray(red)[0, 0] - wanted).max() <= 1


@pytest.mark.parametrize(
    ("points", "note"),
    [((1, 13, 0, 1), None), ((1, 1, 0, 1), None), ((9, 16, 0, 1), "cicp_unusable"), ((12, 13, 0, 0), "cicp_unusable")],
)
def test_cicp_of_srgb_and_of_hdr_leave_the_pixels(tmp_path, points, note):
    image = gradient(64, 64)
    path = tmp_path / "x.png"
    path.write_bytes(with_cicp(image, *points))
    found = load(path, resolution="64")
    assert np.array_equal(found.pixels, np.asarray(image))
    assert [n for n in found.notes if n.startswith("cicp")] == ([note] if note else [])


def test_cicp_counts_before_a_profile(tmp_path):
    from PIL import ImageCms

    image = gradient(64, 64)
    path = tmp_path / "x.png"
    file = io.BytesIO()
    profile = find_photo("skimage/data/rocket.jpg")
    image.save(file, "PNG", icc_profile=Image.open(profile).info["icc_profile"])
    data = file.getvalue()
    path.write_bytes(data[:33] + png((b"cICP", bytes((1, 13, 0, 1))))[8:] + data[33:])
    assert ImageCms.ImageCmsProfile(io.BytesIO(Image.open(path).info["icc_profile"]))
    assert np.array_equal(load(path, resolution="64").pixels, np.asarray(image))


@pytest.mark.parametrize("channels", [3, 4])
def test_16_bits_a_channel_are_said(tmp_path, channels):
    values = np.full((64, 64, channels), 0x80FF, ">u2")
    rows = b"".join(b"\0" + row.tobytes() for row in values)
    header = struct.pack(">IIBBBBB", 64, 64, 16, {3: 2, 4: 6}[channels], 0, 0, 0)
    path = tmp_path / "x.png"
    path.write_bytes(png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")))
    assert "high_byte" in load(path, resolution="64").notes
    assert "high_byte" not in load(save(tmp_path, gradient(64, 64), "y.png"), resolution="64").notes


def test_a_strip_of_one_row_is_a_skip_that_takes_no_memory(tmp_path):
    path = save(tmp_path, Image.new("RGB", (30000, 1), (9, 8, 7)))
    tracemalloc.start()
    from latentprep.geometry import Geometry
    from latentprep.prepare.plan.buckets import make_place

    reason, detail = make_place(Geometry.from_options(), 8)(read_item(path, "x").size)
    assert (reason, "0.01%" in detail) == ("extreme_aspect", True)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


def test_only_what_the_crop_keeps_is_enlarged(tmp_path, monkeypatch):
    sizes = []
    resize = Image.Image.resize

    def seen(self, size, *args, **options):
        sizes.append(size)
        return resize(self, size, *args, **options)

    monkeypatch.setattr(Image.Image, "resize", seen)
    image = gradient(1200, 8)
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    sizes.clear()
    found = load(save(tmp_path, image), width=640, height=64)  # 9600x64 before the crop
    assert found.pixels.shape == (64, 640, 3)
    assert sizes == [(640, 64), (640, 64)]
    whole = resize(image.convert("RGB"), (9600, 64), Image.Resampling.LANCZOS).crop((4480, 0, 5120, 64))
    assert np.abs(found.pixels.astype(int) - np.asarray(whole)).max() <= 1


def test_one_images_lack_of_memory_is_its_own_skip(tmp_path, monkeypatch):
    def full(*_):
        raise MemoryError

    path = save(tmp_path, gradient(64, 64))
    monkeypatch.setattr("latentprep.prepare.images.decode.to_srgb", full)
    assert load(path, resolution="64").reason == "out_of_memory"


def test_the_tile_of_a_tiff_counts_as_pixels(tmp_path):
    path = tmp_path / "x.tif"
    tags = [(256, 100), (257, 100), (258, 8), (259, 8), (262, 1), (277, 1), (322, 40000), (323, 40000), (324, 8)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in [*tags, (325, 1)])
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags) + 1) + entries + bytes(4))
    found = read_item(path, "x.tif")
    assert isinstance(found, Skip)
    assert (found.reason, "a tile or strip of 1,600,000,000 pixels" in found.detail) == ("too_large", True)


def test_a_large_qoi_is_not_decoded_in_python(tmp_path):
    path = tmp_path / "x.qoi"
    path.write_bytes(b"qoif" + struct.pack(">IIBB", 13000, 13000, 3, 0) + bytes(100))
    found = read_item(path, "x.qoi")
    assert (found.reason, "QOI may have 4,000,000" in found.detail) == ("too_large", True)


def test_a_png_of_endless_chunks_is_left_alone_at_once(tmp_path):
    file = io.BytesIO()
    gradient(64, 64).save(file, "PNG")
    data, chunk = file.getvalue(), png((b"tEXt", b"a\0b"))[8:]
    path = tmp_path / "x.png"
    path.write_bytes(data[:33] + chunk * (MAX_CHUNKS + 1) + data[33:])
    started = time.perf_counter()
    found = read_item(path, "x.png")
    assert (found.reason, time.perf_counter() - started < 5) == ("too_large", True)


@pytest.mark.parametrize("kind", ["pipe", "device"])
def test_pipes_and_devices_as_masks_are_skips_at_once(run, tmp_path, images, kind):
    masks = tmp_path / "masks"
    masks.mkdir()
    Image.new("L", (128, 40), 128).save(masks / "wide0.png")
    if kind == "pipe":
        os.mkfifo(masks / "wide1.png")
    else:
        os.symlink("/dev/zero", masks / "wide1.png")
    options = ("--model", "tiny", "--resolution", 64, "--device", "cpu", "--weights", masks)
    result = run("encode", images, "--out", tmp_path / "c", *options)
    assert (result.code, "skipped  1 unreadable (wide1.png: not a regular file)" in result.out) == (0, True)


def test_a_pipe_under_verify_source_is_a_problem_at_once(run, tmp_path, images):
    run("encode", images, "--out", tmp_path / "c", "--model", "tiny", "--resolution", 64, "--device", "cpu")
    (images / "wide1.png").unlink()
    os.mkfifo(images / "wide1.png")
    result = run("verify", tmp_path / "c", "--source", images)
    assert (result.code, "wide1.png" in result.out) == (1, True)


def test_an_image_and_its_mask_that_are_both_damaged_are_one_image(run, images, tmp_path):
    (tmp_path / "masks").mkdir()
    damaged = taller(as_jpeg(Image.open(find_photo(PHOTOS[0])).convert("RGB").resize((512, 400))))
    for n in range(8):
        (images / f"j{n}.jpg").write_bytes(damaged)
        (tmp_path / "masks" / f"j{n}.jpg").write_bytes(damaged)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--weights", tmp_path / "masks")
    assert result.code == 0
    (line,) = [line for line in result.out.splitlines() if "damage" in line]
    assert line.strip().startswith("8 images with damage")
    assert line.endswith("j0.jpg, j1.jpg, j2.jpg, j3.jpg, j4.jpg and 3 more")
