"""What runs that did not finish left behind: whole shards to take up, and scraps to clear away."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from latentprep.cache.manifest import NAME as MANIFEST_NAME
from latentprep.cache.manifest import SKIPPED_NAME, Manifest, skip_from_json
from latentprep.cache.readers import free
from latentprep.cache.seal import check_seal
from latentprep.cache.shard import (
    FOLDER,
    PARTIAL_NAME,
    SHARD_NAME,
    UNCOND_NAME,
    Groups,
    ShardEntry,
    latents_name,
    open_latents,
    open_text,
    text_name,
)
from latentprep.cache.storage import Stamp, Storage, is_temporary
from latentprep.errors import UnreadableError, UserError
from latentprep.records import Skip


@dataclass(frozen=True)
class Leftover:
    """A whole latents file that no manifest names, and the text files of its unit."""

    unit: str
    recipe: dict[str, Any]  # the latents part
    groups: Groups
    skips: tuple[Skip, ...]
    texts: tuple[str, ...]
    latents_file: Stamp


def find_leftovers(storage: Storage, manifest: Manifest | None) -> dict[str, Leftover]:
    """unit -> every whole latents file that the manifest does not name; damaged ones are as if they were not there.

    Each is read whole, to be checked by its own seal.
    """
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
            latents_file = check_seal(storage, latents_name(unit))
            latents = open_latents(storage, unit)
            skips = tuple(skip_from_json(skip) for skip in latents.metadata["skipped"])
            table, recipe = latents.table(), latents.metadata["recipe"]
            found[unit] = Leftover(unit, recipe, table, skips, tuple(texts[unit]), latents_file)
        except UnreadableError:
            raise  # it may be whole: to encode it again would be a waste
        except (UserError, KeyError, TypeError, ValueError, FileNotFoundError):
            continue
    return found


def recover(storage: Storage, leftover: Leftover) -> ShardEntry | None:
    """The manifest entry of a leftover; None where it has no whole text file, so that its rows have no names."""
    for text in leftover.texts:
        try:
            text_file = check_seal(storage, text_name(leftover.unit, text))
            open_text(storage, leftover.unit, text, leftover.groups)
        except UnreadableError:
            raise
        except (UserError, FileNotFoundError):
            continue
        return ShardEntry(leftover.unit, text, leftover.groups, leftover.latents_file, text_file)
    return None


def clear_temporaries(storage: Storage) -> None:
    """Delete what a killed run was just writing; only for who holds the lock."""
    for name in (*storage.names(), *storage.names(FOLDER)):
        if is_temporary(name):
            storage.delete(name)


def list_orphans(storage: Storage, manifest: Manifest) -> list[str]:
    """Files of ours that the manifest does not name."""
    files = manifest.files()
    return [name for name in (*storage.names(), *storage.names(FOLDER)) if name not in files and is_ours(name)]


def is_ours(name: str) -> bool:
    """Whether a name is one that latentprep gives: of a shard's file, the empty prompt's, or one being written."""
    patterns = (SHARD_NAME, PARTIAL_NAME, UNCOND_NAME)
    return is_temporary(name) or any(pattern.fullmatch(name) for pattern in patterns)


def clear_orphans(storage: Storage, manifest: Manifest) -> tuple[int, int]:
    """Delete our files that the manifest does not name and no reader needs; returns how many went, and their bytes.

    Not on a remote: without a lock, another run may be at work there.
    """
    if not storage.is_local:
        return 0, 0
    sizes = {name: storage.size(name) for name in list_orphans(storage, manifest)}
    gone = free(storage, sizes, manifest.files())
    return len(gone), sum(sizes[name] for name in gone)


def clear_cache(storage: Storage) -> None:
    """Delete a cache's own files and nothing else, the manifest first; files that somebody reads stay."""
    for name in (MANIFEST_NAME, SKIPPED_NAME):
        storage.delete(name)
    free(storage, [name for name in (*storage.names(), *storage.names(FOLDER)) if is_ours(name)])


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
