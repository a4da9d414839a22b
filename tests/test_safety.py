"""What must not cost a cache: another folder, a half-mounted disk, unreadable files, strangers' files, old content."""

import json
import os
import shutil

import pytest
import torch
from filelock import FileLock

from latentprep import LatentDataset
from latentprep.cache import files as cache_files
from latentprep.cache.lock import hold
from latentprep.cache.manifest import open_manifest, read_skips
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.prepare.source.folder import Folder
from tests.conftest import SMALL, gradient
from tests.test_encode import files, rows

SHARDS = ("--shard-size", "30kB")


@pytest.fixture
def encode(run, images, tmp_path):
    return lambda *options, source=images: run("encode", source, "--out", tmp_path / "c", *SMALL, *SHARDS, *options)


def skips(cache):
    return {skip.key: skip.reason for skip in read_skips(Storage(cache))}


# sources


def test_links_in_a_circle_and_unreadable_folders_are_skips(encode, images, tmp_path, monkeypatch):
    (images / "loop").symlink_to(images / "loop")
    (images / "loop.png").symlink_to(images / "loop.png")
    (images / "locked").mkdir()
    gradient(64, 80).save(images / "locked" / "in.png")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    result = encode()
    assert result.code == 0
    assert skips(tmp_path / "c") == {"loop.png": "io_error", "locked": "unreadable_folder"}
    monkeypatch.undo()
    assert "1 new" in encode().out
    assert skips(tmp_path / "c") == {"loop.png": "io_error"}


def test_a_folder_that_cannot_be_read_now_costs_no_row(run, encode, images, tmp_path, monkeypatch):
    (images / "sub").mkdir()
    for n in range(3):
        gradient(64, 80 + n).save(images / "sub" / f"{n}.png")
    encode()
    before = files(tmp_path / "c")
    scandir = os.scandir

    def denied(path):
        if str(path).endswith("sub"):
            raise OSError(5, "Input/output error")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", denied)
    result = encode()
    assert "unread   3 images cannot be read now, what the cache has stays: sub/0.png" in result.err
    assert len(rows(tmp_path / "c")) == 11
    assert run("verify", tmp_path / "c").code == 0
    monkeypatch.undo()
    encode()
    assert files(tmp_path / "c") == before


def test_one_image_that_cannot_be_read_now_costs_no_row(encode, images, tmp_path, monkeypatch):
    encode()
    opened = os.open

    def denied(path, *arguments, **options):
        if str(path).endswith("wide1.png"):
            raise PermissionError(13, "Permission denied")
        return opened(path, *arguments, **options)

    def is_allowed(path, *arguments, **options):
        return not str(path).endswith("wide1.png")

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(os, "access", is_allowed)  # a system that denies one denies both
    assert "unread   1 image cannot be read now" in encode().err
    monkeypatch.undo()
    assert len(rows(tmp_path / "c")) == 8
    assert skips(tmp_path / "c") == {}
    assert "nothing to do" in encode().out


def test_a_bad_caption_is_a_skip_that_heals_and_costs_no_row(encode, images, tmp_path):
    encode()
    good = (images / "tall0.txt").read_bytes()
    (images / "tall0.txt").write_bytes(b"caf\xe9")
    gradient(64, 80).save(images / "new.png")
    (images / "new.txt").write_bytes(b"caf\xe9")
    result = encode()
    assert "unread   1 image cannot be read now, what the cache has stays: tall0.png" in result.err
    assert "skipped  1 bad_caption (new.png: new.txt: not UTF-8 text at byte 3" in result.out
    assert len(rows(tmp_path / "c")) == 8
    (images / "tall0.txt").write_bytes(good)
    (images / "new.txt").write_bytes(good)
    encode()
    assert len(rows(tmp_path / "c")) == 9
    assert skips(tmp_path / "c") == {}


def test_a_source_that_vanishes_stops_the_run(encode, images, tmp_path, monkeypatch):
    read = Folder.read

    def unplugged(self, key, limit):
        if key == "wide0.png":
            images.rename(tmp_path / "elsewhere")
        return read(self, key, limit)

    monkeypatch.setattr(Folder, "read", unplugged)
    result = encode("--workers", 1)
    assert (result.code, "vanished while its images were read" in result.err) == (1, True)
    assert not (tmp_path / "c" / "cache.json").exists()
    monkeypatch.undo()
    (tmp_path / "elsewhere").rename(images)
    assert encode().code == 0
    assert (len(rows(tmp_path / "c")), skips(tmp_path / "c")) == (8, {})


