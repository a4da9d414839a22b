"""What Windows does otherwise, as far as Linux can play it: no file that is open, mapped or locked is deleted,
replaced or written to; no folder is synced; there is no flock and no SIGHUP.
"""

import errno
import importlib
import json
import os
import re
import signal
import sys
from pathlib import Path

import pytest
import torch

from latentprep import LatentDataset, LatentLoader, system
from latentprep.cache import readers
from latentprep.cache.lock import hold
from latentprep.cache.ours import LOCK_NAME, check_ours
from latentprep.cache.storage import Storage
from latentprep.cli import stop, terminal
from latentprep.errors import LockedError, UserError
from latentprep.prepare.source.folder import Folder, walk
from latentprep.prepare.source.tar import Tars
from tests.conftest import SMALL
from tests.test_readers import change_captions

MAPS, DESCRIPTORS = Path("/proc/self/maps"), Path("/proc/self/fd")
pytestmark = pytest.mark.skipif(not MAPS.exists(), reason="asks Linux which files are open")


def is_open(path) -> bool:
    """Whether this process has a file open, or mapped into its memory."""
    wanted = os.path.realpath(path)
    if any(line.endswith(wanted) for line in MAPS.read_text().splitlines()):
        return True
    return any(os.path.realpath(link) == wanted for link in DESCRIPTORS.iterdir())


@pytest.fixture
def windows(monkeypatch):
    """A system that is like Windows in what it refuses."""
    monkeypatch.setattr(system, "IS_WINDOWS", True)
    monkeypatch.setattr(system, "WAITS", (0.0,))
    monkeypatch.setitem(sys.modules, "fcntl", None)  # of filelock's it has been imported

    def refuses(act, which):
        def like_windows(*paths, **options):
            if is_open(paths[which]):
                raise PermissionError(errno.EACCES, "Access is denied", str(paths[which]))
            return act(*paths, **options)

        return like_windows

    for name, which in (("remove", 0), ("unlink", 0), ("replace", 1)):
        monkeypatch.setattr(os, name, refuses(getattr(os, name), which))
    for name in ("write_text", "read_text", "read_bytes"):
        act = getattr(Path, name)

        def locked(path, *arguments, act=act, **options):
            if path.name.startswith(LOCK_NAME) and is_open(path):
                raise PermissionError(errno.EACCES, "Permission denied", str(path))
            return act(path, *arguments, **options)

        monkeypatch.setattr(Path, name, locked)
    fsync = os.fsync

    def no_folders(descriptor):
        assert not os.path.isdir(f"/proc/self/fd/{descriptor}"), "Windows opens no folder"
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", no_folders)


def files_of(cache):
    return {path.name: path.read_bytes() for path in (cache / "shards").iterdir()}


def make(run, images, cache):
    result = run("encode", images, "--out", cache, *SMALL)
    assert result.code == 0, result.err


def test_a_cache_is_made_and_changed_and_its_reader_reads_on(windows, run, images, tmp_path, monkeypatch):
    cache = tmp_path / "c"
    make(run, images, cache)
    assert not (cache / LOCK_NAME).exists()
    data = LatentDataset(cache)
    wanted = [batch.latent_mean for batch in LatentLoader(data, 4)]
    opened = [path for path in (cache / "shards").iterdir() if is_open(path)]
    assert opened
    change_captions(run, images, cache)
    now = readers.time.time()
    monkeypatch.setattr(readers.time, "time", lambda: now + readers.GRACE + 1)
    (images / "tall0.txt").write_text("a third caption")
    make(run, images, cache)  # a day is over: what is old goes, but for what is open
    assert run("verify", cache).code == 0
    for path in opened:
        assert path.exists(), "the reader has it open"
    assert all(map(torch.equal, [batch.latent_mean for batch in LatentLoader(data, 4)], wanted))
    waiting = json.loads((cache / readers.SUPERSEDED_NAME).read_text())
    old = [path for path in opened if f"shards/{path.name}" in waiting]
    assert old
    del data
    (images / "tall0.txt").write_text("a fourth caption")
    make(run, images, cache)
    assert not any(path.exists() for path in old), "nobody has them open any more"


def test_overwrite_beside_a_reader_makes_the_same_files(windows, run, images, tmp_path):
    cache = tmp_path / "c"
    make(run, images, cache)
    before = files_of(cache)
    data = LatentDataset(cache)
    batches = list(LatentLoader(data, 4))
    assert run("encode", images, "--out", cache, *SMALL, "--overwrite").code == 0
    assert files_of(cache) == before
    assert len(batches) == len(list(LatentLoader(data, 4)))


