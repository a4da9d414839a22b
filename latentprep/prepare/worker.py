"""run_unit: load -> encode -> write, for one unit. Engines only decide who calls it."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.manifest import ShardEntry
from latentprep.cache.shard import (
    TORCH_DTYPES,
    UNCOND_NAME,
    LatentGroup,
    Text,
    TextGroup,
    latents_name,
    open_shard,
    text_name,
    write_latents,
    write_text,
    write_uncond,
)
from latentprep.cache.storage import Storage
from latentprep.prepare.plan import text_id
from latentprep.prepare.text import TextEncoder
from latentprep.prepare.vae import VaeEncoder
from latentprep.prompts import make_prompt
from latentprep.records import Item, Pixels, Placement, Size, Skip, Unit

Loaded = Iterator[Pixels | Skip]  # of a unit's items, in their order
Bytes = Callable[[], int]  # of a file; waits until it is written
Submit = Callable[[Callable[[], int]], "Future[int]"]  # hands a write to the writer; may wait for the one before


class Stopwatch:
    """Seconds that the encoding loop spent on each stage: what limits a run."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def on(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


@dataclass(frozen=True)
class Job:
    """What is the same for every unit of a run."""

    storage: Storage
    recipe: dict[str, Any]
    latent: dict[str, Any]  # what a reader must know: scaling_factor, shift_factor, ...
    metadata: dict[str, Any]  # of every shard header: `latent`, the recipe's digest and versions
    batch_size: int
    template: tuple[str, ...] | None
    placeholder: str
    seed: int
    vae: Callable[[], VaeEncoder]  # made on first use: a run that only rewrites text needs none
    text: Callable[[], TextEncoder] | None  # None: no conditioning
    watch: Stopwatch = field(default_factory=Stopwatch)


@dataclass(eq=False)
class UnitResult:
    """What became of a unit; no groups where every item was skipped. entry() waits for its files."""

    unit: str
    text: str
    groups: list[tuple[str, int, list[int]]]
    latents_bytes: Bytes
    text_bytes: Bytes
    skips: list[Skip]
    notes: Counter[str]

    def entry(self) -> ShardEntry:
        return ShardEntry(self.unit, self.text, self.groups, self.latents_bytes(), self.text_bytes())


def run_unit(
    unit: Unit, loaded: Loaded | None, job: Job, submit: Submit, progress: Callable[[int], None]
) -> UnitResult:
    """Encode a unit and hand its files to the writer.

    `loaded` is None where the latents file is there already: then only the text file is made, if it is missing.
    """
    if loaded is None:
        latents = open_shard(job.storage, latents_name(unit.id))
        skips = [Skip(**skip) for skip in latents.metadata["skipped"]]
        notes = Counter(latents.metadata["notes"])
        groups = [
            (label, rows, list(latents.tensors[f"{label}/latent_mean"].shape[2:])) for label, rows in latents.groups()
        ]
        latents_bytes: Bytes = partial(job.storage.size, latents_name(unit.id))
    else:
        skips, notes = [], Counter()
        builders: dict[Size, GroupBuilder] = {}
        for batch in make_batches(unit, loaded, job, skips, notes, progress):
            with job.watch.on("encode"):
                encoded = encode_batch(batch, job)
            keep_rows(batch, encoded, builders, job, skips)
        made = [builder.build() for builder in builders.values() if builder.digest]
        if not made:
            return UnitResult(unit.id, "", [], lambda: 0, lambda: 0, skips, notes)
        groups = [(group.label, len(group), list(group.latent_mean.shape[2:])) for group in made]
        # skips and notes stand in the header too: a killed run is taken up from its shards alone
        metadata = {**job.metadata, "skipped": [asdict(skip) for skip in skips], "notes": dict(sorted(notes.items()))}
        latents_bytes = submit(partial(write_latents, job.storage, unit.id, made, metadata)).result

    skipped = {skip.key for skip in skips}
    rows = [item for item in unit.items if item.key not in skipped]
    text = text_id(unit.id, rows, job.recipe["text"])
    if job.storage.exists(text_name(unit.id, text)):
        text_bytes: Bytes = partial(job.storage.size, text_name(unit.id, text))
    else:
        with job.watch.on("text"):
            made_text = make_text(rows, groups, job)
        text_bytes = submit(partial(write_text, job.storage, unit.id, text, made_text, job.metadata)).result
    return UnitResult(unit.id, text, groups, latents_bytes, text_bytes, skips, notes)


Row = tuple[Item, Placement, Pixels]


def make_batches(
    unit: Unit, loaded: Loaded, job: Job, skips: list[Skip], notes: Counter[str], progress: Callable[[int], None]
) -> Iterator[list[Row]]:
    """Rows of one bucket, at most batch_size, in the unit's order; what cannot be loaded goes to `skips`."""
    batch: list[Row] = []
    for item, placement in zip(unit.items, unit.placements, strict=True):
        with job.watch.on("decode"):
            result = next(loaded)
        progress(1)
        if isinstance(result, Skip):
            skips.append(result)
            continue
        notes.update(result.notes)
        if batch and (len(batch) == job.batch_size or batch[0][1].bucket != placement.bucket):
            yield batch
            batch = []
        batch.append((item, placement, result))
    if batch:
        yield batch


@dataclass(frozen=True, eq=False)
class Encoded:
    """Posterior of N images in V views, in the store dtype."""

    mean: Tensor  # [N,V,C,h,w]
    std: Tensor | None  # the same; None: not stored
    is_finite: list[bool]


