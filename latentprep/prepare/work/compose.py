"""What the rows of a shard are to say -> the prompts of its text, and its groups."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from latentprep.cache.group import TextGroup
from latentprep.cache.schema import Groups
from latentprep.options import TextOptions
from latentprep.prepare.plan.tasks import Borrowed
from latentprep.prompts import list_seeing_prompts, make_prompts
from latentprep.records import Row


@dataclass(frozen=True)
class Composed:
    """The prompts of a text, and its groups, which name them by their numbers."""

    prompts: list[str]
    groups: list[TextGroup]
    rows: list[int]  # of each prompt that sees images: the row whose images they are


def compose(
    rows: Sequence[Row],
    groups: Groups,
    dead: Collection[int],
    borrowed: Borrowed,
    options: TextOptions,
    seed: int,
) -> Composed:
    """The distinct prompts of rows, those that are borrowed last.

    Dead rows have no prompts: they point to the first.
    """
    prompts_of_row = [
        [] if n in dead else make_prompts(row.captions, row.key, options, seed) for n, row in enumerate(rows)
    ]
    distinct = dict.fromkeys(prompt for own in prompts_of_row for prompt in own)
    prompts = sorted(distinct, key=lambda prompt: prompt in borrowed)
    index = {prompt: n for n, prompt in enumerate(prompts)}
    made = [
        make_row(row, [index[prompt] for prompt in own] or [0] * options.prompts_per_image)
        for row, own in zip(rows, prompts_of_row, strict=True)
    ]
    return Composed(prompts, stack(made, groups), [])


def compose_seeing(
    rows: Sequence[Row], groups: Groups, dead: Collection[int], options: TextOptions, seed: int
) -> Composed:
    """The prompts of rows that see images: of each row its own, since its images make their cond."""
    asked = list_seeing_prompts(rows, options, seed, dead)
    index = {pair: n for n, pair in enumerate(asked)}
    made = []
    for n, row in enumerate(rows):
        prompts = [] if n in dead else make_prompts(row.captions, row.key, options, seed)
        own = make_row(row, [index[n, prompt] for prompt in prompts] or [0] * options.prompts_per_image)
        made.append(own | ({"uncond_of": index.get((n, ""), 0)} if options.image_uncond else {}))
    return Composed([prompt for _, prompt in asked], stack(made, groups), [row for row, _ in asked])


def stack(made: list[dict[str, Any]], groups: Groups) -> list[TextGroup]:
    edges = np.cumsum([0, *(count for _, count, _ in groups)]).tolist()
    return [
        TextGroup.stack(label, made[start:end])
        for (label, _, _), start, end in zip(groups, edges, edges[1:], strict=False)
    ]


def make_row(row: Row, prompt_of: list[int]) -> dict[str, Any]:
    """What a text file holds of an image, whose prompts have these numbers: field name -> value."""
    return {
        "key": row.key,
        "nbytes": row.nbytes,
        "version": row.version,
        "caption": list(row.captions),
        "prompt_of": prompt_of,
    }
