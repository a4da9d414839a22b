"""What Pillow may open, what it is given, and what it raises. No pixel is decoded here.

Only what Pillow raises is the fault of an image: its calls stand inside `decoding()`, and our own code outside.
"""

import logging
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from io import BytesIO
from typing import IO, Any, NoReturn, cast

from PIL import ExifTags, Image, UnidentifiedImageError

from latentprep.keys import suffix_of
from latentprep.records import Size

# Formats that Pillow only recognises, or would hand to another program: EPS, WMF, and IPTC, in which any may lie.
NOT_OPENED = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
WITH_A_PLUGIN = {".heic": "heif", ".heif": "heif", ".hif": "heif", ".jxl": ""}  # suffix -> our extra that reads it
DECODERS = ("pillow", "pillow-heif", "simplejpeg")  # packages that decide whether a file can be decoded
NO_FORMAT = "its bytes are of no image format that Pillow knows"
PNG_MAGIC = b"\x89PNG\r\n\x1a\n"
MAX_CHUNKS = 100_000  # of a PNG: Pillow takes 30 seconds for a million; 12,000 are usual in one of 100 MB
MAX_CHUNK = 64_000_000  # bytes of one that holds no pixels; Pillow keeps several copies
PIXEL_CHUNKS = (b"IDAT", b"fdAT")
MAX_READS = 1_000_000  # of a file's headers: Pillow reads them piece by piece in Python, a million a second at best
MAX_PYTHON_PIXELS = 4_000_000  # of formats that Pillow decodes in Python: half a million to 6 million a second
MAX_BYTES_PER_PIXEL = 8  # 16-bit RGBA, stored as it is
FAST_DECODERS = ("SGI16",)  # in Image.DECODERS with the ones written in Python, but fast


class DecodeError(Exception):
    """Pillow cannot open, load or convert an image. `reason` is one of records.REASONS."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@contextmanager
def decoding() -> Iterator[None]:
    """Turn whatever Pillow and the libraries below it raise into a DecodeError: over a dozen kinds were seen.

    A MemoryError passes: it says something about this machine, and not about the image.
    """
    try:
        yield
    except (DecodeError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DecodeError("not_an_image", NO_FORMAT) from error  # its words hold an address
    except Image.DecompressionBombError as error:
        raise DecodeError("too_large", f"{str(error).partition(',')[0]} (--max-megapixels)") from error
    except Exception as error:
        reason = "truncated" if "truncated" in str(error).lower() else "unreadable"
        raise DecodeError(reason, describe(error)) from error


def describe(error: BaseException) -> str:
    """One line about an exception."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def limit_pixels(max_pixels: int) -> None:
    """Have Pillow refuse larger images, wherever in a file they stand (an .ico may hold a PNG of any size)."""
    Image.MAX_IMAGE_PIXELS = max_pixels // 2  # it warns beyond this, and refuses beyond twice this


@contextmanager
def kept_limit() -> Iterator[None]:
    """Puts Pillow's limit back at the end: it is the whole process's."""
    before = Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


def max_pixels() -> int:
    """The limit that limit_pixels has set."""
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**62)


@cache
def formats() -> tuple[str, ...]:
    """The formats that Pillow may open: its own, and HEIF if pillow-heif is installed."""
    Image.preinit()
    Image.init()
    logging.getLogger("PIL").addHandler(logging.NullHandler())  # it logs to the terminal what it then raises
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


def missing_extra(suffix: str) -> str:
    """Our extra that brings the plugin for files of this suffix; "": there is none, or it is installed."""
    return "" if "HEIF" in formats() else WITH_A_PLUGIN.get(suffix.lower(), "")


def is_image_name(name: str) -> bool:
    """Whether a file is taken for an image, by its name or plain path."""
    return suffix_of(name) in image_suffixes()


def decoder_versions() -> str:
    """Names and versions of the packages that decode: whether a file can be decoded depends on them."""
    found = []
    for name in DECODERS:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def max_bytes() -> int:
    """The largest file that is read: one of limit_pixels' pixels, stored as they are."""
    return max_pixels() * MAX_BYTES_PER_PIXEL


