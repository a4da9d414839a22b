"""How fast a cache is read: epochs of a LatentLoader, as a training loop takes them."""

import time
from collections.abc import Callable
from statistics import median

from latentprep.read.dataset import LatentDataset
from latentprep.read.loader import LatentLoader
from latentprep.speeds import ReadSpeed

BATCH_SIZE = 8
MOST = 20  # epochs that are timed, after the one that warms up that are timed, after the one that warms up


def measure_read(cache: str, has_std: bool, seconds: float, count: Callable[[int], object]) -> ReadSpeed:
    """Samples/s of reading, with cond, and with noise if there is a std; the median of all epochs but the first.

    seconds: the time limit for all epochs; two are always read. count: called with the number of samples of each batch.
    Raises UserError if the cache cannot be read.
    """
    data = LatentDataset(cache, latent_sampling_method="random" if has_std else "deterministic")
    loader = LatentLoader(data, BATCH_SIZE)
    times: list[float] = []
    started = time.perf_counter()
    while len(times) < 2 or (len(times) <= MOST and time.perf_counter() - started < seconds):
        begun = time.perf_counter()
        for batch in loader:
            _ = batch.latent_sample, batch.cond
            count(len(batch.index))
        times.append(time.perf_counter() - begun)
    num_samples = len(data)
    return ReadSpeed(num_samples / max(median(times[1:]), 1e-9), BATCH_SIZE, num_samples, len(times) - 1)
