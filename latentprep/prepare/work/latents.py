"""The worker that encodes images: a stream of units becomes a stream of shards, on one device.

Each stage has a thread of its own, so that the device waits for nobody: images are decoded and stacked ahead of it; it
encodes in the thread that calls run(); what it gives is fetched and checked behind it; and full shards are written.
"""

import time
from collections import defaultdict, deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from queue import Full, Queue, SimpleQueue
from threading import Event as Signal
from threading import Thread
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from latentprep.cache.leftovers import find_leftover
from latentprep.cache.manifest import LatentFacts
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.prepare.devices import OutOfMemoryError, empty_cache
from latentprep.prepare.images.load import LoadOptions
from latentprep.prepare.images.pillow import limit_pixels
from latentprep.prepare.models.open_encoder import open_encoder
from latentprep.prepare.work.batches import Batch, End, LoadAhead, Task, make_batches
from latentprep.prepare.work.events import Event, Failure, LatentsResult, Step
from latentprep.prepare.work.finish import Encoded, Finisher
from latentprep.prepare.work.rows import UnitRows, load_rows
from latentprep.recipe import LatentsRecipe
from latentprep.records import Unit

if TYPE_CHECKING:
    from latentprep.prepare.models.doors import ImageEncoder, VaeModel
    from latentprep.prepare.models.vae_encoder import Posterior

AHEAD = 2  # batches at most that are ready for the device; that it works on; that it has done
MOMENT = 0.1  # seconds after which a thread that waits looks whether it is to stop
PATIENCE = 1.0  # seconds that a stopped run waits for images in decoding: a read that hangs must not hold it up


@dataclass(frozen=True)
class LatentsWorker:
    """All that is needed to encode units; it may be sent to another process, and opens its models there."""

    out: str  # root of the cache
    recipe: LatentsRecipe
    facts: LatentFacts
    libraries: Mapping[str, str]
    load: LoadOptions
    vae: "VaeModel"
    device: str
    compile: bool
    batch_size: int
    threads: int  # that decode
    max_pixels: int  # of an image file
    conditions: Mapping[str, str]  # that skips depend on

    @property
    def metadata(self) -> dict[str, Any]:
        """What stands in the header of its files."""
        return {**self.facts.to_json(), "recipe": self.recipe.to_json(), "libraries": dict(self.libraries)}

    def run(self, units: Iterable[Unit]) -> Iterator[Event]:
        """Encode units in their order; a result is given once its file is on disk.

        A unit that fails is a Failure, the others go on. If this generator is closed or interrupted, the batches that
        the device has done are kept for the next run. Raises UserError if none can go on.
        """
        limit_pixels(self.max_pixels)
        try:
            yield from Run(self).run(units)
        finally:
            empty_cache()


