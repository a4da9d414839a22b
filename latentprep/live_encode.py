"""The cache behind a PersonalizedBase, brought up to date by models that are in memory already."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from latentprep.cache.leftovers import find_leftovers
from latentprep.cache.lock import hold
from latentprep.cache.manifest import Manifest, find_manifest
from latentprep.cache.storage import Storage
from latentprep.config import EncodeOptions
from latentprep.errors import UserError
from latentprep.live import Autocast, LiveText, LiveVae, recognize
from latentprep.prepare.encode import encode
from latentprep.prepare.models.model_set import Models
from latentprep.prepare.survey import prepare
from latentprep.records import is_flipped
from latentprep.units import counted

Interrupted = Callable[[], bool]

# what an option of the command line is called here
KEYWORDS = {
    "--out": "cache=", "--allow-gone": "allow_gone=True", "--overwrite": "overwrite=True",
    "--store-dtype": "store_dtype=", "--template": "template_file=", "--placeholder": "placeholder_token=",
    "--word-regex": "filename_word_regex=", "--width": "width=", "--height": "height=", "--model": "model:",
    "SOURCE": "data_root",
}  # fmt: skip
OPTION = re.compile(rf"(?<![\w-])(?:{'|'.join(KEYWORDS)})(?![\w-])")


def update_cache(
    options: EncodeOptions,
    vae: LiveVae,
    cond_model: Any,
    autocast: Autocast,
    version: str,
    interrupted: Interrupted | None,
) -> None:
    """Encode what is new or has changed."""
    if options.text.include_cond and cond_model is None:
        raise UserError("include_cond=True: give cond_model=, a pipeline or a callable from prompts to [B,T,D].")
    storage = Storage(options.out)
    text = LiveText(cond_model, vae.device, autocast) if options.text.include_cond else None
    # the caller's autocast is for models of the ancestor's kind, and changes nothing else
    with torch.autocast(vae.device.type, enabled=False), hold(storage):
        known = None if options.overwrite else find_manifest(storage)
        options = replace(options, flip=options.flip or (known is not None and has_flips(known)))
        prepared = prepare(options, lambda line: None, find_models(storage, known, vae, text, version))
        if prepared.is_done:
            return
        print("Preparing dataset...")
        try:
            outcome = encode(prepared, lambda total, stage: make_bar(total, stage, interrupted))
        except KeyboardInterrupt:
            if interrupted is None or not interrupted():
                raise
            raise UserError("interrupted: what is encoded stays, and the next start goes on from there.") from None
        if outcome.failures:
            raise UserError(f"{options.source}: {'; '.join(outcome.failures)}")
        if outcome.skips:
            print(f"{counted(len(outcome.skips), 'image')} skipped: {storage.locate('skipped.jsonl')} says why")


def find_models(storage: Storage, known: Manifest | None, vae: LiveVae, text: LiveText | None, version: str) -> Models:
    """The models for a run, under the names by which the cache, finished or not, knows them."""
    names: list[str | None] = [known.recipe["latents"]["vae"]] if known is not None else []
    names += [leftover.recipe["vae"] for leftover in find_leftovers(storage, known).values()]
    facts = vae.facts(version)
    text_facts = text.facts(version) if text is not None else None
    if text_facts is not None and known is not None:
        before = known.recipe["text"]["text_encoder"]
        text_facts = replace(text_facts, digest=recognize(text_facts.digest, [before]))
    return Models(
        replace(facts, digest=recognize(facts.digest, names)),
        text_facts,
        patch=1,
        is_upcast=False,
        make_vae=lambda device, dtype: vae,
        make_text=(lambda device, dtype: text) if text is not None else None,
    )


def has_flips(manifest: Manifest) -> bool:
    return any(map(is_flipped, manifest.latent["views"]))


def make_bar(total: int, stage: str, interrupted: Interrupted | None) -> Any:
    """A progress bar that asks `interrupted` at every step, and raises KeyboardInterrupt once it says so."""
    from tqdm import tqdm

    class Bar(tqdm):  # type: ignore[type-arg]
        def update(self, n: float | None = 1) -> bool | None:
            done: bool | None = super().update(n)
            if interrupted is not None and interrupted():
                raise KeyboardInterrupt
            return done

    return Bar(total=total, desc=stage, unit="img", disable=not total)


@contextmanager
def words_of_python() -> Iterator[None]:
    """Errors that name options of the command line name the keywords of PersonalizedBase instead."""
    try:
        yield
    except UserError as error:
        raise UserError(OPTION.sub(lambda found: KEYWORDS[found[0]], str(error))) from None
