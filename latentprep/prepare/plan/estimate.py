"""How long a plan will take on this machine: measured on a few of its images and prompts, and not guessed."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar, cast

import numpy as np
import torch

from latentprep.cache.leftovers import find_leftovers
from latentprep.cache.names import FOLDER, cond_name, make_uncond_id, uncond_name
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.prepare.devices import count_cores
from latentprep.prepare.images.load import load_pixels
from latentprep.prepare.models.doors import PromptEncoder, SeeingEncoder, TextModel
from latentprep.prepare.models.open_encoder import open_encoder
from latentprep.prepare.plan.shared import PlannedText
from latentprep.prepare.plan.tokens import list_seen
from latentprep.prepare.speed.timing import repeat
from latentprep.prepare.survey import Prepared
from latentprep.prepare.work.cond import find_seeing, list_missing, told_if_memory_is_full
from latentprep.records import Item, Placement, Size
from latentprep.system import measure_load

SAMPLES = 8  # images decoded for the estimate
LIMIT = 4.0  # seconds for one measurement: what would take longer is measured on less of it
AGAIN = 1 / 8  # of it may go into repeating what is short: other programs may have had the processor
REPEATS = 5
SMALLEST = 256 * 256  # pixels of the smallest image that the VAE is measured on
LARGEST_COMPILED = 1024 * 1024  # with --compile, which takes a minute for each size, only one size is tried
Probe = tuple[int, int, int]  # images, height, width
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    seconds: float
    num_prompts: int  # to encode
    measured: str
    load: float | None  # cores that programs kept busy in the minute before; None: not known
    cores: int


def estimate_time(prepared: Prepared) -> Estimate | None:
    """Seconds for the images and prompts of a plan; None where no model is needed. Loads models, writes nothing."""
    plan, models, load = prepared.plan, prepared.models, measure_load()
    rows = [
        pair for unit in plan.units if unit.id not in plan.leftovers
        for pair in zip(unit.items, unit.placements, strict=True)
    ]  # fmt: skip
    seconds, measured = 0.0, []
    if rows:
        encode, said = measure_vae(prepared, [placement for _, placement in rows])
        seconds += max(encode, measure_decode(prepared, rows))
        measured.append(said)
    prompts = count_prompts(prepared)
    if prompts and models.text is not None:
        texts = [f"a prompt number {n}" for n in range(min(prompts, 32))]
        with told_if_memory_is_full(prepared.text_where.devices[0]):
            encoder = open_text(prepared, models.text)
            images = draw_controls(prepared)

            def encode_some(count: int) -> None:
                if images:
                    cast(SeeingEncoder, encoder).encode_seeing(texts[:count], [images] * count)
                else:
                    encoder.encode(texts[:count])

            count, taken = measure(encode_some, sorted({1, len(texts)}), int)
        seconds += taken / count * prompts
        measured.append(f"{count / taken:.0f} prompts/s")
    return Estimate(seconds, prompts, ", ".join(measured), load, count_cores()) if measured else None


def draw_controls(prepared: Prepared) -> list[np.ndarray]:
    """Control images [H,W,3] in the most frequent sizes, for prompts that see them; none for others."""
    if not prepared.recipe.text.sees_images:
        return []
    ((sizes, _),) = Counter(sizes for _, sizes in list_seen(prepared)).most_common(1)
    return [np.zeros((*size, 3), np.uint8) for size in sizes]


def open_text(prepared: Prepared, text: TextModel) -> PromptEncoder:
    """The text encoders of a run, on their device. Raises RuntimeError if its memory does not hold them."""
    dtype = TORCH_DTYPES[prepared.recipe.text.dtype or "float32"]
    return text.open(torch.device(prepared.text_where.devices[0]), dtype, prepared.options.text)


def measure_vae(prepared: Prepared, placements: Sequence[Placement]) -> tuple[float, str]:
    """Seconds that the VAE takes for all images, and what was measured."""
    recipe, options = prepared.recipe.latents, prepared.options
    vae = open_encoder(prepared.models.vae, recipe, prepared.where.devices[0], options.compile)
    buckets, num_controls = Counter(placement.buckets for placement in placements), recipe.num_controls or 0
    usual, count = buckets.most_common(1)[0]
    height, width = usual[0]
    batch = min(prepared.batch_size, count)
    probes = list_probes(batch, height, width, prepared.models.vae.factor * prepared.models.patch)
    if options.compile:
        probes = [probe for probe in probes if num_pixels(probe) <= LARGEST_COMPILED][-1:] or probes[:1]
    random = np.random.default_rng(0)

    def encode(probe: Probe) -> None:
        vae.encode(random.integers(0, 256, (*probe, 3), np.uint8))

    probe, seconds = measure(encode, probes, num_pixels)
    per_pixel = seconds * len(recipe.views) / num_pixels(probe)
    pixels = sum(count_pixels(own, num_controls) * count for own, count in buckets.items())
    rate = 1 / (per_pixel * count_pixels(usual, num_controls))
    said = f"{rate:.1f} images/s at {width}x{height}" if rate >= 1 else f"{rate:.2g} images/s at {width}x{height}"
    if probe[1:] == (height, width):
        said += f" in batches of {probe[0]}"
    else:
        said += f", by its area: measured at {probe[2]}x{probe[1]}"
    return per_pixel * pixels, said


def list_probes(batch: int, height: int, width: int, step: int) -> list[Probe]:
    """Inputs for a measurement, the smallest first: one image at halved sides, one whole image, the whole batch."""
    probes = [(batch, height, width)]
    if batch > 1:
        probes.append((1, height, width))
    while height * width > SMALLEST and min(height, width) >= 2 * step:
        height, width = height // (2 * step) * step, width // (2 * step) * step
        probes.append((1, height, width))
    return probes[::-1]


def count_pixels(buckets: Sequence[Size], num_controls: int) -> int:
    """Pixels of an image and of its control images: `buckets` is that of all, or first its own and then theirs."""
    each = buckets if len(buckets) > 1 else [*buckets] * (1 + num_controls)
    return sum(height * width for height, width in each)


def num_pixels(probe: Probe) -> int:
    return probe[0] * probe[1] * probe[2]


def measure(
    work: Callable[[T], object], probes: Sequence[T], cost: Callable[[T], int], limit: float = LIMIT
) -> tuple[T, float]:
    """A probe and its seconds: the last before one that is expected to take over `limit` seconds.

    The first is always tried. Each is done twice or more often: the first time warms up.
    """
    for probe, larger in zip(probes, [*probes[1:], None], strict=True):
        seconds = time_again(lambda probe=probe: work(probe), limit * AGAIN)  # type: ignore[misc]
        if larger is None or 2 * seconds * cost(larger) / cost(probe) > limit:
            break
    return probe, seconds


def time_again(work: Callable[[], object], limit: float) -> float:
    """Seconds of a call, the least of up to REPEATS that take `limit` seconds together. The one before warms up."""
    work()
    return min(repeat(work, limit, REPEATS))


def measure_decode(prepared: Prepared, rows: list[tuple[Item, Placement]]) -> float:
    """Seconds that all threads together take to decode the images: measured on some, for LIMIT at most.

    If these are decoded soon, they are again, and the least counts: the first time warms up.
    """
    some, done, started = rows[:: -(-len(rows) // SAMPLES)], 0, time.perf_counter()

    def decode_all() -> None:
        for pair in some:
            load_pixels(*pair, prepared.load_options)

    for pair in some:
        load_pixels(*pair, prepared.load_options)
        done += 1
        if time.perf_counter() - started > LIMIT:
            break
    taken = time.perf_counter() - started
    if taken < LIMIT * AGAIN:
        taken = min(repeat(decode_all, LIMIT * AGAIN, REPEATS))
    return taken / done * len(rows) / prepared.threads


def count_prompts(prepared: Prepared) -> int:
    """How many prompts the text encoder will see: each prompt without cond once, and the empty one if it has none.

    It cannot know which images turn out to be damaged, which text files have flipped bytes, and which prompts several
    devices or ranks encode at the same moment.
    """
    storage, recipe = prepared.storage, prepared.recipe.text
    if prepared.models.text is None:
        return 0
    there = set() if prepared.options.overwrite else {*storage.names(), *storage.names(FOLDER)}
    if recipe.sees_images:
        todo = ((text, old) for text, old in list_texts(prepared) if text.name not in there)
        return sum(len({*text.asked} - find_seeing(old, recipe).keys()) for text, old in todo)
    sharing = prepared.sharing
    count = int(uncond_name(make_uncond_id(recipe)) not in there and not prepared.is_done)
    for task in sharing.tasks:
        if cond_name(task.id) not in there:
            count += sum(prompt not in task.homes for prompt in task.prompts)
    for text, old in list_texts(prepared):
        if text.name not in there:
            own = [prompt for prompt in text.prompts if prompt not in sharing.borrowed]
            count += sum(prompt not in sharing.homes for prompt in list_missing(own, old, recipe))
    return count


def list_texts(prepared: Prepared) -> list[tuple[PlannedText, Text | None]]:
    """The texts that a run makes, in its order, each with the one that its shard has now."""
    plan, storage, prompter = prepared.plan, prepared.storage, prepared.prompter
    skips = {name: left.skips for name, left in find_leftovers(storage, prepared.manifest).items()}
    texts: list[tuple[PlannedText, Text | None]] = []
    for unit in plan.units:
        skipped = {skip.key for skip in skips.get(unit.id, ())} if unit.id in plan.leftovers else set()
        rows = [item.row for item in unit.items if item.key not in skipped]
        texts.append((prompter.plan_text(unit.id, rows), None))
    for task in plan.text_tasks:
        old = None
        if task.shard.text_id:
            with suppress(UserError):  # damaged: nothing of it will be taken over
                old = task.shard.open_text(storage)
        texts.append((prompter.plan_text(task.id, task.rows, task.shard.dead), old))
    return texts
