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

from latentprep.cache.shard import (
    TORCH_DTYPES,
    UNCOND_NAME,
    Groups,
    LatentGroup,
    ShardEntry,
    Text,
    TextGroup,
    latents_name,
    open_latents,
    open_text,
    open_uncond,
    text_id,
    text_name,
    write_latents,
    write_text,
    write_uncond,
)
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UserError
from latentprep.prepare.devices import OutOfMemoryError
from latentprep.prepare.plan import Retext
from latentprep.prepare.text import TextEncoder
from latentprep.prepare.vae import VaeEncoder
from latentprep.prompts import make_prompt
from latentprep.records import Item, Pixels, Placement, Row, Size, Skip, Unit

Loaded = Iterator[Pixels | Skip]  # of a unit's items, in their order
Stamped = Callable[[], Stamp]  # of a file; waits until it is written
Submit = Callable[[Callable[[], Stamp]], "Future[Stamp]"]  # hands a write to the writer; may wait for the one before


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
    batch_size: int
    template: tuple[str, ...] | None
    placeholder: str
    seed: int
    vae: Callable[[], VaeEncoder]  # made on first use: a run that only rewrites text needs none
    text: Callable[[], TextEncoder] | None  # None: no conditioning
    watch: Stopwatch = field(default_factory=Stopwatch)
    counts: Counter[str] = field(default_factory=Counter)  # prompts: how many were encoded

    def latents_metadata(self) -> dict[str, Any]:
        return {**self.latent, "recipe": self.recipe["latents"], "libraries": self.recipe["libraries"]}

    def text_metadata(self) -> dict[str, Any]:
        return {"recipe": self.recipe["text"], "libraries": self.recipe["libraries"]}


@dataclass(eq=False)
class UnitResult:
    """What became of a unit. entry() waits for its files; a unit whose every item was skipped has none."""

    unit: str
    text: str
    groups: Groups
    latents_file: Stamped
    text_file: Stamped
    skips: list[Skip] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)
    tombstones: tuple[int, ...] = ()

    def entry(self) -> ShardEntry:
        return ShardEntry(self.unit, self.text, self.groups, self.latents_file(), self.text_file(), self.tombstones)


def run_unit(
    unit: Unit, loaded: Loaded | None, job: Job, submit: Submit, progress: Callable[[int], None]
) -> UnitResult:
    """Encode a unit and hand its files to the writer.

    `loaded` is None where the latents file is there already: then only the text file is made, if it is missing.
    """
    if loaded is None:
        latents = open_latents(job.storage, unit.id)
        skips = [Skip(**skip) for skip in latents.metadata["skipped"]]
        notes = Counter(latents.metadata["notes"])
        groups = latents.table()
        latents_file: Stamped = partial(job.storage.stamp, latents_name(unit.id))
    else:
        skips, notes = [], Counter()
        builders: dict[Size, GroupBuilder] = {}
        for batch in make_batches(unit, loaded, job, skips, notes, progress):
            try:
                with job.watch.on("encode"):
                    encoded = encode_batch(batch, job)
            except OutOfMemoryError as error:
                skips += [item.skip("out_of_memory", str(error)) for item, _, _ in batch]
            else:
                keep_rows(batch, encoded, builders, job, skips)
        made = [builder.build() for builder in builders.values() if builder.digest]
        groups = tuple((group.label, len(group), tuple(group.latent_mean.shape[2:])) for group in made)
        if not made:
            return UnitResult(unit.id, "", groups, _no_file, _no_file, skips, notes)
        # skips and notes stand in the header too: a killed run is taken up from its shards alone
        metadata = {
            **job.latents_metadata(),
            "skipped": [asdict(skip) for skip in skips],
            "notes": dict(sorted(notes.items())),
        }
        latents_file = submit(partial(write_latents, job.storage, unit.id, made, metadata)).result

    skipped = {skip.key for skip in skips}
    rows = [item.row for item in unit.items if item.key not in skipped]
    text = text_id(unit.id, rows, job.recipe)
    text_file = hand_over_text(unit.id, text, rows, groups, job, submit)
    return UnitResult(unit.id, text, groups, latents_file, text_file, skips, notes)


def retext_unit(retext: Retext, job: Job, submit: Submit) -> UnitResult:
    """Make a new text file for a shard whose latents stay; prompts whose cond is there are not encoded again."""
    entry = retext.entry
    with job.watch.on("text"):
        old = open_text(job.storage, entry.unit, entry.text, entry.groups)
    text_file = hand_over_text(
        entry.unit, retext.text, retext.rows, entry.groups, job, submit, old, frozenset(entry.tombstones)
    )
    return UnitResult(
        entry.unit, retext.text, entry.groups, lambda: entry.latents_file, text_file, tombstones=entry.tombstones
    )


def hand_over_text(
    unit: str,
    text: str,
    rows: list[Row],
    groups: Groups,
    job: Job,
    submit: Submit,
    old: Text | None = None,
    tombstones: frozenset[int] = frozenset(),
) -> Stamped:
    """Make the text file of a unit and hand it to the writer, if it is not there from a run that was stopped."""
    name = text_name(unit, text)
    if job.storage.exists(name):
        try:
            open_text(job.storage, unit, text, groups)
            return partial(job.storage.stamp, name)
        except UserError:
            pass  # damaged: make it anew
    with job.watch.on("text"):
        made = make_text(rows, groups, job, old, tombstones)
    return submit(partial(write_text, job.storage, unit, text, made, job.text_metadata())).result


def _no_file() -> Stamp:
    return Stamp(0, "")


Image = tuple[Item, Placement, Pixels]


