"""Runs units on this machine: decode threads ahead of one encoder, and one writer behind it."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

from latentprep.cache.storage import Stamp
from latentprep.errors import UserError
from latentprep.prepare.plan.plan import Retext
from latentprep.prepare.work.job import Job
from latentprep.prepare.work.latents import UnitResult, retext_unit, run_unit
from latentprep.prepare.work.partial import count_partial
from latentprep.records import Item, Pixels, Placement, Skip, Unit

Load = Callable[[Item, Placement], Pixels | Skip]


@dataclass
class RunResult:
    units: list[UnitResult] = field(default_factory=list)
    failures: dict[str, Exception] = field(default_factory=dict)  # of units that raised, by id; they are not done


class LoadAhead:
    """Decodes the images of unit after unit in threads, at most `depth` ahead, and hands them out in order."""

    def __init__(
        self, pool: ThreadPoolExecutor, load: Load, units: list[Unit], done: dict[str, int], depth: int
    ) -> None:
        """`done`: unit -> how many of its first items are not to be loaded."""
        self.pool, self.load, self.depth = pool, load, depth
        self.waiting = (
            (unit.id, unit.items[n], unit.placements[n])
            for unit in units
            for n in range(done.get(unit.id, 0), len(unit.items))
        )
        self.ahead: deque[tuple[str, Future[Pixels | Skip]]] = deque()

    def take(self, unit: Unit) -> Iterator[Pixels | Skip]:
        """The loaded items of a unit; units are to be taken in the order they were given."""
        self._fill()
        while self.ahead and self.ahead[0][0] != unit.id:  # left behind by a unit that failed
            self.ahead.popleft()[1].cancel()
            self._fill()
        while self.ahead and self.ahead[0][0] == unit.id:
            result = self.ahead.popleft()[1].result()
            self._fill()
            yield result

    def _fill(self) -> None:
        while len(self.ahead) < self.depth and (following := next(self.waiting, None)) is not None:
            unit_id, item, placement = following
            self.ahead.append((unit_id, self.pool.submit(self.load, item, placement)))


class Writer:
    """Writes files one after the other in a thread; waits for the one before, so that at most two are in memory."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self.last: Future[Stamp] | None = None

    def submit(self, write: Callable[[], Stamp]) -> "Future[Stamp]":
        self.wait()
        self.last = self.pool.submit(write)
        return self.last

    def wait(self) -> None:
        """Wait for the last write. Raises what it raised."""
        if self.last is not None:
            with self.job.watch.on("write"):
                self.last.result()


def run(
    units: list[Unit],
    retexts: Iterable[Retext],
    to_encode: set[str],
    load: Load,
    job: Job,
    workers: int,
    progress: Callable[[int, bool], None],
) -> RunResult:
    """Run every unit, then every retext; one that raises stops only itself.

    The units in `to_encode` have no latents file yet; the others only get their text file, if that is missing.
    `progress` hears of images done, and if they were encoded.

    Raises UserError (a full disk stops everything) and KeyboardInterrupt; what is finished by then is on disk.
    """
    result = RunResult()
    decoders = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    writer = Writer(job)
    own = [unit for unit in units if unit.id in to_encode]
    done = {unit.id: count for unit in own if (count := count_partial(job.storage, unit))}
    ahead = LoadAhead(decoders, load, own, done, depth=max(2 * job.batch_size, 2 * workers))

    def attempt(unit: str, work: Callable[[], UnitResult]) -> None:
        try:
            result.units.append(work())
        except UserError:
            raise
        except Exception as error:
            result.failures[unit] = error

    is_whole = False
    try:
        for unit in units:
            loaded = ahead.take(unit) if unit.id in to_encode else None
            attempt(unit.id, partial(run_unit, unit, loaded, job, writer.submit, lambda n: progress(n, True)))
            if loaded is None:
                progress(len(unit.items), False)
        for retext in retexts:
            attempt(retext.entry.unit, partial(retext_unit, retext, job, writer.submit))
            progress(retext.entry.num_images, True)
        writer.wait()
        is_whole = True
    finally:
        decoders.shutdown(
            wait=is_whole, cancel_futures=True
        )  # a read that hangs is not to hold up a run that is stopped
        writer.pool.shutdown(wait=True)
    return result
