"""Rewrites shards that have many dead rows. Needs no model and no image."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from latentprep.cache.latents import write_latents
from latentprep.cache.leftovers import clear_orphans
from latentprep.cache.manifest import commit, open_manifest, read_skips
from latentprep.cache.names import make_text_id
from latentprep.cache.readers import free
from latentprep.cache.sets import recipe_of, take_runs
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.text import write_text
from latentprep.errors import UnreadableError, UserError
from latentprep.recipe import digest_of

MIN_SHARE = 0.2  # default of --min-share: a shard is rewritten if at least this share of its rows is dead


@dataclass(frozen=True)
class Compacted:
    """What a compact did."""

    num_shards: int  # rewritten or removed
    num_rows: int  # dead rows that are gone
    num_left: int  # dead rows that stay, in shards that have few
    nbytes: int  # freed, once the files that are still read have gone
    num_read: int  # files of the old shards that somebody still reads: a later encode or compact deletes them
    damaged: list[str]  # what is wrong with the shards that were left alone


def compact(storage: Storage, min_share: float, count: Callable[[int], object] = int) -> Compacted:
    """Rewrite every shard that has a dead row and a share of dead rows of at least `min_share`.

    A shard without live rows is removed. A damaged shard is left alone and named in the result. The new shards are
    written first, then the manifest; only then the old files are deleted. count(1) is called for each shard rewritten
    or removed. Raises UserError if the manifest is missing or damaged, or if a file cannot be read or written.
    """
    manifest = open_manifest(storage)
    skips = read_skips(storage)
    damaged: list[str] = []
    shards: list[Shard | None] = []
    for shard in manifest.shards:
        made: Shard | None = shard
        if would_rewrite(shard, min_share):
            try:
                made = _rewrite(storage, shard)
                count(1)
            except UnreadableError:
                raise  # the file may be intact: if it counted as damaged, the advice would be to delete it
            except UserError as error:
                damaged.append(str(error))
        shards.append(made)
    kept = [shard for shard in shards if shard is not None]
    result = manifest.having(kept)
    if kept != manifest.shards:
        commit(storage, result, skips)
    superseded = manifest.files().keys() - result.files().keys()
    clear_orphans(storage, result)
    if not storage.is_local:
        free(storage, superseded, result.files())
    kept_files = [name for name in superseded if storage.exists(name)]
    num_changed = sum(old is not new for old, new in zip(manifest.shards, shards, strict=True))
    removed = manifest.num_dead - result.num_dead
    return Compacted(num_changed, removed, result.num_dead, manifest.nbytes - result.nbytes, len(kept_files), damaged)


def would_rewrite(shard: Shard, min_share: float = MIN_SHARE) -> bool:
    """Whether a compact rewrites a shard, or removes it."""
    return bool(shard.dead) and len(shard.dead) >= min_share * shard.num_rows


def _rewrite(storage: Storage, shard: Shard) -> Shard | None:
    """Write the shard without its dead rows; None if all rows are dead. Raises UserError if a file is damaged."""
    if not shard.num_images:
        return None
    shard.check(storage)
    live = shard.live_rows()
    latents, text = shard.open_latents(storage).take(live), shard.open_text(storage).take(live)
    new, rows = digest_of([shard.id, shard.dead]), text.rows()
    recipe = recipe_of(text.metadata["recipe"], (row.key for row in rows))
    text = replace(text, metadata={**text.metadata, "recipe": recipe})
    text_id = make_text_id(new, rows, recipe)
    sets = take_runs(shard.sets, shard.live_numbers())
    made = Shard(new, latents.table(), write_latents(storage, new, latents), sets=sets)
    return made.with_text(text_id, write_text(storage, new, text_id, text), text.cond_files)
