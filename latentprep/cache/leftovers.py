"""What runs that did not finish left behind: whole shards to take up, and scraps to clear away."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from latentprep.cache.manifest import NAME as MANIFEST_NAME
from latentprep.cache.manifest import SKIPPED_NAME, Manifest, skip_from_json
from latentprep.cache.shard import (
    FOLDER,
    SHARD_NAME,
    UNCOND_NAME,
    Groups,
    ShardEntry,
    latents_name,
    open_latents,
    open_text,
    text_name,
)
from latentprep.cache.storage import Storage, is_temporary
from latentprep.errors import UserError
from latentprep.records import Skip


@dataclass(frozen=True)
class Leftover:
    """A whole latents file that no manifest names, and the text files of its unit."""

    unit: str
    recipe: dict[str, Any]  # the latents part
    groups: Groups
    skips: tuple[Skip, ...]
    texts: tuple[str, ...]


def find_leftovers(storage: Storage, manifest: Manifest | None) -> dict[str, Leftover]:
    """unit -> every whole latents file that the manifest does not name; damaged ones are as if they were not there."""
    named = {shard.unit for shard in manifest.shards} if manifest else set()
    texts: defaultdict[str, list[str]] = defaultdict(list)
    units = []
    for name in storage.names(FOLDER):
        match = SHARD_NAME.fullmatch(name)
        if match is None or match[1] in named:
            continue
        if match[2] is None:
            units.append(match[1])
        else:
            texts[match[1]].append(match[2])
    found = {}
    for unit in units:
        try:
            latents = open_latents(storage, unit)
            skips = tuple(skip_from_json(skip) for skip in latents.metadata["skipped"])
            found[unit] = Leftover(unit, latents.metadata["recipe"], latents.table(), skips, tuple(texts[unit]))
        except (UserError, KeyError, TypeError, ValueError):
            continue
    return found


def recover(storage: Storage, leftover: Leftover) -> ShardEntry | None:
    """The manifest entry of a leftover; None where it has no whole text file, so that its rows have no names."""
    for text in leftover.texts:
        try:
            open_text(storage, leftover.unit, text, leftover.groups)
        except UserError:
            continue
        latents_file, text_file = (
            storage.stamp(latents_name(leftover.unit)),
            storage.stamp(text_name(leftover.unit, text)),
        )
        return ShardEntry(leftover.unit, text, leftover.groups, latents_file, text_file)
    return None


def clear_temporaries(storage: Storage) -> None:
    """Delete what a killed run was just writing; only for who holds the lock."""
    for name in (*storage.names(), *storage.names(FOLDER)):
        if is_temporary(name):
            storage.delete(name)


def list_orphans(storage: Storage, manifest: Manifest) -> list[str]:
    """Files of ours that the manifest does not name."""
    files = manifest.files()
    return [
        name
        for name in (*storage.names(), *storage.names(FOLDER))
        if name not in files and (is_temporary(name) or SHARD_NAME.fullmatch(name) or name == UNCOND_NAME)
    ]


def clear_orphans(storage: Storage, manifest: Manifest) -> tuple[int, int]:
    """Delete our files that the manifest does not name; returns how many they were, and their bytes.

    Not on a remote: without a lock, another run may be at work there.
    """
    if not storage.is_local:
        return 0, 0
    orphans = list_orphans(storage, manifest)
    nbytes = sum(storage.size(name) for name in orphans)
    for name in orphans:
        storage.delete(name)
    return len(orphans), nbytes


def clear_cache(storage: Storage) -> None:
    """Delete a cache's own files and nothing else, the manifest first."""
    for name in (MANIFEST_NAME, SKIPPED_NAME, UNCOND_NAME):
        storage.delete(name)
    for name in storage.names(FOLDER):
        if SHARD_NAME.fullmatch(name) or is_temporary(name):
            storage.delete(name)


def find_missing(storage: Storage, shards: list[ShardEntry]) -> dict[str, str]:
    """unit -> what is wrong, of every shard whose files are missing or have another size; no file is opened."""
    sizes = storage.sizes(FOLDER)
    found = {}
    for shard in shards:
        for name, stamp in shard.files().items():
            if name not in sizes:
                found[shard.unit] = f"{name} is missing"
            elif sizes[name] != stamp.nbytes:
                found[shard.unit] = f"{name} has {sizes[name]:,} bytes, expected {stamp.nbytes:,}"
    return found
