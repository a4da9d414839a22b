"""cache.json: what a finished cache consists of. Written last and atomically; with it a cache is complete."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from latentprep.cache.shard import FORMAT, check_format
from latentprep.cache.storage import Storage
from latentprep.config import digest_of
from latentprep.errors import UserError
from latentprep.records import Skip

NAME = "cache.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class ShardEntry:
    """One shard in the manifest. `groups`: label, rows, and the [C,h,w] of a latent."""

    unit: str
    text: str
    groups: list[tuple[str, int, list[int]]]
    latents_bytes: int
    text_bytes: int

    @property
    def rows(self) -> int:
        return sum(rows for _, rows, _ in self.groups)


@dataclass
class Manifest:
    recipe: dict[str, Any]  # "latents" and "text": see config.latents_recipe, config.text_recipe
    latent: dict[
        str, Any
    ]  # what a reader must know: scaling_factor, shift_factor, factor, channels, views, pixel_range
    made_with: dict[str, Any]  # names and versions, for people: model, device, torch, diffusers, ...
    shards: list[ShardEntry] = field(default_factory=list)
    num_skipped: int = 0

    @property
    def num_images(self) -> int:
        return sum(shard.rows for shard in self.shards)


def recipe_digest(recipe: dict[str, Any]) -> str:
    """Digest of the part of a recipe that decides the latents."""
    return digest_of({"format": FORMAT, **recipe["latents"]})


def open_manifest(storage: Storage) -> Manifest:
    """The manifest of a cache. Raises UserError where there is none, it is broken, or of a newer format."""
    where = storage.locate(NAME)
    try:
        data = json.loads(storage.read(NAME))
    except FileNotFoundError:
        if storage.names("shards"):
            raise UserError(
                f"{storage.root}: an unfinished cache. Run the same latentprep encode again to finish it."
            ) from None
        raise UserError(
            f"{storage.root}: not a latent cache, it has no {NAME}. Make one with latentprep encode."
        ) from None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: cannot be read ({error}).") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: not a manifest.")
    check_format(data.get("format"), where)
    try:
        shards = [
            ShardEntry(s["unit"], s["text"], [(label, rows, shape) for label, rows, shape in s["groups"]], *s["bytes"])
            for s in data["shards"]
        ]
        return Manifest(data["recipe"], data["latent"], data["made_with"], shards, data["counts"]["skipped"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{where}: not a complete manifest ({type(error).__name__}: {error}).") from None


def find_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a cache, or None where it has none yet."""
    return open_manifest(storage) if storage.exists(NAME) else None


def commit(storage: Storage, manifest: Manifest, skips: list[Skip]) -> None:
    """Write skipped.jsonl and then cache.json: from here on the cache is what the manifest says."""
    lines = [json.dumps(asdict(skip), ensure_ascii=True) for skip in sorted(skips, key=lambda skip: skip.key)]
    storage.write_atomic(SKIPPED_NAME, "".join(line + "\n" for line in lines).encode())
    data = {
        "format": FORMAT,
        "recipe": manifest.recipe,
        "latent": manifest.latent,
        "made_with": manifest.made_with,
        "counts": {"images": manifest.num_images, "skipped": len(skips)},
        "tombstones": [],
    }
    rows = [
        json.dumps({"unit": s.unit, "text": s.text, "groups": s.groups, "bytes": [s.latents_bytes, s.text_bytes]})
        for s in manifest.shards
    ]
    head = json.dumps(data, indent=1)[:-2]  # one shard a line: readable, and small for many shards
    text = head + ',\n "shards": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n" if rows else head + ',\n "shards": []\n}\n'
    storage.write_atomic(NAME, text.encode())


def read_skips(storage: Storage) -> list[Skip]:
    """What skipped.jsonl says. Raises UserError where it is broken."""
    try:
        lines = storage.read(SKIPPED_NAME).decode().splitlines()
    except FileNotFoundError:
        return []
    try:
        return [Skip(**json.loads(line)) for line in lines]
    except (ValueError, TypeError) as error:
        raise UserError(f"{storage.locate(SKIPPED_NAME)}: cannot be read ({error}).") from None
