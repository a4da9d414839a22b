"""What there is to do, before anything is written: source, captions, models and cache -> a plan."""

import os
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from latentprep import __version__
from latentprep.cache.leftovers import Leftover, find_leftovers, find_missing, recover
from latentprep.cache.manifest import Manifest, find_manifest, read_skips
from latentprep.cache.ours import check_ours
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.shard import ShardEntry, uncond_name
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UserError
from latentprep.human import counted, human_bytes, printable
from latentprep.options import EncodeOptions
from latentprep.prepare.devices import choose_device, default_shard_bytes
from latentprep.prepare.images.load import LoadOptions
from latentprep.prepare.images.pillow import decoder_versions, limit_pixels
from latentprep.prepare.models.doors import VaeModel
from latentprep.prepare.models.model_set import Models, open_models
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.plan.plan import Plan, RowBytes, is_current, make_plan
from latentprep.prepare.source.captions import Captioned, add_captions
from latentprep.prepare.source.folder import Source, hash_images, list_folder
from latentprep.prepare.source.masks import Masks, add_masks, list_masks, paths_of
from latentprep.recipe import latents_recipe, recipe_changes, text_recipe
from latentprep.records import REASONS, Item, Skip

Say = Callable[[str], None]
LATENT_CHANGES = ("new", "changed", "gone", "returned")  # of records.CHANGES: those that need no other text


@dataclass(frozen=True)
class Prepared:
    """A plan and all it rests on; nothing has been written and no weights are loaded."""

    options: EncodeOptions
    storage: Storage
    models: Models
    device: str
    recipe: dict[str, Any]
    bare_recipe: dict[str, Any]  # the same without cond: what the first pass writes
    manifest: Manifest | None
    found: dict[str, Stamp]  # units of the plan whose latents an unfinished run has left, and those files
    captioned: Captioned
    masks: Masks | None
    row_bytes: RowBytes
    plan: Plan

    @property
    def load_options(self) -> LoadOptions:
        return LoadOptions.from_recipe(
            self.options.source, self.models.vae.factor, self.masks, self.recipe["latents"], self.options.strict_images
        )

    @property
    def conditions(self) -> dict[str, str]:
        return skip_conditions(self.options)

    @property
    def workers(self) -> int:
        return self.options.workers or min(8, os.cpu_count() or 1)

    @property
    def is_done(self) -> bool:
        """Whether the cache holds everything already, as it should."""
        return (
            self.manifest is not None
            and not (self.plan.new or self.plan.retext)
            and self.manifest.shards == self.plan.kept
            and read_skips(self.storage) == sorted(self.plan.skips, key=lambda skip: skip.key)
            and (self.options.only == "latents" or has_uncond(self.storage, self.manifest))
        )


def skip_conditions(options: EncodeOptions) -> dict[str, str]:
    """What a skip depends on, for each of records.CONDITIONS; "" keeps no skip."""
    libraries = versions()
    return {
        "machine": "",
        "decoder": decoder_versions(),
        "limits": f"--max-megapixels {options.max_pixels / 1e6:g}" + " --strict-images" * options.strict_images,
        "encoder": f"torch {libraries['torch']}, diffusers {libraries['diffusers']}",
    }


def check_paths(options: EncodeOptions, say: Say) -> None:
    """Raise UserError where --out cannot be a cache of its own."""
    storage = Storage(options.out)
    if not storage.is_local:
        if "memory" in storage.fs.protocol:
            say(f"out      {options.out}: in the memory of this process, and gone with it")
        return
    out = Path(storage.path)
    if out.resolve() == options.source.resolve():
        raise UserError(f"--out {options.out}: is the image folder itself. Give the cache a folder of its own.")
    if out.is_file():
        raise UserError(f"--out {options.out}: is a file, expected a folder for the cache.")
    check_ours(storage)


