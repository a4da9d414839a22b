"""A folder -> items: every image under it by its header; no pixel is decoded."""

import hashlib
import os
import stat
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path, PurePosixPath

from PIL import ExifTags, Image, UnidentifiedImageError

from latentprep.errors import UserError
from latentprep.records import Item, Size, Skip
from latentprep.units import human_bytes

# Formats that Pillow only recognises, or would hand to another program (EPS, WMF).
NOT_OPENED = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
WITH_A_PLUGIN = {".heic": "heif", ".heif": "heif", ".hif": "heif", ".jxl": ""}  # suffix -> our extra that reads it
HASHERS = 4  # threads that read files; a disk has no use for more
MAX_BYTES_PER_PIXEL = 8  # 16-bit RGBA, stored as it is
# Pillow and the libraries below it raise whatever comes to them: over a dozen kinds were seen on damaged files.
DECODER_ERRORS = Exception


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
    for path in walk(folder, without):
        key = path.relative_to(folder).as_posix()
        if not is_image_name(key):
            others.append(key)
            continue
        entry = read_item(path, key)
        (items if isinstance(entry, Item) else skips).append(entry)  # type: ignore[arg-type]
    if not items and not skips:
        found = f"{len(others)} other files" if others else "it is empty"
        raise UserError(f"SOURCE {folder}: no images ({found}). Expected files such as .jpg, .png or .webp.")
    return Source(folder, sorted(items, key=lambda i: i.key), sorted(skips, key=lambda s: s.key), sorted(others))


def limit_pixels(max_pixels: int) -> None:
    """Have Pillow refuse larger images, wherever in a file they stand (an .ico may hold a PNG of any size)."""
    Image.MAX_IMAGE_PIXELS = max_pixels // 2  # it warns beyond this, and refuses beyond twice this


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow may open: its own, and HEIF where pillow-heif is installed."""
    Image.preinit()
    Image.init()
    try:
        from pillow_heif import register_heif_opener
    except ImportError:
        pass
    else:
        register_heif_opener()
    return tuple(name for name in Image.ID if name not in NOT_OPENED)


@cache
def image_suffixes() -> frozenset[str]:
    """Lower-case suffixes of the files that are taken for images."""
    known = formats()
    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in known) | set(
        WITH_A_PLUGIN
    )


def is_image_name(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in image_suffixes()


def stem(key: str) -> str:
    """A key without its suffix: what an image, its caption file and its mask have in common."""
    return PurePosixPath(key).with_suffix("").as_posix()


def walk(folder: Path, without: Iterable[Path]) -> Iterator[Path]:
    """Files under a folder, following links to folders but never in a circle; hidden files and caches are left out."""
    seen: set[tuple[int, int]] = set()
    pending = [folder]
    hidden = {path.resolve() for path in without}
    while pending:
        here = pending.pop()
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen or here.resolve() in hidden:
            continue
        seen.add((status.st_dev, status.st_ino))
        if here != folder and (here / "cache.json").is_file() and (here / "shards").is_dir():
            continue  # another latent cache
        try:
            with os.scandir(here) as listing:
                entries = [entry for entry in listing if not entry.name.startswith(".")]
        except OSError as error:
            raise UserError(f"SOURCE {here}: cannot be listed ({error.strerror}). Make it readable.") from error
        for entry in entries:
            if entry.is_dir():
                pending.append(Path(entry.path))
            else:
                yield Path(entry.path)


def read_item(path: Path, key: str) -> Item | Skip:
    """The item of a file, or the Skip that says why it is none."""
    nbytes = mtime_ns = -1
    try:
        status = path.stat()
        nbytes, mtime_ns = status.st_size, status.st_mtime_ns
        if not stat.S_ISREG(status.st_mode):
            return Skip(key, "unreadable", "not a regular file", nbytes, mtime_ns)
        if Image.MAX_IMAGE_PIXELS is not None and nbytes > 2 * Image.MAX_IMAGE_PIXELS * MAX_BYTES_PER_PIXEL:
            return Skip(
                key,
                "too_large",
                f"{human_bytes(nbytes)} is more than any image of --max-megapixels has",
                nbytes,
                mtime_ns,
            )
        with Image.open(path, formats=formats()) as image:
            return Item(key, oriented_size(image), nbytes, mtime_ns)
    except UnidentifiedImageError:
        extra = WITH_A_PLUGIN.get(path.suffix.lower())
        detail = "empty file" if nbytes == 0 else f"no image format that Pillow knows ({path.suffix})"
        if extra:
            detail += f"; pip install 'latentprep[{extra}]'"
        return Skip(key, "not_an_image", detail, nbytes, mtime_ns)
    except Image.DecompressionBombError as error:
        return Skip(key, "too_large", too_large(error), nbytes, mtime_ns)
    except DECODER_ERRORS as error:
        return Skip(key, "unreadable", describe(error), nbytes, mtime_ns)


def hash_image(image: Path, mask: Path | None = None) -> bytes | None:
    """16 bytes: the content hash that a cache keeps of every image and its mask; None where they cannot be read."""
    made = new_hash()
    try:
        for path in (image, mask) if mask is not None else (image,):
            with path.open("rb") as file:
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


def oriented_size(image: Image.Image) -> Size:
    """(height, width) of an opened image once its EXIF orientation is applied; nothing is decoded."""
    if read_orientation(image) >= 5:  # 5 to 8 swap rows and columns
        return image.width, image.height
    return image.height, image.width


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an opened image; 1 where there is nothing left to turn."""
    if image.format == "TIFF":
        return 1  # Pillow gives the size of the upright image, and turns it when it loads it
    if image.format == "PNG" and "exif" not in image.info and not _has_late_exif(image):
        return 1  # Pillow's getexif would decode the whole PNG to look for it
    try:
        value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DECODER_ERRORS:
        return 1
    return value if value in range(1, 9) else 1


def _has_late_exif(image: Image.Image) -> bool:
    """Whether a PNG has its eXIf chunk behind the pixels, where the standard allows it; skips from chunk to chunk."""
    file = getattr(image, "fp", None)
    if file is None:
        return False
    here = file.tell()
    try:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, name = struct.unpack(">I4s", head)
            if name == b"eXIf":
                return True
            if name == b"IEND":
                return False
            file.seek(length + 4, os.SEEK_CUR)
        return False
    finally:
        file.seek(here)


def too_large(error: Image.DecompressionBombError) -> str:
    """What Pillow says of an image beyond limit_pixels, and the option that decides it."""
    return f"{str(error).partition(',')[0]} (--max-megapixels)"


def describe(error: BaseException) -> str:
    """One line about an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