class CountedFile:
    """A file that is read at most MAX_READS times: then it raises DecodeError. Everything else is the file's own.

    Many formats are lists of pieces of a few bytes, and Pillow takes a step in Python for each.
    """

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self._read = file, file.read
        self._left = MAX_READS

    def read(self, size: int = -1) -> bytes:
        self._left -= 1
        return self._read(size) if self._left >= 0 else self._refuse()

    def readline(self, size: int = -1) -> bytes:
        self._left -= 1
        return self._file.readline(size) if self._left >= 0 else self._refuse()

    def _refuse(self) -> NoReturn:
        raise DecodeError("too_large", f"a file of more than {MAX_READS:,} pieces")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def open_image(file: IO[bytes]) -> Image.Image:
    """An image by its header; nothing is decoded. Raises DecodeError, also for one that takes unbounded time or memory.

    Bounds beyond --max-megapixels: the chunks of a PNG, the pieces of any file, the pixels of formats that Pillow
    decodes in Python, and those of a TIFF's tiles and strips.
    """
    if file.read(len(PNG_MAGIC)) == PNG_MAGIC:
        check_chunks(file)
    file.seek(0)
    with decoding():
        image = Image.open(cast("IO[bytes]", CountedFile(file)), formats=formats())
    pixels, limit, why = image.width * image.height, max_pixels(), "--max-megapixels"
    if is_slow(image):
        limit, why = min(limit, MAX_PYTHON_PIXELS), "Pillow decodes it in Python: make it a PNG"
    elif image.format == "TIFF":
        with decoding():
            pixels = max(pixels, largest_tile(image))
    if pixels > limit:
        what = "a tile or strip of " if pixels > image.width * image.height else ""
        raise DecodeError("too_large", f"{what}{pixels:,} pixels, {image.format} may have {limit:,} ({why})")
    return image


def is_slow(image: Image.Image) -> bool:
    """Whether the pixels of an opened image are decoded by Python code of Pillow's."""
    codecs = {str(tile[0]) for tile in getattr(image, "tile", ())}
    return not codecs.isdisjoint(Image.DECODERS.keys() - set(FAST_DECODERS))


def largest_tile(image: Image.Image) -> int:
    """Pixels of a TIFF's largest tile or strip, which libtiff decodes whole, whatever part of it is in the image."""
    tags = image.tag_v2  # type: ignore[attr-defined]
    sides = [int(tags.get(tag) or 0) for tag in (ExifTags.Base.TileWidth, ExifTags.Base.TileLength)]
    rows = min(int(tags.get(ExifTags.Base.RowsPerStrip) or 0), image.height)
    return max(sides[0] * sides[1], image.width * rows)


def list_chunks(file: IO[bytes]) -> Iterator[tuple[bytes, int]]:
    """Name and length of a PNG's chunks, in their order; the file then stands at the chunk's content."""
    here = len(PNG_MAGIC)
    while True:
        file.seek(here)
        head = file.read(8)
        if len(head) < 8:
            return
        length, name = struct.unpack(">I4s", head)
        yield name, length
        here += length + 12  # length, name and checksum


def check_chunks(file: IO[bytes]) -> None:
    """Raise DecodeError for a PNG of too many chunks, since Pillow keeps a Python object for each, or of huge ones."""
    for number, (name, length) in enumerate(list_chunks(file)):
        if number >= MAX_CHUNKS:
            raise DecodeError("too_large", f"a PNG of more than {MAX_CHUNKS:,} chunks")
        if name not in PIXEL_CHUNKS and length > MAX_CHUNK:
            raise DecodeError("too_large", f"a PNG chunk {name!r} of {length:,} bytes, expected at most {MAX_CHUNK:,}")


def find_chunk(data: bytes, wanted: bytes) -> bytes | None:
    """The content of a PNG's first chunk of a name, if it stands before the pixels; else None."""
    file = BytesIO(data)
    for name, length in list_chunks(file):
        if name == wanted:
            return file.read(length)
        if name == b"IDAT":
            break
    return None


def oriented_size(image: Image.Image) -> Size:
    """(height, width) of an opened image once its EXIF orientation is applied; nothing is decoded."""
    if read_orientation(image) >= 5:  # 5 to 8 swap rows and columns
        return image.width, image.height
    return image.height, image.width


def read_orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8, of an opened image; 1 if there is nothing left to turn, or EXIF is damaged."""
    if image.format == "TIFF":
        return 1  # Pillow gives the size of the upright image, and turns it when it loads it
    if image.format == "PNG" and "exif" not in image.info and not _has_late_exif(image):
        return 1  # Pillow's getexif would decode the whole PNG to look for it
    try:
        with decoding():
            value = image.getexif().get(ExifTags.Base.Orientation, 1)
    except DecodeError:
        return 1
    return value if value in range(1, 9) else 1


def _has_late_exif(image: Image.Image) -> bool:
    """Whether a PNG has its eXIf chunk behind the pixels, as the standard allows."""
    file = getattr(image, "fp", None)
    if file is None:
        return False
    here = file.tell()
    try:
        return any(name == b"eXIf" for name, _ in list_chunks(file))
    finally:
        file.seek(here)
