"""cache.json: what a cache consists of. Written last and atomically: what it does not name does not count."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from latentprep.cache.names import COND_ID, FOLDER, SHARD_NAME, SKIPPED, cond_name, uncond_name
from latentprep.cache.names import MANIFEST as NAME
from latentprep.cache.normalization import Normalization, check_channels
from latentprep.cache.schema import FORMAT, check_format
from latentprep.cache.sets import MAX_SETS, SetFacts
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.human import shortened
from latentprep.recipe import Recipe, to_json
from latentprep.records import Skip, list_views

CondId = Annotated[str, Meta(pattern=f"^{COND_ID.pattern}$")]
MAX_DEPTH = 4  # of the arguments of a run: sets are dicts in a list, and may have lists


@dataclass(frozen=True)
class LatentFacts:
    """What a reader must know of the latents. Raises ValueError for what no VAE has."""

    normalization: Normalization  # from a sample of the posterior to what the denoiser sees
    factor: Annotated[int, Meta(ge=1, le=2**10)]  # a latent pixel stands for factor x factor pixels of the image
    channels: Annotated[int, Meta(ge=1, le=2**16)]
    views: tuple[str, ...]
    pixel_range: tuple[int, int] = (-1, 1)  # of what the VAE was given

    def __post_init__(self) -> None:
        check_channels(self.normalization, self.channels)
        count = len(self.views)
        possible = [list_views(count // (1 + flip), flip) for flip in (False, True) if count >= 1 + flip]
        if list(self.views) not in possible:
            raise ValueError(f"views {self.views!r:.80}")

    def to_json(self) -> dict[str, Any]:
        found: dict[str, Any] = to_json(self)
        return found


@dataclass(frozen=True)
class MadeWith:
    """How a cache was made, for people and for verify --re-encode; nothing of it is compared."""

    model: str
    source: str | None = None  # absolute path
    vae: str | None = None
    config: str | None = None
    text_encoders: tuple[str, ...] = ()  # where weights of text encoders were, beside those of the model
    revision: str | None = None
    commit: str | None = None  # of a hub model
    exclude: tuple[str, ...] = ()  # patterns of files that were left out
    masks: str | None = None
    control: tuple[str, ...] = ()  # folders of control images; not there if there are none
    control_columns: tuple[str, ...] = ()  # of metadata files, which name control images; not there if there are none
    device: str | None = None
    batch_size: int | None = None
    compile: bool = False
    again: dict[str, Any] = field(default_factory=dict)  # the arguments that ask for the same run once more

    def __post_init__(self) -> None:
        """Raise ValueError for arguments that no call has."""
        level: list[Any] = [self.again]
        for _ in range(MAX_DEPTH):
            inner = [part.values() if isinstance(part, dict) else part for part in level]
            level = [value for values in inner for value in values if isinstance(value, dict | list | tuple)]
        if level:
            raise ValueError("made_with.again is nested too deeply")


@dataclass(frozen=True)
class Uncond:
    """The file of the empty prompt's cond."""

    id: Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
    file: Stamp


