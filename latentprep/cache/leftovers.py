"""Files that unfinished runs left: latents files that can be used again, and files that are deleted."""

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from latentprep.cache.latents import open_latents
from latentprep.cache.manifest import Manifest, skips_from_json
from latentprep.cache.names import (
    FOLDER,
    MANIFEST,
    SHARD_NAME,
    SKIPPED,
    cond_name,
    is_ours,
    is_temporary,
    latents_name,
    text_name,
)
from latentprep.cache.readers import free
from latentprep.cache.schema import Groups
from latentprep.cache.seal import check_seal
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.text import open_text
from latentprep.errors import UnreadableError, UserError
from latentprep.records import Skip


@dataclass(frozen=True)
class Leftover:
    """A latents file that no manifest names, as its header describes it. Its bytes are not checked yet: see check()."""

    id: str
    recipe: dict[str, Any]  # the latents part, in JSON
    groups: Groups
    skips: tuple[Skip, ...]
    notes: Counter[str]  # what had to be done to its images
    text_ids: tuple[str, ...]  # of the text files that are there for it

    @property
    def num_rows(self) -> int:
        return sum(rows for _, rows, _ in self.groups)

    def check(self, storage: Storage, cond_files: Collection[str] = ()) -> Shard | None:
        """The shard, if the seal of its latents file fits, else None. It has a text file if an intact one is there.

        cond_files: ids of the cond files that exist; a text file that borrows from another one is not used.
        Raises UnreadableError if a file exists but cannot be read.
        """
        latents_file = _find(storage, latents_name(self.id))
        if latents_file is None:
            return None
        shard = Shard(self.id, self.groups, latents_file)
        for text_id in self.text_ids:
            text_file = _find(storage, text_name(self.id, text_id))
            if text_file is None:
                continue
            lenders = self._lenders(storage, text_id)
            if lenders is not None and set(lenders) <= set(cond_files):
                return shard.with_text(text_id, text_file, lenders)
        return shard

    def _lenders(self, storage: Storage, text_id: str) -> tuple[str, ...] | None:
        """Ids of the cond files that a text borrows from; None if it is not that of these latents."""
        try:
            return open_text(storage, self.id, text_id, self.groups).cond_files
        except UnreadableError:
            raise
        except UserError:
            return None


def _find(storage: Storage, name: str) -> Stamp | None:
    """A file, if it is as it was written. Raises UnreadableError."""
    try:
        return check_seal(storage, name)
    except UnreadableError:
        raise  # the file may be intact, and to make it again would waste time
    except (UserError, FileNotFoundError):
        return None


def find_leftovers(storage: Storage, manifest: Manifest | None) -> dict[str, Leftover]:
    """id -> every latents file that the manifest does not name; those that cannot be ours are left out."""
    named = {shard.id for shard in manifest.shards} if manifest else set()
    matches = [SHARD_NAME.fullmatch(name) for name in storage.names(FOLDER)]
    texts: defaultdict[str, list[str]] = defaultdict(list)
    for match in matches:
        if match is not None and match[1] not in named:
            texts[match[1]] += [match[2]] if match[2] is not None else []
    leftovers = ((id, find_leftover(storage, id, text_ids)) for id, text_ids in texts.items())  # noqa: A001
    return {id: leftover for id, leftover in leftovers if leftover is not None}  # noqa: A001


def find_leftover(storage: Storage, id: str, text_ids: Iterable[str] = ()) -> Leftover | None:  # noqa: A002
    """What the latents file of a unit says, if there is one and its header is whole. Raises UnreadableError."""
    if not storage.exists(latents_name(id)):
        return None
    try:
        latents = open_latents(storage, id)
        recipe, notes = dict(latents.metadata["recipe"]), Counter(dict(latents.metadata["notes"]))
        return Leftover(
            id, recipe, latents.table(), skips_from_json(latents.metadata["skipped"]), notes, tuple(text_ids)
        )
    except UnreadableError:
        raise
    except (UserError, KeyError, TypeError, ValueError):
        return None


def clear_temporaries(storage: Storage) -> None:
    """Delete the temporary files of killed runs. The caller must hold the lock."""
    for name in (*storage.names(), *storage.names(FOLDER)):
        if is_temporary(name):
            storage.delete_unless_open(name)


def list_orphans(storage: Storage, manifest: Manifest) -> list[str]:
    """Files of ours that the manifest does not name."""
    files = manifest.files()
    return [name for name in (*storage.names(), *storage.names(FOLDER)) if name not in files and is_ours(name)]


def clear_orphans(storage: Storage, manifest: Manifest) -> tuple[int, int]:
    """Delete our files that the manifest does not name and no reader needs; returns how many went, and their bytes.

    Not on a remote: without a lock, another run may be at work there.
    """
    if not storage.is_local:
        return 0, 0
    sizes = {name: _size(storage, name) for name in list_orphans(storage, manifest)}
    gone = free(storage, sizes, manifest.files())
    return len(gone), sum(sizes[name] for name in gone)


def _size(storage: Storage, name: str) -> int:
    """Bytes of a file; 0 for a link that leads nowhere, or in a circle."""
    try:
        return storage.size(name)
    except OSError:
        return 0


def clear_cache(storage: Storage) -> None:
    """Delete a cache's own files and nothing else, the manifest first; files that somebody reads stay."""
    for name in (MANIFEST, SKIPPED):
        storage.delete(name)
    free(storage, [name for name in (*storage.names(), *storage.names(FOLDER)) if is_ours(name)])


def find_missing(
    storage: Storage, shards: list[Shard], cond_files: Mapping[str, Stamp] | None = None
) -> dict[str, str]:
    """id -> what is wrong, of every shard and cond file that is missing or has another size; no file is opened."""
    sizes = storage.sizes(FOLDER)
    missing = {}
    files = {shard.id: shard.files() for shard in shards}
    files |= {name: {cond_name(name): stamp} for name, stamp in (cond_files or {}).items()}
    for owner, own in files.items():
        for name, stamp in own.items():
            if name not in sizes:
                missing[owner] = f"{name} is missing"
            elif sizes[name] != stamp.nbytes:
                missing[owner] = f"{name} has {sizes[name]:,} bytes, expected {stamp.nbytes:,}"
    return missing