def encode_batch(batch: list[Row], job: Job) -> Encoded:
    recipe = job.recipe["latents"]
    dtype = TORCH_DTYPES[recipe["store_dtype"]]
    plain = np.stack([pixels.pixels for _, _, pixels in batch])
    views = [plain if view == "plain" else np.ascontiguousarray(plain[:, :, ::-1]) for view in recipe["views"]]
    posteriors = [job.vae().encode(view) for view in views]
    mean = torch.stack([posterior.mean for posterior in posteriors], dim=1).to(dtype)
    std = torch.stack([posterior.std for posterior in posteriors], dim=1).to(dtype)
    # after the cast: a mean of 70,000 is finite in float32 and not in a float16 cache
    finite = mean.isfinite().flatten(1).all(1) & std.isfinite().flatten(1).all(1)
    return Encoded(mean, std if recipe["store"] == "mean+std" else None, finite.tolist())


def keep_rows(
    batch: list[Row], encoded: Encoded, builders: dict[Size, "GroupBuilder"], job: Job, skips: list[Skip]
) -> None:
    """Add a batch to the group of its bucket, without the rows that are not finite."""
    bucket = batch[0][1].bucket
    builder = builders.setdefault(bucket, GroupBuilder(bucket, job.recipe["latents"]["views"]))
    for n, (item, placement, pixels) in enumerate(batch):
        if encoded.is_finite[n]:
            builder.mean.append(encoded.mean[n])
            if encoded.std is not None:
                builder.std.append(encoded.std[n])
            builder.weight.append(pixels.weight)
            builder.original_size.append(item.size)
            builder.placement.append(placement)
            builder.digest.append(pixels.digest)
        else:
            detail = (
                f"the VAE gives no finite latents in float32, or none that {job.recipe['latents']['store_dtype']} holds"
            )
            skips.append(item.skip("non_finite", detail))


@dataclass(eq=False)
class GroupBuilder:
    """Rows of one bucket on their way to a LatentGroup."""

    bucket: Size
    views: list[str]
    mean: list[Tensor] = field(default_factory=list)
    std: list[Tensor] = field(default_factory=list)
    weight: list[np.ndarray | None] = field(default_factory=list)
    original_size: list[Size] = field(default_factory=list)
    placement: list[Placement] = field(default_factory=list)
    digest: list[bytes] = field(default_factory=list)

    def build(self) -> LatentGroup:
        def per_view(rows: list[tuple[int, ...]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int32)[:, None].repeat(1, len(self.views), 1)

        return LatentGroup(
            label=group_label(self.bucket),
            latent_mean=torch.stack(self.mean),
            latent_std=torch.stack(self.std) if self.std else None,
            weight=self._build_weight(),
            original_size=torch.tensor(self.original_size, dtype=torch.int32),
            resized_size=per_view([placement.resized_size for placement in self.placement]),
            crop=per_view([placement.crop for placement in self.placement]),
            flipped=torch.tensor([view == "flipped" for view in self.views], dtype=torch.uint8),
            digest=torch.from_numpy(np.frombuffer(b"".join(self.digest), np.uint8).reshape(-1, 16).copy()),
        )

    def _build_weight(self) -> Tensor | None:
        if all(weight is None for weight in self.weight):
            return None
        ones = np.ones(self.mean[0].shape[-2:], np.float32)
        plain = torch.from_numpy(np.stack([ones if weight is None else weight for weight in self.weight])).half()
        return torch.stack([plain.flip(-1) if view == "flipped" else plain for view in self.views], dim=1)


def group_label(bucket: Size) -> str:
    """Name of a bucket's group; a label only, shapes are read from tensors."""
    return f"h{bucket[0]}w{bucket[1]}"


def make_text(rows: list[Item], groups: list[tuple[str, int, list[int]]], job: Job) -> Text:
    """The text file of a shard: every distinct prompt is encoded once."""
    prompt_of_row = [make_prompt(job.template, item.caption, job.placeholder, job.seed, item.key) for item in rows]
    prompts = list(dict.fromkeys(prompt_of_row))
    index = {prompt: n for n, prompt in enumerate(prompts)}
    made: list[TextGroup] = []
    start = 0
    for label, count, _ in groups:
        own = slice(start, start + count)
        items = rows[own]
        made.append(
            TextGroup(
                label,
                key=[item.key for item in items],
                caption=[[item.caption] for item in items],
                prompt_of=np.array([[index[prompt]] for prompt in prompt_of_row[own]], np.int32),
                nbytes=np.array([item.nbytes for item in items], np.int64),
                mtime_ns=np.array([item.mtime_ns for item in items], np.int64),
            )
        )
        start += count
    if job.text is None:
        return Text(made, prompts)
    encoder = job.text()
    return Text(made, prompts, make_cond(encoder, prompts, job), encoder.count_tokens(prompts), encoder.max_tokens)


def make_cond(encoder: TextEncoder, prompts: list[str], job: Job) -> dict[str, Tensor]:
    """Cond of P prompts, name -> [P,...], in the store dtype."""
    dtype = TORCH_DTYPES[job.recipe["text"]["store_dtype"]]
    return {name: value.to(dtype) for name, value in encoder.encode(prompts).items()}


def write_empty_prompt(job: Job) -> None:
    """The cond of the empty prompt, which training drops captions to; none where there is no conditioning."""
    if job.text is None:
        job.storage.delete(UNCOND_NAME)
    else:
        write_uncond(job.storage, make_cond(job.text(), [""], job), job.metadata)