def list_source(options: EncodeOptions, say: Say) -> tuple[Source, Masks | None]:
    """The image folder, and the masks of its images where there are such. Raises UserError."""
    own = [*([] if "://" in options.out else [Path(options.out)]), *([options.masks] if options.masks else [])]
    source = list_folder(options.source, without=own)  # which hold no images to encode, though they may lie in it
    if options.masks is None:
        return source, None
    masks = list_masks(options.masks)
    items, without = add_masks(source.items, masks)
    source = replace(source, items=items, skips=[*source.skips, *without])
    with_mask = sum(masks.path_of(item.key) is not None for item in source.items)
    say(f"masks    {masks.folder}: {with_mask:,} of {counted(len(source.items), 'image')} have one")
    return source, masks


def prepare(options: EncodeOptions, say: Say, models: Models | None = None) -> Prepared:
    """The plan for a folder and a cache; says what it chose and why. Raises UserError.

    `models` are those of the options, or others that are in memory already.
    """
    limit_pixels(options.max_pixels)
    source, masks = list_source(options, say)
    captioned = add_captions(source, options.text)
    models = models or open_models(options, say)
    vae, text = models.vae, models.text
    place = make_place(options.geometry, vae.factor * models.patch)
    device, dtype, reason = choose_device(options.device, options.dtype)
    at = f" at {models.commit}" if models.commit else ""
    say(f"model    {options.model}{at}" + (f", VAE {options.vae}" if options.vae else "") + f" (factor {vae.factor})")
    if options.store != "mean" and not vae.has_std:
        say("store    mean: this VAE gives no std")
    recipe, bare_recipe = (make_recipe(options, models, dtype, with_cond) for with_cond in (True, False))
    upcast = "; the VAE in float32, since it overflows in float16" if recipe["latents"]["dtype"] != dtype else ""
    say(f"device   {device}, {dtype} ({reason}){upcast}")
    storage = Storage(options.out)
    manifest = None if options.overwrite else find_manifest(storage)
    leftovers = {} if options.overwrite else find_leftovers(storage, manifest)
    check_recipe(options, recipe, manifest, leftovers)
    leftovers = {unit: leftover for unit, leftover in leftovers.items() if leftover.recipe == recipe["latents"]}
    if manifest is not None and manifest.recipe["libraries"] != recipe["libraries"]:
        changes = "; ".join(recipe_changes(manifest.recipe["libraries"], recipe["libraries"]))
        say(f"versions {changes}: latents that are new may differ from the others in their last digits")
    cond_values = options.text.prompts_per_image * text.num_values(options.text) if text else 0
    row_bytes = estimate_row_bytes(recipe, vae, cond_values)
    shard_bytes = options.shard_bytes or default_shard_bytes(device)
    conditions = skip_conditions(options)
    skips = [*source.skips, *captioned.skips]
    unread = {skip.key for skip in skips if REASONS[skip.reason][0] == "machine"}

    def hash_items(items: list[Item]) -> list[bytes | None]:
        nbytes = sum(item.nbytes for item in items)
        say(f"hash     {counted(len(items), 'image')} ({human_bytes(nbytes)}) whose time or name is new")
        return list(hash_images(paths_of(item.key, options.source, masks) for item in items))

    def make(shards: list[ShardEntry], known_skips: list[Skip]) -> Plan:
        return make_plan(
            captioned.items, skips, place, row_bytes, recipe=recipe, shard_bytes=shard_bytes,
            storage=storage, shards=shards, known_skips=[] if options.retry_skipped else known_skips,
            conditions=conditions, hash_files=hash_items, unread=unread, check_content=options.check_content,
        )  # fmt: skip

    plan = plan_with_leftovers(make, storage, manifest, leftovers, conditions)
    found = {unit.id: leftovers[unit.id].latents_file for unit in plan.new if unit.id in leftovers}
    plan = narrow(plan, options, found, say)
    check_source(options, plan, manifest, leftovers)
    if plan.unread:
        named = ", ".join(map(printable, plan.unread[:3])) + (", ..." if len(plan.unread) > 3 else "")
        say(f"unread   {counted(len(plan.unread), 'image')} cannot be read now, what the cache has stays: {named}")
    for line in plan.lost:
        say(f"lost     {line}: its images are encoded again")
    if manifest is None and not plan.new and not plan.kept and not plan.retext:
        raise UserError(nothing_usable(options.source, plan.skips))
    return Prepared(
        options, storage, models, device, recipe, bare_recipe, manifest, found, captioned, masks, row_bytes, plan
    )