class Run:
    """One run of a LatentsWorker: its threads, and what passes between them."""

    def __init__(self, worker: LatentsWorker) -> None:
        self.worker, self.storage = worker, Storage(worker.out)
        self.ready: Queue[Any] = Queue(AHEAD)  # what the device is to do, in the order of the units
        self.behind: Queue[Any] = Queue(AHEAD)  # what it has done
        self.results: SimpleQueue[Any] = SimpleQueue()
        self.failed: set[str] = set()  # ids of units of which nothing more is to be done
        self.at_work: deque[Posterior] = deque()  # what the device has been asked for last
        self.stopping = Signal()
        self.waits: defaultdict[str, float] = defaultdict(float)  # stage -> seconds, since the last Step

    def run(self, units: Iterable[Unit]) -> Iterator[Event]:
        """See LatentsWorker.run."""
        worker = self.worker
        finisher = Finisher(self.storage, worker.recipe, worker.metadata, worker.conditions, self.failed)
        ahead = Thread(target=self._load, args=(units,), name="load", daemon=True)
        behind = Thread(target=finisher.run, args=(self.behind, self.results), name="finish")
        try:
            ahead.start()
            behind.start()
            yield from self._encode(finisher)
            self._put(self.behind, None)
            yield from self._drain()
        finally:
            self.stopping.set()
            if behind.is_alive():
                self.behind.put(None)  # the finisher takes what stands before it, and keeps that
                behind.join()
            if ahead.is_alive():
                ahead.join(PATIENCE)

    def _encode(self, finisher: Finisher) -> Iterator[Event]:
        """The device's own thread: what is ready is encoded, and handed to who waits behind it."""
        encoder = None
        while (message := self._get("decode", self.ready)) is not None:
            unit_id = message.unit.id if isinstance(message, UnitRows | Batch | End) else message.id
            num_done, is_new = getattr(message, "num_items", 0), True
            num_skips = len(getattr(message, "skips", ()))  # now: the finisher adds to those of a unit
            if isinstance(message, UnitRows):
                num_done, is_new = message.num_done, False
            elif isinstance(message, LatentsResult):
                num_done, is_new = message.num_found + len(message.skips), False
            elif isinstance(message, Failure):
                self.failed.add(message.id)
            elif isinstance(message, Batch):
                if encoder is None:
                    encoder = finisher.encoder = self._open()
                message = self._start(encoder, message)
            if message is not None:
                with self._on("write"):
                    self._put(self.behind, message)
            waits, self.waits = self.waits, defaultdict(float)
            yield Step(unit_id, num_done, is_new, waits, num_skips)
            while not self.results.empty():
                yield self._get("write", self.results)

    def _drain(self) -> Iterator[Event]:
        """The results of what is still behind the device."""
        while (result := self._get("write", self.results)) is not None:
            yield result

    def _open(self) -> "ImageEncoder":
        """The VAE, loaded now: loading is no part of the images' speed."""
        worker = self.worker
        with self._on("load"):
            return open_encoder(worker.vae, worker.recipe, worker.device, worker.compile)

    def _start(self, encoder: "ImageEncoder", batch: Batch) -> "Encoded | Failure | None":
        """The batch with its posteriors, which the device may still work on; a Failure; None: its unit has failed."""
        if batch.unit.id in self.failed:
            return None
        with self._on("encode"):
            try:
                return Encoded(batch, [self._ask(encoder, images) for images in batch.inputs])
            except OutOfMemoryError as error:
                return Encoded(batch, error)
            except UserError:
                raise
            except Exception as error:  # of torch or a model
                self.failed.add(batch.unit.id)
                return Failure.of(batch.unit.id, error)

    def _ask(self, encoder: "ImageEncoder", images: Tensor) -> "Posterior":
        """Start to encode one more input. If AHEAD are in work, wait for the first: that time is the device's own."""
        if len(self.at_work) == AHEAD:
            self.at_work.popleft().wait()
        self.at_work.append(encoder.start(images))
        return self.at_work[-1]

    def _load(self, units: Iterable[Unit]) -> None:
        """The first thread: images become batches. What ends it is handed on: None, or an exception."""
        if self.worker.device.startswith("cuda"):  # else pinned memory would take a part of the first GPU's
            torch.cuda.set_device(self.worker.device)
        end: BaseException | None = None
        begun: deque[UnitRows | LatentsResult | Failure] = deque()
        depth = max(2 * self.worker.batch_size, 2 * self.worker.threads)
        loader = LoadAhead(self.worker.load, self.worker.threads, depth, self._begin(units, begun))
        try:
            loader.fill()
            while begun and not self.stopping.is_set():
                first = begun.popleft()
                self._put(self.ready, first)
                if isinstance(first, UnitRows):
                    self._batch(first, loader)
                loader.fill()
            end = loader.end
        except BaseException as error:
            end = error
        self._put(self.ready, end)
        loader.stop(wait=end is None and not self.stopping.is_set())

    def _begin(self, units: Iterable[Unit], begun: "deque[UnitRows | LatentsResult | Failure]") -> Iterator[Task]:
        """The images of each unit that are still to be decoded. `begun` gets what earlier runs have left of it."""
        for unit in units:
            found = self._find(unit)
            begun.append(found)
            if isinstance(found, UnitRows):
                start = found.num_done
                for item, placement in zip(unit.items[start:], unit.placements[start:], strict=True):
                    yield unit.id, item, placement

    def _find(self, unit: Unit) -> UnitRows | LatentsResult | Failure:
        """What earlier runs have left of a unit. Raises UserError."""
        try:
            leftover = find_leftover(self.storage, unit.id)
            shard = leftover.check(self.storage) if leftover is not None else None
            if leftover is not None and shard is not None:
                return LatentsResult(unit.id, shard, leftover.skips, leftover.notes, num_found=shard.num_images)
            return load_rows(self.storage, unit)
        except UserError:
            raise
        except Exception as error:  # of a remote, or ours: it is no other unit's fault
            return Failure.of(unit.id, error)

    def _batch(self, rows: UnitRows, loader: LoadAhead) -> None:
        """The batches of a unit, one after the other."""
        unit, worker = rows.unit, self.worker
        try:
            loaded = loader.take(unit.id)
            views, on_cuda = worker.recipe.views, worker.device.startswith("cuda")
            for batch in make_batches(unit, rows.num_done, loaded, worker.batch_size, views, pinned=on_cuda):
                self._put(self.ready, batch)
                if self.stopping.is_set() or unit.id in self.failed:
                    break
        except UserError:
            raise
        except Exception as error:  # a fault of ours
            self._put(self.ready, Failure.of(unit.id, error))
        if not self.stopping.is_set():
            loader.drop(unit.id)

    def _get(self, stage: str, queue: "Queue[Any] | SimpleQueue[Any]") -> Any:
        """What comes next, waited for. Raises it if it is an exception."""
        with self._on(stage):
            found = queue.get()
        if isinstance(found, BaseException):
            raise found
        return found

    def _put(self, queue: "Queue[Any]", message: Any) -> None:
        """Hand something on, once there is room; nothing if the run stops."""
        while not self.stopping.is_set():
            with suppress(Full):
                queue.put(message, timeout=MOMENT)
                break

    @contextmanager
    def _on(self, stage: str) -> Iterator[None]:
        """Counts the time that the device's thread spends on a stage."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.waits[stage] += time.perf_counter() - started
