"""Images of a cache one by one: those that fit a pattern, and those that are the same to the byte."""

from collections import defaultdict
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from latentprep.cache.manifest import Manifest, open_manifest
from latentprep.cache.storage import Storage
from latentprep.errors import UserError

NUM_GROUPS = 5  # of duplicates that are named
NUM_KEYS = 5  # of each


def list_rows(storage: Storage, pattern: str, only_enlarged: bool = False) -> Iterator[dict[str, Any]]:
    """Key, bucket, original size, whether it was enlarged, and captions of each image whose key fits.

    Sizes are (height, width). Raises UserError, also if none fits.
    """
    manifest, found = open_manifest(storage), False
    factor = manifest.latent.factor
    for shard in manifest.shards:
        latents, text = shard.open_latents(storage), shard.open_text(storage)
        for pixels, words, live in zip(latents.groups, text.groups, shard.live_rows(), strict=True):
            bucket = [side * factor for side in pixels.latent_mean.shape[-2:]]
            is_enlarged = (pixels.resized_size > pixels.original_size[:, None]).any(2).any(1).tolist()
            for row in live.tolist():
                key = words.key[row]
                if fnmatchcase(key, pattern) and (is_enlarged[row] or not only_enlarged):
                    found = True
                    size = pixels.original_size[row].tolist()
                    yield {
                        "key": key, "bucket": bucket, "original_size": size, "enlarged": is_enlarged[row],
                        "caption": words.caption[row],
                    }  # fmt: skip
    if not found:
        of_all = f"none of the {manifest.num_images:,} images in {storage.root}"
        if only_enlarged:
            raise UserError(f"--enlarged: {of_all} was enlarged{f' and fits {pattern}' if pattern != '*' else ''}.")
        raise UserError(f"PATTERN {pattern}: {of_all} fits it.")


def find_duplicates(storage: Storage, manifest: Manifest) -> dict[str, Any]:
    """Images of equal content, mask included: how many there are, in how many groups; and keys of the first groups."""
    num_images, num_groups, groups = group_duplicates(storage, manifest, NUM_GROUPS, NUM_KEYS)
    examples = []
    for count, places in groups:
        keys = [manifest.shards[n].open_text(storage).groups[number].key[row] for n, number, row in places]
        examples.append({"images": count, "keys": keys})
    return {"images": num_images, "groups": num_groups, "examples": examples}


def group_duplicates(
    storage: Storage, manifest: Manifest, num_groups: int, num_each: int
) -> tuple[int, int, list[tuple[int, list[tuple[int, int, int]]]]]:
    """Images of equal content: how many there are, in how many groups; of the first groups how many images each has,
    and the places of the first of these: shard, group, row.
    """
    digests: list[np.ndarray] = []
    spots: list[np.ndarray] = []  # [N,3] of each group: shard, group, row
    for n, shard in enumerate(manifest.shards):
        groups = shard.open_latents(storage).groups
        for number, (group, live) in enumerate(zip(groups, shard.live_rows(), strict=True)):
            digests.append(group.digest.numpy()[live])
            spots.append(np.stack([np.full_like(live, n), np.full_like(live, number), live], axis=1))
    _, group_of, counts = np.unique(
        np.concatenate([np.zeros((0, 16), np.uint8), *digests]), axis=0, return_inverse=True, return_counts=True
    )
    group_of = group_of.reshape(-1)  # numpy 2.0 alone gives it another shape
    is_double = counts[group_of] > 1
    wanted: defaultdict[int, list[int]] = defaultdict(list)  # content -> images, in the order of the cache
    for image in np.flatnonzero(is_double).tolist():
        content_number = int(group_of[image])
        if content_number in wanted or len(wanted) < num_groups:
            wanted[content_number].append(image)
    places = np.concatenate(spots) if spots else np.zeros((0, 3), int)
    first = [(len(own), [(n, g, r) for n, g, r in places[own[:num_each]].tolist()]) for own in wanted.values()]
    return int(is_double.sum()), int((counts > 1).sum()), first
