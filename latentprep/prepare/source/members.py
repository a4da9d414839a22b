"""The members of a tar, by their headers alone: ustar, GNU and pax names and sizes, within bounds.

tarfile's own loop over members has none: it reads a pax header of any size, and keeps an object of a kilobyte for each
member. Its TarInfo.frombuf, which takes one block apart, is used.
"""

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from io import RawIOBase
from typing import IO

from latentprep.human import counted

BLOCK = 512
MAX_EXTENSION = 2**20  # bytes of a long name, or of the pax records of one member
MAX_SIZE = 2**60  # bytes of a header's content, such as a long name: no disk holds more, and no seek can go there
MAX_HEADERS = 64  # of one member: long name, long link, pax records, itself; of old sparse files the parts, too
LONG_NAME, PAX, SPARSE = tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE
EXTENSIONS = (LONG_NAME, tarfile.GNUTYPE_LONGLINK, PAX, tarfile.SOLARIS_XHDTYPE, tarfile.XGLTYPE)
# Of these, tarfile reads no content, whatever size the header names.
WITHOUT_CONTENT = (
    tarfile.LNKTYPE,
    tarfile.SYMTYPE,
    tarfile.CHRTYPE,
    tarfile.BLKTYPE,
    tarfile.DIRTYPE,
    tarfile.FIFOTYPE,
)
MAGICS = {  # of what a .tar may be instead
    b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"PK\x03\x04": "zip",
}  # fmt: skip


class TarError(Exception):
    """A tar, or what is left of it, that cannot be listed."""


@dataclass(frozen=True, slots=True)
class Member:
    """A file in a tar."""

    name: str  # without "./", as unpacking makes it
    offset: int  # of its first header
    start: int  # of its content
    nbytes: int
    version: int  # a hash of its headers and its offset
    is_regular: bool  # no link, device or sparse file
    end: int  # where the next one begins

    @property
    def is_hidden(self) -> bool:
        """Whether it, or a folder above it, has a name that begins with a dot."""
        return any(part.startswith(".") and part != ".." for part in self.name.split("/"))


def list_members(file: IO[bytes]) -> Iterator[Member]:
    """The files in a tar, in their order; folders and hidden files are left out. Raises TarError at what is damaged.

    Ends at the first block of zeros, or with the file.
    """
    size = file.seek(0, 2)
    if size == 0:
        raise TarError("an empty file, expected a tar")
    offset = 0
    while (member := read_member(file, offset)) is not None:
        if (missing := member.start + member.nbytes - size) > 0:
            raise TarError(f"ends within {member.name}: {counted(missing, 'byte')} missing")
        if member.name and not member.is_hidden:
            yield member
        offset = member.end


def read_member(file: IO[bytes], offset: int) -> Member | None:
    """The member whose headers begin at an offset, its name "" for a folder; None at the end of a tar.

    Raises TarError.
    """
    names: list[str] = []
    pax: dict[str, str] = {}
    seen, here = blake2b(offset.to_bytes(8), digest_size=8), offset
    for _ in range(MAX_HEADERS):
        file.seek(here)
        block = file.read(BLOCK)
        header = read_header(block, here)
        if header is None and here == offset:
            return None
        if header is None:
            raise TarError(f"ends within the headers of the member at byte {offset:,}")
        seen.update(block)
        here += BLOCK
        if header.type not in EXTENSIONS:
            break
        if header.size > MAX_SIZE:
            raise TarError(f"damaged at byte {offset:,}: a size of {header.size:,} bytes")
        data = b""
        if header.type in (LONG_NAME, PAX, tarfile.SOLARIS_XHDTYPE):
            if header.size > MAX_EXTENSION:
                raise TarError(
                    f"a header of {header.size:,} bytes at byte {offset:,}, expected at most {MAX_EXTENSION:,}"
                )
            data = file.read(header.size)
            seen.update(data)
        if header.type == LONG_NAME:
            names.append(decode(data.partition(b"\0")[0]))
        elif data:
            pax |= read_pax(data, offset)
        here += padded(header.size)
    else:
        raise TarError(f"more than {MAX_HEADERS} headers of one member at byte {offset:,}")
    is_sparse = header.type == SPARSE or any(name.startswith("GNU.sparse.") for name in pax)
    if header.type == SPARSE:
        here = skip_sparse_map(file, block, here)
    nbytes = header.size
    if "size" in pax:
        if not pax["size"].isascii() or not pax["size"].isdigit():
            raise TarError(f"damaged at byte {offset:,}: a size of {pax['size'][:20]!r}")
        nbytes = int(pax["size"][:20])
    name = pax.get("path") or (names[-1] if names else header.name)
    is_regular = header.type in tarfile.REGULAR_TYPES and not is_sparse
    nbytes = 0 if header.type in WITHOUT_CONTENT else nbytes
    is_folder = header.type == tarfile.DIRTYPE or name.endswith("/")
    version = int.from_bytes(seen.digest()) >> 2  # so that the sum of two fits in an int64
    return Member(
        "" if is_folder else tidy_name(name), offset, here, nbytes, version, is_regular, here + padded(nbytes)
    )


