"""cache.json: what a cache consists of. Written last and atomically: what it does not name does not count."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from latentprep.cache.normalization import Normalization, normalization_from_json
from latentprep.cache.schema import FORMAT, check_format
from latentprep.cache.shard import FOLDER, SHARD_NAME, Groups, ShardEntry, uncond_name
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UnreadableError, UserError
from latentprep.options import DTYPES, STORES
from latentprep.records import Skip, list_views

NAME = "cache.json"
SKIPPED_NAME = "skipped.jsonl"


@dataclass(frozen=True)
class Manifest:
    # "latents" and "text" (config.latents_recipe, config.text_recipe), and "libraries", which is not compared
    recipe: dict[str, Any]
    # what a reader must know: normalization, factor, channels, views, pixel_range
    latent: dict[str, Any]
    made_with: dict[str, Any]  # for people, of the last run: model, VAE, device, batch size, compile
    shards: list[ShardEntry] = field(default_factory=list)
    skipped_file: Stamp | None = None
    uncond: str = ""  # what the file of the empty prompt's cond is called by; "" without cond
    uncond_file: Stamp | None = None
    num_skipped: int = 0

    @property
    def normalization(self) -> Normalization:
        """How latents become what the denoiser sees."""
        return normalization_from_json(self.latent["normalization"], self.latent["channels"])

    @property
    def num_images(self) -> int:
        return sum(shard.num_images for shard in self.shards)

    @property
    def num_tombstones(self) -> int:
        return sum(len(shard.tombstones) for shard in self.shards)

    def root_files(self) -> dict[str, Stamp]:
        """The files that belong to the cache and to no shard, but cache.json."""
        files = {SKIPPED_NAME: self.skipped_file, uncond_name(self.uncond): self.uncond_file}
        return {name: stamp for name, stamp in files.items() if stamp is not None}

    def files(self) -> dict[str, Stamp]:
        """Every file that belongs to the cache, but cache.json."""
        return {name: stamp for shard in self.shards for name, stamp in shard.files().items()} | self.root_files()


def commit(storage: Storage, manifest: Manifest, skips: list[Skip]) -> None:
    """Write skipped.jsonl and then cache.json: from here on the cache is what the manifest says."""
    lines = [json.dumps(asdict(skip), ensure_ascii=True) + "\n" for skip in sorted(skips, key=lambda skip: skip.key)]
    skipped_file = storage.write_atomic(SKIPPED_NAME, "".join(lines).encode())
    head = {
        "format": FORMAT,
        "recipe": manifest.recipe,
        "latent": manifest.latent,
        "made_with": manifest.made_with,
        "counts": {"images": manifest.num_images, "skipped": len(skips)},
        "skipped": asdict(skipped_file),
        "uncond": {"id": manifest.uncond, **asdict(manifest.uncond_file)} if manifest.uncond_file else None,
        "tombstones": {shard.unit: list(shard.tombstones) for shard in manifest.shards if shard.tombstones},
    }
    shards = ",\n".join("  " + json.dumps(_shard_to_json(shard)) for shard in manifest.shards)
    body = json.dumps(head, indent=1)[:-2] + f',\n "shards": [\n{shards}\n ],\n'  # one shard a line
    storage.write_atomic(NAME, f"{body}{_seal(body)}".encode())


def _seal(body: str) -> str:
    """The end of cache.json: a hash of all that stands before it."""
    return f' "blake2b": "{Stamp.of(body.encode()).blake2b}"\n}}\n'


def _shard_to_json(shard: ShardEntry) -> dict[str, Any]:
    stamps = (shard.latents_file, shard.text_file)
    return {
        "unit": shard.unit,
        "text": shard.text,
        "groups": shard.groups,
        "bytes": [stamp.nbytes for stamp in stamps],
        "blake2b": [stamp.blake2b for stamp in stamps],
    }


def find_manifest(storage: Storage) -> Manifest | None:
    """The manifest of a cache, or None where it has none yet. Raises UserError like open_manifest."""
    return open_manifest(storage) if storage.exists(NAME) else None


def open_manifest(storage: Storage) -> Manifest:
    """The manifest of a cache. Raises UserError where there is none, it is damaged, or of a newer format."""
    where = storage.locate(NAME)
    try:
        text = storage.read_json(NAME).decode()
        data = json.loads(text)
    except FileNotFoundError:
        if storage.names(FOLDER):
            raise UserError(
                f"{storage.root}: an unfinished cache. Run the same latentprep encode again to finish it."
            ) from None
        raise UserError(
            f"{storage.root}: not a latent cache, it has no {NAME}. Make one with latentprep encode."
        ) from None
    except NotADirectoryError:
        raise UserError(f"{storage.root}: a file, expected the folder of a cache.") from None
    except OSError as error:  # the disk's trouble, or the permission's: the manifest may be whole
        raise UnreadableError(
            f"{where}: is there, and cannot be read ({error.strerror or error}). "
            "Mend that, and run the same command again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: cannot be read ({' '.join(str(error).split())}). {_remedy(storage)}") from None
    if not isinstance(data, dict):
        raise UserError(f"{where}: not a manifest.")
    check_format(data.get("format"), where)
    body, mark, _ = text.rpartition(' "blake2b": "')
    if not mark or text != body + _seal(body):
        raise UserError(f"{where}: changed since latentprep wrote it, its hash does not fit. {_remedy(storage)}")
    try:
        return _manifest_from_json(data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: not a complete manifest ({type(error).__name__}: {error}).") from None


def _remedy(storage: Storage) -> str:
    """What to do about a damaged manifest: without it the shards are taken up as those of a run that did not finish."""
    if not any(map(SHARD_NAME.fullmatch, storage.names(FOLDER))):
        return "There are no shards beside it, so it may be another program's."
    return f"Delete {NAME} and run the same latentprep encode again: its shards are taken up, nothing is encoded twice."


# What a manifest must hold; a reader may rely on it. A tuple lists what a value may be.
SPEC: dict[str, Any] = {
    "recipe": {
        "latents": {
            "vae": str, "geometry": dict, "images": dict, "views": list,
            "dtype": DTYPES, "store": STORES, "store_dtype": DTYPES,
        },
        "text": dict,
        "libraries": dict,
    },
    "latent": {"normalization": dict, "factor": int, "channels": int, "views": list},
    "made_with": {"model": str},
    "shards": list,
    "tombstones": dict,
}  # fmt: skip


MADE_WITH_NAMES = (
    "source",
    "vae",
    "config",
    "revision",
    "commit",
    "masks",
)  # of made_with: texts, or there is no such thing


def possible_views(count: int) -> list[list[str]]:
    """What `count` views may be called."""
    return [list_views(count // (1 + flip), flip) for flip in (False, True) if count >= 1 + flip]


def check_spec(value: Any, spec: Any, name: str = "cache") -> None:
    """Raise ValueError unless a JSON value has the parts and types that a spec asks for."""
    if isinstance(spec, dict):
        check_spec(value, dict, name)
        for key, inner in spec.items():
            if key not in value:
                raise ValueError(f"{name} has no {key}")
            check_spec(value[key], inner, f"{name}.{key}")
    elif isinstance(spec, tuple):
        if value not in spec:
            raise ValueError(f"{name} is {value!r:.80}, expected one of {', '.join(spec)}")
    elif not isinstance(value, (float, int) if spec is float else spec) or isinstance(value, bool):
        raise ValueError(f"{name} is {value!r:.80}, expected {spec.__name__}")


def _manifest_from_json(data: dict[str, Any]) -> Manifest:
    check_spec(data, SPEC)
    latent, tiling = data["latent"], data["recipe"]["latents"].get("tiling")
    if tiling is not None:
        check_spec(tiling, int, "recipe.latents.tiling")
        if tiling < 4 * latent["factor"]:
            raise ValueError(f"recipe.latents.tiling is {tiling}, which is no tile")
    for name in MADE_WITH_NAMES:
        if data["made_with"].get(name) is not None:
            check_spec(data["made_with"][name], str, f"made_with.{name}")
    for name, low, high in (
        ("factor", 1, 2**10),
        ("channels", 1, 2**16),
    ):
        if not low <= latent[name] <= high:
            raise ValueError(f"latent.{name} is {latent[name]}, expected {low:g} to {high:g}")
    normalization = normalization_from_json(latent["normalization"], latent["channels"])
    views = latent["views"]
    if views not in possible_views(len(views)) or views != data["recipe"]["latents"]["views"]:
        raise ValueError(f"views {latent['views']!r:.80}")
    shards = [_shard_from_json(shard, data["tombstones"]) for shard in data["shards"]]
    if len({shard.unit for shard in shards}) < len(shards):
        raise ValueError("a shard stands twice in it")
    for shard in shards:
        for _, _, shape in shard.groups:
            if shape[0] != latent["channels"]:
                raise ValueError(f"shard {shard.unit} has latents of {shape[0]} channels")
            if any(side % normalization.patch for side in shape[1:]):
                raise ValueError(f"shard {shard.unit} has latents of {shape[1]}x{shape[2]}, which have no patches")
    return Manifest(
        data["recipe"],
        latent,
        data["made_with"],
        shards,
        skipped_file=_stamp_from_json(data["skipped"]),
        uncond=_check_name(data["uncond"]["id"]) if data["uncond"] is not None else "",
        uncond_file=_stamp_from_json(data["uncond"]) if data["uncond"] is not None else None,
        num_skipped=data["counts"]["skipped"],
    )


def _shard_from_json(data: dict[str, Any], tombstones: dict[str, Any]) -> ShardEntry:
    unit, text = _check_name(data["unit"]), _check_name(data["text"])
    groups: Groups = tuple((label, rows, tuple(shape)) for label, rows, shape in data["groups"])
    latents_file, text_file = (Stamp(*pair) for pair in zip(data["bytes"], data["blake2b"], strict=True))
    for label, rows, shape in groups:
        numbers = (rows, *shape)
        if not isinstance(label, str) or len(shape) != 3 or not all(type(n) is int and n > 0 for n in numbers):
            raise ValueError(f"shard {unit}: group {label!r:.80} of {numbers}")
    entry = ShardEntry(unit, text, groups, _check_stamp(latents_file), _check_stamp(text_file))
    if not groups or entry.num_rows > latents_file.nbytes:
        raise ValueError(f"shard {unit} cannot hold {entry.num_rows} rows")
    dead = tombstones.get(unit, [])
    if not all(type(row) is int and 0 <= row < entry.num_rows for row in dead) or dead != sorted(set(dead)):
        raise ValueError(f"shard {unit}: tombstones that are no rows")
    return replace(entry, tombstones=tuple(dead))


def _check_name(name: Any) -> str:
    """A part of the name of one of our files. Raises ValueError: it is not to lead anywhere else."""
    if not (isinstance(name, str) and name.isascii() and name.isalnum()):
        raise ValueError(f"{name!r:.80}: not a part of a file's name")
    return name


def _stamp_from_json(data: dict[str, Any]) -> Stamp:
    return _check_stamp(Stamp(data["nbytes"], data["blake2b"]))


def _check_stamp(stamp: Stamp) -> Stamp:
    if type(stamp.nbytes) is not int or stamp.nbytes < 0 or not isinstance(stamp.blake2b, str):
        raise ValueError(f"{stamp}")
    return stamp


def read_skips(storage: Storage) -> list[Skip]:
    """What skipped.jsonl says. Raises UserError where it is broken."""
    try:
        lines = storage.read_json(SKIPPED_NAME).decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as error:
        raise UserError(f"{storage.locate(SKIPPED_NAME)}: cannot be read ({error}).") from None
    try:
        return [skip_from_json(json.loads(line)) for line in lines]
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{storage.locate(SKIPPED_NAME)}: cannot be read ({error}).") from None


def skip_from_json(data: Any) -> Skip:
    """A Skip as asdict() gave it. Raises ValueError, TypeError."""
    types = {"key": str, "reason": str, "detail": str, "nbytes": int, "version": int, "condition": str}
    check_spec(data, types, "skip")
    return Skip(**data)