def check_source(options: EncodeOptions, plan: Plan, manifest: Manifest | None, leftovers: dict[str, Leftover]) -> None:
    """Raise UserError if this is not the folder that the cache was made from: most images would be gone from it.

    That is so if more than half of them are, or any of them and the folder has another path than it had. With another
    path it is also refused if more than half have other content: other folders may have the same names, as 0001.png.
    """
    gone, changed = (sum(change.what == what for change in plan.changes) for what in ("gone", "changed"))
    held = manifest.num_images if manifest is not None else 0
    held += sum(rows for leftover in leftovers.values() for _, rows, _ in leftover.groups)
    before = str(manifest.made_with.get("source") or "") if manifest is not None else ""
    now = str(options.source.resolve())
    is_other = before not in ("", now)
    if options.allow_gone or not (2 * gone > held or (is_other and (gone or 2 * changed > held))):
        return
    what = f"{gone:,} of its {counted(held, 'image')} are not"
    if not gone:
        what = f"{changed:,} of its {counted(held, 'image')} have another content"
    raise UserError(
        f"{options.out}: {what} in SOURCE {now}"
        + (f"; it was made from {before}" if is_other else "")
        + ". Nothing was written. Is that the right folder, and wholly there? Give another --out, or --allow-gone "
        "if this is what you want."
    )


def nothing_usable(folder: Path, skips: list[Skip], failures: Sequence[str] = ()) -> str:
    """Says that a folder gives a cache of no images at all, and an example of why; `failures` are faults of ours."""
    if failures:
        return f"SOURCE {folder}: no cache was made, since {counted(len(failures), 'unit')} failed ({failures[0]})."
    why = f"{skips[0].key}: {skips[0].reason}, {skips[0].detail}"
    reasons = Counter(skip.reason for skip in skips).most_common()
    counts = "; " + ", ".join(f"{count:,} {reason}" for reason, count in reasons) if len(reasons) > 1 else ""
    return f"SOURCE {folder}: none of its {len(skips):,} images can be used ({why}{counts}). Nothing was written."


def make_recipe(options: EncodeOptions, models: Models, dtype: str, with_cond: bool) -> dict[str, Any]:
    """Everything that decides the numbers in the cache. Without cond it is that of the first pass."""
    vae, text = models.vae, models.text if with_cond else None
    is_upcast = models.is_upcast and (options.dtype, dtype) == ("auto", "float16")
    return {
        "latents": latents_recipe(
            vae=vae.digest, geometry=options.geometry, images=options.images, flip=options.flip,
            dtype="float32" if is_upcast else dtype, store=options.store if vae.has_std else "mean",
            store_dtype=options.store_dtype, tiling=options.tiling,
        ),
        "text": text_recipe(
            text_encoder=text.digest if text else None, settings=text.settings(options.text) if text else {},
            options=options.text, seed=options.seed, dtype=dtype, store_dtype=options.store_dtype,
        ),
        "libraries": versions(),
    }  # fmt: skip


def check_recipe(
    options: EncodeOptions, recipe: dict[str, Any], manifest: Manifest | None, leftovers: dict[str, Leftover]
) -> None:
    """Raise UserError where the folder holds a cache, finished or not, whose latents were made otherwise."""
    made = [manifest.recipe["latents"]] if manifest is not None else [left.recipe for left in leftovers.values()]
    for before in made:
        changes = list(recipe_changes(before, recipe["latents"]))
        if changes:
            kind = "a cache" if manifest is not None else "an unfinished cache"
            raise UserError(
                f"{options.out}: holds {kind} of another recipe ({'; '.join(changes)}; cache -> asked). "
                "Give another --out, the options it was made with, or --overwrite to start anew."
            )


