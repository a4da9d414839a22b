"""Which images of a cache a preview shows: by chance, or those that stand out. The cache alone is asked."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np
from torch import Tensor

from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.look.images import cropped_away
from latentprep.records import Sample

AWAY = 1e6  # how far latents are from the usual that are not finite


@dataclass(frozen=True)
class Ranking:
    """A row of RANKINGS: what stands out, and how it is said."""

    measure: Callable[[LatentGroup], np.ndarray]  # [N,V,...]
    score: Callable[[np.ndarray], np.ndarray]  # of all images: [M,V,...] => [M,V]; the most is shown first, 0 never
    say: Callable[[float], str]  # of one score
    none: str  # what is said if no image has a score
    order: str  # what is said of a sheet


def measure_crop(group: LatentGroup) -> np.ndarray:
    """[N,V]: the share of each image that lies outside its crop; of several crops of an image all lose the same."""
    return np.broadcast_to(cropped_away(group)[:, None], group.latent_mean.shape[:2])


def measure_weight(group: LatentGroup) -> np.ndarray:
    """[N,V]: how much of the loss weights take away: 1 minus the mean weight of each view."""
    if group.weight is None:
        return np.zeros(group.latent_mean.shape[:2])
    found: np.ndarray = 1 - group.weight.double().mean((2, 3)).numpy()
    return found


def measure_latents(group: LatentGroup) -> np.ndarray:
    """[N,V,2C] float32: mean and std of each channel of latent_mean. One row at a time is in memory."""
    return np.stack([means_and_stds(row) for row in group.latent_mean])


def means_and_stds(latents: Tensor) -> np.ndarray:
    """[N,C,h,w] => [N,2C] float32."""
    values = latents.double().flatten(2)
    found = np.concatenate([values.mean(2).numpy(), values.std(2, correction=0).numpy()], axis=1)
    return found.astype(np.float32)


def distances(measures: np.ndarray) -> np.ndarray:
    """[M,V,2C] => [M,V]: how far each is from the mean of all, in standard deviations; root mean square over 2C."""
    flat = measures.reshape(-1, measures.shape[-1])
    is_finite = np.isfinite(flat).all(axis=1)
    usual = flat[is_finite] if is_finite.any() else np.zeros_like(flat[:1])
    mean, spread = (measure(axis=0, dtype=np.float64) for measure in (usual.mean, usual.std))
    away = (flat - mean) / np.where(spread > 1e-6, spread, np.inf)
    found = np.sqrt(np.square(away).mean(axis=1))
    return np.where(is_finite, found, AWAY).reshape(measures.shape[:2])


def say_distance(score: float) -> str:
    return "not finite" if score == AWAY else f"{score:.1f} std from the usual latents"


def as_it_is(measures: np.ndarray) -> np.ndarray:
    return measures


RANDOM = "random"
# value of --show -> how images are ranked
RANKINGS = {
    "crop": Ranking(
        measure_crop, as_it_is, lambda score: f"{score:.0%} cropped away",
        none="no image is cropped", order="those that lose most to their crop first",
    ),
    "weight": Ranking(
        measure_weight, as_it_is, lambda score: f"mean weight {1 - score:.2f}",
        none="every image weighs 1 throughout", order="those that weigh least first",
    ),
    "outliers": Ranking(
        measure_latents, distances, say_distance,
        none="all latents are alike", order="those with the most unusual latents first",
    ),
}  # fmt: skip


def choose_samples(
    storage: Storage, manifest: Manifest, show: str, num: int, seed: int, pattern: str | None, key: str | None
) -> tuple[list[Sample], int]:
    """Up to `num` samples, and from how many images they were chosen: all, those that fit a shell pattern, or one key.

    Random samples are in the order of the cache; else the first stands out most. If all views of all these images fit
    into `num`, all are shown; else one of each image, in turn, or the one that stands out most.

    Raises UserError if none fits, or stands out.
    """
    spots, measures, ranking = [], [], RANKINGS.get(show)
    for spot, group, live in list_groups(storage, manifest, pattern, key, with_latents=ranking is not None):
        spots.append(np.concatenate([np.broadcast_to(spot, (len(live), 2)), live[:, None]], axis=1))
        if ranking is not None and group is not None:
            measures.append(ranking.measure(group)[live])
    places = np.concatenate(spots) if spots else np.zeros((0, 3), int)
    if not len(places):
        what = f"--key {key}: not in" if key is not None else f"PATTERN {pattern}: fits no image of"
        raise UserError(f"{what if key or pattern else 'preview: no image in'} {storage.root}.")
    views = len(manifest.latent.views)

    def sample(n: int, view: int, note: str = "") -> Sample:
        shard, group, row = places[n].tolist()
        return Sample(shard, group, row, view, note)

    if ranking is None:
        chosen = np.sort(np.random.default_rng(seed % 2**64).permutation(len(places))[:num])
        return [sample(n, view) for n, view in take_turns(chosen.tolist(), views, num)], len(places)
    scores = ranking.score(np.concatenate(measures))
    best = scores.max(axis=1)
    order = [n for n in np.argsort(-best, kind="stable").tolist() if best[n] > 0][:num]
    if not order:
        raise UserError(f"--show {show}: {ranking.none} in {storage.root}. Give another --show.")
    is_alike = bool((scores == scores[:, :1]).all())
    turns = take_turns(order, views, num) if is_alike else [(n, int(scores[n].argmax())) for n in order]
    return [sample(n, view, ranking.say(float(scores[n, view]))) for n, view in turns], len(places)


def list_groups(
    storage: Storage, manifest: Manifest, pattern: str | None, key: str | None, with_latents: bool
) -> Iterator[tuple[tuple[int, int], LatentGroup | None, np.ndarray]]:
    """(shard, group), the group's latents if they are asked for, and its rows that count and whose key fits."""
    for n, shard in enumerate(manifest.shards):
        rows = shard.live_rows()
        if pattern is not None or key is not None:
            words = [group.key for group in shard.open_text(storage).groups]
            rows = [fitting(keys, live, pattern, key) for keys, live in zip(words, rows, strict=True)]
        groups = shard.open_latents(storage).groups if with_latents and any(map(len, rows)) else [None] * len(rows)
        for number, (group, live) in enumerate(zip(groups, rows, strict=True)):
            if len(live):
                yield (n, number), group, live


def fitting(keys: Sequence[str], live: np.ndarray, pattern: str | None, key: str | None) -> np.ndarray:
    """Of rows those whose key is this one, or fits a shell pattern."""
    fits = [keys[row] == key if key is not None else fnmatchcase(keys[row], pattern or "*") for row in live.tolist()]
    return live[np.array(fits, bool)]


def take_turns(images: Sequence[int], views: int, num: int) -> list[tuple[int, int]]:
    """Each image with its views, if they are no more than `num` together; else the k-th image with the k-th view."""
    if len(images) * views <= num:
        return [(n, view) for n in images for view in range(views)]
    return [(n, k % views) for k, n in enumerate(images)]
