"""How fast images are decoded and resized: on one core, and by all threads together."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle

import numpy as np
import torch

from latentprep.errors import UserError
from latentprep.prepare.devices import count_cores
from latentprep.prepare.images.load import load_pixels
from latentprep.prepare.speed.timing import rate
from latentprep.prepare.survey import Prepared
from latentprep.prepare.work.batches import LoadAhead
from latentprep.records import Item, Pixels, Placement, Size
from latentprep.speeds import DecodeSpeed

KEPT = 8  # images whose pixels the VAE is measured on
Rows = list[tuple[Item, Placement]]


def measure_decode(
    prepared: Prepared, seconds: float, count: Callable[[int], object]
) -> tuple[DecodeSpeed, Size, np.ndarray]:
    """The speed, the bucket that most images have, and pixels of images in it, [N,H,W,3] uint8. Raises UserError."""
    rows = [
        pair for unit in prepared.plan.units for pair in zip(unit.items, unit.placements, strict=True)
    ]  # fmt: skip
    threads, cores = prepared.threads, count_cores()
    parts = 3 if cores > threads else 2
    num_broken = len(prepared.plan.skips)
    with one_torch_thread():
        good, pixels, per_core = decode_alone(prepared, rows, seconds / parts, count)
    broken = [key for key, own in pixels.items() if own is None]
    if not good:
        raise UserError(f"SOURCE {prepared.options.source}: none of its images can be decoded ({broken[0]}).")
    bucket = Counter(placement.bucket for _, placement in good).most_common(1)[0][0]
    kept = [own for item, placement in good if placement.bucket == bucket and (own := pixels[item.key]) is not None]
    with_threads, num_measured, num_rounds = decode_together(prepared, good, threads, seconds / parts, count)
    with_cores = None
    if cores > threads:
        with_cores, _, more = decode_together(prepared, good, cores, seconds / parts, count)
        num_rounds = min(num_rounds, more)
    kinds = Counter(f"{item.key.rpartition('.')[2].upper()} {item.size[1]}x{item.size[0]}" for item, _ in good)
    speed = DecodeSpeed(
        tuple(kinds.most_common()), num_broken + len(broken), per_core, threads, with_threads, num_measured, cores,
        num_rounds, with_cores,
    )  # fmt: skip
    return speed, bucket, np.stack(kept[:KEPT])


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """torch resizes in this thread alone, so that the time of its processor is all that there is."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def decode_alone(
    prepared: Prepared, rows: Rows, seconds: float, count: Callable[[int], object]
) -> tuple[Rows, dict[str, np.ndarray | None], float]:
    """The images that can be decoded, the pixels of each, [H,W,3] uint8 (None: broken), and images/s of one thread.

    The first round warms up, and counts only if there is no time for a second one.
    """
    started, pixels = time.perf_counter(), dict[str, np.ndarray | None]()
    rounds: list[float] = []
    good: Rows = []
    taken = 0.0
    for item, placement in rows:
        begun = time.thread_time()
        found = load_pixels(item, placement, prepared.load_options)
        count(1)
        pixels[item.key] = found.pixels[0] if isinstance(found, Pixels) else None
        if isinstance(found, Pixels):
            taken += time.thread_time() - begun
            good.append((item, placement))
        if good and time.perf_counter() - started > seconds:
            break
    first = time.perf_counter() - started
    while good and len(rounds) < 5 and time.perf_counter() - started + first <= seconds:
        begun = time.thread_time()
        for item, placement in good:
            load_pixels(item, placement, prepared.load_options)
            count(1)
        rounds.append(time.thread_time() - begun)
    return good, pixels, rate(len(good), rounds or [taken])


def decode_together(
    prepared: Prepared, rows: Rows, threads: int, seconds: float, count: Callable[[int], object]
) -> tuple[float, int, int]:
    """Images/s of threads that decode one image after the other, how many were measured, and in how many rounds.

    The first images of all threads warm up. Each round ends in the midst of work, so that no thread waits for others.
    """
    loader = LoadAhead(prepared.load_options, threads, 2 * threads, (("all", *row) for row in cycle(rows)))
    of_round = -(-2 * threads // len(rows)) * len(rows)  # all images, once or more often
    rounds: list[float] = []
    try:
        done, started = loader.take("all"), time.perf_counter()
        for _ in range(2 * threads):
            next(done)
            count(1)
        while not rounds or time.perf_counter() - started + min(rounds) <= seconds:
            begun = time.perf_counter()
            for _ in range(of_round):
                next(done)
                count(1)
            rounds.append(time.perf_counter() - begun)
    finally:
        loader.stop(wait=True)
    return rate(of_round, rounds), of_round * len(rounds), len(rounds)
