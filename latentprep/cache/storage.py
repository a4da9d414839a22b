"""Where a cache lives: a folder, or any URL that fsspec knows. The only place that opens its files for writing."""

import hashlib
import os
import stat
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from secrets import randbits
from typing import Annotated

import fsspec
from msgspec import Meta

from latentprep import system
from latentprep.errors import UnreadableError, UserError, WriteError
from latentprep.human import human_bytes

LARGEST_JSON = 2**30  # bytes: the manifest of 50,000 shards has 20 MB; the limit stops a hostile file that fills memory
CHUNK = 2**22


@dataclass(frozen=True, slots=True)
class Stamp:
    """A file's bytes, counted and hashed."""

    nbytes: Annotated[int, Meta(ge=0)]
    blake2b: str  # 32 hex digits

    @classmethod
    def of(cls, data: bytes) -> "Stamp":
        return cls(len(data), hashlib.blake2b(data, digest_size=16).hexdigest())


class Storage:
    """Files of a cache by their names relative to its root, such as "shards/x.latents.safetensors"."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        if os.path.basename(self.root) == "cache.json" and os.path.isfile(self.root):  # as a shell completes it
            self.root = os.path.dirname(self.root) or "."
        if "::" in self.root:
            raise UserError(f"{self.root}: chained locations are not supported. Give the last of them alone.")
        try:
            self.fs, path = fsspec.core.url_to_fs(self.root)
        except Exception as error:  # each protocol raises errors of its own, of any kind
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{self.root}: cannot open this location ({reason}).") from None
        if getattr(self.fs.ls, "__func__", None) is fsspec.AbstractFileSystem.ls:  # it has none of its own
            raise UserError(f"{self.root}: this kind of location has no folders, expected one that has.")
        self.path: str = path.rstrip("/")
        self.is_local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)

    def locate(self, name: str) -> str:
        """The full path or URL of a file, for messages and, if is_local, for memory-mapping."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        """Whether there is such a file. Raises UnreadableError if that cannot be known.

        fsspec's own exists() takes every error for a no, so that a sick disk would look like an empty one.
        """
        try:
            os.stat(self.locate(name)) if self.is_local else self.fs.info(self.locate(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        except Exception as error:  # the libraries behind a remote raise kinds of their own
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300]
            raise UnreadableError(f"{self.locate(name)}: cannot be looked for ({reason}).") from None
        return True

    def check_regular(self, name: str) -> None:
        """Raise FileNotFoundError or OSError unless this is a file: a pipe or a device may have no end."""
        if self.is_local and not stat.S_ISREG(os.stat(self.locate(name)).st_mode):
            raise OSError("not a regular file")

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        self.check_regular(name)
        return bytes(self.fs.cat_file(self.locate(name)))

    def read_json(self, name: str) -> bytes:
        """All bytes of a manifest or of skipped.jsonl. Raises FileNotFoundError; ValueError above LARGEST_JSON."""
        size = self.size(name)
        if size > LARGEST_JSON:
            raise ValueError(f"{human_bytes(size)} is more than any latentprep writes")
        return self.read(name)

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self.fs.size(self.locate(name)))

    def stamp(self, name: str) -> Stamp:
        """Bytes and hash of a file as it is now. Raises FileNotFoundError."""
        self.check_regular(name)
        digest, nbytes = hashlib.blake2b(digest_size=16), 0
        with self.fs.open(self.locate(name), "rb") as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
                nbytes += len(chunk)
        return Stamp(nbytes, digest.hexdigest())

    def sizes(self, folder: str = "") -> dict[str, int]:
        """Name -> bytes of what lies directly in a folder, names relative to the root; empty where there is no folder.

        Everything that is not a folder counts: links, pipes, and files whose name begins with a dot.
        """
        try:
            entries = self.fs.ls(self.locate(folder), detail=True, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except OSError as error:
            raise UserError(f"{self.locate(folder)}: cannot be listed ({error.strerror or error}).") from None
        prefix = f"{folder}/" if folder else ""
        files = [entry for entry in entries if entry["type"] != "directory"]
        return {prefix + entry["name"].rpartition("/")[2]: int(entry["size"] or 0) for entry in files}

    def names(self, folder: str = "") -> list[str]:
        """The sorted names of sizes()."""
        return sorted(self.sizes(folder))

    def write_atomic(self, name: str, data: bytes) -> Stamp:
        """All of the bytes under the final name, or nothing.

        Local: temporary file in the same folder, fsync, rename, fsync of the folder. Remote: one put. Windows cannot
        replace a file that is open; if that file already has the same bytes, it counts as written.
        Raises WriteError if the file cannot be written, on a remote too.
        """
        stamp = Stamp.of(data)
        if not self.is_local:
            try:
                self.fs.pipe_file(self.locate(name), data)
            except Exception as error:  # the libraries behind a remote raise kinds of their own
                reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:300] or type(error).__name__
                raise WriteError(f"{self.locate(name)}: cannot write ({reason}).") from error
            return stamp
        target = Path(self.locate(name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(
                f".{target.name}.{randbits(63)}.tmp"
            )  # random, not the process id: two machines may write to one folder with the same process id
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                self._replace(temporary, target, stamp)
            except BaseException:
                with suppress(OSError):  # its error would hide the first one; the next run deletes the temporary file
                    temporary.unlink(missing_ok=True)
                raise
            _sync_folder(target.parent)
        except OSError as error:
            raise WriteError(
                f"{target}: cannot write ({error.strerror or error}). Nothing was left half-written; "
                "mend that, and run the same command again to go on."
            ) from error
        return stamp

    def _replace(self, temporary: Path, target: Path, stamp: Stamp) -> None:
        """Give a file its name. Raises OSError."""
        try:
            system.patiently(lambda: os.replace(temporary, target))
        except OSError as error:
            if not (system.is_in_use(error) and target.is_file() and Stamp.of(target.read_bytes()) == stamp):
                raise
            temporary.unlink(missing_ok=True)

    def delete(self, name: str) -> None:
        """Remove a file, if it is there. Raises UserError."""
        try:
            system.patiently(lambda: self.fs.rm_file(self.locate(name)))
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.locate(name)}: cannot delete ({error.strerror or error}).") from error

    def delete_unless_open(self, name: str) -> bool:
        """Delete a file that nobody needs; returns whether it is gone. On Windows a file that is open stays.

        Raises UserError if it cannot be deleted for another reason.
        """
        try:
            self.fs.rm_file(self.locate(name))
        except FileNotFoundError:
            return True
        except OSError as error:
            if not system.is_in_use(error):
                raise UserError(f"{self.locate(name)}: cannot delete ({error.strerror or error}).") from error
            return False
        return True


def _sync_folder(folder: Path) -> None:
    """Have the disk know the new name; Windows has no such call for folders."""
    if system.IS_WINDOWS:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