# another source


def small_folder(tmp_path):
    folder = tmp_path / "small"
    folder.mkdir()
    gradient(64, 90).save(folder / "one.png")
    return folder


@pytest.mark.parametrize("options", [(), ("--dry-run",), ("--only", "latents")])
def test_a_mistyped_out_empties_no_cache(run, encode, images, tmp_path, options):
    encode()
    before = files(tmp_path / "c")
    result = encode(*options, source=small_folder(tmp_path))
    assert result.code == 1
    assert f"8 of its 8 images are not in SOURCE {tmp_path / 'small'}; it was made from {images}" in result.err
    assert "--allow-gone" in result.err
    assert files(tmp_path / "c") == before


def test_an_unfinished_cache_is_not_emptied_either(encode, tmp_path):
    encode()
    (tmp_path / "c" / "cache.json").unlink()
    before = {name for name in files(tmp_path / "c") if name.startswith("shards/")}
    assert encode(source=small_folder(tmp_path)).code == 1
    assert {name for name in files(tmp_path / "c") if name.startswith("shards/")} == before


def test_more_than_half_gone_is_refused_and_half_is_not(encode, images, tmp_path):
    encode()
    for n in range(4):
        (images / f"wide{n}.png").unlink()
    assert "4 gone" in encode().out
    for n in range(3):
        (images / f"tall{n}.png").unlink()
    assert "3 of its 4 images are not in SOURCE" in encode().err
    assert "3 gone" in encode("--allow-gone").out


def test_a_folder_that_moved_goes_on_and_one_that_lost_images_too_is_refused(encode, images, tmp_path):
    encode()
    images.rename(tmp_path / "moved")
    assert "nothing to do" in encode(source=tmp_path / "moved").out
    (tmp_path / "moved" / "wide0.png").unlink()
    assert "1 of its 8 images are not in SOURCE" in encode(source=tmp_path / "moved").err
    assert encode("--allow-gone", source=tmp_path / "moved").code == 0
    (tmp_path / "moved" / "wide1.png").unlink()
    assert "1 gone" in encode(source=tmp_path / "moved").out  # that is its source now


# strangers' files


@pytest.mark.parametrize(
    ("name", "content"),
    [("cache.json", b'{"a": 1}'), ("skipped.jsonl", b"{}\n"), ("shards/x.bin", b"x"), (".lock", b"mine"),
     ("shards", b"a file"), (".readers", b"x")],
)  # fmt: skip
@pytest.mark.parametrize("options", [(), ("--overwrite",), ("--dry-run",)])
def test_files_of_another_program_are_left_alone(encode, tmp_path, name, content, options):
    path = tmp_path / "c" / name
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    (tmp_path / "c" / "notes.txt").write_bytes(b"hello")
    before = files(tmp_path / "c")
    result = encode(*options)
    assert (result.code, "which latentprep did not write" in result.err) == (1, True)
    assert files(tmp_path / "c") == before


def test_other_files_in_the_folder_are_no_obstacle(encode, tmp_path):
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "notes.txt").write_bytes(b"hello")
    assert encode().code == 0
    assert encode("--overwrite").code == 0
    assert (tmp_path / "c" / "notes.txt").read_bytes() == b"hello"


def test_demo_writes_into_nobody_elses_folder(run, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "000.txt").write_text("mine")
    result = run("demo", tmp_path)
    assert (result.code, "files that are not the demo's" in result.err) == (1, True)
    assert files(tmp_path) == {"images/000.txt": b"mine"}


# advice


@pytest.mark.parametrize("command", ["inspect", "verify", "compact"])
def test_the_path_of_cache_json_is_the_cache(run, encode, tmp_path, command):
    encode()
    assert run(command, tmp_path / "c" / "cache.json").code == 0
    assert len(LatentDataset(tmp_path / "c" / "cache.json")) == 8


def test_nobody_is_told_to_delete_another_programs_file(run, tmp_path):
    (tmp_path / "cache.json").write_text("{broken")
    result = run("inspect", tmp_path)
    assert result.code == 1
    assert "Delete" not in result.err


