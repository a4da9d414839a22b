"""`latentprep verify`: every file of a cache against the hash, the shapes and the rows that its manifest promises."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import torch

from latentprep.cache.borrowed import CondFiles
from latentprep.cache.latents import Latents
from latentprep.cache.leftovers import list_orphans
from latentprep.cache.manifest import Manifest, open_manifest, read_skips
from latentprep.cache.names import MANIFEST, SKIPPED
from latentprep.cache.readers import Reading, list_waiting
from latentprep.cache.schema import CONTROLS
from latentprep.cache.sets import list_runs, take_runs
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UserError
from latentprep.look.verify_cond import (
    CondShapes,
    check_alike,
    check_borrowed,
    check_pad_to,
    check_shared,
    check_text,
    check_uncond,
    cond_shapes,
)
from latentprep.records import Problem, is_flipped, set_of

THREADS = 4  # hashing one file a thread; more gain nothing on a disk
HEADER_PARTS = ("normalization", "factor", "channels", "pixel_range", "views")


@dataclass(frozen=True)
class Checked:
    """What a shard is found to be."""

    problems: list[Problem]
    keys: list[str] = field(default_factory=list)  # of its rows that count
    cond: CondShapes | None = None  # None: it has no rows that count, or cannot be opened


def verify(storage: Storage, progress: Callable[[int], object]) -> tuple[Manifest | None, list[Problem]]:
    """The manifest, and everything that is wrong with a cache. `progress` hears of bytes that were hashed.

    A cache without problems holds exactly the bytes that were written: no byte can flip unseen.
    """
    try:
        manifest = open_manifest(storage)
    except UserError as error:
        return None, [Problem(MANIFEST, "manifest", str(error))]
    scraps = list_scraps(storage, manifest)  # before this process is a reader itself
    with Reading(storage):  # what the manifest names stays meanwhile, if encode or compact run beside this
        manifest = open_manifest(storage)
        return manifest, [*check_cache(storage, manifest, progress), *scraps]


def check_cache(storage: Storage, manifest: Manifest, progress: Callable[[int], object]) -> list[Problem]:
    """Everything that is wrong with the files that a manifest names."""
    problems = [
        problem for name, stamp in manifest.root_files().items() for problem in check_file(storage, name, stamp)
    ]
    keys: Counter[str] = Counter()
    shapes: dict[str, CondShapes] = {}  # text file -> of its cond
    check = partial(check_shard, storage, manifest, CondFiles(storage))
    with ThreadPoolExecutor(THREADS) as pool:
        for entry, found in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
            problems += found.problems
            keys.update(found.keys)
            if found.cond:
                shapes[entry.text_name] = found.cond
            progress(entry.nbytes)
    problems += [Problem("", "duplicate", f"{key} stands in {n} rows") for key, n in keys.items() if n > 1]
    problems += check_skips(storage, manifest, keys)
    for more, own in (check_uncond(storage, manifest), check_shared(storage, manifest)):
        problems += more
        shapes |= own
    return problems + check_alike(shapes) + check_pad_to(manifest, shapes)


def list_scraps(storage: Storage, manifest: Manifest) -> list[Problem]:
    """The files of ours that the manifest does not name, and that no reader keeps."""
    orphans = list_orphans(storage, manifest)
    waiting = set(list_waiting(storage, orphans))
    detail = "a file that cache.json does not name; the next latentprep encode clears it away"
    return [Problem(name, "orphan", detail) for name in orphans if name not in waiting]


def check_file(storage: Storage, name: str, stamp: Stamp) -> list[Problem]:
    """Whether a file has the bytes that were written."""
    try:
        found = storage.stamp(name)
    except FileNotFoundError:
        return [Problem(name, "missing", "cache.json names it, and it is not there")]
    except OSError as error:
        return [Problem(name, "unreadable", str(error.strerror or error))]
    if found.nbytes != stamp.nbytes:
        return [Problem(name, "size", f"{found.nbytes:,} bytes, expected {stamp.nbytes:,}")]
    if found != stamp:
        return [Problem(name, "hash", f"blake2b {found.blake2b}, expected {stamp.blake2b}: its bytes have changed")]
    return []


def check_shard(storage: Storage, manifest: Manifest, cond_files: CondFiles, entry: Shard) -> Checked:
    """What is wrong with a shard, and what it holds."""
    problems: list[Problem] = []
    for name, stamp in entry.files().items():
        problems += check_file(storage, name, stamp)
    try:
        latents = entry.open_latents(storage)
        problems += check_latents(manifest, latents, entry.latents_name)
    except UserError as error:
        problems.append(Problem(entry.latents_name, "structure", str(error)))
    keys: list[str] = []
    cond: CondShapes | None = None
    try:
        text = entry.open_text(storage)
        if entry.num_images:
            problems += check_text(manifest, entry, text)
            problems += check_borrowed(cond_files, entry.text_name, text)
            cond = cond_shapes(text.cond)
        for group, live in zip(text.groups, entry.live_rows(), strict=True):
            keys += [group.key[row] for row in live.tolist()]
        is_known = {facts.name for facts in manifest.sets}.issuperset(map(set_of, keys)) or not manifest.sets
        if not is_known or take_runs(entry.sets, entry.live_numbers()) != list_runs(keys, manifest.sets):
            problems.append(
                Problem(entry.text_name, "sets", "cache.json gives its images to other sets than their keys")
            )
    except UserError as error:
        problems.append(Problem(entry.text_name, "structure", str(error)))
    return Checked(problems, keys, cond)


def check_latents(manifest: Manifest, latents: Latents, file: str) -> list[Problem]:
    """Recipe, views, dtypes and finiteness of a latents file."""
    recipe, metadata, facts = manifest.recipe.latents, latents.metadata, manifest.latent.to_json()
    problems = []

    def wrong(problem: str, detail: str) -> None:
        problems.append(Problem(file, problem, detail))

    if metadata.get("recipe") != recipe.to_json():
        wrong("recipe", "made with another recipe than cache.json holds")
    for name in HEADER_PARTS:
        if metadata.get(name) != facts[name]:
            wrong("header", f"{name} {metadata.get(name)!r}, cache.json has {facts[name]!r}")
    flipped = [is_flipped(view) for view in manifest.latent.views]
    for group in latents.groups:
        if str(group.latent_mean.dtype) != f"torch.{recipe.store_dtype}":
            wrong("dtype", f"{group.label}: {group.latent_mean.dtype}, expected {recipe.store_dtype}")
        if group.flipped.tolist() != flipped:
            wrong("views", f"{group.label}: flipped {group.flipped.tolist()}, expected {facts['views']}")
        if (group.latent_std is not None) != (recipe.store != "mean"):
            wrong("std", f"{group.label}: latent_std does not fit --store {recipe.store}")
        controls = CONTROLS[: recipe.num_controls or 0]
        if tuple(group.controls) != controls:
            wrong("control", f"{group.label}: has {[*group.controls]}, expected {[*controls]}")
        if len(group.shape) > 3 and recipe.control_size != "own":
            wrong("control", f"{group.label}: control images of other sizes than their targets")
        for name, values in group.controls.items():
            if values.dtype != group.latent_mean.dtype:
                wrong("dtype", f"{group.label}/{name}: {values.dtype}, expected {recipe.store_dtype}")
        for name in ("latent_mean", "latent_std", "weight", *group.controls):
            bad = _not_finite(getattr(group, name))
            if bad:
                wrong("non_finite", f"{group.label}/{name}: {bad} rows")
        if group.latent_std is not None and bool((group.latent_std < 0).any()):
            wrong("range", f"{group.label}/latent_std: below 0")
        if group.weight is not None and not bool(((group.weight >= 0) & (group.weight <= 1)).all()):
            wrong("range", f"{group.label}/weight: outside 0..1")
    return problems


def check_skips(storage: Storage, manifest: Manifest, keys: Counter[str]) -> list[Problem]:
    """Whether any key is both skipped and cached, and whether the number of skips is the manifest's."""
    try:
        skips = read_skips(storage)
    except UserError as error:
        return [Problem(SKIPPED, "structure", str(error))]
    problems = [
        Problem(SKIPPED, "duplicate", f"{skip.key} is skipped, and in the cache too")
        for skip in skips
        if skip.key in keys
    ]
    if len(skips) != manifest.num_skipped:
        problems.append(Problem(SKIPPED, "count", f"{len(skips)} lines, expected {manifest.num_skipped}"))
    return problems


def _not_finite(values: torch.Tensor | None) -> int:
    """How many rows hold a number that is not finite."""
    return 0 if values is None else int((~values.isfinite().flatten(1).all(1)).sum())
