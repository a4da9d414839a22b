"""A folder of zip files as a source: an example of a new one."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import BadZipFile, ZipFile

from latentprep.prepare.source.door import File, Source
from latentprep.records import Skip


@dataclass(frozen=True)
class Zips(Source):
    where: str

    def list(self) -> Iterator[File | Skip]:
        for path in sorted(Path(self.where).glob("*.zip")):
            try:
                infos = ZipFile(path).infolist()
            except (OSError, BadZipFile) as error:
                yield Skip(path.name, "unreadable_folder", str(error))
                continue
            for info in infos:
                if not info.is_dir():
                    yield File(f"{path.name}/{info.filename}", info.file_size, info.CRC)

    def read(self, key: str, limit: int) -> bytes:
        name, _, member = key.partition("/")
        try:
            with ZipFile(Path(self.where) / name) as archive, archive.open(member) as file:
                return file.read(limit + 1)
        except (BadZipFile, KeyError, NotImplementedError, RuntimeError, zlib.error) as error:
            raise OSError(f"{key}: {error}") from error


def open_zips(where: str, without: tuple[Path, ...]) -> Zips | None:
    names = [path.name for path in Path(where).glob("[!.]*")] if Path(where).is_dir() else []
    return Zips(where) if names and all(name.endswith(".zip") for name in names) else None
