"""Shard: rows that are stored together, in a latents file and a text file. It is one object from encode to compact."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import numpy as np
from msgspec import Meta

from latentprep.cache.latents import Latents, open_latents
from latentprep.cache.names import COND_ID, latents_name, text_name
from latentprep.cache.schema import Groups
from latentprep.cache.seal import check_stamp
from latentprep.cache.sets import Runs
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.text import Text, open_text

NamePart = Annotated[str, Meta(pattern="^[0-9A-Za-z]+$")]  # part of a file name: it cannot point outside the folder


@dataclass(frozen=True)
class Shard:
    """The rows of some images, in two files. Raises ValueError if rows, dead rows and sets do not fit each other."""

    id: NamePart  # of the unit that it was made from
    groups: Groups
    latents_file: Stamp
    text_id: Annotated[str, Meta(pattern="^[0-9A-Za-z]*$")] = ""  # "": it has no text yet
    text_file: Stamp | None = None
    dead: tuple[int, ...] = ()  # numbers of dead rows, counted across all groups, ascending
    cond_files: tuple[Annotated[str, Meta(pattern=f"^{COND_ID.pattern}$")], ...] = ()  # that its text borrows from
    sets: Runs = ()  # in a cache of several sets: the set of each row, as runs across all groups

    def __post_init__(self) -> None:
        if not self.groups or self.num_rows > self.latents_file.nbytes:
            raise ValueError(f"shard {self.id} cannot hold {self.num_rows} rows")
        if self.dead and (
            self.dead[0] < 0 or self.dead[-1] >= self.num_rows or list(self.dead) != sorted(set(self.dead))
        ):
            raise ValueError(f"shard {self.id}: invalid dead rows")
        if self.sets and sum(count for _, count in self.sets) != self.num_rows:
            raise ValueError(f"shard {self.id}: has not {self.num_rows} rows of sets")

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows, _ in self.groups)

    @property
    def num_images(self) -> int:
        return self.num_rows - len(self.dead)

    @property
    def nbytes(self) -> int:
        return sum(stamp.nbytes for stamp in self.files().values())

    @property
    def latents_name(self) -> str:
        return latents_name(self.id)

    @property
    def text_name(self) -> str:
        return text_name(self.id, self.text_id)

    def order(self) -> tuple[str, str]:
        """The key by which the shards of a cache are sorted."""
        return self.groups[0][0], self.id

    def files(self) -> dict[str, Stamp]:
        found = {self.latents_name: self.latents_file}
        return found | {self.text_name: self.text_file} if self.text_file is not None else found

    def live_rows(self) -> list[np.ndarray]:
        """For each group: the numbers of its live rows, counted from the start of the group."""
        edges = np.cumsum([rows for _, rows, _ in self.groups])[:-1]
        return [np.flatnonzero(part) for part in np.split(self._is_live(), edges)]

    def live_numbers(self) -> np.ndarray:
        """The numbers of its live rows, counted across all groups."""
        return np.flatnonzero(self._is_live())

    def _is_live(self) -> np.ndarray:
        is_live = np.ones(self.num_rows, bool)
        is_live[list(self.dead)] = False
        return is_live

    def with_text(self, text_id: str, text_file: Stamp, cond_files: Sequence[str] = ()) -> "Shard":
        return replace(self, text_id=text_id, text_file=text_file, cond_files=tuple(cond_files))

    def with_dead(self, dead: Iterable[int]) -> "Shard":
        return replace(self, dead=tuple(dead))

    def with_sets(self, sets: Runs) -> "Shard":
        return replace(self, sets=sets)

    def check(self, storage: Storage) -> None:
        """Raise UserError unless its files have the bytes that were written: before anything is made of them."""
        for name, stamp in self.files().items():
            check_stamp(storage, name, stamp)

    def open_latents(self, storage: Storage) -> Latents:
        """Its latents file, checked against its groups. Raises UserError."""
        return open_latents(storage, self.id, self.groups)

    def open_text(self, storage: Storage) -> Text:
        """Its text file, checked against its groups. Raises UserError."""
        return open_text(storage, self.id, self.text_id, self.groups)
