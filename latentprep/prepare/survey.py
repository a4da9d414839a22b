"""What there is to do, before anything is written: source, captions, models and cache -> a plan."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial

from latentprep.cache.borrowed import find_cond_files
from latentprep.cache.leftovers import find_leftovers, find_missing
from latentprep.cache.manifest import LatentFacts, Manifest, find_manifest, read_skips
from latentprep.cache.names import uncond_name
from latentprep.cache.schema import CONTROLS
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UserError
from latentprep.human import counted, human_bytes, printable
from latentprep.options import EncodeOptions
from latentprep.prepare.devices import (
    choose_device,
    choose_devices,
    choose_dtype,
    default_batch_size,
    default_shard_bytes,
    default_threads,
)
from latentprep.prepare.engine.where import Where, find_share
from latentprep.prepare.find_images import Images, find_images
from latentprep.prepare.images.load import LoadOptions, read_control_sizes
from latentprep.prepare.images.pillow import limit_pixels
from latentprep.prepare.models.model_set import Models, open_models
from latentprep.prepare.plan.buckets import describe_square, make_place, with_controls
from latentprep.prepare.plan.plan import Plan, Planner, RowBytes
from latentprep.prepare.plan.shared import Prompter, Sharing, share_prompts
from latentprep.prepare.plan.stored import list_known, read_shards
from latentprep.prepare.recipes import estimate_row_bytes, make_facts, make_recipe, skip_conditions
from latentprep.prepare.refusals import (
    Say,
    check_recipe,
    check_seen_images,
    check_source,
    nothing_usable,
    told_what_text_needs,
)
from latentprep.prepare.source.content import hash_images
from latentprep.prepare.work.latents import LatentsWorker
from latentprep.prepare.work.text import TextWorker
from latentprep.progress import LateBar, Progress
from latentprep.recipe import Recipe, tell_changes
from latentprep.records import REASONS, Item, Placement, Skip
from latentprep.system import rare_collections


@dataclass(frozen=True)
class Prepared:
    """A plan and all it rests on; nothing has been written and no weights are loaded."""

    options: EncodeOptions
    storage: Storage
    models: Models
    where: Where
    text_where: Where  # of the text encoders
    recipe: Recipe
    facts: LatentFacts
    manifest: Manifest | None
    known_skips: tuple[Skip, ...]  # what the cache has skipped before
    images: Images
    load_options: LoadOptions
    conditions: Mapping[str, str]  # on which skips depend: one of records.CONDITIONS -> its value in this run
    row_bytes: RowBytes
    plan: Plan
    cond_files: Mapping[str, Stamp]  # id -> those that are there, from which texts may borrow cond
    has_uncond: bool  # whether the cond of the empty prompt is there, or none is asked for

    @property
    def threads(self) -> int:
        """How many decode images, for each device."""
        return self.options.workers or default_threads(len(self.where.devices) * self.where.local_size)

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
            self.text_where.devices[0], options.max_pixels,
            self.load_options if self.recipe.text.sees_images else None,
        )  # fmt: skip

    @property
    def prompter(self) -> Prompter:
        """How rows become prompts."""
        return Prompter(self.recipe.text, self.options.text, self.options.seed)

    @cached_property
    def sharing(self) -> Sharing:
        """Which prompts of the plan several shards have, and where their cond is or will be."""
        of_prompt = self.row_bytes.per_row // self.options.text.prompts_per_image
        shard_bytes = self.options.shard_bytes or default_shard_bytes(self.where.devices[0])
        prompts_per_file = max(1, shard_bytes // of_prompt)
        return share_prompts(self.storage, self.plan, self.prompter, self.cond_files, prompts_per_file)

    @property
    def is_done(self) -> bool:
        """Whether the cache holds everything already, as it should."""
        return (
            self.manifest is not None
            and not (self.plan.units or self.plan.text_tasks)
            and set(self.manifest.shards) == set(self.plan.kept)
            and self.manifest.sets == self.images.facts
            and sorted(self.known_skips, key=_key) == sorted(self.plan.skips, key=_key)
            and (self.options.only == "latents" or self.has_uncond)
        )


def _key(skip: Skip) -> str:
    return skip.key


@rare_collections()
def prepare(
    options: EncodeOptions, progress: Progress, models: Models | None = None, images: Images | None = None
) -> Prepared:
    """The plan for a source and a cache; says what it chose and why. Raises UserError.

    `models` are those of the options, or others that are in memory already; `images` those of the source, or some.
    """
    limit_pixels(options.max_pixels)
    say = progress.say
    storage = Storage(options.out)
    manifest = None if options.overwrite else find_manifest(storage)
    missing = find_missing(storage, manifest.shards) if manifest is not None else {}
    shards = [shard for shard in manifest.shards if shard.id not in missing] if manifest is not None else []
    with LateBar(progress, len(shards), "read", "shard") as bar:
        stored = read_shards(storage, shards, bar.update)
    with told_what_text_needs(options):
        images = images or find_images(options, progress, {} if options.check_content else list_known(storage, stored))
    models = models or open_models(options, say)
    where, dtype = choose_where(options, models, say)
    text_where, text_dtype = choose_text_where(options, where, dtype, say)
    recipe = make_recipe(options, models, dtype, text_dtype)
    check_seen_images(options, models, recipe)
    say_precision(recipe, dtype, say)
    if (line := describe_square(options.geometry, models.vae.factor * models.patch)) is not None:
        say(line)
    leftovers = {} if options.overwrite else find_leftovers(storage, manifest)
    check_recipe(options, recipe, manifest, leftovers)
    leftovers = {name: left for name, left in leftovers.items() if left.recipe == recipe.latents.to_json()}
    if manifest is not None and manifest.recipe.libraries != recipe.libraries:
        changes = tell_changes(manifest.recipe.libraries, recipe.libraries)
        say(f"versions {changes}: latents that are new may differ from the others in their last digits")
    conditions, known_skips = skip_conditions(options), read_skips(storage) if manifest is not None else []
    row_bytes = estimate_row_bytes(recipe, models, options)

    def hash_items(items: list[Item]) -> list[bytes | None]:
        nbytes = sum(item.nbytes for item in items)
        say(f"hash     {counted(len(items), 'image')} ({human_bytes(nbytes)}) whose time or name is new")
        hashes = hash_images(images.source, images.partners, ((item.key, item.nbytes) for item in items))
        with LateBar(progress, len(items), "hash") as bar:
            return list(bar.each(hashes))

    skips = [*images.skips, *images.captioned.skips]
    place = make_place(options.geometry, models.vae.factor * models.patch)
    named = manifest.cond_files if manifest is not None else {}
    # with several ranks, what the others have done by now must not matter
    cond_files = {} if options.overwrite else find_cond_files(storage, named, others=where.world_size == 1)
    load = LoadOptions.from_recipe(
        images.source, models.vae.factor, images.masks, recipe.latents, options.strict_images, images.controls,
        models.patch,
    )  # fmt: skip
    planner = Planner(
        images.captioned.items, skips, place, row_bytes, recipe,
        options.shard_bytes or default_shard_bytes(where.devices[0]), conditions, hash_items,
        unread={skip.key for skip in skips if REASONS[skip.reason][0] == "machine"},
        check_content=options.check_content, only=options.only, sets=images.facts, cond_files=cond_files,
        place_controls=partial(place_controls, load) if options.control_size == "own" else None,
    )  # fmt: skip
    known = [] if options.retry_skipped else known_skips
    plan = planner.plan(storage, stored, known, leftovers, where.world_size > 1)
    with told_what_text_needs(options):
        check_source(options, plan, manifest, leftovers)
    if where.world_size > 1 and len(plan.leftovers) < len(leftovers):
        say(
            f"found    {counted(len(leftovers) - len(plan.leftovers), 'shard')} of an unfinished run that planned "
            "otherwise: only a run without ranks takes such up"
        )
    say_plan(options, plan, [*missing.values(), *plan.lost], say)
    sharing = len(where.devices) * where.world_size
    if 0 < len(plan.units) < sharing:
        say(
            f"shards   {counted(len(plan.units), 'shard')} to encode for {sharing} devices, which share whole ones: "
            "a smaller --shard-size makes more"
        )
    if manifest is None and not plan.units and not plan.kept and not plan.text_tasks:
        raise UserError(nothing_usable(options, plan.skips))
    return Prepared(
        options, storage, models, where, text_where, recipe, make_facts(models, recipe), manifest, tuple(known_skips),
        images, load, conditions, row_bytes, plan, cond_files,
        manifest is not None and has_uncond(storage, manifest, models),
    )  # fmt: skip


def place_controls(load: LoadOptions, item: Item, placement: Placement) -> Placement | Skip:
    """The placement of an item with the buckets of its control images added; a Skip if one of them fits no bucket.
    Raises UserError.
    """
    sizes = read_control_sizes(item, load)
    if isinstance(sizes, Skip):
        return sizes
    buckets = []
    for name, size in zip(CONTROLS, sizes, strict=False):
        own = load.place_control(size, item.size, placement)
        if not isinstance(own, Placement):
            reason, detail = own
            return item.skip(reason, f"{name}: {detail}")
        buckets.append(own.bucket)
    return with_controls(placement, buckets)


def choose_where(options: EncodeOptions, models: Models, say: Say) -> tuple[Where, str]:
    """Devices, share of the work, and the number type of the models; says them. Raises UserError."""
    share = find_share(options.rank, options.world_size)
    devices, reason = choose_devices(options.device, options.devices, share.local_rank)
    dtype = choose_dtype(options.dtype, devices[0])
    at = f" at {models.commit}" if models.commit else ""
    vae = f", VAE {options.vae}" if options.vae else ""
    say(f"model    {options.model}{at}{vae} (factor {models.vae.factor})")
    if options.store != "mean" and not models.vae.has_std:
        say("store    mean: this VAE gives no std")
    say(f"device   {', '.join(devices)}, {dtype} ({reason})")
    if share.world_size > 1:
        say(f"rank     {share.rank} of {share.world_size} ({share.origin}): they take the shards in turn")
        if options.overwrite:
            raise UserError(
                "--overwrite with several ranks: one would delete what another has made. Delete the cache first."
            )
    return Where(devices, share.rank, share.world_size, share.local_size), dtype


def choose_text_where(options: EncodeOptions, where: Where, dtype: str, say: Say) -> tuple[Where, str]:
    """Where the text encoders run, and their number type; says so if it is not where the VAE runs. Raises UserError.

    --text-device names one device, so the text encoders run in one process: each further one would hold all of
    their weights again.
    """
    if options.text_device is None or not options.needs_text_encoder:
        return where, dtype
    share = find_share(options.rank, options.world_size)
    device, reason = choose_device(options.text_device, share.local_rank, "--text-device")
    dtype = choose_dtype(options.dtype, device)
    say(f"         the text encoders on {device}, {dtype} ({reason})")
    return replace(where, devices=(device,)), dtype


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


def has_uncond(storage: Storage, manifest: Manifest, models: Models) -> bool:
    """Whether the cond of the empty prompt is there, or none is asked for."""
    if models.text is None or manifest.recipe.text.sees_images:
        return True
    uncond = manifest.uncond
    return uncond is not None and storage.sizes().get(uncond_name(uncond.id)) == uncond.file.nbytes
