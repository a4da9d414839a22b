"""Numbers -> bars of a chart. Pure arithmetic."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

MOST_BARS = 24


@dataclass(frozen=True)
class Histogram:
    """Bars beside each other."""

    counts: Sequence[int]
    labels: Sequence[str]  # of each bar: what it counts
    low: str  # at the left end of the axis
    high: str  # at the right end

    @property
    def most(self) -> int:
        return max(self.counts, default=0)

    @property
    def total(self) -> int:
        return sum(self.counts)


def of_shares(values: np.ndarray) -> Histogram:
    """Shares of 0 to 1: a bar for those of exactly 0, then one for each step of 5% up to the largest share."""
    steps = np.ceil(np.round(values.astype(np.float64), 6) * 20).astype(int)  # 0; 1: up to 5%; ...
    counts = np.bincount(steps, minlength=2)
    labels = ["0%", *(f"{5 * n - 5}% to {5 * n}%" for n in range(1, len(counts)))]
    return Histogram(counts.tolist(), labels, "0%", f"{5 * len(counts) - 5}%")


def of_counts(
    values: np.ndarray, say: Callable[[int, int], str] = lambda low, high: f"{low:,} to {high:,}"
) -> Histogram:
    """Whole numbers from 0 on, in at most MOST_BARS bars of a width of 1, 2, 5, 10, 20, 50, ..."""
    most = int(values.max()) if len(values) else 0
    width = next(w for n in range(20) for w in (10**n, 2 * 10**n, 5 * 10**n) if most // w < MOST_BARS)
    counts = np.bincount(values // width, minlength=1)
    labels = [say(n * width, (n + 1) * width - 1) if width > 1 else f"{n:,}" for n in range(len(counts))]
    return Histogram(counts.tolist(), labels, "0", f"{len(counts) * width - 1:,}")
