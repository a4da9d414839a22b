"""Where a cache lives: a folder, or any URL that fsspec knows. The only place that opens files for writing."""

import os
from pathlib import Path

import fsspec

from latentprep.errors import UserError


class Storage:
    """Files of a cache by their names relative to its root, such as "shards/x.latents.safetensors"."""

    def __init__(self, root: str | Path) -> None:
        self.root = str(root)
        try:
            self.fs, path = fsspec.core.url_to_fs(self.root)
        except (ImportError, ValueError) as error:
            raise UserError(f"{self.root}: cannot open this location ({error}).") from None
        self.path: str = path.rstrip("/")
        self.is_local = isinstance(self.fs, fsspec.implementations.local.LocalFileSystem)

    def locate(self, name: str) -> str:
        """The full path or URL of a file, for messages and, if is_local, for memory-mapping."""
        return f"{self.path}/{name}"

    def exists(self, name: str) -> bool:
        return bool(self.fs.exists(self.locate(name)))

    def read(self, name: str) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        return bytes(self.fs.cat_file(self.locate(name)))

    def size(self, name: str) -> int:
        """Bytes of a file. Raises FileNotFoundError."""
        return int(self.fs.size(self.locate(name)))

    def names(self, folder: str) -> list[str]:
        """Names of the files directly in a folder, relative to the root, sorted; none where there is no such folder."""
        try:
            entries = self.fs.ls(self.locate(folder), detail=True, refresh=True)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{entry['name'].rpartition('/')[2]}" for entry in entries if entry["type"] == "file")

    def write_atomic(self, name: str, data: bytes) -> None:
        """All of the bytes under the final name, or nothing.

        Local: temporary file in the same folder, fsync, rename, fsync of the folder. Remote: one put.
        Raises UserError where the disk is full or read-only.
        """
        if not self.is_local:
            self.fs.pipe_file(self.locate(name), data)
            return
        target = Path(self.locate(name))
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
            try:
                with open(temporary, "wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                os.replace(temporary, target)
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise
            _sync_folder(target.parent)
        except OSError as error:
            raise UserError(
                f"{target}: cannot write ({error.strerror or error}). Nothing was left half-written."
            ) from error

    def delete(self, name: str) -> None:
        """Remove a file, if it is there."""
        try:
            self.fs.rm_file(self.locate(name))
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(f"{self.locate(name)}: cannot delete ({error.strerror or error}).") from error


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
