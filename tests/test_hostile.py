"""prepare/images: what Pillow passes over in silence, and small files that would take minutes or gigabytes."""

import io
import logging
import random
import resource
import struct
import time
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from latentprep.prepare.images import pillow
from latentprep.prepare.images.alpha import split_alpha
from latentprep.prepare.images.cicp import Cicp, apply_cicp
from latentprep.prepare.images.color import to_srgb
from latentprep.prepare.images.jpeg import MAX_SEGMENTS, check_jpeg, read_outline
from latentprep.prepare.images.load import LARGE_BYTES, is_large
from latentprep.prepare.images.pillow import MAX_CHUNK, MAX_PYTHON_PIXELS, MAX_READS, DecodeError
from latentprep.prepare.images.png import scale_transparency
from latentprep.prepare.source.folder import Folder
from latentprep.records import Item, Skip
from tests.conftest import PHOTOS, SMALL, find_photo, gradient, read_item
from tests.test_damage import as_jpeg, png, taller
from tests.test_load import load, save


def photo(width=160, height=120):
    return Image.open(find_photo(PHOTOS[0])).convert("RGB").resize((width, height))


def test_bytes_that_look_like_scans_are_none():
    data = as_jpeg(photo())
    video = random.Random(0).randbytes(12_000_000)  # as phones put one behind the photo: FFDA stands in it 180 times
    assert check_jpeg(data + video) == (data + video, "")
    segment = b"\xff\xe5" + (60_002).to_bytes(2, "big") + b"\xff\xda" * 30_000
    assert check_jpeg(data[:2] + segment + data[2:])[1] == ""


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_a_jpeg_that_ends_between_two_scans_is_cut(mode):
    data = as_jpeg(photo().convert(mode), progressive=True)
    assert check_jpeg(data[:-2]) == (data, "")
    scans = len(read_outline(data).scans)
    assert scans > 4
    cuts = [n for n in range(len(data) - 2) if data[n : n + 2] in (b"\xff\xda", b"\xff\xc4")][1:]  # headers of scans
    behind_a_scan = [n for n in cuts if len(read_outline(data[:n]).scans) in range(1, scans)]
    assert behind_a_scan
    for n in behind_a_scan:
        with pytest.raises(DecodeError, match="ends before its pixels do"):
            check_jpeg(data[:n])


def test_scans_count_by_their_pixels(monkeypatch):
    data = as_jpeg(photo(), progressive=True)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 160 * 120 // 2)  # so the image is as large as any may be
    scan = data[data.rfind(b"\xff\xda") : -2]
    assert len(read_outline(check_jpeg(data[:-2] + scan * 10 + data[-2:])[0]).scans) == 20
    with pytest.raises(DecodeError, match="a JPEG of 21 scans, expected at most 20 for 19,200 pixels"):
        check_jpeg(data[:-2] + scan * 11 + data[-2:])


def test_a_jpeg_of_endless_segments_is_too_large():
    data = as_jpeg(photo())
    with pytest.raises(DecodeError, match="more than 10,000 segments"):
        check_jpeg(data[:-2] + b"\xff\xfe\x00\x02" * MAX_SEGMENTS + data[-2:])


def png_of(rows, width, height, color=2, interlace=0):
    header = struct.pack(">IIBBBBB", width, height, 8, color, 0, 0, interlace)
    return png((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))