def plan_with_leftovers(
    make: Callable[[list[ShardEntry], list[Skip]], Plan],
    storage: Storage,
    manifest: Manifest | None,
    leftovers: dict[str, Leftover],
    conditions: dict[str, str],
) -> Plan:
    """The plan, where what an unfinished run has left counts as done.

    If the folder has not changed since, its units are those of the plan, and are known by their names. If it has, or
    if one of their skips is to be tried again, every whole shard is taken into the cache as it is, and only what is
    left is cut into units.
    """
    missing = find_missing(storage, manifest.shards) if manifest is not None else {}
    shards = [shard for shard in manifest.shards if shard.unit not in missing] if manifest is not None else []
    skips = read_skips(storage) if manifest is not None else []
    plan = make(shards, skips)
    left_skips = [skip for leftover in leftovers.values() for skip in leftover.skips]
    if leftovers.keys() - {unit.id for unit in plan.new} or not all(is_current(s, conditions) for s in left_skips):
        recovered = [entry for leftover in leftovers.values() if (entry := recover(storage, leftover)) is not None]
        plan = make([*shards, *recovered], [*skips, *left_skips])
        of_no_use = {entry.unit for entry in plan.kept if not entry.num_images} - {shard.unit for shard in shards}
        plan = replace(plan, kept=[entry for entry in plan.kept if entry.unit not in of_no_use])
    return replace(plan, lost=[*missing.values(), *plan.lost])


def narrow(plan: Plan, options: EncodeOptions, found: Collection[str], say: Say) -> Plan:
    """The part of a plan that --only asks for. Raises UserError where text is to be made for no latents."""
    if options.only == "latents":
        say("only     latents: cond, and captions that changed, are left for later")
        kept = [*plan.kept, *(retext.entry for retext in plan.retext)]
        return replace(plan, retext=[], kept=kept, changes=[c for c in plan.changes if c.what in LATENT_CHANGES])
    if options.only == "text":
        new = [unit for unit in plan.new if unit.id in found]
        if not (new or plan.retext or plan.kept):
            raise UserError(f"--only text: {options.out} holds no latents yet. Encode them first, with --only latents.")
        later = {item.key for unit in plan.new if unit.id not in found for item in unit.items}
        left = f": {counted(len(later), 'image')} without latents left for later" if later else ""
        say(f"only     text{left}")
        return replace(plan, new=new, changes=[c for c in plan.changes if c.key not in later])
    return plan


def has_uncond(storage: Storage, manifest: Manifest) -> bool:
    """Whether the cond of the empty prompt is there, if it should be."""
    if manifest.uncond_file is None:
        return True
    return storage.sizes().get(uncond_name(manifest.uncond)) == manifest.uncond_file.nbytes


def estimate_row_bytes(recipe: dict[str, Any], vae: VaeModel, cond_values: int) -> RowBytes:
    """What rows will cost on disk, from the configs alone; `cond_values` numbers are stored of an image's prompts."""
    posterior = 2 if recipe["latents"]["store"] == "mean+std" else 1
    views = len(recipe["latents"]["views"])
    latent = views * (
        posterior * vae.latent_channels * TORCH_DTYPES[recipe["latents"]["store_dtype"]].itemsize + 2
    )  # + 2: weight
    cond = cond_values * TORCH_DTYPES[recipe["text"]["store_dtype"]].itemsize if cond_values else 0
    return RowBytes(latent, cond + 512, vae.factor)  # 512: key, captions and prompts


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers come from."""
    libraries = ("torch", "diffusers", "transformers", "pillow")
    return {"latentprep": __version__, **{name: version(name) for name in libraries}}
