"""The cache behind a PersonalizedBase, brought up to date by models that are in memory already."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch

from latentprep.cache.latents import open_latents, open_partial
from latentprep.cache.lock import hold
from latentprep.cache.manifest import Manifest, find_manifest, open_manifest
from latentprep.cache.names import FOLDER, PARTIAL_NAME, SHARD_NAME
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.keywords import Keywords
from latentprep.options import EncodeOptions
from latentprep.personalized.fingerprint import is_fingerprint, is_other_version, recognize
from latentprep.personalized.first_stage import Autocast, is_autocast_on
from latentprep.personalized.models import LiveText, LiveTextModel, LiveVae, LiveVaeModel
from latentprep.prepare.encode import encode
from latentprep.prepare.models.model_set import Models
from latentprep.prepare.refusals import check_paths
from latentprep.prepare.survey import prepare
from latentprep.progress import Silent
from latentprep.recipe import tell_changes, to_json
from latentprep.records import is_flipped

Interrupted = Callable[[], bool]

# what an option of the command line is called here; the values behind them are left as they are
KEYWORDS = Keywords({
    "--out": "cache", "--allow-gone": "allow_gone=True", "--overwrite": "overwrite=True",
    "--store-dtype": "store_dtype", "--template": "template_file", "--placeholder": "placeholder_token",
    "--word-regex": "filename_word_regex", "--width": "width", "--height": "height", "--model": "cond_model",
    "--flip": "flip_p", "--dtype": "the model's dtype", "SOURCE": "data_root",
})  # fmt: skip


class Stopped(KeyboardInterrupt):
    """The caller asked for a stop: the engine keeps what is done, as it does after Ctrl-C."""


def update_cache(
    options: EncodeOptions,
    vae: LiveVae,
    cond_model: Any,
    autocast: Autocast,
    version: str,
    interrupted: Interrupted | None,
) -> None:
    """Encode what is new or has changed. Raises UserError."""
    if options.text.include_cond and cond_model is None:
        raise UserError("include_cond=True: give cond_model=, a pipeline or a callable from prompts to [B,T,D].")

    def check() -> None:
        try:
            is_stopped = interrupted is not None and interrupted()
        except Exception as error:  # the caller's own: it may raise anything
            raise UserError(f"interrupted: raised {type(error).__name__}: {error}.") from error
        if is_stopped:
            raise Stopped

    storage = Storage(options.out)
    # the caller's autocast is for models of the ancestor's kind, and changes nothing else
    with torch.autocast(vae.device.type, enabled=False) if is_autocast_on(vae.device) else nullcontext():
        check_paths(options, print)
        options = keep_what_is_there(options, storage, cond_model)
        text = LiveText(cond_model, vae.device, autocast, check) if options.text.include_cond else None
        try:
            models, options = find_models(options, storage, vae, text, version)
            if prepare(options, Silent(), models).is_done:
                return
            with hold(storage):
                prepared = prepare(options, Silent(), models)  # what another process has done meanwhile counts
                print("Preparing dataset...")
                outcome = encode(prepared, lambda total, stage: make_bar(total, stage, check))
        except Stopped:
            raise UserError("interrupted: what is encoded stays, and the next start goes on from there.") from None
    if outcome.failures:
        raise UserError(f"{options.source}: {'; '.join(outcome.failures)}")
    if outcome.skips:
        print(f"{counted(len(outcome.skips), 'image')} skipped: {storage.locate('skipped.jsonl')} says why")


def check_without_models(options: EncodeOptions) -> None:
    """Raise UserError if a cache was made with other settings than these, which no model is there to make."""
    if not options.source.is_dir():
        raise UserError(f"data_root {options.source}: no such folder.")
    recipe = open_manifest(Storage(options.out)).recipe
    if not is_fingerprint(recipe.latents.vae):
        return  # made by latentprep encode, with settings of its own
    asked, made = ({
        "geometry": to_json(geometry), "template": list(text.template) if text.template is not None else None,
        "placeholder": text.placeholder,
    } for geometry, text in ((options.geometry, options.text), (recipe.latents.geometry, recipe.text)))  # fmt: skip
    if changes := tell_changes(made, asked):
        raise UserError(f"{options.out}: was made otherwise ({changes}; cache -> asked). Give model= to make it anew.")


def keep_what_is_there(options: EncodeOptions, storage: Storage, cond_model: Any) -> EncodeOptions:
    """The options with the mirrored views and the cond that a cache has, if this start asks for none."""
    if options.overwrite:
        return options
    manifest = find_manifest(storage)
    text = options.text
    if not text.include_cond and manifest is not None and manifest.uncond is not None:
        if cond_model is not None:
            text = replace(text, include_cond=True)
        else:
            print(f"{options.out}: its cond is dropped, since there is no cond_model to keep it up to date")
    has_flips = any(is_flipped(view) for recipe in list_recipes(storage, manifest) for view in recipe["views"])
    return replace(options, text=text, flip=options.flip or has_flips)


def find_models(
    options: EncodeOptions, storage: Storage, vae: LiveVae, text: LiveText | None, version: str
) -> tuple[Models, EncodeOptions]:
    """The models for a run, under the names by which the cache, finished or not, knows them. Runs each once.

    Another version of the caller's asks to start anew.
    """
    manifest = find_manifest(storage) if not options.overwrite else None
    facts = vae.facts(version)
    if not options.overwrite:
        names = [recipe["vae"] for recipe in list_recipes(storage, manifest)]
        facts = replace(facts, digest=recognize(facts.digest, names, vae.dtype))
        if facts.digest not in names and any(is_other_version(facts.digest, name, vae.dtype) for name in names):
            options = replace(options, overwrite=True)
    text_facts = text.facts(version) if text is not None else None
    if text is not None and text_facts is not None and manifest is not None:
        before = manifest.recipe.text.text_encoder
        text_facts = replace(text_facts, digest=recognize(text_facts.digest, [before], text.dtype))
    vae_model = LiveVaeModel(**vars(facts), live=vae)
    text_model = LiveTextModel(**vars(text_facts), live=text) if text is not None and text_facts is not None else None
    return Models(vae_model, text_model, patch=facts.normalization.patch, is_upcast=False), options


def list_recipes(storage: Storage, manifest: Manifest | None) -> list[dict[str, Any]]:
    """The latents recipes of a cache; of one that is not finished, those of its files."""
    if manifest is not None:
        return [manifest.recipe.latents.to_json()]
    recipes = []
    for name in storage.names(FOLDER):
        try:
            if match := PARTIAL_NAME.fullmatch(name):
                metadata = open_partial(storage, match[1]).metadata
            elif (match := SHARD_NAME.fullmatch(name)) and not match[2]:
                metadata = open_latents(storage, match[1]).metadata
            else:
                continue
        except (FileNotFoundError, UserError):
            continue  # prepare says what is to be said of it
        recipe = metadata.get("recipe")
        if isinstance(recipe, dict) and isinstance(recipe.get("vae"), str) and isinstance(recipe.get("views"), list):
            recipes.append(recipe)
    return recipes


def make_bar(total: int, stage: str, check: Callable[[], None]) -> Any:
    """A progress bar that calls `check` at every step."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            done: bool | None = super().update(n)
            check()
            return done

    return Bar(total=total, desc=stage, unit="img", disable=not total)


@contextmanager
def keywords_for_options() -> Iterator[None]:
    """Errors that name options of the command line name the keywords of PersonalizedBase instead."""
    try:
        yield
    except UserError as error:
        raise type(error)(KEYWORDS.translate(str(error))) from None
