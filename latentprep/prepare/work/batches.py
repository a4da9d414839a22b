"""Units -> batches: images are decoded in threads ahead of the device, and stacked for it in the order of the unit."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, replace
from threading import Lock
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from latentprep.prepare.images.load import LoadOptions, is_large, load_pixels
from latentprep.records import Item, Pixels, Placement, Skip, Unit, is_flipped


class Row(NamedTuple):
    """An image of a batch."""

    item: Item
    placement: Placement
    pixels: Pixels  # without the pixels themselves: those are stacked in the batch


@dataclass(frozen=True, eq=False)
class Batch:
    """Images of one bucket that the VAE sees at once."""

    unit: Unit
    rows: list[Row]
    inputs: list[Tensor]  # [N,H,W,3] uint8 each: what the VAE is to see, one for each view that differs
    input_of_view: list[int]
    input_of_control: list[list[int]]  # of each control image: the input of each view
    skips: list[Skip]  # of the items since the batch before
    num_items: int  # since the batch before: its rows and the skips


@dataclass(frozen=True, eq=False)
class End:
    """A unit has no more batches."""

    unit: Unit
    skips: list[Skip]  # behind its last batch

    @property
    def num_items(self) -> int:
        return len(self.skips)


Loaded = Pixels | Skip
Task = tuple[str, Item, Placement]  # id of a unit, and one of its items


class LoadAhead:
    """Decodes images in threads, at most `depth` ahead, and hands them out in order."""

    def __init__(self, options: LoadOptions, threads: int, depth: int, tasks: Iterable[Task]) -> None:
        self.options, self.depth, self.tasks = options, depth, iter(tasks)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="decode")
        self.large = Lock()  # several images at once, but only one that is very large: memory stays bounded
        self.ahead: deque[tuple[str, Future[Loaded]]] = deque()
        self.end: BaseException | None = None  # what has ended the tasks too early; those before it are handed out

    def take(self, unit_id: str) -> Iterator[Loaded]:
        """The loaded items of the unit that comes next."""
        self.fill()
        while self.ahead and self.ahead[0][0] == unit_id:
            result = self.ahead.popleft()[1].result()
            self.fill()
            yield result

    def drop(self, unit_id: str) -> None:
        """Leave out what is left of a unit."""
        while self.ahead and self.ahead[0][0] == unit_id:
            self.ahead.popleft()[1].cancel()
            self.fill(without=unit_id)

    def fill(self, without: str = "") -> None:
        """Start decoding images until `depth` of them are ahead; those of the unit `without` are passed over."""
        while len(self.ahead) < self.depth and (following := self._next()) is not None:
            unit_id, item, placement = following
            if unit_id != without:
                self.ahead.append((unit_id, self.pool.submit(self._load, item, placement)))

    def _next(self) -> Task | None:
        try:
            return next(self.tasks, None)
        except BaseException as error:  # no fault of the unit whose images are handed out meanwhile
            self.end = error
            return None

    def stop(self, wait: bool) -> None:
        self.pool.shutdown(wait=wait, cancel_futures=True)

    def _load(self, item: Item, placement: Placement) -> Loaded:
        with self.large if is_large(item) else nullcontext():
            return load_pixels(item, placement, self.options)


def make_batches(
    unit: Unit, start: int, loaded: Iterator[Loaded], batch_size: int, views: tuple[str, ...], pinned: bool = False
) -> Iterator[Batch | End]:
    """Batches of a unit from item `start` on, in its order, each of up to batch_size rows of one bucket; then the End.

    pinned: their pixels lie in page-locked memory. CUDA copies from there while the caller goes on.
    """
    rows: list[Row] = []
    images: list[Pixels] = []  # of each row
    skips: list[Skip] = []  # before the last row
    later: list[Skip] = []  # behind it: they count with the next batch
    for number in range(start, len(unit.items)):
        item, placement, result = unit.items[number], unit.placements[number], next(loaded)
        if isinstance(result, Skip):
            later.append(result)
            continue
        if rows and (len(rows) == batch_size or rows[0].placement.buckets != placement.buckets):
            yield make_batch(unit, rows, images, skips, views, pinned)
            rows, images, skips = [], [], []
        skips, later = skips + later, []
        rows.append(Row(item, placement, replace(result, pixels=result.pixels[:, :0], controls=())))
        images.append(result)
    if rows:
        yield make_batch(unit, rows, images, skips, views, pinned)
    yield End(unit, later)


def make_batch(
    unit: Unit, rows: list[Row], images: list[Pixels], skips: list[Skip], views: tuple[str, ...], pinned: bool
) -> Batch:
    """A batch of rows, with what the VAE is to see of them and of their control images."""
    inputs: list[Tensor] = []
    of_view = stack(images, views, pinned, inputs)
    controls = zip(*(image.controls for image in images), strict=True)
    of_control = [stack(own, views, pinned, inputs) for own in controls]
    return Batch(unit, rows, inputs, of_view, of_control, skips, len(rows) + len(skips))


def stack(images: Sequence[Pixels], views: tuple[str, ...], pinned: bool, inputs: list[Tensor]) -> list[int]:
    """Add to `inputs` what the VAE is to see of each view, [N,H,W,3] uint8; returns which of these each view is.

    Views that are the same for all images are there once: images that just fit their bucket have one crop only.
    """
    boxes = list(zip(*(image.crops for image in images), strict=True))  # of each crop those of all images
    mirrors = len(views) // len(boxes)  # views of each crop
    known: dict[tuple[object, bool], int] = {}
    input_of_view = []
    for n, view in enumerate(views):
        crop, flipped = n // mirrors, is_flipped(view)
        same = boxes[crop], flipped
        if same not in known:
            known[same] = len(inputs)
            stacked = torch.empty(len(images), *images[0].pixels.shape[1:], dtype=torch.uint8, pin_memory=pinned)
            pixels = [image.pixels[crop] for image in images]
            np.stack([own[:, ::-1] if flipped else own for own in pixels], out=stacked.numpy())
            inputs.append(stacked)
        input_of_view.append(known[same])
    return input_of_view
