"""The door through which images, masks, captions and metadata come: what a source must be able to do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from typing import IO, NamedTuple, Protocol

from latentprep.records import Skip

TEXTS = (".txt", ".caption")  # suffixes of files that hold a caption and nothing else


class NotRegularError(OSError):
    """A pipe, a socket, a device, a link or a folder in the place of a file."""


class File(NamedTuple):
    """One file of a source, as it is listed. Without `open` (which raises OSError) all of it is read for its header."""

    key: str  # its path in the source, POSIX style; an image whose key has an empty part, "." or ".." is a skip
    nbytes: int  # -1: cannot be looked at; reading it will say why
    version: int  # says cheaply that the content may have changed: a time, a checksum; only compared, never ordered
    open: Callable[[], IO[bytes]] | None = None  # a seekable file, for its header alone, until the next is listed


class Source(Protocol):
    """Where files come from. Small and picklable: worker processes have copies, and each has several threads.

    A new source is one file with such a class, and one row in sources.SOURCES.
    """

    where: str  # path or URL, for messages
    sidecars: tuple[str, ...] = TEXTS  # suffixes of files that caption the image of their stem, the best first

    def list(self) -> Iterator[File | Skip]:
        """Every file, in any order; what cannot be listed is a Skip "unreadable_folder" with the key of what is above.

        A key that comes again replaces the one before. Raises OSError if nothing can be listed.
        """
        ...

    def read(self, key: str, limit: int) -> bytes:
        """All bytes of a file, or limit + 1 of a larger one. Raises OSError, whatever is wrong."""
        ...

    @contextmanager
    def open(self, key: str, limit: int) -> Iterator[IO[bytes]]:
        """A seekable file, for its header alone; of a source that cannot open it what read() gives. Raises OSError."""
        yield BytesIO(self.read(key, limit))

    def locate(self, key: str) -> str:
        """Where a file is, for messages."""
        return f"{self.where}/{key}"

    def is_there(self) -> bool:
        """False if the whole source is gone, and not only one of its files: a disk that is not mounted any more."""
        return True

    def can_open(self, key: str) -> bool:
        """False for a file that cannot be opened now: reading it will say why. Asked of images that the cache knows."""
        return True
