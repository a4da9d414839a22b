"""How long the prompts of a plan are, and what their cond takes on disk: by the tokenizers alone, without weights."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import numpy as np

from latentprep.cache.int8 import nbytes_of
from latentprep.prepare.models.family import FIXED
from latentprep.prepare.models.text_folder import TextFiles, TextFolder
from latentprep.prepare.plan.plan import live_rows
from latentprep.prepare.survey import Prepared
from latentprep.prompts import list_seeing_prompts, make_prompts
from latentprep.records import Row, Size

MOST_COUNTED = 50_000  # prompts, the longest in characters: some seconds (benchmarks/count_tokens.py)
STEP = 16  # of the --max-tokens that is advised


@dataclass(frozen=True)
class Lengths:
    """How many tokens the prompts of a plan take."""

    longest: int
    prompt: str  # that takes so many
    key: str  # of the first image that has it
    num_cut: int  # prompts of more than max_tokens
    max_tokens: int
    num_counted: int
    num_prompts: int
    total: int = 0  # of all that is stored, if prompts see images


@dataclass(frozen=True)
class TextSizes:
    """What the texts of a plan take on disk, in bytes."""

    text: int
    is_bound: bool  # whether `text` is an upper bound, and not about the size
    advised: int | None = None  # a --max-tokens that cuts no prompt and stores less; None: there is none
    with_advised: int = 0  # bytes with it


def list_rows(prepared: Prepared) -> Iterator[Row]:
    """The rows of all texts that are to be made."""
    for unit in prepared.plan.units:
        yield from (item.row for item in unit.items)
    for task in prepared.plan.text_tasks:
        yield from live_rows(task.rows, task.shard.dead)


def list_seen(prepared: Prepared) -> Iterator[tuple[Row, tuple[Size, ...]]]:
    """The rows of all texts that are to be made, each with the sizes of its control images as the VAE sees them."""
    count, factor = prepared.options.num_controls, prepared.models.vae.factor
    for item, placement in prepared.plan.rows():
        yield item.row, placement.controls or (placement.bucket,) * count
    for task in prepared.plan.text_tasks:
        shapes = (shape for _, rows, shape in task.shard.groups for _ in range(rows))
        dead = frozenset(task.shard.dead)
        for n, (row, shape) in enumerate(zip(task.rows, shapes, strict=True)):
            if n not in dead:
                sides = [side * factor for side in shape[3:] or shape[1:] * count]
                yield row, tuple(zip(sides[::2], sides[1::2], strict=True))


def measure_seeing(prepared: Prepared, text: TextFolder) -> Lengths | None:
    """The same of prompts that see images, with the tokens of these."""
    options, tokens_of = prepared.options, cache(text.count_image_tokens)
    asked: dict[tuple[str, int], str] = {}  # prompt, and tokens of its images -> the first image that has them
    num_tokens = Counter[tuple[str, int]]()
    for row, sizes in list_seen(prepared):
        of_images = tokens_of(sizes)
        for _, prompt in list_seeing_prompts([row], options.text, options.seed):
            asked.setdefault((prompt, of_images), row.key)
            num_tokens[prompt, of_images] += 1
    if not asked:
        return None
    counter = text.open_counter(options.text)
    counter.see(options.num_controls)
    pairs = sorted(asked, key=lambda pair: len(pair[0]), reverse=True)[:MOST_COUNTED]
    counts = counter.count([prompt for prompt, _ in pairs]) + np.array([own for _, own in pairs])
    first = int(counts.argmax())
    total = sum(num_tokens[pair] * int(count) for pair, count in zip(pairs, counts, strict=True))
    return Lengths(
        int(counts[first]), pairs[first][0], asked[pairs[first]], 0, counter.max_tokens, len(pairs), len(asked),
        round(total * num_tokens.total() / sum(num_tokens[pair] for pair in pairs)),
    )  # fmt: skip


def measure_lengths(prepared: Prepared) -> Lengths | None:
    """The lengths of the plan's prompts; None if it has none, or its encoder shows no tokenizer."""
    options, text = prepared.options, prepared.models.text
    if not isinstance(text, TextFiles):
        return None
    if isinstance(text, TextFolder) and text.processor is not None:
        return measure_seeing(prepared, text)
    key_of: dict[str, str] = {}
    for row in list_rows(prepared):
        for prompt in make_prompts(row.captions, row.key, options.text, options.seed):
            key_of.setdefault(prompt, row.key)
    if not key_of:
        return None
    counter = text.open_counter(options.text)
    prompts = sorted(key_of, key=len, reverse=True)[:MOST_COUNTED]
    counts = counter.count(prompts)
    first = int(counts.argmax())
    num_cut = int((counts > counter.max_tokens).sum())
    return Lengths(
        int(counts[first]),
        prompts[first],
        key_of[prompts[first]],
        num_cut,
        counter.max_tokens,
        len(prompts),
        len(key_of),
    )


def measure_texts(prepared: Prepared, lengths: Lengths | None) -> TextSizes:
    """Bytes of a plan's texts, and of the cond that they share.

    Prompts with lengths of their own all count as if they were as long as the longest, or as --max-tokens.
    """
    sharing = prepared.sharing
    texts = prepared.prompter.plan_texts(prepared.plan)
    num_stored = sum(prompt not in sharing.borrowed for text in texts for prompt in text.prompts)
    num_stored += sum(len(task.prompts) for task in sharing.tasks)
    rest = 512 * (prepared.plan.num_unit_items + prepared.plan.num_text_items)  # keys, captions and prompts
    text, options = prepared.models.text, prepared.options.text
    if text is None:
        return TextSizes(rest, is_bound=True)

    def count_bytes(max_tokens: int | None) -> int:
        return bytes_of(text.num_values(replace(options, max_tokens=max_tokens)))

    def bytes_of(num_values: int) -> int:
        return bytes_of_values(num_stored * num_values)

    def bytes_of_values(num_values: int) -> int:
        return nbytes_of(num_values, prepared.recipe.text.store_dtype or "float32") + rest

    if lengths is not None and lengths.total and isinstance(text, TextFiles):
        return TextSizes(bytes_of_values(lengths.total * text.values_of(1)), is_bound=False)
    now = count_bytes(options.max_tokens)
    if lengths is None or not isinstance(text, TextFiles) or text.family.sequence is None:
        return TextSizes(now, is_bound=lengths is None)
    enough = -(-lengths.longest // STEP) * STEP
    is_less = lengths.num_counted == lengths.num_prompts and enough < text.family.num_tokens(
        options.max_tokens, text.window
    )
    if text.family.length != FIXED:
        return TextSizes(bytes_of(text.values_of(enough)) if is_less else now, is_bound=True)
    cannot_ask = text.family.tokens_argument is None or enough < text.family.least_tokens
    if text.family.sequence in getattr(text, "left_out", ()) or not is_less or cannot_ask:
        return TextSizes(now, is_bound=False)
    return TextSizes(now, False, enough, count_bytes(enough))
