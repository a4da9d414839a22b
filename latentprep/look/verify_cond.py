"""What verify looks at in text files and in the cond of the empty prompt: numbers, ranges, and one shape for all."""

from collections import Counter

import torch

from latentprep.cache.borrowed import CondFiles
from latentprep.cache.cond import CondFile, open_cond, open_uncond
from latentprep.cache.int8 import LARGEST, POSITIONS, SCALE_DTYPE, dtype_of, scales_in
from latentprep.cache.manifest import Manifest
from latentprep.cache.names import MANIFEST, cond_name, uncond_name
from latentprep.cache.ragged import Conds, finite_rows, row_shape, show_shape, values_of
from latentprep.cache.sets import recipe_of
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.records import Problem

CondShapes = dict[str, tuple[int | None, ...]]  # name of cond -> the shape of a prompt's: ragged.row_shape


def check_text(manifest: Manifest, entry: Shard, text: Text) -> list[Problem]:
    """Recipe, cond, finiteness and numbers of tokens of a text file."""
    name, rows = entry.text_name, text.rows()
    problems = []
    recipe = recipe_of(manifest.recipe.text.to_json(), (rows[number].key for number in entry.live_numbers()))
    if text.metadata.get("recipe") != recipe:
        problems.append(Problem(name, "recipe", "made with another recipe than cache.json holds: encode again"))
    if text.has_cond != manifest.has_cond:
        problems.append(Problem(name, "cond", "cond where the others have none, or none where they have it"))
    if any((group.uncond_of is not None) != bool(manifest.recipe.text.image_uncond) for group in text.groups):
        problems.append(Problem(name, "cond", "an empty prompt of each image where the others have none, or none"))
    if {*text.cond_files} != {*entry.cond_files}:
        problems.append(Problem(name, "cond", "borrows from other cond files than cache.json says"))
    return problems + check_tokens(name, text) + check_cond(name, text.cond, manifest.recipe.text.store_dtype)


def check_tokens(file: str, made: Text | CondFile) -> list[Problem]:
    """Numbers of tokens that no prompt has."""
    problems = []
    if made.num_tokens is not None and bool((made.num_tokens < 0).any()):
        problems.append(Problem(file, "range", "num_tokens: below 0"))
    if made.max_tokens is not None and made.max_tokens < 1:
        problems.append(Problem(file, "range", f"max_tokens: {made.max_tokens}, expected 1 or more"))
    return problems


def check_borrowed(cond_files: CondFiles, name: str, text: Text) -> list[Problem]:
    """Whether the prompts that a text borrows are those of the cond files. Of damaged ones check_shared tells."""
    try:
        lenders = [cond_files[cond_file] for cond_file in text.cond_files]
    except UserError:
        return []
    try:
        cond_files.of(text)
    except UserError as error:
        return [Problem(name, "cond", str(error))]
    wrong = [
        prompt
        for prompt, (number, row) in zip(text.prompt[text.num_own :], text.borrowed.tolist(), strict=True)
        if lenders[number].prompt[row] != prompt
    ]
    if not wrong:
        return []
    shown = f"{len(wrong)} of its prompts borrow the cond of others, such as {shortened(wrong[0])!r}"
    return [Problem(name, "cond", shown)]


def check_shared(storage: Storage, manifest: Manifest) -> tuple[list[Problem], dict[str, CondShapes]]:
    """Whether cond that texts share is of the recipe, and finite; and each file's name -> its shapes.

    Shards without images keep what an earlier recipe has made.
    """
    problems, shapes = list[Problem](), dict[str, CondShapes]()
    for cond_file in sorted({name for shard in manifest.shards if shard.num_images for name in shard.cond_files}):
        name = cond_name(cond_file)
        try:
            cond = open_cond(storage, cond_file)
        except UserError as error:
            problems.append(Problem(name, "structure", str(error)))
            continue
        if cond.metadata.get("recipe") != manifest.recipe.text.cond:
            problems.append(Problem(name, "recipe", "made with another recipe than cache.json holds: encode again"))
        problems += check_tokens(name, cond) + check_cond(name, cond.cond, manifest.recipe.text.store_dtype)
        shapes[name] = cond_shapes(cond.cond)
    return problems, shapes


def check_cond(file: str, conds: Conds, store_dtype: str | None) -> list[Problem]:
    """Number types and finiteness of cond, and the sign of its scales."""
    problems, scales = [], scales_in(conds)
    for name, value in conds.items():
        expected = SCALE_DTYPE if name in scales else dtype_of(name, value, store_dtype or "float32")
        if value.dtype != expected and not name.endswith(POSITIONS):  # older caches have these in bfloat16
            shown = str(expected).removeprefix("torch.")
            problems.append(Problem(file, "dtype", f"cond/{name}: {value.dtype}, expected {shown}"))
        bad = int((~finite_rows(value)).sum())
        if bad:
            problems.append(Problem(file, "non_finite", f"cond/{name}: {bad} prompts"))
        least = 0 if name in scales else -LARGEST
        if (name in scales or value.dtype == torch.int8) and bool((values_of(value) < least).any()):
            problems.append(Problem(file, "range", f"cond/{name}: below {least}"))
    return problems


def check_uncond(storage: Storage, manifest: Manifest) -> tuple[list[Problem], dict[str, CondShapes]]:
    """Whether the cond of the empty prompt can be opened, and is finite; and its file's name -> its shapes."""
    if manifest.uncond is None:
        return [], {}
    name = uncond_name(manifest.uncond.id)
    try:
        _, cond = open_uncond(storage, manifest.uncond.id)
    except UserError as error:
        return [Problem(name, "structure", str(error))], {}
    return check_cond(name, cond, manifest.recipe.text.store_dtype), {name: cond_shapes(cond)}


def cond_shapes(conds: Conds) -> CondShapes:
    """Name -> the shape of a prompt's cond, in the order of the names."""
    return {name: row_shape(conds[name]) for name in sorted(conds)}


def check_alike(shapes: dict[str, CondShapes]) -> list[Problem]:
    """Files whose cond has other names, shapes or kinds than that of most: a batch takes rows of all of them.

    shapes: name of a file -> of its cond.
    """
    if not shapes:
        return []
    counts = Counter(tuple(own.items()) for own in shapes.values())
    usual = dict(counts.most_common(1)[0][0])
    one = next(file for file, own in shapes.items() if own == usual)
    return [
        Problem(file, "cond", f"{describe_cond(own)}, expected {describe_cond(usual)} as in {one}")
        for file, own in shapes.items()
        if own != usual
    ]


def describe_cond(shapes: CondShapes) -> str:
    """'prompt_embeds [T, 64]'; T stands for a number of tokens of each prompt's own."""
    shown = " and ".join(f"{name} {show_shape(shape)}" for name, shape in shapes.items())
    return shortened(shown, 200) or "no cond"


def check_pad_to(manifest: Manifest, shapes: dict[str, CondShapes]) -> list[Problem]:
    """Names of pad_to in the text recipe that no cond has: such cond would not be padded as its denoiser wants."""
    there = {name for own in shapes.values() for name in own}
    is_known = bool(shapes) or not manifest.has_cond
    missing = [name for name in manifest.recipe.text.pad_to or {} if is_known and name not in there]
    return [Problem(MANIFEST, "cond", f"pad_to names {name}, which no cond has") for name in missing]
