"""What there is to do, before anything is written: source, captions, models and cache -> a plan."""

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path

from latentprep import __version__
from latentprep.cache.leftovers import Leftover, find_leftovers, find_missing
from latentprep.cache.manifest import LatentFacts, Manifest, find_manifest, read_skips
from latentprep.cache.names import uncond_name
from latentprep.cache.ours import check_ours
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted, human_bytes, printable
from latentprep.options import EncodeOptions
from latentprep.prepare.devices import choose_devices, choose_dtype, default_batch_size, default_shard_bytes
from latentprep.prepare.engine.where import Where, find_share
from latentprep.prepare.images.load import LoadOptions
from latentprep.prepare.images.pillow import decoder_versions, limit_pixels
from latentprep.prepare.models.model_set import Models, open_models
from latentprep.prepare.plan.buckets import make_place
from latentprep.prepare.plan.plan import Plan, Planner, RowBytes
from latentprep.prepare.source.captions import Captioned, add_captions
from latentprep.prepare.source.content import hash_images
from latentprep.prepare.source.listing import Listing, list_images
from latentprep.prepare.source.masks import Masks, add_masks, list_masks
from latentprep.prepare.source.sources import open_source
from latentprep.prepare.work.latents import LatentsWorker
from latentprep.prepare.work.text import TextWorker
from latentprep.recipe import LatentsRecipe, Recipe, TextRecipe, recipe_changes
from latentprep.records import REASONS, Item, Skip

