"""What a sick disk, a stranger's file or another source must not do to a cache; and advice that is true."""

import ctypes
import errno
import os
import shutil
import sys

import filelock
import pytest

from latentprep import LatentDataset, demo
from latentprep.cache.lock import hold
from latentprep.cache.manifest import find_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.prepare.models.vae_encoder import VaeEncoder
from latentprep.prepare.source.folder import Folder
from latentprep.prepare.work.finish import Finisher
from tests.conftest import SMALL, TINY, gradient
from tests.test_encode import files, rows

SHARDS = ("--shard-size", "30kB")
IO_ERROR = OSError(errno.EIO, "Input/output error")


@pytest.fixture
def encode(run, images, tmp_path):
    return lambda *options, source=images: run("encode", source, "--out", tmp_path / "c", *SMALL, *SHARDS, *options)


def fail_stats(monkeypatch, part):
    """The disk fails at every question for a path that holds `part`."""
    asked = os.stat

    def denied(path, *arguments, **options):
        if part in str(path):
            raise IO_ERROR
        return asked(path, *arguments, **options)

    monkeypatch.setattr(os, "stat", denied)


@pytest.fixture
def no_root():
    """This thread, and those that it starts, without root's right to open everything: mode 000 means what it says."""
    if sys.platform != "linux":
        pytest.skip("rights as Linux has them")
    if os.getuid() != 0:
        yield
        return
    libc, header = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 2)(0x20080522, 0)  # capability version 3
    before, after = (ctypes.c_uint32 * 6)(), (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable, twice
    assert libc.capget(header, before) == 0
    after[:] = before[:]
    after[0] &= ~(1 << 1 | 1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, after) == 0
    yield
    assert libc.capset(header, before) == 0


# files that are there, and cannot be opened


@pytest.mark.parametrize("kind", ["latents", "text"])
@pytest.mark.parametrize("what", ["encode", "compact", "read"])
def test_a_shard_of_mode_000_is_not_missing(run, encode, images, tmp_path, no_root, kind, what):
    encode("--shard-size", "10MB")
    for n in range(3):
        (images / f"wide{n}.png").unlink()
    encode("--shard-size", "10MB")
    (images / "tall0.png").touch()
    before = files(tmp_path / "c")
    path = next((tmp_path / "c" / "shards").glob(f"*.{kind}.*"))
    path.chmod(0)
    if what == "read":
        with pytest.raises(UnreadableError, match=r"is there, and cannot be read \(Permission denied\)"):
            LatentDataset(tmp_path / "c")[0]
    else:
        result = encode() if what == "encode" else run("compact", tmp_path / "c")
        assert (result.code, "cannot be read (Permission denied)" in result.err) == (1, True)
        assert "elete" not in result.out + result.err
    path.chmod(0o644)
    assert files(tmp_path / "c") == before


def test_verify_says_of_a_shard_of_mode_000_that_it_is_there(run, encode, tmp_path, no_root):
    encode()
    for path in (tmp_path / "c" / "shards").iterdir():
        path.chmod(0)
    result = run("verify", tmp_path / "c")
    assert (result.code, "missing" in result.out, "Permission denied" in result.out) == (1, False, True)


@pytest.mark.parametrize(
    "name",
    [
        "model_index.json", "vae", "vae/config.json", "vae/diffusion_pytorch_model.safetensors",
        "text_encoder/config.json", "text_encoder/model.safetensors", "tokenizer", "tokenizer/tokenizer.json",
    ],
)  # fmt: skip
def test_a_model_file_of_mode_000_is_no_damaged_download(run, images, tmp_path, no_root, name):
    shutil.copytree(TINY, tmp_path / "model")
    (tmp_path / "model" / name).chmod(0)
    result = run("encode", images, "--out", tmp_path / "c", *SMALL[2:], "--model", tmp_path / "model")
    (tmp_path / "model" / name).chmod(0o755)
    assert result.code == 1
    said = result.err.strip().splitlines()[-1]
    assert said.startswith("error: ")
    assert f"{tmp_path / 'model' / name}" in said
    assert "Permission denied. Mend that, and run the same command again." in said


def test_images_and_folders_of_mode_000_cost_no_row(encode, images, tmp_path, no_root):
    (images / "sub").mkdir()
    gradient(64, 90).save(images / "sub" / "one.png")
    encode()
    before = files(tmp_path / "c")
    (images / "sub").chmod(0)
    (images / "wide0.png").chmod(0)
    assert "unread   2 images cannot be read now" in encode().err
    assert len(rows(tmp_path / "c")) == 9
    (images / "sub").chmod(0o755)
    (images / "wide0.png").chmod(0o644)
    encode()
    assert files(tmp_path / "c") == before


# a manifest that cannot be read is not one that is missing, and is not to be deleted


@pytest.mark.parametrize("command", ["encode", "inspect", "verify", "compact"])
def test_a_manifest_that_cannot_be_read_is_neither_missing_nor_to_be_deleted(
    run, encode, tmp_path, monkeypatch, command
):
    encode()
    before = files(tmp_path / "c")
    fail_stats(monkeypatch, "cache.json")
    result = encode() if command == "encode" else run(command, tmp_path / "c")
    text = result.out + result.err
    assert result.code == 1
    assert "cache.json" in text
    assert "Input/output error" in text
    assert "elete" not in text
    monkeypatch.undo()
    assert files(tmp_path / "c") == before


def test_the_bare_name_of_cache_json_is_the_folder_around_it(run, encode, tmp_path, monkeypatch):
    encode()
    monkeypatch.chdir(tmp_path / "c")
    assert run("inspect", "cache.json").code == 0


def test_compact_does_not_say_that_an_unreadable_shard_is_to_be_deleted(run, encode, images, tmp_path, monkeypatch):
    encode("--shard-size", "10MB")
    for n in range(3):
        (images / f"wide{n}.png").unlink()
    encode("--shard-size", "10MB")
    stamp = Storage.stamp

    def denied(self, name):
        if ".latents." in name:
            raise IO_ERROR
        return stamp(self, name)

    monkeypatch.setattr(Storage, "stamp", denied)
    result = run("compact", tmp_path / "c")
    assert (result.code, "Input/output error" in result.err) == (1, True)
    assert "elete" not in result.out + result.err


def test_verify_does_not_call_an_unreadable_image_gone(run, encode, images, tmp_path, monkeypatch):
    encode()
    opened = os.open

    def denied(path, *arguments, **options):
        if str(path).endswith("wide1.png"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    (images / "wide2.png").unlink()
    result = run("verify", tmp_path / "c", "--source", images, "--json")
    assert '"problem": "unreadable"' in result.out
    assert result.out.count('"problem": "gone"') == 1


def test_a_touched_image_that_cannot_be_read_costs_no_row(encode, images, tmp_path, monkeypatch):
    encode()
    (images / "wide1.png").touch()
    read = Folder.read
    monkeypatch.setattr(Folder, "read", lambda self, key, limit: read(self, key.replace("wide1.png", "none"), limit))
    result = encode()
    assert "unread   1 image cannot be read now, what the cache has stays: wide1.png" in result.err
    assert len(rows(tmp_path / "c")) == 8
    monkeypatch.undo()
    assert "1 touched" in encode().out


# another source


def test_another_source_with_the_same_names_empties_no_cache(encode, images, tmp_path):
    encode()
    before = files(tmp_path / "c")
    other = tmp_path / "other"
    other.mkdir()
    for number, path in enumerate(sorted(images.glob("*.png"))):
        gradient(64, 80 + number).rotate(90).save(other / path.name)
    result = encode(source=other)
    assert (result.code, "8 of its 8 images have another content" in result.err) == (1, True)
    assert str(images) in result.err
    assert files(tmp_path / "c") == before
    assert "8 changed" in encode("--allow-gone", source=other).out


def test_a_source_whose_images_were_all_edited_or_that_moved_with_few_edits_goes_on(encode, images, tmp_path):
    encode()
    for path in images.glob("*.png"):
        gradient(64, 99).save(path)
    assert "8 changed" in encode().out
    images.rename(tmp_path / "moved")
    gradient(64, 98).save(tmp_path / "moved" / "wide0.png")
    assert "1 changed" in encode(source=tmp_path / "moved").out


# strangers' files


@pytest.mark.parametrize("options", [(), ("--overwrite",)])
def test_names_that_are_only_like_ours_are_left_alone(encode, images, tmp_path, options):
    encode()
    strangers = {".notes.tmp", "uncond.v2.safetensors", ".draft.7.tmp", "shards/readme.txt", "shards/.x.tmp"}
    for name in strangers:
        (tmp_path / "c" / name).write_bytes(b"mine")
    gradient(64, 90).save(images / "new.png")
    assert encode(*options).code == 0
    after = files(tmp_path / "c")
    assert {name: after.get(name) for name in strangers} == dict.fromkeys(strangers, b"mine")


def test_what_a_killed_run_was_just_writing_goes(encode, images, tmp_path):
    encode()
    unit = next((tmp_path / "c" / "shards").glob("*.latents.*")).name
    scraps = [".cache.json.1.tmp", ".skipped.jsonl.22.tmp", f"shards/.{unit}.333.tmp"]
    for name in scraps:
        (tmp_path / "c" / name).write_bytes(b"half")
    gradient(64, 90).save(images / "new.png")
    encode()
    assert not set(scraps) & files(tmp_path / "c").keys()


def test_a_lock_that_is_a_link_leads_to_no_file_of_anybody(encode, images, tmp_path):
    encode()
    (tmp_path / "precious").write_bytes(b"mine")
    (tmp_path / "c" / ".lock").symlink_to(tmp_path / "precious")
    gradient(64, 90).save(images / "new.png")
    result = encode()
    assert (result.code, ".lock" in result.err) == (1, True)
    assert (tmp_path / "precious").read_bytes() == b"mine"


def test_demo_over_a_file_is_one_line(run, tmp_path):
    (tmp_path / "images").write_text("mine")
    result = run("demo", tmp_path)
    assert (result.code, "demo:" in result.err) == (1, True)


def test_demo_on_a_full_disk_is_one_line(run, tmp_path, monkeypatch):
    def full(*_arguments, **_options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(demo, "_save", full)
    result = run("demo", tmp_path)
    assert (result.code, "No space left on device" in result.err, str(tmp_path / "images") in result.err) == (
        1, True, True,
    )  # fmt: skip


# trouble in mid-run


@pytest.mark.parametrize("pattern", ["*", "shards/*", "shards/*.latents.*"])
@pytest.mark.parametrize("options", [(), ("--no-cond", "--shard-size", "5kB")])
def test_a_cache_that_vanishes_in_mid_run_is_not_committed(encode, tmp_path, monkeypatch, pattern, options):
    cache, write, shards = tmp_path / "c", Finisher._write, []

    def deleting(self, latents, result, results):
        write(self, latents, result, results)
        if not shards:  # the file of the first is on disk now
            for path in list(cache.glob(pattern)):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        shards.append(result.id)

    monkeypatch.setattr(Finisher, "_write", deleting)
    result = encode(*options)
    assert len(shards) > 1
    assert (result.code, "missing" in result.err) == (1, True)
    assert not (cache / "cache.json").exists()
    monkeypatch.undo()
    assert encode(*options).code == 0
    assert len(rows(cache)) == 8


def test_a_disk_without_locks_is_one_line(tmp_path, monkeypatch):
    def none(*_arguments, **_options):
        raise NotImplementedError("FileSystem does not appear to support flock")

    monkeypatch.setattr(filelock.FileLock, "acquire", none)
    with pytest.raises(UserError, match="cannot be locked"), hold(Storage(tmp_path / "c")):
        pass


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE])
def test_a_lock_file_that_cannot_be_written_is_one_line(encode, tmp_path, monkeypatch, number):
    def denied(*_arguments, **_options):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("pathlib.Path.write_text", denied)
    result = encode()
    assert (result.code, os.strerror(number) in result.err, ".lock" in result.err) == (1, True, True)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    "error", [PermissionError("denied"), ConnectionResetError("reset"), RuntimeError("of its own")]
)
def test_a_remote_that_cannot_be_asked_is_not_an_empty_one(monkeypatch, error):
    def denied(*_arguments, **_options):
        raise error

    storage = Storage("memory://somewhere")
    assert find_manifest(storage) is None
    monkeypatch.setattr(type(storage.fs), "info", denied)
    with pytest.raises(UnreadableError, match=r"somewhere/cache\.json: cannot be looked for \("):
        find_manifest(storage)


