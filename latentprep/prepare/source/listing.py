"""The files of a source -> items: every image by its header; no pixel is decoded."""

import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import PurePosixPath
from typing import IO

from latentprep.errors import UserError
from latentprep.human import human_bytes, printable
from latentprep.prepare.images.pillow import (
    DecodeError,
    describe,
    is_image_name,
    max_bytes,
    missing_extra,
    open_image,
    oriented_size,
)
from latentprep.prepare.source.door import File, NotRegularError, Source
from latentprep.records import Item, Skip

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


def list_images(source: Source, exclude: Sequence[str] = (), count: Callable[[int], object] = int) -> Listing:
    """Every image of a source, but those that a pattern leaves out, or one of EXCLUDED. Raises UserError.

    `count` hears of each file that was looked at.
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
            elif not is_plain(found.key):
                if is_image_name(found.key):
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
    in_order = [images[key] for key in sorted(images)]
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
        self._of_names = [(pattern, compile_pattern(pattern)) for pattern in patterns if "/" not in pattern]
        self._known: dict[str, str | None] = {}  # name of a folder -> the pattern that leaves it out

    def find(self, key: str) -> str | None:
        """The first pattern that leaves a key out; None: none does."""
        for pattern, matches in self._of_keys:
            if matches(key):
                return pattern
        *folders, name = key.split("/")
        for folder in folders:
            if folder not in self._known:
                self._known[folder] = self._find_name(folder)
            if self._known[folder] is not None:
                return self._known[folder]
        return self._find_name(name)

    def _find_name(self, name: str) -> str | None:
        return next((pattern for pattern, matches in self._of_names if matches(name)), None)


def compile_pattern(pattern: str) -> Callable[[str], object]:
    """A shell's pattern: * is any text, ? a character, [ab] one of these."""
    return re.compile(fnmatch.translate(pattern)).match


def is_image(key: str) -> bool:
    """Whether a file is taken for an image, by its name."""
    return is_image_name(key)


def is_plain(key: str) -> bool:
    """Whether a key is a path inside its source, and the only way to write it: archives hold names of any kind."""
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
            return Item(key, oriented_size(image), nbytes, version)
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
    detail = "empty file" if nbytes == 0 else f"no image format that Pillow knows ({PurePosixPath(key).suffix})"
    if extra and nbytes:
        detail += f"; pip install 'latentprep[{extra}]'"
    return skip("not_an_image", detail)


def open_file(file: File, source: Source) -> IO[bytes]:
    """A file for its header. Raises OSError."""
    return file.open() if file.open is not None else BytesIO(source.read(file.key, max_bytes()))


def stem(key: str) -> str:
    """A key without its suffix: what an image, its caption file and its mask have in common.

    The suffix begins at the last dot. WebDataset's begins at the first one of the file name, so that `1.seg.png`
    belongs to its sample `1`; here that is an image of its own, in a tar as in a folder, and `a v1.5.png` has its
    caption in `a v1.5.txt`.
    """
    return PurePosixPath(key).with_suffix("").as_posix()
