"""What is refused before anything is written: folders, recipes and sources that a cache does not go with."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from latentprep.cache.leftovers import Leftover
from latentprep.cache.manifest import Manifest
from latentprep.cache.ours import check_ours
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.human import counted
from latentprep.options import EncodeOptions
from latentprep.prepare.models.model_set import Models
from latentprep.prepare.models.text_folder import TextFiles
from latentprep.prepare.plan.plan import Plan
from latentprep.recipe import Recipe
from latentprep.recipe_words import describe_changes
from latentprep.records import Skip

Say = Callable[[str], None]


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


@contextmanager
def told_what_text_needs(options: EncodeOptions) -> Iterator[None]:
    """With --only text, errors about SOURCE add that it needs images too: a person may have copied captions only."""
    try:
        yield
    except UserError as error:
        if options.only != "text" or "SOURCE " not in str(error):
            raise
        raise type(error)(
            f"{error} --only text needs the images too, beside their captions: by their names, sizes and content it "
            "knows which rows of the cache are theirs. Copy both."
        ) from None


def check_seen_images(options: EncodeOptions, models: Models, recipe: Recipe) -> None:
    """Raise UserError for control images that prompts are to see and cannot: too few, too many, or in several views."""
    if not recipe.text.sees_images or not isinstance(models.text, TextFiles):
        return
    family, count = models.text.family, options.num_controls
    without = "or leave cond out with --no-cond."
    if not count:
        raise UserError(
            f"--model {options.model}: the prompts of {family.name} see control images, and there are none. Give them "
            f"to encode with --control, {without}"
        )
    if count > family.num_images:
        raise UserError(
            f"--control: {count} control images of each image, but a prompt of {family.name} sees at most "
            f"{family.num_images}. Give fewer, {without}"
        )
    if len(recipe.latents.views) > 1:
        option = "--flip" if options.flip else f"--crops {options.geometry.crops}"
        raise UserError(
            f"{option}: a prompt of {family.name} sees its control images in one view alone. Leave it out, {without}"
        )


def check_recipe(
    options: EncodeOptions, recipe: Recipe, manifest: Manifest | None, leftovers: Mapping[str, Leftover]
) -> None:
    """Raise UserError where the folder holds a cache, finished or not, whose latents were made otherwise."""
    made = [manifest.recipe.latents.to_json()] if manifest is not None else [left.recipe for left in leftovers.values()]
    for before in made:
        changes = list(describe_changes(before, recipe.latents.to_json()))
        if changes:
            hint = f" (--again {options.out} has them)" if options.remembered and manifest is not None else ""
            kind = "a cache" if manifest is not None else "an unfinished cache"
            raise UserError(
                f"{options.out}: holds {kind} of another recipe ({'; '.join(changes)}; cache -> asked). "
                f"Give another --out, the options it was made with{hint}, or --overwrite to start anew."
            )


def check_source(
    options: EncodeOptions, plan: Plan, manifest: Manifest | None, leftovers: Mapping[str, Leftover]
) -> None:
    """Raise UserError if this is not the source that the cache was made from: most images would be gone from it.

    A source is refused if more than half of the images are gone. If its path is not the one that the cache remembers,
    it is also refused if any image is gone, or if more than half have other content: another folder may have the same
    names, such as 0001.png.
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
    elif lacking := sum(skip.reason == "no_control" for skip in plan.skips):
        what = f"{gone:,} of its {counted(held, 'image')} are not, or lack a control image ({lacking:,} do),"
    raise UserError(
        f"{options.out}: {what} in SOURCE {now}"
        + (f"; it was made from {before}" if is_other else "")
        + ". Nothing was written. Is this the right folder, and is all of it there? Give another --out, or "
        "--allow-gone if this is what you want."
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
