"""How far the latents of two caches are from each other, for images of the same content and geometry."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.group import LatentGroup
from latentprep.cache.schema import CONTROLS
from latentprep.differences import Distances, distance_of
from latentprep.errors import UserError
from latentprep.look.catalog import Catalog, Problems, add_problem

AT_ONCE = 2**23  # numbers of a chunk: 32 MB in float32, for each tensor
NUM_OPEN = 4  # shards of each cache; at a URL a shard that is open is in memory
NUM_NAMED = 5  # images of another geometry
FIELDS = ("latent_mean", "latent_std", *CONTROLS)


class Sums:
    """What is added up of K pairs: mean squared differences of each, and the spread of the first cache's latents."""

    def __init__(self, num_pairs: int, channels: int) -> None:
        self.num_pairs, self.channels = num_pairs, channels
        self.squares: dict[str, np.ndarray] = {}  # name -> [K,C] float32, of weights [K,1]
        self.measured: dict[str, np.ndarray] = {}  # name -> [K] bool
        self.is_unlike = np.zeros(num_pairs, bool)  # of another geometry
        self.is_read = np.zeros(num_pairs, bool)
        self.num_resized = Counter[str]()  # name -> pairs of a control image that has another size in each
        self.count, self.total, self.total_squares = 0, np.zeros(channels), np.zeros(channels)

    def put(self, name: str, pairs: np.ndarray, squares: Tensor) -> None:
        """squares [n,C] float32: of each pair, the mean over pixels and views."""
        if name not in self.squares:
            self.squares[name] = np.zeros((self.num_pairs, squares.shape[1]), np.float32)
            self.measured[name] = np.zeros(self.num_pairs, bool)
        self.squares[name][pairs] = squares.numpy()
        self.measured[name][pairs] = True

    def add_spread(self, latents: Tensor) -> None:
        """latents [n,V,C,h,w] float32 of the first cache."""
        self.count += latents.numel() // self.channels
        means, squares = latents.mean((-1, -2)).double(), latents.square().mean((-1, -2)).double()
        pixels = latents.shape[-1] * latents.shape[-2]
        self.total += (means.sum((0, 1)) * pixels).numpy()
        self.total_squares += (squares.sum((0, 1)) * pixels).numpy()

    @property
    def spread(self) -> np.ndarray:
        """[C] standard deviation of each channel; 1 for a channel of one value: then the difference itself counts."""
        mean = self.total / max(1, self.count)
        found = np.sqrt(np.clip(self.total_squares / max(1, self.count) - mean**2, 0, None))
        return np.where(found > 0, found, 1.0)


def measure_latents(
    one: Catalog,
    other: Catalog,
    pairs: np.ndarray,
    num_shared: int,
    problems: Problems,
    progress: Callable[[int], object],
) -> Distances:
    """Distances of the pairs [K,2] of rows, of `num_shared` images that have the same content.

    Of an image: the root of the mean squared difference of all its numbers, each divided by the standard deviation of
    its channel over all latents of `one` that are compared. Weights are not divided. `progress` hears of images.
    """
    facts, others = one.manifest.latent, other.manifest.latent
    if (facts.channels, facts.factor) != (others.channels, others.factor):
        why = (
            f"latents of {facts.channels} channels for {facts.factor} pixels cannot be compared with those of "
            f"{others.channels} channels for {others.factor} pixels"
        )
        return Distances(num_shared, why_not=why)
    views = [(facts.views.index(view), others.views.index(view)) for view in facts.views if view in others.views]
    sums = Sums(len(pairs), facts.channels)
    openers = [opener(cache, problems) for cache in (one, other)]
    for chunk in list_chunks(one, other, pairs):
        first, second = (opened(shard) for opened, shard in zip(openers, chunk.shards, strict=True))
        if first is not None and second is not None:
            own, others_own = first[chunk.groups[0]], second[chunk.groups[1]]
            for part in cut(chunk, own, others_own):
                compare_rows(sums, part, own, others_own, views)
        progress(len(chunk.numbers))
    keys = [one.keys[row] for row in pairs[sums.is_unlike, 0][:NUM_NAMED].tolist()]
    spread = sums.spread
    found = {}
    for name in (*FIELDS, "weight"):
        if name in sums.squares:
            numbers = np.flatnonzero(sums.measured[name])
            squares = sums.squares[name][numbers] / (1.0 if name == "weight" else spread**2)
            values = np.sqrt(squares.mean(1))
            found[name] = distance_of(values, partial(key_at, one, pairs[numbers, 0]))
    num_compared = int((sums.is_read & ~sums.is_unlike).sum())
    num_unlike, resized = int(sums.is_unlike.sum()), dict(sums.num_resized)
    return Distances(num_shared, num_compared, num_unlike, tuple(keys), resized=resized, distances=found)


def key_at(cache: Catalog, rows: np.ndarray, number: int) -> str:
    return cache.keys[int(rows[number])]


