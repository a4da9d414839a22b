"""Several sources as one: the keys of each begin with the name of its set."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

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

    def read(self, key: str, limit: int) -> bytes:
        name, _, rest = key.partition("/")
        if name not in self.sources:
            raise FileNotFoundError(2, "No set of this name", key)
        return self.sources[name].read(rest, limit)

    def is_there(self) -> bool:
        return all(source.is_there() for source in self.sources.values())

    def locate(self, key: str) -> str:
        name, _, rest = key.partition("/")
        return self.sources[name].locate(rest) if name in self.sources else super().locate(key)
