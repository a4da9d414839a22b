"""`latentprep verify`: every file of a cache against the hash, the shapes and the rows that its manifest promises."""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch

from latentprep.cache.borrowed import CondFiles
from latentprep.cache.cond import open_cond, open_uncond
from latentprep.cache.int8 import LARGEST, POSITIONS, SCALE_DTYPE, dtype_of, scales_in
from latentprep.cache.latents import Latents
from latentprep.cache.leftovers import list_orphans
from latentprep.cache.manifest import Manifest, open_manifest, read_skips
from latentprep.cache.names import MANIFEST, SKIPPED, cond_name, uncond_name
from latentprep.cache.ragged import Conds, finite_rows, values_of
from latentprep.cache.readers import Reading, list_waiting
from latentprep.cache.schema import CONTROLS
from latentprep.cache.sets import list_runs, recipe_of, take_runs
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.records import Problem, is_flipped, set_of

THREADS = 4  # hashing one file a thread; more gain nothing on a disk
HEADER_PARTS = ("normalization", "factor", "channels", "pixel_range", "views")


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
    check = partial(check_shard, storage, manifest, CondFiles(storage))
    with ThreadPoolExecutor(THREADS) as pool:
        for entry, (found, own) in zip(manifest.shards, pool.map(check, manifest.shards), strict=True):
            problems += found
            keys.update(own)
            progress(entry.nbytes)
    problems += [Problem("", "duplicate", f"{key} stands in {n} rows") for key, n in keys.items() if n > 1]
    problems += check_skips(storage, manifest, keys)
    problems += check_uncond(storage, manifest)
    problems += [problem for cond_file in manifest.cond_files for problem in check_shared(storage, manifest, cond_file)]
    return problems


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


def check_shard(
    storage: Storage, manifest: Manifest, cond_files: CondFiles, entry: Shard
) -> tuple[list[Problem], list[str]]:
    """What is wrong with a shard, and the keys of its rows that count."""
    problems: list[Problem] = []
    for name, stamp in entry.files().items():
        problems += check_file(storage, name, stamp)
    try:
        latents = entry.open_latents(storage)
        problems += check_latents(manifest, latents, entry.latents_name)
    except UserError as error:
        problems.append(Problem(entry.latents_name, "structure", str(error)))
    keys: list[str] = []
    try:
        text = entry.open_text(storage)
        if entry.num_images:
            problems += check_text(manifest, entry, text)
            problems += check_borrowed(cond_files, entry.text_name, text)
        for group, live in zip(text.groups, entry.live_rows(), strict=True):
            keys += [group.key[row] for row in live.tolist()]
        is_known = {facts.name for facts in manifest.sets}.issuperset(map(set_of, keys)) or not manifest.sets
        if not is_known or take_runs(entry.sets, entry.live_numbers()) != list_runs(keys, manifest.sets):
            problems.append(
                Problem(entry.text_name, "sets", "cache.json gives its images to other sets than their keys")
            )
    except UserError as error:
        problems.append(Problem(entry.text_name, "structure", str(error)))
    return problems, keys


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


def check_text(manifest: Manifest, entry: Shard, text: Text) -> list[Problem]:
    """Recipe, cond and finiteness of a text file."""
    name, rows = entry.text_name, text.rows()
    problems = []
    recipe = recipe_of(manifest.recipe.text.to_json(), (rows[number].key for number in entry.live_numbers()))
    if text.metadata.get("recipe") != recipe:
        problems.append(Problem(name, "recipe", "made with another recipe than cache.json holds: encode again"))
    if text.has_cond != (manifest.uncond is not None):
        problems.append(Problem(name, "cond", "cond where the others have none, or none where they have it"))
    if {*text.cond_files} != {*entry.cond_files}:
        problems.append(Problem(name, "cond", "borrows from other cond files than cache.json says"))
    return problems + check_cond(name, text.cond, manifest.recipe.text.store_dtype)


def check_borrowed(cond_files: CondFiles, name: str, text: Text) -> list[Problem]:
    """Whether the prompts that a text borrows are those of the cond files. Of damaged ones check_shared tells."""
    try:
        lenders = [cond_files[cond_file] for cond_file in text.cond_files]
    except UserError:
        return []
    try:
        cond_files.of(text)
    except UserError as error:
        return [Problem(name, "cond", str(error))]
    wrong = [
        prompt
        for prompt, (number, row) in zip(text.prompt[text.num_own :], text.borrowed.tolist(), strict=True)
        if lenders[number].prompt[row] != prompt
    ]
    if not wrong:
        return []
    shown = f"{len(wrong)} of its prompts borrow the cond of others, such as {shortened(wrong[0])!r}"
    return [Problem(name, "cond", shown)]


def check_shared(storage: Storage, manifest: Manifest, cond_file: str) -> list[Problem]:
    """Whether cond that texts share is of the recipe, and finite. What is wrong with the file is known already."""
    name = cond_name(cond_file)
    try:
        cond = open_cond(storage, cond_file)
    except UserError as error:
        return [Problem(name, "structure", str(error))]
    problems = check_cond(name, cond.cond, manifest.recipe.text.store_dtype)
    if cond.metadata.get("recipe") != manifest.recipe.text.cond:
        problems.append(Problem(name, "recipe", "made with another recipe than cache.json holds: encode again"))
    return problems


def check_cond(file: str, conds: Conds, store_dtype: str | None) -> list[Problem]:
    """Number types and finiteness of cond, and the sign of its scales."""
    problems, scales = [], scales_in(conds)
    for name, value in conds.items():
        expected = SCALE_DTYPE if name in scales else dtype_of(name, value, store_dtype or "float32")
        if value.dtype != expected and not name.endswith(POSITIONS):  # older caches have these in bfloat16
            shown = str(expected).removeprefix("torch.")
            problems.append(Problem(file, "dtype", f"cond/{name}: {value.dtype}, expected {shown}"))
        bad = int((~finite_rows(value)).sum())
        if bad:
            problems.append(Problem(file, "non_finite", f"cond/{name}: {bad} prompts"))
        least = 0 if name in scales else -LARGEST
        if (name in scales or value.dtype == torch.int8) and bool((values_of(value) < least).any()):
            problems.append(Problem(file, "range", f"cond/{name}: below {least}"))
    return problems


def check_skips(storage: Storage, manifest: Manifest, keys: Counter[str]) -> list[Problem]:
    """Whether the skipped and the cached are two different sets."""
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


def check_uncond(storage: Storage, manifest: Manifest) -> list[Problem]:
    """Whether the cond of the empty prompt can be opened, and is finite."""
    if manifest.uncond is None:
        return []
    name = uncond_name(manifest.uncond.id)
    try:
        _, cond = open_uncond(storage, manifest.uncond.id)
    except UserError as error:
        return [Problem(name, "structure", str(error))]
    return check_cond(name, cond, manifest.recipe.text.store_dtype)


def _not_finite(values: torch.Tensor | None) -> int:
    """How many rows hold a number that is not finite."""
    return 0 if values is None else int((~values.isfinite().flatten(1).all(1)).sum())
