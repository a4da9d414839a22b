"""Rewrites the shards of which many rows are tombstones. Needs no model and no image."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from latentprep.cache.leftovers import clear_orphans
from latentprep.cache.manifest import commit, open_manifest, read_skips
from latentprep.cache.ragged import Ragged, stack_rows
from latentprep.cache.readers import free
from latentprep.cache.seal import FIELD, check_stamp
from latentprep.cache.shard import (
    LatentGroup,
    ShardEntry,
    Text,
    TextGroup,
    open_latents,
    open_text,
    table_of,
    text_id,
    write_latents,
    write_text,
)
from latentprep.cache.storage import Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.recipe import digest_of

MIN_SHARE = 0.2  # of a shard's rows that are to be dead before it is rewritten, unless asked for otherwise


@dataclass(frozen=True)
class Compacted:
    """What a compact did."""

    num_shards: int  # rewritten or removed
    num_rows: int  # tombstones that are gone
    num_left: int  # tombstones that stay, in shards that have few
    nbytes: int  # freed, once the files that are still read have gone
    num_read: int  # files of the old shards that somebody still reads: a later encode or compact deletes them
    damaged: list[str]  # what is wrong with the shards that were left alone


def compact(storage: Storage, min_share: float) -> Compacted:
    """Rewrite every shard whose share of tombstones is at least `min_share`, and no less than one of them.

    A shard whose bytes are not those that were written is left alone, and named. The new shards are written first, then
    the manifest, and only then the old ones go. Raises UserError.
    """
    manifest = open_manifest(storage)
    skips = read_skips(storage)
    damaged: list[str] = []
    shards: list[ShardEntry | None] = []
    for shard in manifest.shards:
        found: ShardEntry | None = shard
        if would_rewrite(shard, min_share):
            try:
                found = _rewrite(storage, shard)
            except UnreadableError:
                raise  # it may be whole, and nobody is to delete it
            except UserError as error:
                damaged.append(str(error))
        shards.append(found)
    kept = [shard for shard in shards if shard is not None]
    result = replace(manifest, shards=kept)
    if kept != manifest.shards:
        commit(storage, result, skips)
    superseded = manifest.files().keys() - result.files().keys()
    clear_orphans(storage, result)
    if not storage.is_local:
        free(storage, superseded, result.files())
    kept_files = [name for name in superseded if storage.exists(name)]
    before, after = sum(shard.nbytes for shard in manifest.shards), sum(shard.nbytes for shard in kept)
    num_changed = sum(old is not new for old, new in zip(manifest.shards, shards, strict=True))
    removed = manifest.num_tombstones - result.num_tombstones
    return Compacted(num_changed, removed, result.num_tombstones, before - after, len(kept_files), damaged)


def would_rewrite(shard: ShardEntry, min_share: float = MIN_SHARE) -> bool:
    """Whether a compact rewrites a shard, or removes it."""
    return bool(shard.tombstones) and len(shard.tombstones) >= min_share * shard.num_rows


def _rewrite(storage: Storage, shard: ShardEntry) -> ShardEntry | None:
    """The shard without its tombstones; None if nothing else is in it. Raises UserError if a file is damaged."""
    if not shard.num_images:
        return None
    for name, stamp in shard.files().items():
        check_stamp(storage, name, stamp)
    latents = open_latents(storage, shard.unit, shard.groups)
    text = open_text(storage, shard.unit, shard.text, shard.groups)
    live = shard.live_rows()
    groups = [_take_latents(group, rows) for group, rows in zip(latents.groups, live, strict=True) if len(rows)]
    words = _take_text(text, live)
    unit = digest_of([shard.unit, shard.tombstones])
    recipe = {"text": text.metadata["recipe"]}
    new_text = text_id(unit, words.rows(), recipe)
    latents_file = write_latents(storage, unit, groups, _metadata(latents.metadata))
    text_file = write_text(storage, unit, new_text, words, _metadata(text.metadata))
    return ShardEntry(unit, new_text, table_of(groups), latents_file, text_file)


def _metadata(metadata: dict[str, Any]) -> dict[str, Any]:
    return {
        name: value for name, value in metadata.items() if name not in ("format", "kind", "groups", "max_tokens", FIELD)
    }


def _take_latents(group: LatentGroup, rows: np.ndarray) -> LatentGroup:
    """Some rows of a group."""
    chosen = torch.from_numpy(rows)

    def take(values: torch.Tensor) -> torch.Tensor:
        return values[chosen]

    return replace(
        group,
        latent_mean=take(group.latent_mean),
        latent_std=take(group.latent_std) if group.latent_std is not None else None,
        weight=take(group.weight) if group.weight is not None else None,
        original_size=take(group.original_size),
        resized_size=take(group.resized_size),
        crop=take(group.crop),
        digest=take(group.digest),
    )


def _take_text(text: Text, live: list[np.ndarray]) -> Text:
    """Some rows of every group, and of the prompts only those that they use."""
    used = np.unique(np.concatenate([group.prompt_of[rows] for group, rows in zip(text.groups, live, strict=True)]))
    groups = [
        TextGroup(
            group.label,
            key=[group.key[row] for row in rows],
            caption=[group.caption[row] for row in rows],
            prompt_of=np.searchsorted(used, group.prompt_of[rows]).astype(np.int32),
            nbytes=group.nbytes[rows],
            version=group.version[rows],
        )
        for group, rows in zip(text.groups, live, strict=True)
        if len(rows)
    ]
    return Text(
        groups,
        prompt=[text.prompt[n] for n in used],
        cond={
            name: stack_rows([value[n] for n in used.tolist()], isinstance(value, Ragged))
            for name, value in text.cond.items()
        },
        num_tokens=text.num_tokens[used] if text.num_tokens is not None else None,
        max_tokens=text.max_tokens,
    )