def test_compact_is_recommended_only_if_it_does_something(run, encode, images, tmp_path):
    options = ("--shard-size", "10MB")
    encode(*options)
    (images / "wide0.png").unlink()  # one row of eight
    result = encode(*options)
    assert "too few to compact" in result.out
    assert "too few to compact" in run("inspect", tmp_path / "c").out
    assert "0 shards rewritten" in run("compact", tmp_path / "c").out
    (images / "wide1.png").unlink()
    assert "latentprep compact" in encode(*options).out
    assert "latentprep compact" in run("inspect", tmp_path / "c").out
    assert "1 shard rewritten" in run("compact", tmp_path / "c").out


# content


def test_check_content_finds_what_size_and_time_hide(run, encode, images, tmp_path):
    def replace(name, image):
        before = (images / name).stat()
        image.save(images / name, compress_level=0)
        os.utime(images / name, ns=(before.st_atime_ns, before.st_mtime_ns))

    for name in ("wide0.png", "tall0.png"):
        replace(name, gradient(128, 40))
    encode()
    replace("wide0.png", gradient(128, 40).rotate(180))
    assert "nothing to do" in encode().out
    result = encode("--check-content")
    assert (result.code, "1 changed" in result.out) == (0, True)
    assert "nothing to do" in encode("--check-content").out
    assert "nothing to do" in encode().out
    assert run("verify", tmp_path / "c", "--source", images).code == 0
    shutil.copytree(tmp_path / "c", tmp_path / "healed")
    encode("--overwrite")
    healed, fresh = rows(tmp_path / "healed"), rows(tmp_path / "c")
    assert all(torch.equal(healed[key]["latent_mean"], fresh[key]["latent_mean"]) for key in fresh)


# files of a cache that are there and cannot be read


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"), RuntimeError("unable to mmap 100 bytes")])
@pytest.mark.parametrize("kind", ["latents", "text"])
def test_files_of_a_cache_that_cannot_be_read_are_not_made_again(encode, images, tmp_path, monkeypatch, error, kind):
    encode()
    before = files(tmp_path / "c")
    opened = cache_files.safe_open

    def denied(path, *arguments, **options):
        if f".{kind}." in path:
            raise error
        return opened(path, *arguments, **options)

    monkeypatch.setattr(cache_files, "safe_open", denied)
    gradient(64, 80).save(images / "wide0.png")
    (images / "wide1.png").touch()
    result = encode()
    assert (result.code, "is there, and cannot be read" in result.err) == (1, True)
    with pytest.raises(UnreadableError, match="is there, and cannot be read"):
        LatentDataset(tmp_path / "c")[0]
    monkeypatch.undo()
    assert files(tmp_path / "c") == before


def test_an_unreadable_shard_of_an_unfinished_run_is_not_made_again(encode, tmp_path, monkeypatch):
    encode()
    (tmp_path / "c" / "cache.json").unlink()
    read = Storage.read

    def denied(self, name):
        if ".latents." in name:
            raise OSError(5, "Input/output error")
        return read(self, name)

    monkeypatch.setattr(Storage, "read", denied)
    assert "cannot be read (Input/output error)" in encode().err


def test_trouble_with_the_lock_hides_no_error(tmp_path, monkeypatch):
    def denied(*_arguments, **_options):
        raise PermissionError(13, "Permission denied")

    def work():
        with hold(Storage(tmp_path / "c")):
            monkeypatch.setattr("pathlib.Path.unlink", denied)
            monkeypatch.setattr(FileLock, "release", denied)
            raise UserError("the real one")

    with pytest.raises(UserError, match="the real one"):
        work()


def test_a_cache_of_no_images_is_an_error_and_leaves_nothing(encode, images, tmp_path):
    for path in images.glob("*.png"):
        path.write_bytes(path.read_bytes()[:-40])
    result = encode()
    assert (result.code, "none of its 8 images can be used" in result.err) == (1, True)
    assert not (tmp_path / "c").exists()


def test_the_source_is_recorded(encode, images, tmp_path):
    encode()
    assert open_manifest(Storage(tmp_path / "c")).made_with.source == str(images)
    assert json.loads((tmp_path / "c" / "cache.json").read_text())["made_with"]["source"] == str(images)