def opener(cache: Catalog, problems: Problems) -> Callable[[int], list[LatentGroup] | None]:
    """Opens a shard's groups by its number; a few stay open. None for a damaged file, which becomes a problem."""

    @lru_cache(NUM_OPEN)
    def open_shard(number: int) -> list[LatentGroup] | None:
        entry = cache.manifest.shards[number]
        try:
            return entry.open_latents(cache.storage).groups
        except UserError as error:
            add_problem(problems, cache.name, entry.latents_name, str(error))
            return None

    return open_shard


@dataclass(frozen=True, eq=False)
class Chunk:
    """Pairs whose rows stand in the same two groups."""

    numbers: np.ndarray  # [n] of the pairs
    shards: tuple[int, int]
    groups: tuple[int, int]
    rows: np.ndarray  # [n,2] int64 in these groups


def list_chunks(one: Catalog, other: Catalog, pairs: np.ndarray) -> Iterator[Chunk]:
    """Chunks in the order of the shards of `one`, and in each of them of `other`: few shards are opened twice."""
    a, b = one.spot[pairs[:, 0]], other.spot[pairs[:, 1]]
    where = np.stack([a[:, 0], b[:, 0], a[:, 1], b[:, 1]], axis=1)
    rows = np.stack([a[:, 2], b[:, 2]], axis=1).astype(np.int64)
    order = np.lexsort((rows[:, 0], *where.T[::-1]))
    edges = np.flatnonzero((where[order][1:] != where[order][:-1]).any(1)) + 1
    for numbers in np.split(order, edges) if len(order) else ():
        shard, shard_b, group, group_b = where[numbers[0]].tolist()
        yield Chunk(numbers, (shard, shard_b), (group, group_b), rows[numbers])


def cut(chunk: Chunk, one: LatentGroup, other: LatentGroup) -> Iterator[Chunk]:
    """The chunk in parts, so that each has at most AT_ONCE numbers of a tensor."""
    columns = (getattr(group, name) for group in (one, other) for name in FIELDS)
    largest = max(column[0].numel() for column in columns if column is not None)
    at_once = max(1, AT_ONCE // largest)
    for start in range(0, len(chunk.numbers), at_once):
        part = slice(start, start + at_once)
        yield replace(chunk, numbers=chunk.numbers[part], rows=chunk.rows[part])


def compare_rows(
    sums: Sums, chunk: Chunk, one: LatentGroup, other: LatentGroup, views: Sequence[tuple[int, int]]
) -> None:
    """Add up the pairs of a chunk. `views`: those that both have; only those with equal crop and resized size count."""
    sums.is_read[chunk.numbers] = True
    if one.latent_mean.shape[2:] != other.latent_mean.shape[2:] or not views:
        sums.is_unlike[chunk.numbers] = True
        return
    mine, theirs = torch.from_numpy(chunk.rows).T
    views_a, views_b = torch.tensor(views).T
    is_same = torch.ones(len(mine), len(views), dtype=torch.bool)
    for name in ("crop", "resized_size"):
        is_same &= (take(getattr(one, name), mine, views_a) == take(getattr(other, name), theirs, views_b)).all(-1)
    is_like = is_same.any(1)
    sums.is_unlike[chunk.numbers[~is_like.numpy()]] = True
    numbers, mine, theirs, is_same = chunk.numbers[is_like.numpy()], mine[is_like], theirs[is_like], is_same[is_like]
    if not len(numbers):
        return

    def over_views(squares: Tensor) -> Tensor:
        """[n,V,C] => [n,C]: the mean over the views that count."""
        return torch.where(is_same[..., None], squares, 0).sum(1) / is_same.sum(1, keepdim=True)

    for name in FIELDS:
        column, other_column = getattr(one, name), getattr(other, name)
        if column is None or other_column is None:
            continue
        if column.shape[2:] != other_column.shape[2:]:  # a control image, with a bucket of its own in one of them
            sums.num_resized[name] += len(numbers)
            continue
        values = take(column, mine, views_a).float()
        if name == "latent_mean":
            sums.add_spread(values)
        difference = values - take(other_column, theirs, views_b).float()
        sums.put(name, numbers, over_views(difference.square_().mean((-1, -2))))
    if one.weight is not None or other.weight is not None:
        difference = weight_of(one, mine, views_a) - weight_of(other, theirs, views_b)
        sums.put("weight", numbers, over_views(difference.square().mean((-1, -2))[..., None]))


def weight_of(group: LatentGroup, rows: Tensor, views: Tensor) -> Tensor:
    """[n,V,h,w] float32; of a group without weights all is 1."""
    if group.weight is None:
        return torch.ones(len(rows), len(views), *group.latent_mean.shape[-2:])
    return take(group.weight, rows, views).float()


def take(values: Tensor, rows: Tensor, views: Tensor) -> Tensor:
    """Some rows and views of [N,V,...]."""
    return values[rows[:, None], views[None]]
