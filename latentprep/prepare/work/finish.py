"""What comes behind the device: latents are fetched, checked and gathered into shards, and these are written."""

from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import Queue, SimpleQueue
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.latents import Latents, write_latents
from latentprep.cache.ragged import finite_rows
from latentprep.cache.schema import CONTROLS, TORCH_DTYPES
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.prepare.devices import OutOfMemoryError
from latentprep.prepare.work.batches import Batch, End, Row
from latentprep.prepare.work.events import Failure, LatentsResult
from latentprep.prepare.work.rows import UnitRows
from latentprep.prepare.work.writing import Writing
from latentprep.recipe import LatentsRecipe
from latentprep.records import NAMED_NOTES, Skip, Unit, is_flipped

if TYPE_CHECKING:
    from latentprep.prepare.models.doors import ImageEncoder
    from latentprep.prepare.models.vae_encoder import Posterior


@dataclass(frozen=True, eq=False)
class Encoded:
    """A batch, and what the device makes of each of its inputs; or why it cannot."""

    batch: Batch
    posteriors: "list[Posterior] | OutOfMemoryError"

    @property
    def unit(self) -> Unit:
        return self.batch.unit


class Finisher:
    """The thread behind the device, and the one that writes: at most two shards are in memory."""

    def __init__(
        self,
        storage: Storage,
        recipe: LatentsRecipe,
        metadata: dict[str, Any],
        conditions: Mapping[str, str],
        failed: set[str],
    ) -> None:
        self.storage, self.recipe, self.metadata, self.conditions = storage, recipe, metadata, conditions
        self.failed = failed  # ids of units of which nothing more is to be done
        self.told: set[str] = set()  # those of them whose Failure was handed on already
        self.encoder: ImageEncoder | None = None
        self.rows: UnitRows | None = None  # of the unit in work
        self.named: dict[str, list[str]] = {}
        self.num_encoded = self.num_retried = 0
        self.writing = Writing()
        self.written: Future[None] | None = None

    def run(self, messages: "Queue[Any]", results: "SimpleQueue[Any]") -> None:
        """Take messages until None comes. The last result is None, or the exception that ended this thread."""
        message: Any = ""
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            try:
                while (message := messages.get()) is not None:
                    self._take(message, writer, results)
                if self.rows is not None:  # the run stops in the middle of a unit
                    self.rows.save(self.storage, self.metadata)
                self._wait()
            except BaseException as error:
                results.put(error)  # at once: nothing that the device does from now on would be kept
                while message is not None:  # nobody is to wait for room
                    message = messages.get()
                return
        results.put(None)

    def _take(self, message: Any, writer: ThreadPoolExecutor, results: "SimpleQueue[Any]") -> None:
        if isinstance(message, UnitRows):
            self.rows, self.named, self.num_encoded = message, {}, 0
        elif isinstance(message, LatentsResult):
            results.put(message)
        elif isinstance(message, Failure):
            self._fail(message, results)
        elif message.unit.id not in self.failed:
            try:
                self._add(message) if isinstance(message, Encoded) else self._end(message, writer, results)
            except UserError:
                raise
            except Exception as error:  # of torch or a model
                self._fail(Failure.of(message.unit.id, error), results)

    def _fail(self, failure: Failure, results: "SimpleQueue[Any]") -> None:
        """Tell of a unit that fails; once, though the device may have failed at it too."""
        self.failed.add(failure.id)
        self.rows = None
        if failure.id not in self.told:
            self.told.add(failure.id)
            results.put(failure)

    def _add(self, encoded: Encoded) -> None:
        """Gather the rows of a batch."""
        assert self.rows is not None
        rows, batch = self.rows, encoded.batch
        skips = list(batch.skips)
        if isinstance(encoded.posteriors, OutOfMemoryError):
            skips += [row.item.skip("out_of_memory", str(encoded.posteriors)) for row in batch.rows]
        else:
            skips += self._keep(encoded, rows)
        rows.skips += [skip.under(self.conditions) for skip in skips]
        rows.num_done += batch.num_items
        for row in batch.rows:
            rows.notes.update(set(row.pixels.notes))
            for note in set(row.pixels.notes).intersection(NAMED_NOTES):
                self.named.setdefault(note, []).append(row.item.key)

    def _keep(self, encoded: Encoded, rows: UnitRows) -> list[Skip]:
        """Add the rows of a batch that are finite; the others are skips."""
        batch, recipe = encoded.batch, self.recipe
        mean, std, controls, too_large = self._fetch(encoded)
        what = f"the VAE gives no finite latents in float32, or none that {recipe.store_dtype} holds"
        reason = ("out_of_memory", too_large) if too_large else ("non_finite", what)
        # after the cast: a mean of 70,000 is finite in float32 and not in a float16 cache
        fields = {"latent_mean": mean} | ({"latent_std": std} if std is not None else {})
        is_finite = finite_in_all(fields.values())
        is_control_finite = finite_in_all(controls.values()) if controls else is_finite
        if recipe.store == "mean":
            fields.pop("latent_std", None)
        skips = []
        for n, row in enumerate(batch.rows):
            if is_finite[n] and is_control_finite[n]:
                latents = {name: values[n] for name, values in (fields | controls).items()}
                rows.groups.setdefault(row.placement.buckets, []).append({**latents, **make_row(row, recipe.views)})
                self.num_encoded += 1
            else:
                skips.append(row.item.skip(reason[0], "a control image: " * bool(is_finite[n]) + reason[1]))
        return skips

    def _fetch(self, encoded: Encoded) -> tuple[Tensor, Tensor | None, dict[str, Tensor], str]:
        """Mean, std, and the means of control images by field, each [N,V,C,h,w] in the store dtype, on the CPU.

        std is None if the VAE has none. The last result is Posterior.too_large, "" if memory sufficed.
        """
        assert self.encoder is not None
        assert isinstance(encoded.posteriors, list)
        batch, dtype = encoded.batch, TORCH_DTYPES[self.recipe.store_dtype]
        made = [self.encoder.finish(*pair) for pair in zip(encoded.posteriors, batch.inputs, strict=True)]
        views = [made[n] for n in batch.input_of_view]
        mean = torch.stack([posterior.mean for posterior in views], dim=1).to(dtype)
        stds = [posterior.std for posterior in views if posterior.std is not None]
        controls = {
            name: torch.stack([made[n].mean for n in own], dim=1).to(dtype)
            for name, own in zip(CONTROLS, batch.input_of_control, strict=False)
        }
        too_large = next((posterior.too_large for posterior in made if posterior.too_large), "")
        return mean, torch.stack(stds, dim=1).to(dtype) if stds else None, controls, too_large

    def _end(self, end: End, writer: ThreadPoolExecutor, results: "SimpleQueue[Any]") -> None:
        """A unit is done: hand its shard to the writer, once the one before is written."""
        assert self.rows is not None
        rows, self.rows = self.rows, None
        rows.skips += [skip.under(self.conditions) for skip in end.skips]
        result = LatentsResult(
            end.unit.id, None, tuple(rows.skips), rows.notes, {name: tuple(keys) for name, keys in self.named.items()},
            self.num_encoded, rows.num_found, *self._take_counts(),
        )  # fmt: skip
        latents = rows.build(self.metadata)
        self._wait()
        self.written = writer.submit(self._write, latents, result, results)

    def _take_counts(self) -> tuple[int, str]:
        """How many images were encoded again in float32 since the last call, and the message of BatchLimit."""
        if self.encoder is None:
            return 0, ""
        before, self.num_retried = self.num_retried, self.encoder.num_retried
        return self.num_retried - before, self.encoder.limit.said

    def _write(self, latents: Latents, result: LatentsResult, results: "SimpleQueue[Any]") -> None:
        """Write a shard and hand on its result, in the writer's thread. Raises WriteError if no file can be written."""
        try:
            shard = None
            if latents.groups:
                shard = Shard(result.id, latents.table(), write_latents(self.storage, result.id, latents))
            self.writing.went_well()
            results.put(replace(result, shard=shard))
        except Exception as error:
            results.put(self.writing.failed(result.id, error))

    def _wait(self) -> None:
        """Wait for the last write. Raises what it raised."""
        if self.written is not None:
            self.written.result()
            self.written = None