Say = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """A plan and all it rests on; nothing has been written and no weights are loaded."""

    options: EncodeOptions
    storage: Storage
    models: Models
    where: Where
    recipe: Recipe
    facts: LatentFacts
    manifest: Manifest | None
    known_skips: tuple[Skip, ...]  # what the cache has skipped before
    captioned: Captioned
    load_options: LoadOptions
    conditions: Mapping[str, str]  # of this run, that skips depend on
    row_bytes: RowBytes
    plan: Plan
    has_uncond: bool  # whether the cond of the empty prompt is there, if it should be

    @property
    def threads(self) -> int:
        """That decode, of each device."""
        return self.options.workers or max(1, min(8, (os.cpu_count() or 1) // len(self.where.devices)))

    @property
    def batch_size(self) -> int:
        """Images that the VAE sees at once."""
        return self.options.batch_size or default_batch_size(self.where.devices[0], self.plan.buckets())

    def latents_worker(self) -> LatentsWorker:
        """What encodes the plan's units."""
        options = self.options
        return LatentsWorker(
            options.out, self.recipe.latents, self.facts, self.recipe.libraries, self.load_options, self.models.vae,
            self.where.devices[0], options.compile, self.batch_size, self.threads, options.max_pixels, self.conditions,
        )  # fmt: skip

    def text_worker(self) -> TextWorker:
        """What makes texts."""
        options = self.options
        return TextWorker(
            options.out, self.recipe.text, self.recipe.libraries, options.text, options.seed, self.models.text,
            self.where.devices[0],
        )  # fmt: skip

    @property
    def is_done(self) -> bool:
        """Whether the cache holds everything already, as it should."""
        return (
            self.manifest is not None
            and not (self.plan.units or self.plan.text_tasks)
            and set(self.manifest.shards) == set(self.plan.kept)
            and sorted(self.known_skips, key=_key) == sorted(self.plan.skips, key=_key)
            and (self.options.only == "latents" or self.has_uncond)
        )


def _key(skip: Skip) -> str:
    return skip.key


def prepare(options: EncodeOptions, say: Say, models: Models | None = None) -> Prepared:
    """The plan for a source and a cache; says what it chose and why. Raises UserError.

    `models` are those of the options, or others that are in memory already.
    """
    limit_pixels(options.max_pixels)
    storage = Storage(options.out)
    listing, masks = list_source(options, say)
    captioned = add_captions(listing, options.text)
    models = models or open_models(options, say)
    where, dtype = choose_where(options, models, say)
    recipe = make_recipe(options, models, dtype)
    say_precision(recipe, dtype, say)
    manifest = None if options.overwrite else find_manifest(storage)
    leftovers = {} if options.overwrite else find_leftovers(storage, manifest)
    check_recipe(options, recipe, manifest, leftovers)
    leftovers = {name: left for name, left in leftovers.items() if left.recipe == recipe.latents.to_json()}
    if manifest is not None and manifest.recipe.libraries != recipe.libraries:
        changes = "; ".join(recipe_changes(manifest.recipe.libraries, recipe.libraries))
        say(f"versions {changes}: latents that are new may differ from the others in their last digits")
    conditions, known_skips = skip_conditions(options), read_skips(storage) if manifest is not None else []
    row_bytes = estimate_row_bytes(recipe, models, options)

    def hash_items(items: list[Item]) -> list[bytes | None]:
        nbytes = sum(item.nbytes for item in items)
        say(f"hash     {counted(len(items), 'image')} ({human_bytes(nbytes)}) whose time or name is new")
        return list(hash_images(listing.source, masks, ((item.key, item.nbytes) for item in items)))

    skips = [*listing.skips, *captioned.skips]
    planner = Planner(
        captioned.items, skips, make_place(options.geometry, models.vae.factor * models.patch), row_bytes, recipe,
        options.shard_bytes or default_shard_bytes(where.devices[0]), conditions, hash_items,
        unread={skip.key for skip in skips if REASONS[skip.reason][0] == "machine"},
        check_content=options.check_content, only=options.only,
    )  # fmt: skip
    missing = find_missing(storage, manifest.shards) if manifest is not None else {}
    shards = [shard for shard in manifest.shards if shard.id not in missing] if manifest is not None else []
    known = [] if options.retry_skipped else known_skips
    plan = planner.plan(storage, shards, known, leftovers, is_shared=where.world_size > 1)
    check_source(options, plan, manifest, leftovers)
    if where.world_size > 1 and len(plan.found) < len(leftovers):
        say(
            f"found    {counted(len(leftovers) - len(plan.found), 'shard')} of an unfinished run that planned "
            "otherwise: only a run without ranks takes such up"
        )
    say_plan(options, plan, [*missing.values(), *plan.lost], say)
    if manifest is None and not plan.units and not plan.kept and not plan.text_tasks:
        raise UserError(nothing_usable(options, plan.skips))
    return Prepared(
        options, storage, models, where, recipe, make_facts(models, recipe), manifest, tuple(known_skips), captioned,
        LoadOptions.from_recipe(listing.source, models.vae.factor, masks, recipe.latents, options.strict_images),
        conditions, row_bytes, plan, manifest is not None and has_uncond(storage, manifest),
    )  # fmt: skip


def list_source(options: EncodeOptions, say: Say) -> tuple[Listing, Masks | None]:
    """The images, and the masks of its images where there are such. Raises UserError."""
    own = [*([] if "://" in options.out else [Path(options.out)]), *([options.masks] if options.masks else [])]
    # which hold no images to encode, though they may lie in it
    listing = list_images(open_source(options.source, without=own))
    if options.masks is None:
        return listing, None
    masks = list_masks(options.masks)
    items, without = add_masks(listing.items, masks)
    listing = replace(listing, items=items, skips=[*listing.skips, *without])
    with_mask = sum(masks.find(item.key) is not None for item in items)
    say(f"masks    {masks.source.where}: {with_mask:,} of {counted(len(items), 'image')} have one")
    return listing, masks


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


def choose_where(options: EncodeOptions, models: Models, say: Say) -> tuple[Where, str]:
    """Devices, share of the work, and the number type of the models; says them. Raises UserError."""
    share = find_share(options.rank, options.world_size)
    devices, reason = choose_devices(options.devices or options.device, share.local_rank)
    dtype = choose_dtype(options.dtype, devices[0])
    at = f" at {models.commit}" if models.commit else ""
    vae = f", VAE {options.vae}" if options.vae else ""
    say(f"model    {options.model}{at}{vae} (factor {models.vae.factor})")
    if options.store != "mean" and not models.vae.has_std:
        say("store    mean: this VAE gives no std")
    say(f"device   {', '.join(devices)}, {dtype} ({reason})")
    if share.world_size > 1:
        say(f"rank     {share.rank} of {share.world_size} ({share.origin}): every {share.world_size}th unit is its own")
        if options.overwrite:
            raise UserError(
                "--overwrite with several ranks: one would delete what another has made. Delete the cache first."
            )
    return Where(devices, share.rank, share.world_size), dtype


def say_precision(recipe: Recipe, dtype: str, say: Say) -> None:
    if recipe.latents.dtype != dtype:
        say("         the VAE in float32, since it overflows in float16")


def say_plan(options: EncodeOptions, plan: Plan, lost: Sequence[str], say: Say) -> None:
    """What a plan leaves out, and why. Raises UserError where text is to be made for no latents."""
    if options.only == "latents":
        say("only     latents: cond, and captions that changed, are left for later")
    if options.only == "text":
        if not (plan.units or plan.text_tasks or plan.kept):
            raise UserError(f"--only text: {options.out} holds no latents yet. Encode them first, with --only latents.")
        left = f": {counted(len(plan.later), 'image')} without latents left for later" if plan.later else ""
        say(f"only     text{left}")
    if plan.unread:
        named = ", ".join(map(printable, plan.unread[:3])) + (", ..." if len(plan.unread) > 3 else "")
        say(f"unread   {counted(len(plan.unread), 'image')} cannot be read now, what the cache has stays: {named}")
    for line in lost:
        say(f"lost     {line}: its images are encoded again")


def check_source(
    options: EncodeOptions, plan: Plan, manifest: Manifest | None, leftovers: Mapping[str, Leftover]
) -> None:
    """Raise UserError if this is not the source that the cache was made from: most images would be gone from it.

    That is so if more than half of them are, or any of them and the source has another path than it had. With another
    path it is also refused if more than half have other content: other folders may have the same names, as 0001.png.
    """
    gone, changed = (sum(change.what == what for change in plan.changes) for what in ("gone", "changed"))
    held = manifest.num_images if manifest is not None else 0
    held += sum(leftover.num_rows for leftover in leftovers.values())
    before = manifest.made_with.source or "" if manifest is not None else ""
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


def nothing_usable(options: EncodeOptions, skips: Sequence[Skip], failures: Sequence[str] = ()) -> str:
    """Says that a source gives a cache of no images at all, and an example of why; `failures` are faults of ours."""
    where = f"SOURCE {options.source}"
    if failures:
        return f"{where}: no cache was made, since {counted(len(failures), 'unit')} failed ({failures[0]})."
    why = f"{skips[0].key}: {skips[0].reason}, {skips[0].detail}"
    reasons = Counter(skip.reason for skip in skips).most_common()
    counts = "; " + ", ".join(f"{count:,} {reason}" for reason, count in reasons) if len(reasons) > 1 else ""
    return f"{where}: none of its {len(skips):,} images can be used ({why}{counts}). Nothing was written."


def skip_conditions(options: EncodeOptions) -> dict[str, str]:
    """What a skip depends on, for each of records.CONDITIONS; "" keeps no skip."""
    libraries = versions()
    return {
        "machine": "",
        "decoder": decoder_versions(),
        "limits": f"--max-megapixels {options.max_pixels / 1e6:g}" + " --strict-images" * options.strict_images,
        "encoder": f"torch {libraries['torch']}, diffusers {libraries['diffusers']}",
    }


def make_recipe(options: EncodeOptions, models: Models, dtype: str) -> Recipe:
    """Everything that decides the numbers in the cache."""
    vae, text = models.vae, models.text
    is_upcast = models.is_upcast and (options.dtype, dtype) == ("auto", "float16")
    return Recipe(
        LatentsRecipe.of(
            vae=vae.digest, geometry=options.geometry, images=options.images, flip=options.flip,
            dtype="float32" if is_upcast else dtype, store=options.store if vae.has_std else "mean",
            store_dtype=options.store_dtype, tiling=options.tiling,
        ),
        TextRecipe.of(
            text_encoder=text.digest if text else None, settings=text.settings(options.text) if text else {},
            options=options.text, seed=options.seed, dtype=dtype, store_dtype=options.store_dtype,
        ),
        versions(),
    )  # fmt: skip


def make_facts(models: Models, recipe: Recipe) -> LatentFacts:
    """What a reader must know of the latents."""
    return LatentFacts(models.vae.normalization, models.vae.factor, models.vae.latent_channels, recipe.latents.views)


def check_recipe(
    options: EncodeOptions, recipe: Recipe, manifest: Manifest | None, leftovers: Mapping[str, Leftover]
) -> None:
    """Raise UserError where the folder holds a cache, finished or not, whose latents were made otherwise."""
    made = [manifest.recipe.latents.to_json()] if manifest is not None else [left.recipe for left in leftovers.values()]
    for before in made:
        changes = list(recipe_changes(before, recipe.latents.to_json()))
        if changes:
            kind = "a cache" if manifest is not None else "an unfinished cache"
            raise UserError(
                f"{options.out}: holds {kind} of another recipe ({'; '.join(changes)}; cache -> asked). "
                "Give another --out, the options it was made with, or --overwrite to start anew."
            )


def has_uncond(storage: Storage, manifest: Manifest) -> bool:
    """Whether the cond of the empty prompt is there, if it should be."""
    if manifest.uncond is None:
        return True
    return storage.sizes().get(uncond_name(manifest.uncond.id)) == manifest.uncond.file.nbytes


def estimate_row_bytes(recipe: Recipe, models: Models, options: EncodeOptions) -> RowBytes:
    """What rows will cost on disk, from the configs alone."""
    posterior = 2 if recipe.latents.store == "mean+std" else 1
    itemsize = TORCH_DTYPES[options.store_dtype].itemsize
    latent = len(recipe.latents.views) * (posterior * models.vae.latent_channels * itemsize + 2)  # + 2: weight
    cond = options.text.prompts_per_image * models.text.num_values(options.text) * itemsize if models.text else 0
    return RowBytes(latent, cond + 512, models.vae.factor)  # 512: key, captions and prompts


def versions() -> dict[str, str]:
    """Versions of the libraries that the numbers come from."""
    libraries = ("torch", "diffusers", "transformers", "pillow")
    return {"latentprep": __version__, **{name: version(name) for name in libraries}}
