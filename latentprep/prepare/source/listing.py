"""The files of a source -> items: every image by its header; no pixel is decoded."""

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from io import BytesIO
from pathlib import PurePosixPath
from types import MappingProxyType
from typing import IO

from latentprep.errors import UserError
from latentprep.human import human_bytes, printable
from latentprep.keys import split_suffix
from latentprep.prepare.images.pillow import (
    NO_FORMAT,
    DecodeError,
    describe,
    is_image_name,
    max_bytes,
    missing_extra,
    open_image,
    oriented_size,
)
from latentprep.prepare.source.door import File, NotRegularError, Source
from latentprep.records import Item, Size, Skip

MANY_SIZES = 2**16  # that are remembered
MAX_VERSION = 2**63 - 1  # it is stored as an int64
# what systems put beside photos: thumbnails of a Synology, an archive's forks of macOS, bins
EXCLUDED = ("@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "lost+found")


@dataclass(frozen=True, slots=True)
class Listing:
    """What a source holds: images that can be planned, files that only look like images, and all the rest."""

    source: Source
    items: list[Item]
    skips: list[Skip]
    others: dict[str, int]  # key -> bytes of the files that are no images: captions and the like. All sorted by key
    excluded: Counter[str] = field(default_factory=Counter)  # pattern -> files that it left out

    def take_items(self) -> Iterator[Item]:
        """The items, each of which is forgotten here: whoever makes others of them has them in memory once."""
        self.items.reverse()
        while self.items:
            yield self.items.pop()

    def keys(self) -> set[str]:
        """Of all that looks like an image."""
        return {item.key for item in self.items} | {skip.key for skip in self.skips}


def list_images(
    source: Source,
    exclude: Sequence[str] = (),
    count: Callable[[int], object] = int,
    known: Mapping[str, Item] = MappingProxyType({}),
) -> Listing:
    """Every image of a source, but those that a pattern leaves out, or one of EXCLUDED. Raises UserError.

    `count` hears of each file that was looked at. `known`: images whose header need not be read if their file has the
    same bytes and version, by key.
    """
    images: dict[str, Item | Skip] = {}
    others: dict[str, int] = {}
    excluded: Counter[str] = Counter()
    find_pattern = Patterns((*EXCLUDED, *exclude)).find
    try:
        for found in source.list():
            count(1)
            if (pattern := find_pattern(found.key)) is not None:
                excluded[pattern] += 1
            elif isinstance(found, Skip):
                images[found.key] = found
            elif (item := known.get(found.key)) is not None and is_same(item, found) and source.can_open(found.key):
                images[found.key] = item
            elif not is_plain(found.key):
                if is_image_name(PurePosixPath(found.key).name):
                    images[found.key] = Skip(found.key, "unreadable", "its name leads outside of the source")
            elif is_image_name(found.key):
                images[found.key] = read_item(found, source)
            else:
                others[found.key] = found.nbytes
    except OSError as error:
        raise UserError(
            f"SOURCE {source.where}: cannot be listed ({error.strerror or error}). Make it readable."
        ) from error
    if not source.is_there():
        raise UserError(
            f"SOURCE {source.where}: vanished while it was listed. Mount it again, and run the same command."
        )
    if not images:
        found_instead = f"{len(others)} other files" if others else "it is empty"
        if excluded:
            found_instead = f"{excluded.total()} files are left out by {', '.join(map(printable, sorted(excluded)))}"
        raise UserError(
            f"SOURCE {source.where}: no images ({found_instead}). Expected files such as .jpg, .png or .webp."
        )
    in_order = sorted(images.values(), key=lambda entry: entry.key)
    return Listing(
        source,
        [entry for entry in in_order if isinstance(entry, Item)],
        [entry for entry in in_order if isinstance(entry, Skip)],
        dict(sorted(others.items())),
        excluded,
    )


class Patterns:
    """Patterns of files and folders to leave out."""

    def __init__(self, patterns: Sequence[str]) -> None:
        """With a slash in it a pattern is of a whole key, else of a name: that of the file or of a folder above it."""
        self._of_keys = [(pattern, compile_pattern(pattern)) for pattern in patterns if "/" in pattern]
        names = [pattern for pattern in patterns if "/" not in pattern]
        self._of_names = [(pattern, compile_pattern(pattern)) for pattern in names]
        self._fits_any = re.compile("|".join(map(fnmatch.translate, names)) or r"(?!)").match
        self._known: dict[str, str | None] = {"": None}  # a folder -> the pattern that leaves it out

    def find(self, key: str) -> str | None:
        """The first pattern that leaves a key out; None: none does."""
        for pattern, matches in self._of_keys:
            if matches(key):
                return pattern
        folder, _, name = key.rpartition("/")
        if folder not in self._known:
            names = (self._find_name(name) for name in folder.split("/"))
            self._known[folder] = next((pattern for pattern in names if pattern is not None), None)
        above = self._known[folder]
        return above if above is not None else self._find_name(name)

    def _find_name(self, name: str) -> str | None:
        if not self._fits_any(name):
            return None
        return next(pattern for pattern, matches in self._of_names if matches(name))


def is_same(item: Item, file: File) -> bool:
    """Whether a file is still the one that an item was made of."""
    return item.nbytes == file.nbytes and item.version == file.version & MAX_VERSION


def compile_pattern(pattern: str) -> Callable[[str], object]:
    """A shell's pattern: * is any text, ? a character, [ab] one of these."""
    return re.compile(fnmatch.translate(pattern)).match


def is_image(key: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return is_image_name(key)


def is_plain(key: str) -> bool:
    """Whether a key is a path inside its source, and the only way to write it: archives hold names of any kind."""
    if not (key.startswith((".", "/")) or key.endswith("/") or "//" in key or "/." in key or "\0" in key):
        return key != ""  # the usual case, in a third of the time
    return {"", ".", ".."}.isdisjoint(key.split("/")) and "\0" not in key


def read_item(file: File, source: Source) -> Item | Skip:
    """The item of a file, or the Skip that says why it is none."""
    key, nbytes, version = file.key, file.nbytes, file.version & MAX_VERSION

    def skip(reason: str, detail: str) -> Skip:
        return Skip(key, reason, detail, nbytes, version)

    if nbytes > max_bytes():
        return skip("too_large", f"{human_bytes(nbytes)} is more than any image of --max-megapixels has")
    try:
        with open_file(file, source) as opened, open_image(opened) as image:
            return Item(key, shared(oriented_size(image)), nbytes, version)
    except NotRegularError as error:
        return skip("unreadable", str(error))
    except OSError as error:
        return skip("io_error", describe(error))
    except MemoryError as error:
        return skip("out_of_memory", describe(error))
    except DecodeError as error:
        if error.reason != "not_an_image":  # it is the header that was read, and not the pixels
            return skip("unreadable" if error.reason == "truncated" else error.reason, error.detail)
    extra = missing_extra(PurePosixPath(key).suffix)
    detail = "empty file" if nbytes == 0 else f"{NO_FORMAT}, whatever its {PurePosixPath(key).suffix} says"
    if extra and nbytes:
        detail += f"; pip install 'latentprep[{extra}]'"
    return skip("not_an_image", detail)


@lru_cache(MANY_SIZES)
def shared(size: Size) -> Size:
    """The same tuple for images of the same size: a tuple takes as much memory as its item."""
    return size


def open_file(file: File, source: Source) -> IO[bytes]:
    """A file for its header. Raises OSError."""
    return file.open() if file.open is not None else BytesIO(source.read(file.key, max_bytes()))


def stem(key: str) -> str:
    """A key without its suffix: what an image, its caption file and its mask have in common.

    The suffix begins at the last dot. WebDataset's begins at the first one of the file name, so that `1.seg.png`
    belongs to its sample `1`; here that is an image of its own, in a tar as in a folder, and `a v1.5.png` has its
    caption in `a v1.5.txt`.
    """
    if not is_plain(key):  # of a source that says so
        return PurePosixPath(key).with_suffix("").as_posix()
    return split_suffix(key)[0]
