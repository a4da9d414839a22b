"""What systems do otherwise. Windows deletes, replaces and reads no file that another has open, mapped or locked;
Linux's glibc keeps what a thread has freed for that thread. And when Python looks for objects in circles.
"""

import ctypes
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")

IS_WINDOWS = os.name == "nt"
M_ARENA_MAX = -8  # of malloc.h
MAPPED = 1224  # ERROR_USER_MAPPED_FILE: Python knows no class for it
WAITS = (0.01, 0.05, 0.2, 0.5)  # seconds between attempts: who reads cache.json has it open for a moment


def is_in_use(error: OSError) -> bool:
    """Whether Windows refuses something only because another program, or a reader, has the file open."""
    return IS_WINDOWS and (isinstance(error, PermissionError) or getattr(error, "winerror", None) == MAPPED)


def patiently(act: Callable[[], T]) -> T:
    """Do something to a file; on Windows again for a second, if somebody has it open. Raises OSError."""
    for seconds in WAITS:
        try:
            return act()
        except OSError as error:
            if not is_in_use(error):
                raise
        time.sleep(seconds)
    return act()


def measure_load() -> float | None:
    """How many cores programs kept busy in the last minute; None on Windows, which does not say it."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None


def share_freed_memory() -> None:
    """Let threads that begin from now on use what others have freed: a run has many, and each hands on to the next.

    Else glibc gives each an arena of its own: encoding 1,500 images takes 190 MB more (benchmarks/memory.py).
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None  # musl has none
    if mallopt is not None:
        mallopt(M_ARENA_MAX, 2)


@contextmanager
def rare_collections() -> Iterator[None]:
    """Objects that live long are not looked through for circles: of a million images Python would do so a dozen times.

    New ones still are, so that circles which images leave behind do not add up.
    """
    before = gc.get_threshold()
    gc.set_threshold(50_000, 20, 1000)  # new objects; and so often those that outlived that, and all
    try:
        yield
    finally:
        gc.set_threshold(*before)