@pytest.mark.parametrize(("color", "channels"), [(0, 1), (2, 3), (6, 4)])
def test_a_png_of_too_few_rows_is_cut(tmp_path, color, channels):
    rows = b"".join(b"\0" + bytes([y + 1] * 64 * channels) for y in range(64))
    path = tmp_path / "x.png"
    path.write_bytes(png_of(rows, 64, 64, color))
    assert load(path, resolution="64").pixels.shape == (64, 64, 3)
    path.write_bytes(png_of(rows[:-1], 64, 64, color))
    assert load(path, resolution="64").reason == "truncated"
    path.write_bytes(png_of(rows[: len(rows) // 2], 64, 64, color))
    assert load(path, resolution="64").reason == "truncated"


def test_a_png_whose_last_rows_are_black_is_whole(tmp_path):
    path = save(tmp_path, Image.new("RGB", (70, 65)))
    assert load(path, resolution="64").pixels.max() == 0
    assert load(save(tmp_path, Image.new("1", (70, 65)), "b.png"), resolution="64").pixels.max() == 0


@pytest.mark.parametrize("chunk", [(b"tEXt", b"a\0b"), (b"IHDR", struct.pack(">IIBBBBB", 64, 64, 8, 0, 0, 0, 0))])
def test_a_png_whose_header_is_not_its_first_chunk_stops_no_unit(tmp_path, chunk):
    path = tmp_path / "x.png"
    whole = png_of(b"".join(b"\0" + bytes(3 * 64) for _ in range(64)), 64, 64)
    path.write_bytes(whole[:8] + png(chunk)[8:] + whole[8:])
    assert load(path, resolution="64").pixels.shape == (64, 64, 3)


def test_the_passes_of_an_interlaced_png_are_counted(tmp_path):
    sides = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    path = tmp_path / "x.png"
    for width, height in ((64, 64), (65, 71), (64, 2), (2, 64)):
        pixels = np.full((height, width, 3), 200, np.uint8)
        parts = [pixels[top::down, left::right] for left, top, right, down in sides]
        rows = b"".join(b"\0" + row.tobytes() for part in parts if part.shape[1] for row in part)
        path.write_bytes(png_of(rows, width, height, interlace=1))
        assert load(path, width=64, height=64).pixels.min() == 200
        path.write_bytes(png_of(rows[:-2], width, height, interlace=1))
        assert load(path, width=64, height=64).reason == "truncated"


def test_a_png_of_a_huge_chunk_is_too_large(tmp_path):
    path = tmp_path / "x.png"
    rows = bytes(64 * (1 + 3 * 64))
    path.write_bytes(png_of(rows, 64, 64)[:33] + struct.pack(">I4s", MAX_CHUNK + 1, b"tEXt"))
    found = read_item(path, "x.png")
    assert (found.reason, "a PNG chunk b'tEXt' of 64,000,001 bytes" in found.detail) == ("too_large", True)


def endless(kind):
    """A file that holds a good image, and a million pieces more than it needs."""
    many = MAX_READS + 10
    jpeg, gif, jp2 = (io.BytesIO() for _ in range(3))
    photo().save(jpeg, "JPEG")
    photo().convert("P").save(gif, "GIF")
    photo().save(jp2, "JPEG2000")
    return {
        "padding.jpg": jpeg.getvalue()[:2] + b"\xff" * many + jpeg.getvalue()[2:],
        "segments.jpg": jpeg.getvalue()[:2] + b"\xff\xe5\x00\x02" * many + jpeg.getvalue()[2:],
        "late.gif": gif.getvalue()[:-1] + b"!\x01" + b"\x01a" * many + b"\0;",
        "boxes.jp2": jp2.getvalue()[:12] + b"\0\0\0\x08free" * many + jp2.getvalue()[12:],
        "comment.ppm": b"P6\n#" + b"a" * many + b"\n8 8 255\n" + bytes(192),
    }[kind]


@pytest.mark.parametrize("name", ["padding.jpg", "segments.jpg", "late.gif", "boxes.jp2", "comment.ppm"])
def test_a_file_of_endless_pieces_is_too_large(tmp_path, monkeypatch, name):
    monkeypatch.setattr(pillow, "MAX_READS", 20_000)
    monkeypatch.setattr("tests.test_hostile.MAX_READS", 20_000)
    path = tmp_path / name
    path.write_bytes(endless(name))
    found = load(path, resolution="64")
    assert isinstance(found, Skip)
    assert (found.reason, found.detail) == ("too_large", "a file of more than 20,000 pieces")


def test_what_pillow_decodes_in_python_is_bounded(tmp_path):
    path = tmp_path / "x.ppm"
    path.write_bytes(b"P6 2001 2000 100\n")  # levels 0 to 100: these are scaled pixel by pixel
    found = read_item(path, "x.ppm")
    assert (found.reason, f"PPM may have {MAX_PYTHON_PIXELS:,}" in found.detail) == ("too_large", True)
    assert "make it a PNG" in found.detail
    path.write_bytes(b"P6 2001 2000 255\n")
    assert isinstance(read_item(path, "x.ppm"), Item)


def test_photoshop_files_are_read(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    head = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 64, 64, 8, 3) + struct.pack(">III", 0, 0, 0)
    path = tmp_path / "x.psd"
    path.write_bytes(head + b"\0\0" + pixels.transpose(2, 0, 1).tobytes())
    assert np.array_equal(load(path, resolution="64").pixels, pixels)
    image = Image.fromarray((pixels[:, :, 0] / 255).astype(np.float32))
    image.save(tmp_path / "x.spider", "SPIDER")
    assert np.array_equal(load(tmp_path / "x.spider", resolution="64").pixels[:, :, 0], pixels[:, :, 0])


@pytest.mark.parametrize("kind", ["cicp", "float"])
def test_colour_takes_little_memory(kind):
    image = Image.new("RGB", (3000, 3000), (200, 50, 50)) if kind == "cicp" else Image.new("F", (3000, 3000), 0.5)
    tracemalloc.start()
    if kind == "cicp":
        apply_cicp(image, Cicp(12, 13, 0, 1), [])
    else:
        to_srgb(image, None, [])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 16 * image.width * image.height  # bytes a pixel; what Pillow holds itself is not in it


def test_cicp_by_strips_is_the_formula():
    image = gradient(1100, 1000)  # more pixels than a strip
    found = np.asarray(apply_cicp(image, Cicp(12, 13, 0, 1), [])).astype(int)
    values = np.asarray(image) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    matrix = np.array([[1.22494, -0.22494, 0], [-0.04206, 1.04206, 0], [-0.01964, -0.07864, 1.09827]])
    linear = np.clip(linear @ matrix.T, 0, 1)
    wanted = 255 * np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
    assert np.abs(found - wanted).max() < 0.6


def test_large_files_are_decoded_alone():
    assert is_large(Item("a", (8, 8), LARGE_BYTES + 1, 0))
    assert not is_large(Item("a", (8, 8), LARGE_BYTES, 0))


@pytest.mark.parametrize("damage", ["jpeg", "checksum", "rows"])
def test_damaged_masks_are_looked_at_as_images_are(run, tmp_path, images, damage):
    masks = tmp_path / "masks"
    masks.mkdir()
    rows = b"".join(b"\0" + bytes([200] * 128) for _ in range(40))
    data = png_of(rows[: len(rows) // 2] if damage == "rows" else rows, 128, 40, 0)
    if damage == "checksum":
        data = data[:-16] + bytes([data[-16] ^ 1]) + data[-15:]
    (masks / ("wide1.jpg" if damage == "jpeg" else "wide1.png")).write_bytes(data)
    if damage == "jpeg":
        file = io.BytesIO()
        photo(128, 40).save(file, "JPEG")
        data = file.getvalue()
        (masks / "wide1.jpg").write_bytes(data[: len(data) // 2] + b"\xff\xd9")
    encode = ("encode", images, "--out", tmp_path / "c", *SMALL, "--device", "cpu", "--weights", masks)
    result = run(*encode, *(["--strict-images"] if damage == "jpeg" else []))
    assert (result.code, "skipped  1 bad_mask (wide1.png" in result.out) == (0, True)


def test_damaged_images_are_named(run, tmp_path, images):
    for n in range(7):
        (images / f"bad{n}\x1b.jpg").write_bytes(taller(as_jpeg(photo())))
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--device", "cpu")
    line = next(line for line in result.out.splitlines() if "damage in the JPEG data" in line)
    assert line.endswith("bad0\\x1b.jpg, bad1\\x1b.jpg, bad2\\x1b.jpg, bad3\\x1b.jpg, bad4\\x1b.jpg and 2 more")


def test_a_mask_of_no_end_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    masks = tmp_path / "masks"
    masks.mkdir()
    save(tmp_path, gradient(64, 64))
    with (masks / "x.png").open("wb") as file:
        file.truncate(1 << 40)  # of no bytes on disk
    monkeypatch.setattr(Folder, "read", None)  # nothing is read
    started = time.perf_counter()
    found = load(tmp_path / "x.png", resolution="64", masks=masks)
    assert (found.reason, time.perf_counter() - started < 1) == ("bad_mask", True)


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_grey_is_that_of_the_file(tmp_path, bits):
    levels = np.arange(64 * 64).reshape(64, 64) // 256 * ((1 << bits) - 1) // 15
    transparent = int(levels[20, 0])
    if bits == 16:
        rows = levels.astype(">u2").view(np.uint8)
    else:
        rows = np.packbits(
            np.unpackbits(levels.astype(np.uint8)[:, :, None], axis=2)[:, :, 8 - bits :].reshape(64, -1), axis=1
        )
    path = tmp_path / "x.png"
    header = struct.pack(">IIBBBBB", 64, 64, bits, 0, 0, 0, 0)
    content = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    path.write_bytes(
        png((b"IHDR", header), (b"tRNS", struct.pack(">H", transparent)), (b"IDAT", content), (b"IEND", b""))
    )
    found = load(path, resolution="64", background="keep")
    wanted = np.round(levels * 255 / ((1 << bits) - 1))
    assert np.array_equal(found.pixels, np.repeat(wanted[:, :, None], 3, axis=2))
    assert np.array_equal(
        found.weight, (levels != transparent).reshape(8, 8, 8, 8).mean(axis=(1, 3)).astype(np.float32)
    )


def test_what_a_skip_says_is_the_same_in_every_run(tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    save(tmp_path, gradient(64, 64))
    (masks / "x.png").write_bytes(b"no image")
    found = load(tmp_path / "x.png", resolution="64", masks=masks)  # Pillow's words name the address of an object
    detail = f"{masks / 'x.png'}: its bytes are of no image format that Pillow knows"
    assert (found.reason, found.detail) == ("bad_mask", detail)


def test_pillow_logs_nothing_to_the_terminal():
    pillow.formats()  # Python prints what a logger without a handler says; pytest's own handlers hide that
    assert any(isinstance(handler, logging.NullHandler) for handler in logging.getLogger("PIL").handlers)


def test_a_mask_of_another_shape_is_not_decoded(tmp_path):
    masks = tmp_path / "masks"
    masks.mkdir()
    save(tmp_path, gradient(64, 64))
    (masks / "x.png").write_bytes(png_of(b"", 64, 640))
    assert "not the same shape" in load(tmp_path / "x.png", resolution="64", masks=masks).detail


@pytest.mark.parametrize("megapixels", ["100000", "1e15"])
def test_a_bound_without_measure_takes_no_memory(run, images, tmp_path, megapixels):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = run("encode", images, "--out", tmp_path / "c", *SMALL, "--max-megapixels", megapixels)
    assert result.code == 0
    assert "encoded  8 images" in result.out
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB


def test_an_image_that_does_not_fit_into_memory_is_a_skip(run, images, tmp_path, monkeypatch):
    read = Folder.read

    def fails(self, key, limit):
        if key == "wide0.png":
            raise MemoryError
        return read(self, key, limit)

    monkeypatch.setattr(Folder, "read", fails)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL)
    assert result.code == 0
    assert "skipped  1 out_of_memory (wide0.png" in result.out


def test_the_transparent_colour_of_16_bits(tmp_path):
    pixels = np.full((4, 5, 3), 20_000, ">u2")
    pixels[1, 2] = 0x1234, 0x5678, 0x9ABC
    rows = b"".join(b"\0" + row.tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", 5, 4, 16, 2, 0, 0, 0)
    parts = (
        (b"IHDR", header),
        (b"tRNS", struct.pack(">HHH", 0x1234, 0x5678, 0x9ABC)),
        (b"IDAT", zlib.compress(rows)),
        (b"IEND", b""),
    )
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body)) for name, body in parts
    )
    image = Image.open(io.BytesIO(data))
    image.load()
    scale_transparency(data, image)
    alpha = split_alpha(image)[1]
    assert np.argwhere(np.asarray(alpha) == 0).tolist() == [[1, 2]]


def test_a_file_in_which_any_other_may_lie_is_not_opened(tmp_path):
    """IPTC, of which Pillow opens what is inside without our list of formats: an EPS would start Ghostscript."""
    assert "IPTC" in Image.OPEN or "IPTC" in Image.ID
    assert not {"IPTC", "EPS", "WMF"} & set(pillow.formats())


def test_the_size_of_a_mask_is_looked_at_before_it_is_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    masks = tmp_path / "masks"
    masks.mkdir()
    save(tmp_path, gradient(64, 64))
    gradient(300, 300).convert("L").save(masks / "x.jpg")
    monkeypatch.setattr("latentprep.prepare.images.decode.check_jpeg", None)  # which decodes it
    found = load(tmp_path / "x.png", resolution="64", masks=masks)
    assert (found.reason, "exceeds limit" in found.detail) == ("bad_mask", True)
