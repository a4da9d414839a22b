"""A cache against the images it came from: are they still the same, and does encoding them again give the same?"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath

import numpy as np

from latentprep.cache.distance import larger
from latentprep.cache.group import LatentGroup
from latentprep.cache.manifest import Manifest, read_skips
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.devices import choose_device
from latentprep.prepare.images.load import LoadOptions, load_pixels
from latentprep.prepare.images.pillow import limit_pixels, max_pixels
from latentprep.prepare.models.doors import ImageEncoder
from latentprep.prepare.models.model_set import open_made_vae
from latentprep.prepare.models.open_encoder import open_encoder
from latentprep.prepare.models.single_file import VaeFile
from latentprep.prepare.models.vae_folder import VaeFolder
from latentprep.prepare.recheck_source import Originals, common_patch
from latentprep.prepare.source.content import hash_images
from latentprep.prepare.work.seen import place_again
from latentprep.records import Item, Problem, Skip

# Largest difference, in standard deviations of the latent (root mean square over a row). Another device, batch size or
# library stays far below, another image, crop or model far above: bfloat16 alone costs 0.013.
TOLERANCES = {"float32": 0.003, "float16": 0.01, "bfloat16": 0.05}


def compare_source(
    storage: Storage, manifest: Manifest, originals: Originals, progress: Callable[[int], object]
) -> list[Problem]:
    """A problem for each cached image that is gone, unreadable or changed, and for each image that is not in the cache.

    Every image is read, whatever its time says. What differs is told in words of CHANGES, as encode tells it.
    """
    rows = list(list_cached(storage, manifest))
    problems, gone = [], dict[str, tuple[int, bytes]]()  # key -> bytes, content hash
    listed = frozenset(originals.keys)  # images, and folders that cannot be listed
    hashes = hash_images(originals.source, originals.partners, ((key, nbytes) for key, nbytes, _ in rows))
    for (key, nbytes, digest), found in zip(rows, hashes, strict=True):
        progress(1)
        if found is None and not listed.isdisjoint({key, *map(str, PurePosixPath(key).parents)}):
            problems.append(
                Problem(
                    key, "unreadable", "in the cache; it, its mask, its control image or its folder cannot be read now"
                )
            )
        elif found is None:
            gone[key] = nbytes, digest
        elif found != digest:
            problems.append(Problem(key, "changed", "its content is not what was encoded"))
    known = {key for key, _, _ in rows} | {skip.key for skip in read_skips(storage)}
    new = [key for key in originals.keys if key not in known]
    renamed = find_renamed(originals, gone, new)
    old = set(renamed.values())
    problems += [Problem(key, "gone", "in the cache, and not in the folder") for key in gone if key not in old]
    problems += [Problem(key, "renamed", f"was {was}, with the same content") for key, was in renamed.items()]
    return problems + [Problem(key, "new", "in the folder, and not in the cache") for key in new if key not in renamed]


def find_renamed(originals: Originals, gone: Mapping[str, tuple[int, bytes]], new: Sequence[str]) -> dict[str, str]:
    """The keys of new images that have the content of one that is gone, each with the key of that."""
    left: defaultdict[bytes, list[str]] = defaultdict(list)
    for key, (_, digest) in gone.items():
        left[digest].append(key)
    most = max((nbytes for nbytes, _ in gone.values()), default=0)
    hashes = hash_images(originals.source, originals.partners, ((key, most) for key in new if gone))
    return {key: left[found].pop(0) for key, found in zip(new, hashes, strict=False) if found and left.get(found)}


def compare_captions(storage: Storage, manifest: Manifest, originals: Originals) -> Iterator[Problem]:
    """What images have other captions now than in the cache, or some that cannot be read."""
    bad = {skip.key: skip.detail for skip in originals.bad_captions}
    for entry in manifest.shards:
        text = entry.open_text(storage)
        for words, live in zip(text.groups, entry.live_rows(), strict=True):
            for row in live.tolist():
                key, before = words.key[row], tuple(words.caption[row])
                after = originals.captions.get(key, before)
                if key in bad:
                    yield Problem(key, "caption", bad[key])
                elif after != before:
                    old, new = (shortened(" | ".join(captions)) for captions in (before, after))
                    yield Problem(key, "caption", f"{old!r} in the cache, {new!r} now")


def list_cached(storage: Storage, manifest: Manifest) -> Iterator[tuple[str, int, bytes]]:
    """key, bytes (with its mask and control images) and content hash of every image in the cache."""
    for entry in manifest.shards:
        text = entry.open_text(storage)
        latents = entry.open_latents(storage)
        for group, words, live in zip(latents.groups, text.groups, entry.live_rows(), strict=True):
            for row in live.tolist():
                yield words.key[row], int(words.nbytes[row]), bytes(group.digest[row].tolist())


def reencode(
    storage: Storage,
    manifest: Manifest,
    originals: Originals,
    count: int,
    *,
    seed: int,
    model: str | None,
    vae: str | None = None,
    device: str,
    progress: Callable[[int], object] = int,
) -> tuple[list[Problem], float]:
    """Encode `count` random images again: problems, and the largest difference, in standard deviations of the latent.

    Raises UserError if the model is not the one that the cache was made with, or was in memory alone.
    """
    if is_in_memory(manifest):
        raise UserError(
            "--re-encode: this cache was made by PersonalizedBase, with a model in memory that cannot be loaded again. "
            "Leave it out."
        )
    made_vae = find_vae(manifest, model, vae)
    recipe = manifest.recipe.latents
    chosen, _ = choose_device(device)
    encoder = open_encoder(made_vae, recipe, chosen)
    options = load_options(manifest, originals)
    problems, worst = [], 0.0
    for entry, number, row in sample_rows(manifest, count, seed):
        words = entry.open_text(storage).groups[number]
        group = entry.open_latents(storage).groups[number]
        key = words.key[row]
        progress(1)
        result = encode_row(key, int(words.nbytes[row]), group, row, options, encoder)
        if isinstance(result, Skip):
            problems.append(Problem(key, result.reason, result.detail))
            continue
        worst = larger(worst, result)
        if not result <= TOLERANCES[recipe.dtype]:
            detail = f"{result:.4f} standard deviations from what is stored, allowed {TOLERANCES[recipe.dtype]}"
            problems.append(Problem(key, "latents", detail))
    return problems, worst


def load_options(manifest: Manifest, originals: Originals) -> LoadOptions:
    """How the images of a cache are read again."""
    return LoadOptions.from_recipe(
        originals.source, manifest.latent.factor, originals.masks, manifest.recipe.latents,
        controls=originals.controls, patch=common_patch(manifest),
    )  # fmt: skip


def sample_rows(manifest: Manifest, count: int, seed: int) -> Iterator[tuple[Shard, int, int]]:
    """Shard, group and row of `count` random images, in the order of the cache."""
    edges = np.cumsum([0, *(shard.num_images for shard in manifest.shards)])
    chosen = np.sort(np.random.default_rng(seed % 2**64).permutation(manifest.num_images)[:count])
    for n in chosen.tolist():
        shard = int(np.searchsorted(edges, n, side="right")) - 1
        entry = manifest.shards[shard]
        number, row = [(g, r) for g, rows in enumerate(entry.live_rows()) for r in rows.tolist()][n - edges[shard]]
        yield entry, number, row


def is_in_memory(manifest: Manifest) -> bool:
    """Whether a cache was made with a model that no file has: its hash is a personalized.fingerprint."""
    return manifest.recipe.latents.vae.count(".") == 2


def find_vae(
    manifest: Manifest, model: str | None, vae: str | None = None, may_download: bool = True
) -> VaeFolder | VaeFile:
    """The VAE that a cache was made with, by its hash; `model` and `vae` are those of the command line.

    Raises UserError if it is not there, or is another one.
    """
    made_with = manifest.made_with
    wanted = manifest.recipe.latents.vae
    option, name = ("--vae", vae) if vae else ("--model", model or made_with.vae or made_with.model)
    beside = model if vae and model else made_with.model
    found = open_made_vae(made_with, name, option, beside, may_download)
    if found.digest != wanted:
        advice = "Give that one" + (" with --vae." if made_with.vae and not vae else ".")
        raise UserError(f"{option} {name}: its VAE is {found.digest}, this cache was made with {wanted}. {advice}")
    return found


def encode_row(
    key: str, nbytes: int, group: LatentGroup, row: int, options: LoadOptions, vae: ImageEncoder
) -> float | Skip:
    """How far one image, encoded again, is from its row: the worst of its views and control images, mean and std."""
    height, width = group.original_size[row].tolist()
    limit_pixels(max(max_pixels(), height * width))  # whatever --max-megapixels the cache was made with
    boxes = [tuple(box) for box in group.crop[row].tolist()]
    factor = options.factor
    placement = place_again(group, row, factor)
    pixels = load_pixels(Item(key, (height, width), nbytes, 0), placement, options, boxes)
    if isinstance(pixels, Skip):
        return pixels
    worst = 0.0
    for number, own in enumerate((pixels, *pixels.controls)):
        mean = list(group.controls.values())[number - 1] if number else group.latent_mean
        std = None if number else group.latent_std
        per_crop = len(boxes) // len(own.pixels)  # a control image of another shape has crops of its own
        _, rows, columns, _ = own.pixels.shape
        if [rows, columns] != [side * factor for side in mean.shape[-2:]]:  # of a stranger's cache
            return Skip(key, "changed", "its crop in the cache is not of its latents' size")
        for view, flipped in enumerate(group.flipped.tolist()):
            shown = own.pixels[view // per_crop]
            posterior = vae.encode(np.ascontiguousarray(shown[:, ::-1] if flipped else shown)[None])
            spread = float(posterior.mean.std()) or 1.0  # all of one value: then the difference itself counts
            for fresh, stored in ((posterior.mean, mean), (posterior.std, std)):
                if stored is not None and fresh is not None:
                    difference = fresh[0] - stored[row, view].float()
                    worst = larger(worst, float(difference.square().mean().sqrt()) / spread)
    return worst
