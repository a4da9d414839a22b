"""Names of a cache's files, and the digests in them: the same work has the same name wherever it is done."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from latentprep.cache.schema import FORMAT
from latentprep.recipe import LatentsRecipe, TextRecipe, digest_of
from latentprep.records import Item, Row

MANIFEST, SKIPPED = "cache.json", "skipped.jsonl"
FOLDER = "shards"
COND_ID = re.compile("[0-9a-f]{32}")
COND_NAME = re.compile(rf"{FOLDER}/({COND_ID.pattern})\.cond\.safetensors")
UNCOND_NAME = re.compile(r"uncond\.([0-9a-f]{16})\.safetensors")
PARTIAL_NAME = re.compile(rf"{FOLDER}/(\w+)\.partial\.safetensors")
SHARD_NAME = re.compile(rf"{FOLDER}/(\w+)\.(?:latents|(\w+)\.text)\.safetensors")
PART_NAME = re.compile(r"rank-(\d+)-of-(\d+)\.json")
# as write_atomic calls it; other programs have temporary files of their own
TEMPORARY_NAME = re.compile(r"\.[\w.-]+\.(?:jsonl?|safetensors)\.\d+\.tmp")


def latents_name(shard: str) -> str:
    return f"{FOLDER}/{shard}.latents.safetensors"


def text_name(shard: str, text_id: str) -> str:
    return f"{FOLDER}/{shard}.{text_id}.text.safetensors"


def partial_name(unit: str) -> str:
    return f"{FOLDER}/{unit}.partial.safetensors"


def cond_name(cond_file: str) -> str:
    return f"{FOLDER}/{cond_file}.cond.safetensors"


def uncond_name(uncond: str) -> str:
    return f"uncond.{uncond}.safetensors"


def part_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.json"


def is_temporary(name: str) -> bool:
    """Whether a name is one that write_atomic writes under, before the file has its own."""
    return bool(TEMPORARY_NAME.fullmatch(name.rpartition("/")[2]))


def is_ours(name: str) -> bool:
    """Whether latentprep gives this name to a file: of a shard, of cond, of a rank, or a temporary one.

    cache.json, skipped.jsonl, the locks and the files of readers do not count.
    """
    return is_temporary(name) or any(
        pattern.fullmatch(name) for pattern in (SHARD_NAME, COND_NAME, PARTIAL_NAME, UNCOND_NAME, PART_NAME)
    )


def make_unit_id(rows: Iterable[Item | Row], recipe: LatentsRecipe, contents: Sequence[str] = ()) -> str:
    """Digest of what goes into a latents file: the recipe, and every row's key, size and version.

    contents: the content hash of each row whose content changed while key, size and version stayed; "" for other rows.
    """
    known = [list(contents)] if any(contents) else []
    return digest_of([FORMAT, recipe.to_json(), [row.fingerprint for row in rows], *known])


def make_text_id(shard: str, rows: Iterable[Item | Row], recipe: Mapping[str, Any], dead: Iterable[int] = ()) -> str:
    """Digest, 16 hex digits, of what goes into a text file: the shard's id, the text recipe in JSON, and all its rows.

    dead: the numbers of the rows that were dead when the file was made; they have no prompts, and count in the digest.
    """
    silent = [sorted(dead)] if dead else []
    said = [(row.key, row.nbytes, row.version, row.captions) for row in rows]
    return digest_of([shard, recipe, said, *silent])[:16]


def make_cond_id(prompts: Sequence[str], recipe: TextRecipe) -> str:
    """Digest of what goes into a cond file: its prompts, and what their cond is made by."""
    return digest_of([FORMAT, recipe.cond, list(prompts)])


def make_uncond_id(recipe: TextRecipe) -> str:
    """Digest of what the empty prompt's cond is made by; "" without cond."""
    return digest_of(recipe.cond)[:16] if recipe.text_encoder is not None else ""
