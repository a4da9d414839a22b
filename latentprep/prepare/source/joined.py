"""Several sources as one: the keys of each begin with the name of its set."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import IO

from latentprep.prepare.source.door import File, Source
from latentprep.records import Skip


@dataclass(frozen=True)
class Joined(Source):
    """Sources by the names of their sets."""

    where: str
    sources: Mapping[str, Source]

    def list(self) -> Iterator[File | Skip]:
        for name, source in self.sources.items():
            for found in source.list():
                key = f"{name}/{found.key}"
                yield found._replace(key=key) if isinstance(found, File) else replace(found, key=key)

    @contextmanager
    def open(self, key: str, limit: int) -> Iterator[IO[bytes]]:
        source, rest = self._of(key)
        with source.open(rest, limit) as opened:
            yield opened

    def read(self, key: str, limit: int) -> bytes:
        source, rest = self._of(key)
        return source.read(rest, limit)

    def _of(self, key: str) -> tuple[Source, str]:
        """The source of a set, and a key in it. Raises OSError."""
        name, _, rest = key.partition("/")
        if name not in self.sources:
            raise FileNotFoundError(2, "No set of this name", key)
        return self.sources[name], rest

    def is_there(self) -> bool:
        return all(source.is_there() for source in self.sources.values())

    def locate(self, key: str) -> str:
        name, _, rest = key.partition("/")
        return self.sources[name].locate(rest) if name in self.sources else super().locate(key)