def test_a_pipe_or_a_link_in_the_place_of_the_readers_lock_is_neither_waited_for_nor_followed(encode, tmp_path):
    encode()
    readers = tmp_path / "c" / ".readers"
    readers.unlink()
    readers.symlink_to(tmp_path / "made")
    assert len(LatentDataset(tmp_path / "c")) == 8
    assert not (tmp_path / "made").exists()
    readers.unlink()
    os.mkfifo(readers)
    assert len(LatentDataset(tmp_path / "c")) == 8


# Ctrl-C


def test_overwrite_that_was_stopped_before_it_deleted_anything_is_advised_again(encode, tmp_path, monkeypatch):
    encode()

    def stops(*_arguments):
        raise KeyboardInterrupt(2)

    with monkeypatch.context() as patch:
        patch.setattr("latentprep.prepare.encode.encode", stops)
        assert "--overwrite" in encode("--overwrite").err
    monkeypatch.setattr(VaeEncoder, "_posterior", stops)
    assert "--overwrite" not in encode("--overwrite").err


def test_a_link_to_nowhere_under_a_leftovers_name_is_cleared_away(encode, tmp_path):
    assert encode("--shard-size", "5kB").code == 0
    cache = tmp_path / "c"
    left = cache / "shards" / ("0" * 32 + ".latents.safetensors")
    left.symlink_to(tmp_path / "nowhere")
    assert encode("--shard-size", "5kB", "--placeholder", "x", "--template", "subject").code == 0
    assert not left.is_symlink()