def finite_in_all(fields: Iterable[Tensor]) -> Tensor:
    """[N] bool: whether all numbers of a row are finite in all of the fields, [N,...] each."""
    return torch.stack([finite_rows(values) for values in fields]).all(0)


def make_row(row: Row, views: tuple[str, ...]) -> dict[str, Any]:
    """What a latents file holds of an image, but for its latents: field name -> value."""
    item, placement, pixels = row
    mirrors = len(views) // len(pixels.crops)  # views of each crop
    return {
        "weight": make_weight(pixels.weight, views),
        "original_size": item.size,
        "resized_size": [placement.resized_size] * len(views),
        "crop": [box for box in pixels.crops for _ in range(mirrors)],
        "flipped": [is_flipped(view) for view in views],
        "digest": np.frombuffer(pixels.digest, np.uint8),
        "key": item.key,
        "nbytes": item.nbytes,
        "version": item.version,
    }


def make_weight(weight: np.ndarray | None, views: tuple[str, ...]) -> Tensor | None:
    """The weight map of each view, [V,h,w] float16, of those of K crops, [K,h,w]; None: all weigh 1."""
    if weight is None:
        return None
    mirrors = len(views) // len(weight)
    planes = [weight[n // mirrors] for n in range(len(views))]
    flipped = [plane[:, ::-1] if is_flipped(view) else plane for view, plane in zip(views, planes, strict=True)]
    return torch.from_numpy(np.stack(flipped)).half()
