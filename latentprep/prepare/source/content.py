"""The content hash of images, 16 bytes: it tells whether an image is still the one that was encoded."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from threading import Lock

from latentprep.prepare.source.door import Source
from latentprep.prepare.source.partners import Partners

HASHERS = 4  # threads that read files; a disk has no use for more
LARGE_BYTES = (
    32_000_000  # larger files are read one at a time: in memory are at most so many bytes for each thread, and one file
)


def hash_images(
    source: Source, partners: Sequence[Partners], files: Iterable[tuple[str, int]]
) -> Iterator[bytes | None]:
    """The content hash of each image and its partners, by key and bytes of all; None where they cannot be read.

    A file that has more bytes now is not read to its end: its hash is another in any case.
    """
    large = Lock()

    def hash_image(file: tuple[str, int]) -> bytes | None:
        key, nbytes = file[0], max(0, file[1])
        try:
            with large if nbytes > LARGE_BYTES else nullcontext():
                made = new_hash(source.read(key, nbytes))
                for own in partners:
                    if (partner := own.find(key)) is not None:
                        made.update(own.source.read(partner.key, nbytes))
                return made.digest()
        except (OSError, MemoryError):
            return None

    with ThreadPoolExecutor(HASHERS) as pool:
        yield from pool.map(hash_image, files)


def new_hash(data: bytes = b"") -> "hashlib.blake2b":
    """BLAKE2b of 16 bytes, of everything in an image file, and behind it in its mask and its control images."""
    return hashlib.blake2b(data, digest_size=16)
