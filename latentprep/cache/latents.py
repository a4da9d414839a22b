"""The latents file of a shard, and the partial file of an unfinished unit: written, opened, checked."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from latentprep.cache.files import check_groups, damaged, open_file, pack
from latentprep.cache.group import LatentGroup, rows_of
from latentprep.cache.names import latents_name, partial_name
from latentprep.cache.schema import Groups
from latentprep.cache.seal import check_seal
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.strings import Tensors
from latentprep.records import Row


@dataclass(frozen=True, eq=False)
class Latents:
    """What a latents file holds. Tensors of an open file use the mapped memory of the file: no copy."""

    groups: list[LatentGroup]
    metadata: dict[str, Any]

    def table(self) -> Groups:
        """What the manifest says of its groups."""
        return tuple((group.label, len(group), group.shape) for group in self.groups)  # type: ignore[misc]

    def rows(self) -> list[Row]:
        """A Row for each image, group after group, with what was known when it was encoded; without captions."""
        return rows_of(self.groups)

    def take(self, live: list[np.ndarray]) -> "Latents":
        """Some rows of every group; groups without rows are left out."""
        pairs = zip(self.groups, live, strict=True)
        return Latents([group.take(rows) for group, rows in pairs if len(rows)], self.metadata)

    def pack(self, kind: str = "latents") -> bytes:
        """The bytes of its file."""
        tensors: Tensors = {}
        for group in self.groups:
            group.put(tensors)
        return pack(kind, tensors, {**self.metadata, "groups": [[group.label, len(group)] for group in self.groups]})


def write_latents(storage: Storage, shard: str, latents: Latents) -> Stamp:
    """Write the latents file of a shard. Raises WriteError (a UserError) if that fails, on a remote too."""
    return storage.write_atomic(latents_name(shard), latents.pack())


def write_partial(storage: Storage, unit: str, latents: Latents) -> Stamp:
    """Write the first rows of an unfinished unit. No manifest names such a file. Raises WriteError if that fails."""
    return storage.write_atomic(partial_name(unit), latents.pack("partial"))


def open_latents(storage: Storage, shard: str, groups: Groups | None = None) -> Latents:
    """Open and check a latents file; `groups` is what the manifest says it holds.

    Raises UserError if it is missing, damaged, of another format or not what the manifest says.
    """
    name = latents_name(shard)
    latents = _open(storage, name, "latents")
    if groups is not None and latents.table() != groups:
        raise damaged(storage, name, ValueError("holds other rows than cache.json says"))
    return latents


def open_partial(storage: Storage, unit: str) -> Latents:
    """The first rows of a unit that is not finished, if the seal fits. Raises UserError like open_latents."""
    check_seal(storage, partial_name(unit))
    return _open(storage, partial_name(unit), "partial")


def _open(storage: Storage, name: str, kind: str) -> Latents:
    metadata, tensors = open_file(storage, name, kind)
    try:
        groups = [LatentGroup.take_from(tensors, label, rows) for label, rows in check_groups(metadata)]
    except (KeyError, ValueError) as error:
        raise damaged(storage, name, error) from None
    return Latents(groups, metadata)
