"""Seconds of work that is done again and again until its time is up."""

import time
from collections.abc import Callable, Sequence
from statistics import median

MOST = 50  # repetitions: the median of more is no other


def repeat(work: Callable[[], object], seconds: float, most: int = MOST) -> list[float]:
    """Seconds of each of several calls: one at least, and no other once the time is up."""
    times: list[float] = []
    started = time.perf_counter()
    while not times or (len(times) < most and time.perf_counter() - started + median(times) <= seconds):
        begun = time.perf_counter()
        work()
        times.append(time.perf_counter() - begun)
    return times


def rate(count: float, times: Sequence[float]) -> float:
    """So many a second, by the median of the seconds that they took."""
    return count / max(median(times), 1e-9)  # a clock may stand still
