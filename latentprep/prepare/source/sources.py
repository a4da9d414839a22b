"""The table of sources: the first row that claims a path opens it."""

from collections.abc import Callable, Iterable
from pathlib import Path

from latentprep.errors import UserError
from latentprep.prepare.source.door import Source
from latentprep.prepare.source.folder import open_folder
from latentprep.prepare.source.tar import open_tars

# (where, without) -> the source, or None if it is of another kind. `without`: folders that hold no images of its own,
# though they may lie in it, as the cache that is written.
OpenSource = Callable[[str, tuple[Path, ...]], Source | None]
SOURCES: list[OpenSource] = [open_tars, open_folder]


class NoSourceError(UserError):
    """Nothing is there, or nothing that images could come from."""


def open_source(where: str | Path, option: str = "SOURCE", *, without: Iterable[Path] = ()) -> Source:
    """The source at a path; nothing is listed yet. Raises NoSourceError, which names `option`."""
    left_out = tuple(without)
    for open_ in SOURCES:
        if (source := open_(str(where), left_out)) is not None:
            return source
    if not Path(where).exists():
        raise NoSourceError(f"{option} {where}: no such folder. Give the folder that holds the images.")
    raise NoSourceError(f"{option} {where}: a file, expected a folder of images.")
