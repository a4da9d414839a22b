"""prepare/source: what is found in a folder, by headers alone; and a source that is new."""

import inspect
import os
import pickle
import re
import struct
import zlib
from io import BytesIO
from zipfile import ZIP_DEFLATED, ZipFile

import pytest
from PIL import Image

import latentprep
from latentprep.errors import UserError
from latentprep.options import Geometry, ImageOptions
from latentprep.prepare.images.load import LoadOptions
from latentprep.prepare.images.pillow import limit_pixels
from latentprep.prepare.source import sources
from latentprep.prepare.source.listing import list_images
from latentprep.prepare.source.masks import list_masks
from latentprep.prepare.source.sources import open_source
from latentprep.recipe import LatentsRecipe
from latentprep.records import Item
from tests import zip_source
from tests.conftest import SMALL, gradient, read_item
from tests.zip_source import open_zips


def list_folder(folder, without=()):
    return list_images(open_source(folder, without=without))


def exif(orientation):
    data = Image.Exif()
    data[0x0112] = orientation
    return data


def test_folder_is_searched_recursively_and_sorted(tmp_path):
    for key in ("b.png", "a/c.JPG", "a/b/d.webp", ".hidden/x.png", "a/.y.png"):
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        gradient(10, 6).save(tmp_path / key)
    (tmp_path / "a" / "notes.md").write_text("x")
    found = list_folder(tmp_path)
    assert [item.key for item in found.items] == ["a/b/d.webp", "a/c.JPG", "b.png"]
    assert {item.size for item in found.items} == {(6, 10)}
    assert found.others == {"a/notes.md": 1}
    status = (tmp_path / "b.png").stat()
    assert (found.items[-1].nbytes, found.items[-1].version) == (status.st_size, status.st_mtime_ns)


def test_links_to_folders_are_followed_and_circles_end(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "elsewhere").mkdir()
    gradient(8, 8).save(tmp_path / "elsewhere" / "a.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "photos" / "link")
    os.symlink(tmp_path / "photos", tmp_path / "photos" / "circle")
    os.symlink(tmp_path / "nowhere.png", tmp_path / "photos" / "dangling.png")
    found = list_folder(tmp_path / "photos")
    assert [item.key for item in found.items] == ["link/a.png"]
    assert [(skip.key, skip.reason) for skip in found.skips] == [("dangling.png", "io_error")]


def test_caches_are_not_images(tmp_path):
    gradient(8, 8).save(tmp_path / "a.png")
    (tmp_path / "old.latents" / "shards").mkdir(parents=True)
    (tmp_path / "old.latents" / "cache.json").write_text("{}")
    (tmp_path / "out").mkdir()
    for name in ("old.latents", "out"):
        gradient(8, 8).save(tmp_path / name / "preview.png")
    assert [item.key for item in list_folder(tmp_path, without=[tmp_path / "out"]).items] == ["a.png"]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_size_is_after_exif_orientation(tmp_path, orientation, suffix):
    path = tmp_path / f"x.{suffix}"
    gradient(20, 10).save(path, exif=exif(orientation))
    item = read_item(path, "x")
    assert isinstance(item, Item)
    assert item.size == ((20, 10) if orientation >= 5 else (10, 20))


def test_png_with_exif_behind_its_pixels(tmp_path):
    path = tmp_path / "late.png"
    gradient(20, 10).save(path)
    data, payload = path.read_bytes(), exif(6).tobytes()
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload + struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_item(path, "x").size == (20, 10)


def test_headers_are_read_without_decoding(tmp_path, monkeypatch):
    for n, suffix in enumerate(("png", "jpg", "webp", "gif")):
        gradient(20, 10).save(tmp_path / f"{n}.{suffix}")

    def load(self):
        raise AssertionError("decoded")

    for name in ("PngImagePlugin.PngImageFile", "JpegImagePlugin.JpegImageFile", "WebPImagePlugin.WebPImageFile"):
        monkeypatch.setattr(f"PIL.{name}.load", load)
    assert len(list_folder(tmp_path).items) == 4


@pytest.mark.parametrize(
    ("content", "reason", "detail"),
    [
        (b"", "not_an_image", "empty file"),
        (
            b"plain text, not a picture",
            "not_an_image",
            "its bytes are of no image format that Pillow knows, whatever its .png says",
        ),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 30, "unreadable", ""),
        (b"\xff\xd8\xff\xe0\0\x10JFIF", "unreadable", ""),
    ],
)
def test_what_only_looks_like_an_image_is_a_skip(tmp_path, content, reason, detail):
    gradient(8, 8).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes(content)
    found = list_folder(tmp_path)
    assert [item.key for item in found.items] == ["good.png"]
    (skip,) = found.skips
    assert skip.key == "bad.png"
    assert skip.reason in (reason, "not_an_image")
    assert detail in skip.detail
    assert skip.nbytes == len(content)


