"""A folder -> items: every image under it by its header; no pixel is decoded."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from latentprep.errors import UserError
from latentprep.human import human_bytes
from latentprep.prepare.images.pillow import (
    WITH_A_PLUGIN,
    DecodeError,
    NotRegularError,
    describe,
    is_image_name,
    max_bytes,
    open_image,
    open_regular,
    oriented_size,
)
from latentprep.records import Item, Skip

HASHERS = 4  # threads that read files; a disk has no use for more


@dataclass(frozen=True, slots=True)
class Source:
    """What a folder holds: images that can be planned, files that only look like images, and all the rest."""

    folder: Path
    items: list[Item]
    skips: list[Skip]
    others: list[str]  # keys of the files that are not images: captions and the like


def list_folder(folder: Path, *, without: Iterable[Path] = ()) -> Source:
    """Every image under a folder, sorted by key; the folders `without` are left out. Raises UserError."""
    if not folder.exists():
        raise UserError(f"SOURCE {folder}: no such folder. Give the folder that holds the images.")
    if not folder.is_dir():
        raise UserError(f"SOURCE {folder}: a file, expected a folder of images.")
    items: list[Item] = []
    skips: list[Skip] = []
    others: list[str] = []
    for path in walk(folder, without, skips):
        key = path.relative_to(folder).as_posix()
        if not is_image_name(key):
            others.append(key)
            continue
        entry = read_item(path, key)
        (items if isinstance(entry, Item) else skips).append(entry)  # type: ignore[arg-type]
    if not folder.is_dir():
        raise UserError(f"SOURCE {folder}: vanished while it was listed. Mount it again, and run the same command.")
    if not items and not skips:
        found = f"{len(others)} other files" if others else "it is empty"
        raise UserError(f"SOURCE {folder}: no images ({found}). Expected files such as .jpg, .png or .webp.")
    return Source(folder, sorted(items, key=lambda i: i.key), sorted(skips, key=lambda s: s.key), sorted(others))


def stem(key: str) -> str:
    """A key without its suffix: what an image, its caption file and its mask have in common."""
    return PurePosixPath(key).with_suffix("").as_posix()


def walk(folder: Path, without: Iterable[Path], skips: list[Skip]) -> Iterator[Path]:
    """Files under a folder, following links to folders but never in a circle; hidden files and caches are left out.

    A folder below it that cannot be listed is added to `skips`. Raises UserError if `folder` itself cannot be.
    """
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    hidden = {path.resolve() for path in without}
    while pending:
        here = pending.pop()
        try:
            status = here.stat()
            if (status.st_dev, status.st_ino) in seen or here.resolve() in hidden:
                continue
            seen.add((status.st_dev, status.st_ino))
            if here != folder and (here / "cache.json").is_file() and (here / "shards").is_dir():
                continue  # another latent cache
            with os.scandir(here) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            if here == folder:
                raise UserError(f"SOURCE {here}: cannot be listed ({error.strerror}). Make it readable.") from error
            skips.append(Skip(here.relative_to(folder).as_posix(), "unreadable_folder", describe(error)))
            continue
        for entry in entries:
            if is_folder(entry):
                pending.append(Path(entry.path))
            else:
                yield Path(entry.path)


def is_folder(entry: "os.DirEntry[str]") -> bool:
    """Whether an entry is a folder, or a link to one; a link in a circle is none."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def read_item(path: Path, key: str) -> Item | Skip:
    """The item of a file, or the Skip that says why it is none."""
    nbytes = version = -1

    def skip(reason: str, detail: str) -> Skip:
        return Skip(key, reason, detail, nbytes, version)

    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            nbytes, version = status.st_size, status.st_mtime_ns
            if nbytes > max_bytes():
                return skip("too_large", f"{human_bytes(nbytes)} is more than any image of --max-megapixels has")
            with open_image(file) as image:
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
    extra = WITH_A_PLUGIN.get(path.suffix.lower())
    detail = "empty file" if nbytes == 0 else f"no image format that Pillow knows ({path.suffix})"
    if extra and nbytes:
        detail += f"; pip install 'latentprep[{extra}]'"
    return skip("not_an_image", detail)


def hash_image(image: Path, mask: Path | None = None) -> bytes | None:
    """16 bytes: the content hash that a cache keeps of every image and its mask; None where they cannot be read."""
    made = new_hash()
    try:
        for path in (image, mask) if mask is not None else (image,):
            with open_regular(path) as file:
                while block := file.read(1 << 20):
                    made.update(block)
    except OSError:
        return None
    return made.digest()


def hash_images(files: Iterable[tuple[Path, Path | None]]) -> Iterator[bytes | None]:
    """hash_image of many, in their order."""
    with ThreadPoolExecutor(HASHERS) as pool:
        yield from pool.map(lambda pair: hash_image(*pair), files)


def new_hash(data: bytes = b"") -> "hashlib.blake2b":
    """BLAKE2b of 16 bytes, of everything in an image file and its mask."""
    return hashlib.blake2b(data, digest_size=16)