def read_header(block: bytes, offset: int) -> tarfile.TarInfo | None:
    """One block taken apart; None at the end of the tar. Raises TarError."""
    if not block.strip(b"\0"):
        return None
    try:
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except (tarfile.HeaderError, ValueError) as error:
        kind = next((kind for magic, kind in MAGICS.items() if block.startswith(magic)), "") if offset == 0 else ""
        if kind:
            raise TarError(f"a {kind} file, expected a tar that is not compressed") from error
        where = "no tar" if offset == 0 else f"damaged at byte {offset:,}"
        raise TarError(f"{where} ({error})") from error
    if header.size < 0:
        raise TarError(f"damaged at byte {offset:,}: a size of {header.size:,} bytes")
    return header


def read_pax(data: bytes, offset: int) -> dict[str, str]:
    """The records of a pax header: "21 path=some/where\\n" (POSIX.1-2001). Raises TarError."""
    found, here = {}, 0
    while here < len(data):
        digits, _, _ = data[here : here + 20].partition(b" ")
        length = int(digits) if digits.isdigit() else 0
        if not len(digits) < length <= len(data) - here:
            raise TarError(f"damaged at byte {offset:,}: no pax header")
        name, _, value = data[here + len(digits) + 1 : here + length - 1].partition(b"=")
        found[decode(name)] = decode(value)
        here += length
    return found


def skip_sparse_map(file: IO[bytes], block: bytes, here: int) -> int:
    """Where the content of an old GNU sparse member begins: behind the blocks that say where its parts lie."""
    is_extended = bool(block[482])
    for _ in range(MAX_HEADERS):
        if not is_extended:
            return here
        file.seek(here)
        block = file.read(BLOCK)
        is_extended = len(block) == BLOCK and bool(block[504])
        here += BLOCK
    raise TarError(f"a sparse member of more than {MAX_HEADERS} blocks of parts")


def decode(name: bytes) -> str:
    """A name as Python has those of files: bytes that are not UTF-8 are lone surrogates."""
    return name.decode("utf-8", "surrogateescape")


def tidy_name(name: str) -> str:
    """A member's name without what means nothing in it: "./" and doubled slashes."""
    return "/" * name.startswith("/") + "/".join(part for part in name.split("/") if part not in ("", "."))


def padded(size: int) -> int:
    """Bytes that a content takes in a tar: whole blocks."""
    return -(-size // BLOCK) * BLOCK


class Region(RawIOBase):
    """A part of an open file, as a file. Only one thread may read the file."""

    def __init__(self, file: IO[bytes], start: int, nbytes: int) -> None:
        self._file, self._start, self._nbytes, self._here = file, start, nbytes, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        base = (0, self._here, self._nbytes)[whence]
        if base + offset < 0:
            raise OSError(22, "Invalid argument")
        self._here = base + offset
        return self._here

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        wanted = min(len(buffer), max(0, self._nbytes - self._here))
        self._file.seek(self._start + self._here)
        data = self._file.read(wanted)
        buffer[: len(data)] = data
        self._here += len(data)
        return len(data)