def test_absurd_dimensions_are_a_skip(tmp_path):
    header = b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIBBBBB", 13, b"IHDR", 300_000, 300_000, 8, 2, 0, 0, 0)
    pixels = struct.pack(">I", 8) + b"IDAT" + bytes(12)
    (tmp_path / "bomb.png").write_bytes(header + struct.pack(">I", zlib.crc32(header[12:])) + pixels)
    (skip,) = list_folder(tmp_path).skips
    assert skip.reason == "too_large"


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "scandir", denied)
    with pytest.raises(UserError, match=r"cannot be listed \(Permission denied\). Make it readable."):
        list_folder(tmp_path)


def test_folders_that_cannot_be_a_source(tmp_path):
    (tmp_path / "file.png").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("x")
    for name, message in {
        "missing": "no such folder. Give the folder that holds the images.",
        "file.png": "a file, expected a folder of images.",
        "empty": "no images (it is empty). Expected files such as .jpg, .png or .webp.",
        "texts": "no images (1 other files). Expected files such as .jpg, .png or .webp.",
    }.items():
        with pytest.raises(UserError) as error:
            list_folder(tmp_path / name)
        assert str(error.value) == f"SOURCE {tmp_path / name}: {message}"


@pytest.fixture
def small_limit():
    before = Image.MAX_IMAGE_PIXELS
    limit_pixels(10_000)
    yield
    Image.MAX_IMAGE_PIXELS = before