@dataclass(frozen=True)
class Manifest:
    """What a cache consists of. Raises ValueError for parts that contradict each other."""

    recipe: Recipe
    latent: LatentFacts
    made_with: MadeWith
    shards: list[Shard] = field(default_factory=list)
    skipped_file: Stamp | None = None
    num_skipped: Annotated[int, Meta(ge=0)] = 0
    uncond: Uncond | None = None  # None: there is no cond, or it depends on control images
    cond_files: dict[CondId, Stamp] = field(default_factory=dict)  # id -> those from which texts borrow cond
    sets: tuple[SetFacts, ...] = ()  # none: all images are of one source, and keys have no name of a set

    @property
    def has_cond(self) -> bool:
        return self.uncond is not None or self.recipe.text.sees_images

    def __post_init__(self) -> None:
        if self.latent.views != self.recipe.latents.views:
            raise ValueError(f"views {self.latent.views!r:.80}, and {self.recipe.latents.views!r:.80} in the recipe")
        tiling = self.recipe.latents.tiling
        if tiling is not None and tiling < 4 * self.latent.factor:
            raise ValueError(f"recipe.latents.tiling is {tiling}, which is no tile")
        if len({shard.id for shard in self.shards}) < len(self.shards):
            raise ValueError("a shard stands twice in it")
        if len({facts.name for facts in self.sets}) < len(self.sets) or len(self.sets) > MAX_SETS:
            raise ValueError("a set stands twice in it, or there are too many")
        for shard in self.shards:
            if shard.text_file is None:
                raise ValueError(f"shard {shard.id} has no text")
            if any(shape[0] != self.latent.channels for _, _, shape in shard.groups):
                raise ValueError(f"shard {shard.id} has latents of other than {self.latent.channels} channels")
            if bool(self.sets) != bool(shard.sets) or any(number >= len(self.sets) for number, _ in shard.sets):
                raise ValueError(f"shard {shard.id} has rows of no set")
            if any(side % self.latent.normalization.patch for _, _, shape in shard.groups for side in shape[1:]):
                raise ValueError(f"shard {shard.id} has latents without whole patches")
            if not {len(shape) for _, _, shape in shard.groups} <= self._lengths_of_shapes():
                raise ValueError(f"shard {shard.id} has control images of sizes that the recipe does not allow")

    def _lengths_of_shapes(self) -> set[int]:
        """How long the shapes of groups may be: see schema.Shape."""
        recipe = self.recipe.latents
        return {3, 3 + 2 * (recipe.num_controls or 0)} if recipe.control_size == "own" else {3}

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)

    @property
    def nbytes(self) -> int:
        """Bytes of all shards, and of the cond that they share."""
        return sum(shard.nbytes for shard in self.shards) + sum(stamp.nbytes for stamp in self.cond_files.values())

    @property
    def num_dead(self) -> int:
        return sum(len(shard.dead) for shard in self.shards)

    def root_files(self) -> dict[str, Stamp]:
        """The files that are no single shard's: skips, cond files, the empty prompt's cond; without cache.json."""
        files = {SKIPPED: self.skipped_file} if self.skipped_file is not None else {}
        files |= {cond_name(name): stamp for name, stamp in self.cond_files.items()}
        return files | ({uncond_name(self.uncond.id): self.uncond.file} if self.uncond is not None else {})

    def having(self, shards: list[Shard], cond_files: Mapping[str, Stamp] | None = None) -> "Manifest":
        """The same manifest with other shards, and with only those cond files that the shards need.

        cond_files: id -> stamp to choose from; None: the manifest's own.
        """
        there = self.cond_files if cond_files is None else cond_files
        needed = sorted({name for shard in shards for name in shard.cond_files} & there.keys())
        return replace(self, shards=shards, cond_files={name: there[name] for name in needed})

    def files(self) -> dict[str, Stamp]:
        """Every file that belongs to the cache, except cache.json."""
        return {name: stamp for shard in self.shards for name, stamp in shard.files().items()} | self.root_files()


def commit(storage: Storage, manifest: Manifest, skips: Iterable[Skip]) -> Manifest:
    """Write skipped.jsonl and then cache.json: from here on the cache is what the manifest says, which is returned."""
    ordered = sorted(skips, key=lambda skip: skip.key)
    lines = [json.dumps(asdict(skip), ensure_ascii=True) + "\n" for skip in ordered]
    skipped_file = storage.write_atomic(SKIPPED, "".join(lines).encode())
    manifest = replace(manifest, skipped_file=skipped_file, num_skipped=len(lines))
    storage.write_atomic(NAME, pack(manifest))
    return manifest


def manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    """All of it as JSON values."""
    fields = {name: value for name, value in vars(manifest).items() if name != "recipe"}
    found = {"recipe": manifest.recipe.to_json(), **msgspec.to_builtins(fields)}
    for name in ("control", "control_columns"):  # left out if empty: older caches without them keep the same bytes
        if not getattr(manifest.made_with, name):
            found["made_with"].pop(name, None)
    if not manifest.cond_files:
        found.pop("cond_files", None)
    return found