def make_batches(
    unit: Unit, loaded: Loaded, job: Job, skips: list[Skip], notes: Counter[str], progress: Callable[[int], None]
) -> Iterator[list[Image]]:
    """Rows of one bucket, at most batch_size, in the unit's order; what cannot be loaded goes to `skips`."""
    batch: list[Image] = []
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


def encode_batch(batch: list[Image], job: Job) -> Encoded:
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
    batch: list[Image], encoded: Encoded, builders: dict[Size, "GroupBuilder"], job: Job, skips: list[Skip]
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
        """The group; the builder is empty afterwards, so that a shard is not in memory twice."""

        def per_view(rows: list[tuple[int, ...]]) -> Tensor:
            return torch.tensor(rows, dtype=torch.int32)[:, None].repeat(1, len(self.views), 1)

        return LatentGroup(
            label=group_label(self.bucket),
            latent_mean=_stack_and_free(self.mean),
            latent_std=_stack_and_free(self.std) if self.std else None,
            weight=self._build_weight(),
            original_size=torch.tensor(self.original_size, dtype=torch.int32),
            resized_size=per_view([placement.resized_size for placement in self.placement]),
            crop=per_view([placement.crop for placement in self.placement]),
            flipped=torch.tensor([view == "flipped" for view in self.views], dtype=torch.uint8),
            digest=torch.from_numpy(np.frombuffer(b"".join(self.digest), np.uint8).reshape(-1, 16).copy()),
        )

    def _build_weight(self) -> Tensor | None:
        shapes = {weight.shape for weight in self.weight if weight is not None}
        if not shapes:
            return None
        ones = np.ones(shapes.pop(), np.float32)
        plain = torch.from_numpy(np.stack([ones if weight is None else weight for weight in self.weight])).half()
        return torch.stack([plain.flip(-1) if view == "flipped" else plain for view in self.views], dim=1)


def _stack_and_free(rows: list[Tensor]) -> Tensor:
    stacked = torch.stack(rows)
    rows.clear()
    return stacked


def group_label(bucket: Size) -> str:
    """Name of a bucket's group; a label only, shapes are read from tensors."""
    return f"h{bucket[0]}w{bucket[1]}"


def make_text(rows: list[Row], groups: Groups, job: Job, old: Text | None, tombstones: frozenset[int]) -> Text:
    """The text file of a shard: every distinct prompt is encoded once, and none whose cond `old` holds.

    Tombstones have no prompt of their own: they point to the first.
    """
    prompt_of_row = [
        None if n in tombstones else make_prompt(job.template, row.captions[0], job.placeholder, job.seed, row.key)
        for n, row in enumerate(rows)
    ]
    prompts = list(dict.fromkeys(prompt for prompt in prompt_of_row if prompt is not None))
    index = {prompt: n for n, prompt in enumerate(prompts)}
    made: list[TextGroup] = []
    start = 0
    for label, count, _ in groups:
        own = rows[start : start + count]
        chosen = [0 if prompt is None else index[prompt] for prompt in prompt_of_row[start : start + count]]
        made.append(
            TextGroup(
                label,
                key=[row.key for row in own],
                caption=[list(row.captions) for row in own],
                prompt_of=np.array(chosen, np.int32)[:, None],
                nbytes=np.array([row.nbytes for row in own], np.int64),
                mtime_ns=np.array([row.mtime_ns for row in own], np.int64),
            )
        )
        start += count
    if job.text is None:
        return Text(made, prompts)
    cond, num_tokens, max_tokens = make_cond(prompts, job, old)
    return Text(made, prompts, cond, num_tokens, max_tokens)


def make_cond(prompts: list[str], job: Job, old: Text | None = None) -> tuple[dict[str, Tensor], np.ndarray, int]:
    """Cond of P prompts, name -> [P,...] in the store dtype; their numbers of tokens, and the encoder's window.

    What `old` holds of them is taken over, if it was made by the same encoder in the same precision.
    """
    sources = [old] if old is not None and is_same_encoder(old.metadata.get("recipe", {}), job.recipe["text"]) else []
    known = {prompt for source in sources for prompt in source.prompt}
    missing = [prompt for prompt in prompts if prompt not in known]
    if missing:
        assert job.text is not None
        encoder, dtype = job.text(), TORCH_DTYPES[job.recipe["text"]["store_dtype"]]
        cond = {name: value.to(dtype) for name, value in encoder.encode(missing).items()}
        job.counts["prompts"] += len(missing)
        sources.append(Text([], missing, cond, encoder.count_tokens(missing), encoder.max_tokens))
    place = {prompt: (source, n) for source in sources for n, prompt in enumerate(source.prompt)}
    chosen = [place[prompt] for prompt in prompts]
    return (
        {name: torch.stack([source.cond[name][n] for source, n in chosen]) for name in sources[-1].cond},
        np.array([source.num_tokens[n] for source, n in chosen if source.num_tokens is not None], np.int32),
        sources[-1].max_tokens or 0,
    )


def is_same_encoder(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether two text recipes give the same cond for the same prompt."""
    return all(before.get(name) == now[name] for name in ("text_encoder", "dtype", "store_dtype"))


def write_empty_prompt(job: Job) -> Stamp | None:
    """The cond of the empty prompt, which training drops captions to; None where there is no conditioning."""
    if job.text is None:
        return None
    if job.storage.exists(UNCOND_NAME):
        try:
            if is_same_encoder(open_uncond(job.storage)[0]["recipe"], job.recipe["text"]):
                return job.storage.stamp(UNCOND_NAME)
        except (UserError, KeyError, AttributeError):
            pass  # damaged: make it anew
    metadata = job.text_metadata()
    metadata["recipe"] = {name: metadata["recipe"][name] for name in ("text_encoder", "dtype", "store_dtype")}
    cond, _, _ = make_cond([""], job)
    return write_uncond(job.storage, cond, metadata)