def bomb(width, height):
    """A PNG whose header promises so many pixels, and that has none."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (2**31 - 1, 2**31 - 1), (1, 2_000_000), (101, 100)])
def test_images_beyond_the_limit_are_not_even_begun(tmp_path, small_limit, size):
    (tmp_path / "x.png").write_bytes(bomb(*size))
    skip = read_item(tmp_path / "x.png", "x.png")
    assert skip.reason == "too_large"
    assert skip.detail == f"Image size ({size[0] * size[1]} pixels) exceeds limit of 10000 pixels (--max-megapixels)"


def test_files_that_are_too_large_for_any_image(tmp_path, small_limit):
    gradient(8, 8).save(tmp_path / "x.png")
    os.truncate(tmp_path / "x.png", 100_000)
    skip = read_item(tmp_path / "x.png", "x.png")
    assert (skip.reason, skip.detail) == ("too_large", "100.0 kB is more than any image of --max-megapixels has")


def test_pipes_and_postscript_are_not_opened(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "script.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n"
    )
    with Image.open(tmp_path / "script.png") as image:
        assert image.format == "EPS"  # Pillow would have Ghostscript run it
    gradient(8, 8).save(tmp_path / "good.png")
    found = list_folder(tmp_path)
    assert [item.key for item in found.items] == ["good.png"]
    assert [(skip.key, skip.reason) for skip in found.skips] == [
        ("pipe.png", "unreadable"), ("script.png", "not_an_image"),
    ]  # fmt: skip


# a source of one's own


@pytest.fixture
def zips(tmp_path, monkeypatch):
    """Two zip files, and the row that opens such folders."""
    monkeypatch.setattr(sources, "SOURCES", [open_zips, *sources.SOURCES])
    folder = tmp_path / "zips"
    folder.mkdir()
    for number in range(2):
        with ZipFile(folder / f"{number}.zip", "w", ZIP_DEFLATED) as archive:
            for name in ("a.png", "sub/b.png"):
                file = BytesIO()
                gradient(64, 80 + number).rotate(len(name)).save(file, "PNG")
                archive.writestr(name, file.getvalue())
            archive.writestr("a.txt", f"picture {number}")
            archive.writestr("../outside.png", b"x")
            archive.writestr("metadata.csv", "file_name,text\nsub/b.png,of a table\n")
    (folder / "broken.zip").write_bytes(b"no zip")
    return folder


def test_a_new_source_is_one_file_and_one_row(run, zips, tmp_path):
    result = run("encode", zips, "--out", tmp_path / "c", *SMALL)
    assert result.code == 0
    assert "4 images; captions: 2 from .txt, 2 from metadata files" in result.err
    assert "encoded  4 images" in result.out
    assert "skipped  1 unreadable_folder" in result.out
    assert "skipped  2 unreadable (0.zip/../outside.png" in result.out
    assert "nothing to do" in run("encode", zips, "--out", tmp_path / "c", *SMALL).out
    assert "picture 1" in run("inspect", tmp_path / "c", "--key", "1.zip/a.png").out
    assert run("verify", tmp_path / "c", "--source", zips, "--re-encode", 2).code == 0


def test_an_example_of_a_source_is_short():
    lines = inspect.getsource(zip_source).partition("@dataclass")[2].splitlines()
    assert len([line for line in lines if line.strip()]) < 30


def test_sources_and_how_images_are_loaded_can_go_to_other_processes(zips, tmp_path, images):
    for source in (open_source(zips), open_source(images)):
        listing = list_images(source)
        geometry = Geometry.from_options(resolution="64", bucket_step=32)
        recipe = LatentsRecipe.of(
            vae="", geometry=geometry, images=ImageOptions(), flip=False, dtype="float32", store="mean",
            store_dtype="float32",
        )  # fmt: skip
        data = pickle.dumps(LoadOptions.from_recipe(source, 8, list_masks(images), recipe))
        assert len(data) < 3000
        options = pickle.loads(data)
        assert options.source.read(listing.items[0].key, 10**6) == source.read(listing.items[0].key, 10**6)


def test_versions_fit_into_the_cache_whatever_they_are(tmp_path):
    gradient(8, 8).save(tmp_path / "a.png")
    for seconds in (-5, 2**33):
        os.utime(tmp_path / "a.png", (seconds, seconds))
        (item,) = list_folder(tmp_path).items
        assert 0 <= item.version < 2**63


@pytest.fixture
def messy(images):
    """A folder as a NAS leaves it, with thumbnails, masks and originals among the images."""
    thumbnails = ("@eaDir/wide0.png/SYNOPHOTO_THUMB_M.png", "__MACOSX/wide0.png")
    for name in (*thumbnails, "raw/day/a.png", "raw/b.png", "x_mask.png"):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        gradient(64, 64).save(images / name)
    (images / "raw" / "b.txt").write_text("b")
    return images


def test_what_systems_put_beside_photos_is_left_out_and_said(run, messy, tmp_path):
    result = run("encode", messy, "--model", "tiny", "--dry-run")
    assert "11 images; captions" in result.err
    assert "         2 files excluded: @eaDir (1), __MACOSX (1)" in result.err


@pytest.mark.parametrize(
    ("patterns", "count", "said"),
    [
        (["raw"], 9, "raw (3)"),
        (["raw/*"], 9, "raw/* (3)"),
        (["raw/?.png"], 10, "raw/?.png (1)"),
        (["*_mask.*", "day"], 9, "*_mask.* (1), day (1)"),
        (["b*"], 10, "b* (2)"),
    ],
)
def test_patterns_leave_out_files_and_folders(run, messy, tmp_path, patterns, count, said):
    given = [word for pattern in patterns for word in ("--exclude", pattern)]
    result = run("encode", messy, "--out", tmp_path / "c", *SMALL, *given)
    assert f"{count} images; captions" in result.err
    excluded = re.search(r"(\d+) files? excluded: (.*)", result.err)[2]
    assert set(said.split(", ")) | {"@eaDir (1)", "__MACOSX (1)"} == set(excluded.split(", "))
    verified = run("verify", tmp_path / "c", "--source", messy)
    assert (verified.code, "new" in verified.out) == (0, False), verified.out
    options = {"model": "tiny", "resolution": 64, "bucket_step": 32, "min_side": 32, "progress": False}
    again = latentprep.encode(messy, tmp_path / "c", exclude=patterns, **options)
    assert (again.num_encoded, again.num_cached) == (0, count)


def test_what_is_excluded_later_is_gone_from_the_cache(run, messy, tmp_path):
    assert run("encode", messy, "--out", tmp_path / "c", *SMALL).code == 0
    result = run("encode", messy, "--out", tmp_path / "c", *SMALL, "--exclude", "raw")
    assert "2 gone" in result.out


def test_a_pattern_that_leaves_nothing_is_said(run, messy, tmp_path):
    result = run("encode", messy, "--out", tmp_path / "c", *SMALL, "--exclude", "*")
    assert re.search(r"error: SOURCE .*: no images \(\d+ files are left out by \*, @eaDir, __MACOSX\)", result.err)
    result = run("encode", messy, "--out", tmp_path / "c", *SMALL, "--exclude", "/")
    assert "error: --exclude '/': expected a pattern such as '*_mask.png' or 'raw/*'." in result.err


def test_a_broken_file_of_a_known_format_is_not_said_to_be_of_an_unknown_one(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"no tiff")
    gradient(8, 8).save(tmp_path / "b.png")
    (skip,) = list_images(open_source(tmp_path)).skips
    assert skip.detail == "its bytes are of no image format that Pillow knows, whatever its .tif says"