def pack(manifest: Manifest) -> bytes:
    """The bytes of cache.json: one shard a line, and a seal at the end."""
    head = {"format": FORMAT, **manifest_to_json(replace(manifest, shards=[]))}
    del head["shards"]
    shards = ",\n".join("  " + _pack_shard(shard) for shard in manifest.shards)
    body = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{shards}\n ],\n'
    return f"{body}{_seal(body)}".encode()


def _pack_shard(shard: Shard) -> str:
    fields = msgspec.to_builtins(shard)
    if not shard.cond_files:
        fields.pop("cond_files", None)
    return msgspec.json.encode(fields).decode()


def _seal(body: str) -> str:
    """The end of cache.json: a hash of all that stands before it."""
    return f' "blake2b": "{Stamp.of(body.encode()).blake2b}"\n}}\n'


def find_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a cache, or None if it has none yet. Raises UserError like open_manifest."""
    return open_manifest(storage) if storage.exists(NAME) else None


def open_manifest(storage: Storage) -> Manifest:
    """The manifest of a cache. Raises UserError if there is none, it is damaged, or of another format."""
    where = storage.locate(NAME)
    try:
        text = storage.read_json(NAME).decode()
        head = json.loads(text)
    except FileNotFoundError:
        if storage.names(FOLDER):
            raise UserError(
                f"{storage.root}: an unfinished cache. Run the same latentprep encode again to finish it."
            ) from None
        inner = list_caches(storage)
        hint = f"it holds caches: {', '.join(inner)}. Give one of them" if inner else "Make one with latentprep encode"
        raise UserError(
            f"{storage.root}: not a latent cache, it has no {NAME}{'; ' if inner else '. '}{hint}."
        ) from None
    except NotADirectoryError:
        raise UserError(f"{storage.root}: a file, expected the folder of a cache.") from None
    except OSError as error:  # a problem of the disk or of permissions: the manifest itself may be intact
        raise UnreadableError(
            f"{where}: is there, and cannot be read ({error.strerror or error}). "
            "Mend that, and run the same command again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({' '.join(str(error).split())}). {_remedy(storage)}") from None
    if not isinstance(head, dict):
        raise UserError(f"{where}: not a manifest.")
    check_format(head.get("format"), where)
    body, mark, _ = text.rpartition(' "blake2b": "')
    if not mark or text != body + _seal(body):
        raise UserError(f"{where}: was changed after latentprep wrote it, its hash does not fit. {_remedy(storage)}")
    try:
        manifest = msgspec.convert(head, Manifest)
        if manifest.cond_files.keys() != {name for shard in manifest.shards for name in shard.cond_files}:
            raise ValueError("its cond_files are not those of its shards")
    except (ValueError, RecursionError) as error:  # msgspec's own is a ValueError
        raise UserError(f"{where}: not a complete manifest ({error}).") from None
    return manifest


def list_caches(storage: Storage) -> list[str]:
    """Names of the caches in a local folder, for a person; at most ten."""
    if not storage.is_local:
        return []
    try:
        found = sorted(path.parent.name for path in Path(storage.path).glob(f"*/{NAME}"))
    except OSError:
        return []
    return [shortened(name) for name in found[:10]] + ["..."] * (len(found) > 10)


def _remedy(storage: Storage) -> str:
    """What to do about a damaged manifest: without it the shards are taken up as those of a run that did not finish."""
    if not any(map(SHARD_NAME.fullmatch, storage.names(FOLDER))):
        return "There are no shards beside it, so it may be another program's."
    return f"Delete {NAME} and run the same latentprep encode again: its shards are taken up, nothing is encoded twice."


def read_skips(storage: Storage) -> list[Skip]:
    """The skips in skipped.jsonl; none if it is missing. Raises UserError if it cannot be read or is damaged."""
    try:
        lines = storage.read_json(SKIPPED).splitlines()
        return [msgspec.convert(json.loads(line), Skip) for line in lines]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{storage.locate(SKIPPED)}: cannot be read ({error}).") from None


def skips_from_json(data: Any) -> tuple[Skip, ...]:
    """Skips as a file's header holds them. Raises ValueError."""
    return msgspec.convert(data, tuple[Skip, ...])
