"""How fast the models are: the VAE in batches of several sizes and in several number types, and the text encoders."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from latentprep.cache.int8 import store_as
from latentprep.cache.ragged import Conds, values_of
from latentprep.errors import UserError
from latentprep.prepare.devices import empty_cache
from latentprep.prepare.models.open_encoder import open_encoder
from latentprep.prepare.plan.estimate import Probe, list_probes, measure, num_pixels, open_text
from latentprep.prepare.speed.peaks import find_peak
from latentprep.prepare.speed.timing import rate, repeat
from latentprep.prepare.survey import Prepared
from latentprep.prepare.work.cond import told_if_memory_is_full
from latentprep.prepare.work.latents import AHEAD
from latentprep.prompts import make_prompts
from latentprep.records import Size
from latentprep.speeds import BatchSpeed, TextSpeed, VaeSpeed

if TYPE_CHECKING:
    from latentprep.prepare.models.doors import ImageEncoder

LARGEST_BATCH = 256
FASTER = 1.03  # than the best before: else a larger batch gains nothing
AT_ONCE = 32  # prompts: a shard has as many or more

Count = Callable[[int], object]


def list_dtypes(dtype: str, device: str) -> list[str]:
    """The number types that the VAE is measured in, that of a run first: half precision pays on GPUs alone."""
    others = ("float16", "bfloat16", "float32") if device.startswith("cuda") else ("float32",)
    return [*dict.fromkeys((dtype, *others))]


def list_sizes(own: int) -> list[int]:
    """Sizes of batches: powers of two, and that of a run."""
    return sorted({own, *(2**n for n in range(LARGEST_BATCH.bit_length()))})


def measure_vae(prepared: Prepared, bucket: Size, pixels: np.ndarray, seconds: float, count: Count) -> VaeSpeed:
    """The VAE on images of one bucket: pixels [N,H,W,3] uint8. Raises UserError if one does not fit into memory."""
    device, recipe = prepared.where.devices[0], prepared.recipe.latents
    batches: list[BatchSpeed] = []
    ends, size = [], bucket
    dtypes = list_dtypes(recipe.dtype, device)
    for number, dtype in enumerate(dtypes):
        share = seconds / 2 if number == 0 and len(dtypes) > 1 else seconds / max(1, 2 * len(dtypes) - 2)
        try:
            encoder = open_encoder(prepared.models.vae, replace(recipe, dtype=dtype), device)
            one = OneVae(encoder, device, dtype, pixels, prepared.models.vae.factor * prepared.models.patch, count)
            batches += one.measure(list_sizes(prepared.batch_size), prepared.batch_size, share)
            ends.append(f"{dtype}: {one.end}" if one.end else "")
            size = one.size if number == 0 else size
            del encoder, one
        except UserError as error:  # of a memory that is too small
            if number == 0:
                raise
            ends.append(f"{dtype}: {error}")
        empty_cache()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    return VaeSpeed(
        device, name, bucket, size, recipe.dtype, prepared.batch_size, tuple(batches), tuple(ends)
    )  # fmt: skip


class OneVae:
    """A VAE in one number type, measured."""

    def __init__(
        self, encoder: "ImageEncoder", device: str, dtype: str, pixels: np.ndarray, step: int, count: Count
    ) -> None:
        self.encoder, self.device, self.dtype, self.pixels, self.step, self.count = (
            encoder, device, dtype, pixels, step, count,
        )  # fmt: skip
        self.size: Size = pixels.shape[1:3]  # that was measured
        self.end = ""  # why no larger batch was tried
        self.flops: dict[Probe, int] = {}  # what an encoding of these images takes
        self.peak = find_peak(device, dtype)

    def measure(self, sizes: Iterable[int], own: int, seconds: float) -> Iterator[BatchSpeed]:
        """Each batch size, the smallest first: until it is no faster, memory is full, or time is up."""
        deadline = time.perf_counter() + seconds
        probes = list_probes(1, *self.size, self.step)
        probe, taken = measure(self._encode, probes, num_pixels, seconds / 2)
        if probe[1:] != self.size:
            share = num_pixels(probe) / (self.size[0] * self.size[1])
            self.end = f"one image of {self.size[1]}x{self.size[0]} takes too long for the time there is"
            self.size = probe[1:]
            yield self._speed(1, [taken / share], self.flops[probe] / share)
            return
        best = 0.0
        for size in sizes:
            left = deadline - time.perf_counter()
            if best and 2 * size / best * self.num_rounds > left:
                self.end = f"time was up before {size} images at once"
                return
            images = self._take(size)
            if size > 1:
                self._run(images, 1)  # warms up
            if self.encoder.limit.said:
                self.end = self.encoder.limit.said.partition(":")[0]
                return
            times = repeat(lambda: self._run(images, self.num_rounds), left / 4)  # noqa: B023 (it is called at once)
            found = self._speed(size, [taken / self.num_rounds for taken in times], self.flops[probe] * size)
            yield found
            if found.per_second < best * FASTER and size >= own:
                self.end = f"{size} images at once are no faster"
                return
            best = max(best, found.per_second)

    @property
    def num_rounds(self) -> int:
        """Batches that are timed together: a GPU has the next ones to do while the first are fetched."""
        return 1 if self.device == "cpu" else 2 * AHEAD

    def _speed(self, size: int, times: list[float], flops: float) -> BatchSpeed:
        """The speed with batches of `size` images; times: seconds of a batch each; flops: operations of a batch."""
        per_second = rate(size, times)
        speed = per_second / size * flops
        share = speed / self.peak if self.peak is not None else None
        return BatchSpeed(self.dtype, size, per_second, len(times), speed, share, self.encoder.num_retried)

    def _encode(self, probe: Probe) -> None:
        """One encoding of the smaller size; the first one counts what it takes."""
        images = self._take(probe[0], probe[1:])
        if probe in self.flops:
            self._run(images, 1)
            return
        with FlopCounterMode(display=False) as counter:
            self._run(images, 1)
        self.flops[probe] = counter.get_total_flops()

    def _take(self, number: int, size: Size | None = None) -> torch.Tensor:
        """So many images, [N,H,W,3] uint8, each again if there are too few; of `size` their upper left corners."""
        height, width = size or self.size
        chosen = torch.from_numpy(self.pixels[np.arange(number) % len(self.pixels), :height, :width])
        return chosen.pin_memory() if self.device.startswith("cuda") else chosen

    def _run(self, images: torch.Tensor, rounds: int) -> None:
        """Encode them so many times, as a run does: AHEAD batches are asked for before the first is fetched."""
        waiting: deque[object] = deque()
        for _ in range(rounds):
            if len(waiting) == AHEAD:
                self._finish(waiting.popleft(), images)
            waiting.append(self.encoder.start(images))
        for started in waiting:
            self._finish(started, images)

    def _finish(self, started: object, images: torch.Tensor) -> None:
        self.encoder.finish(started, images)  # type: ignore[arg-type]
        self.count(len(images))


def list_prompts(prepared: Prepared) -> list[str]:
    """The distinct prompts of the images."""
    options, seed = prepared.options.text, prepared.options.seed
    rows = [item.row for unit in prepared.plan.units for item in unit.items]
    return [*dict.fromkeys(p for row in rows for p in make_prompts(row.captions, row.key, options, seed))]


def measure_text(prepared: Prepared, seconds: float, count: Count) -> tuple[TextSpeed | None, Conds]:
    """The text encoders, and cond of some prompts as it is stored; None and none without. Raises UserError."""
    text, recipe = prepared.models.text, prepared.recipe.text
    if text is None:
        return None, {}
    prompts = list_prompts(prepared)
    texts = (prompts * -(-AT_ONCE // len(prompts)))[: max(AT_ONCE, len(prompts))]
    device, found = prepared.text_where.devices[0], dict[str, Conds]()
    with told_if_memory_is_full(device):
        encoder = open_text(prepared, text)

        def encode(number: int) -> None:
            found["cond"] = encoder.encode(texts[:number])
            count(number)

        number, taken = measure(encode, [1, len(texts)], int, seconds / 2)
        times = [taken, *repeat(lambda: encode(number), seconds / 2)]
        counts = encoder.count_tokens(prompts)
    cond = store_as(found["cond"], recipe.store_dtype or "float32")
    num_bytes = sum(values_of(own).nbytes for own in cond.values()) / number
    tokens = float(np.mean(counts)) if counts is not None else None
    speed = TextSpeed(
        device, recipe.dtype or "float32", rate(number, times), number, len(times), tokens, num_bytes,
        recipe.store_dtype or "float32",
    )  # fmt: skip
    return speed, cond
