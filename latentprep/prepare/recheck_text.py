"""The cond of a cache against its prompts: does encoding them again give what is stored?"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import cast

import numpy as np
import torch

from latentprep.cache.borrowed import CondFiles
from latentprep.cache.cond import open_uncond
from latentprep.cache.distance import EXACT, difference_of, larger
from latentprep.cache.group import TextGroup
from latentprep.cache.int8 import SCALE, pack, scales_in, unpack
from latentprep.cache.manifest import Manifest
from latentprep.cache.names import uncond_name
from latentprep.cache.ragged import Conds
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.cache.strings import Tensors
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import TextOptions
from latentprep.prepare.devices import choose_device, is_out_of_memory
from latentprep.prepare.images.load import LoadOptions
from latentprep.prepare.images.pillow import limit_pixels, max_pixels
from latentprep.prepare.models.doors import PromptEncoder, SeeingEncoder
from latentprep.prepare.models.family import FIXED
from latentprep.prepare.models.model_set import open_made_text
from latentprep.prepare.models.text_file import TextFile
from latentprep.prepare.models.text_folder import TextFolder
from latentprep.prepare.recheck import sample_rows
from latentprep.prepare.work.seen import UnseenError, load_seen
from latentprep.prompts import make_prompts
from latentprep.recipe import TextRecipe, WordingRecipe
from latentprep.records import Problem, Row, set_of

# Largest difference of a token (root mean square over its values), in standard deviations of the prompt's cond.
# Measured with random weights against float32: CLIPs of 2 to 12 layers float16 0.002, bfloat16 0.014; T5s of 2 to 12
# layers float16 0.009, bfloat16 0.06; float32 with another batch size or thread count 2e-7. What is wrong is far above:
# zeros 1, another clip_skip 0.3 to 0.9, another prompt 0.3 to 1, of which T5 may show no more than one token.
TOLERANCES = {"float32": 0.003, "float16": 0.02, "bfloat16": 0.1}


@dataclass(frozen=True, eq=False)
class Sample:
    """A prompt whose cond is compared."""

    name: str  # the key of an image that has it, or the file of the empty prompt
    prompt: str
    cond: Tensors  # name -> [T,D] or [D], as stored
    images: list[np.ndarray] | None = None  # [H,W,3] uint8, if it sees some


def find_text(
    manifest: Manifest, model: str | None, vae: str | None, text_encoders: tuple[str, ...] = ()
) -> TextFolder | TextFile | None:
    """The text encoders that a cache's cond was made with, by their hash; None if it has no cond. Raises UserError.

    `model`, `vae` and `text_encoders` are those of the command line. If the cache has a VAE of its own and `vae` is not
    given, `model` is where that VAE is now (recheck.find_vae), and says nothing of the text encoders.
    """
    if not manifest.has_cond:
        return None
    is_for_vae = vae is None and manifest.made_with.vae is not None
    name = manifest.made_with.model if model is None or is_for_vae else model
    text = open_made_text(manifest.made_with, name, text_encoders)
    wanted = manifest.recipe.text.text_encoder
    if text.digest != wanted:
        raise UserError(
            f"--model {name}: its text encoder is {text.digest}, this cache was made with "
            f"{shortened(str(wanted))}. Give that one, or compare latents alone with --no-cond."
        )
    return text


def reencode_text(
    storage: Storage,
    manifest: Manifest,
    source: TextFolder | TextFile,
    count: int,
    *,
    load: LoadOptions | None = None,
    seed: int,
    device: str,
    progress: Callable[[int], object] = int,
) -> tuple[list[Problem], float]:
    """Encode the empty prompt and those of `count` random images again, and compare; also the largest difference.

    The images are those that recheck.reencode takes, read as `load` says if prompts see them; the difference is as in
    TOLERANCES. Raises UserError if
    these text encoders cannot do what the recipe says, or do not fit into the device's memory.
    """
    recipe = manifest.recipe.text
    options = read_options(recipe, source, storage.root)
    num_values = source.num_values(options)
    chosen, _ = choose_device(device)
    dtype = recipe.dtype or "float32"
    problems, worst = [], 0.0
    try:
        encoder = source.open(torch.device(chosen), TORCH_DTYPES[dtype], options)
        for sample in list_samples(storage, manifest, options, count, seed, load if recipe.sees_images else None):
            progress(1)
            if isinstance(sample, Problem):
                problems.append(sample)
                continue
            scales = scales_in(sample.cond)
            found = sum(value.numel() for name, value in sample.cond.items() if name not in scales)
            # before encoding, since a crafted recipe could ask for huge cond; of prompts that see images none is cut
            if (found > num_values and sample.images is None) or (source.family.length == FIXED and found < num_values):
                detail = f"{found:,} numbers for a prompt, expected {num_values:,}"
                problems.append(Problem(sample.name, "cond", detail))
                continue
            fresh = {name: value[0] for name, value in encode(encoder, sample).items()}
            difference, wrong = compare_cond(fresh, sample.cond, TOLERANCES[dtype])
            worst = larger(worst, difference)
            if wrong:
                problems.append(Problem(sample.name, "cond", f"of {shortened(sample.prompt)!r}: {wrong}"))
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise UserError(
            f"--device {chosen}: the text encoder does not fit into its memory. "
            "Give --device cpu, or compare latents alone with --no-cond."
        ) from None
    return problems, worst


def encode(encoder: PromptEncoder, sample: Sample) -> Conds:
    """The cond of one prompt, made again."""
    if sample.images is None:
        return encoder.encode([sample.prompt])
    return cast(SeeingEncoder, encoder).encode_seeing([sample.prompt], [sample.images])


def list_samples(
    storage: Storage, manifest: Manifest, options: TextOptions, count: int, seed: int, load: LoadOptions | None = None
) -> Iterator[Sample | Problem]:
    """The empty prompt, then those of `count` random images, each once for a shard; a Problem for a wrong prompt.

    load: how images are read, if prompts see them; then there are the empty prompts of these, if they are stored.
    """
    cond_files = CondFiles(storage)
    if manifest.uncond is not None:
        _, uncond = open_uncond(storage, manifest.uncond.id)
        yield Sample(uncond_name(manifest.uncond.id), "", {name: value[0] for name, value in uncond.items()})
    for entry, rows in groupby(sample_rows(manifest, count, seed), key=lambda sample: sample[0]):
        text = entry.open_text(storage)
        cond = cond_files.of(text)
        seen: set[int] = set()
        for _, number, row in rows:
            group = text.groups[number]
            key, captions, chosen = group.key[row], group.caption[row], group.prompt_of[row].tolist()
            stored = [text.prompt[n] for n in chosen]
            can_make = bool(captions) and len(chosen) == options.prompts_per_image
            made = make_prompts(captions, key, options, seed_of(manifest.recipe.text, key)) if can_make else []
            if stored != made:
                wanted = ", ".join(repr(shortened(prompt)) for prompt in made) or "others"
                held = ", ".join(repr(shortened(prompt)) for prompt in stored)
                yield Problem(key, "prompt", f"{held}, but its caption and the recipe give {wanted}")
            images = None
            if load is not None:
                found = see(entry, storage, group, number, row, load)
                if isinstance(found, Problem):
                    yield found
                    continue
                images, chosen = found, group.numbers(np.array([row])).ravel().tolist()
            for n in sorted(set(chosen) - seen):
                yield Sample(key, text.prompt[n], cond.rows(n), images)
            seen.update(chosen)


def see(
    entry: Shard, storage: Storage, words: TextGroup, number: int, row: int, load: LoadOptions
) -> list[np.ndarray] | Problem:
    """The control images of a row of a group, given by their numbers; a Problem if they are not what was encoded."""
    latents = entry.open_latents(storage).groups[number]
    limit_pixels(max(max_pixels(), int(latents.original_size[row].prod())))
    key = words.key[row]
    try:
        return load_seen(Row(key, int(words.nbytes[row]), int(words.version[row]), ()), latents, row, load)
    except UnseenError as error:
        return Problem(key, "unseen", str(error))


def seed_of(recipe: TextRecipe, key: str) -> int:
    """What the prompts of an image were chosen with."""
    own = (recipe.sets or {}).get(set_of(key), recipe)
    return own.seed or 0


def compare_cond(fresh: Tensors, stored: Tensors, tolerance: float) -> tuple[float, str]:
    """Largest difference of embeddings, in their standard deviations; and what is wrong, "" if nothing is.

    Whatever else there is (positions, masks) is to be the same to the last bit.
    """
    scales = scales_in(stored)
    if fresh.keys() != stored.keys() - scales:
        return 0.0, f"{', '.join(stored) or 'none'} are stored, expected {', '.join(fresh)}"
    worst, wrong = 0.0, ""
    for name, value in fresh.items():
        if value.shape != stored[name].shape:
            return worst, f"{name} is {list(stored[name].shape)}, expected {list(value.shape)}"
        old, new, allowed = stored[name], value.to(stored[name].dtype), tolerance  # rounded as what is stored was
        if old.dtype == torch.int8:
            old, new = unpack(old, stored[f"{name}{SCALE}"]), value
            allowed += difference_of(value, unpack(*pack(value)))
        if name.endswith(EXACT):
            wrong = wrong or ("" if torch.equal(new, old) else f"{name} is not what is stored")
            continue
        difference = difference_of(new.float(), old.float())
        worst = larger(worst, difference)
        if not difference <= allowed:
            wrong = wrong or f"{name} {difference:.4f} standard deviations from what is stored, allowed {allowed:.3g}"
    return worst, wrong


def with_wording(options: TextOptions, recipe: WordingRecipe) -> TextOptions:
    """Options with the wording of a recipe. Raises UserError."""
    return replace(
        options,
        template=recipe.template,
        placeholder=recipe.placeholder,
        shuffle_tags=recipe.shuffle_tags,
        tag_drop_out=recipe.tag_drop_out,
        keep_tags=recipe.keep_tags,
        wildcards=recipe.wildcards,
    )


def read_options(recipe: TextRecipe, source: TextFolder | TextFile, where: str) -> TextOptions:
    """How a cache's prompts were made and encoded, by its text recipe.

    Raises UserError if the recipe asks for what these text encoders cannot do.
    """
    try:
        common = TextOptions(
            prompts_per_image=recipe.prompts_per_image,
            max_tokens=recipe.max_tokens,
            clip_skip=recipe.clip_skip or 1,
            emphasis=bool(recipe.emphasis),
            image_uncond=bool(recipe.image_uncond),
        )
        sets = {name: with_wording(common, own) for name, own in (recipe.sets or {}).items()}
        options = replace(with_wording(common, recipe), sets=sets)
        source.settings(options)
    except UserError as error:
        raise UserError(f"{where}: its recipe does not say how prompts become cond ({error}).") from None
    return options