def test_other_bytes_do_not_replace_a_file_that_is_open(windows, tmp_path):
    storage = Storage(tmp_path)
    storage.write_atomic("x", b"one")
    with open(tmp_path / "x", "rb"):
        assert storage.write_atomic("x", b"one") == storage.stamp("x")
        with pytest.raises(UserError, match=r"x: cannot write \(Access is denied\)"):
            storage.write_atomic("x", b"two")
        assert not storage.delete_unless_open("x")
        with pytest.raises(UserError, match=r"x: cannot delete \(Access is denied\)"):
            storage.delete("x")
    assert os.listdir(tmp_path) == ["x"]
    storage.write_atomic("x", b"two")
    assert storage.delete_unless_open("x")
    assert storage.delete_unless_open("x")  # it is gone already


def test_a_file_that_is_open_for_a_moment_is_waited_for(windows, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "WAITS", (0.0, 0.0, 0.0))
    refusals = [PermissionError(13, "denied"), OSError(22, "mapped")]
    refusals[1].winerror = system.MAPPED  # type: ignore[attr-defined]
    replace = os.replace

    def busy(*paths):
        if refusals:
            raise refusals.pop()
        replace(*paths)

    monkeypatch.setattr(os, "replace", busy)
    Storage(tmp_path).write_atomic("x", b"one")
    assert (os.listdir(tmp_path), refusals) == (["x"], [])


def test_elsewhere_a_refusal_is_not_waited_for(tmp_path, monkeypatch):
    calls = []

    def denied(*paths):
        calls.append(paths)
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", denied)
    monkeypatch.setattr(os, "remove", denied)
    storage = Storage(tmp_path)
    with pytest.raises(UserError, match="cannot write"):
        storage.write_atomic("x", b"one")
    with pytest.raises(UserError, match="cannot delete"):
        storage.delete_unless_open("x")
    assert len(calls) == 2


def test_a_lock_that_can_neither_be_written_nor_read_still_locks(windows, tmp_path):
    storage = Storage(tmp_path / "c")
    with hold(storage):
        check_ours(storage)  # a second run comes as far as the lock, and is told
        with pytest.raises(LockedError, match="it has not said which"), hold(storage):
            pass
    assert not (tmp_path / "c").exists()
    with hold(storage, (0, 2)), pytest.raises(LockedError), hold(storage):
        pass


def test_a_terminal_that_has_no_sighup(monkeypatch):
    monkeypatch.delattr(signal, "SIGHUP")
    try:
        module = importlib.reload(stop)
        assert module.SIGNALS == (signal.SIGINT, signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt), module.stoppable():
            signal.raise_signal(signal.SIGINT)
    finally:
        monkeypatch.undo()
        importlib.reload(stop)


def test_a_console_is_left_as_it_is(monkeypatch):
    class Console:
        def isatty(self):
            return True

        def flush(self):
            pass

        def fileno(self):
            raise AssertionError("it takes no bytes")

    monkeypatch.setattr(system, "IS_WINDOWS", True)
    console = Console()
    monkeypatch.setattr(sys, "stdout", console)
    with terminal.unbreakable():
        assert sys.stdout is console


def test_a_disk_that_numbers_no_files_is_searched_too(images, tmp_path, monkeypatch):
    stat = Path.stat

    def without_numbers(path, **options):
        values = list(stat(path, **options))
        return os.stat_result([*values[:1], 0, *values[2:]])

    (images / "below").mkdir()
    (images / "below" / "deep.png").write_bytes(b"")
    (images / "below" / "circle").symlink_to(images)
    monkeypatch.setattr(Path, "stat", without_numbers)
    found = [path.name for path in walk(images) if isinstance(path, Path)]
    assert found.count("deep.png") == 1
    assert found.count("tall0.png") == 1


@pytest.mark.parametrize("key", ["C:/secret.png", "..\\secret.png", "a\\..\\..\\secret.png", "\\secret.png"])
def test_keys_that_lead_outside_on_windows_alone(key, images, tmp_path, monkeypatch):
    monkeypatch.setattr(system, "IS_WINDOWS", True)
    with pytest.raises(OSError, match="its name leads outside of the source"):
        Folder(str(images)).read(key, 100)
    if "/" not in key:
        (images / key.replace(".png", ".tar")).write_bytes(b"\0" * 1024)
        with pytest.raises(OSError, match="its name leads outside of the source"):
            Tars(str(images)).read(key.replace(".png", ".tar") + "/x.png", 100)


def test_names_of_files_are_names_on_windows_too(run, images, tmp_path):
    make(run, images, tmp_path / "c")
    names = [path.name for path in (tmp_path / "c").rglob("*")]
    assert all(re.fullmatch(r"[\w.-]+", name) for name in names)
    assert len({name.lower() for name in names}) == len(names)
