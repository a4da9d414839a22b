"""Prompts that several shards have, and which text file has their cond first: so each of them is encoded once.

The last bits of a prompt's cond depend on what it is batched with. So such a prompt is encoded alone, wherever that
happens: who does not find its home's file there yet makes the same bytes, on another device or after a kill.
"""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from latentprep.cache.names import make_text_id, text_name
from latentprep.cache.sets import recipe_of
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Storage
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.plan.plan import Home, Plan, live_rows
from latentprep.prepare.work.cond import is_of_recipe
from latentprep.prompts import list_prompts
from latentprep.recipe import TextRecipe
from latentprep.records import Row


@dataclass(frozen=True)
class PlannedText:
    """A text that is to be made, if it is not there yet."""

    shard: str  # its id
    text_id: str
    prompts: tuple[str, ...]  # each once

    @property
    def name(self) -> str:
        return text_name(self.shard, self.text_id)


@dataclass(frozen=True)
class Prompter:
    """How rows become prompts and texts get their ids."""

    recipe: TextRecipe
    options: TextOptions
    seed: int

    def plan_text(self, shard: str, rows: Iterable[Row], dead: Iterable[int] = ()) -> PlannedText:
        """The text of a shard, by what its rows say."""
        rows = list(rows)
        live = list(live_rows(rows, frozenset(dead)))
        text_id = make_text_id(shard, rows, recipe_of(self.recipe.to_json(), (row.key for row in live)))
        return PlannedText(shard, text_id, tuple(list_prompts(live, self.options, self.seed)))

    def plan_texts(self, plan: Plan) -> Iterator[PlannedText]:
        """The texts of a plan, as if no image turned out to be damaged."""
        for unit in plan.units:
            yield self.plan_text(unit.id, [item.row for item in unit.items])
        for task in plan.text_tasks:
            yield self.plan_text(task.id, task.rows, task.shard.dead)


def find_homes(storage: Storage, plan: Plan, prompter: Prompter, texts: Iterable[PlannedText]) -> dict[str, Home]:
    """Prompt -> the text file that has its cond before others, for all prompts of a plan that have more than one.

    That is one of the cache, of the same recipe; else the first of `texts`, which are in the order of a run. At a URL
    there are none: a file would be read as a whole, again and again, for a few of its prompts.
    """
    if prompter.recipe.text_encoder is None or not storage.is_local:
        return {}
    seen: set[str] = set()
    shared: set[str] = set()
    for text in prompter.plan_texts(plan):
        shared.update(prompt for prompt in text.prompts if prompt in seen)
        seen.update(text.prompts)
    homes = find_stored(storage, [*plan.kept, *(task.shard for task in plan.text_tasks)], prompter.recipe, seen)
    for text in texts:
        for prompt in text.prompts:
            if prompt in shared and prompt not in homes:
                homes[prompt] = Home(text.shard, text.text_id)
    return homes


def find_stored(storage: Storage, shards: Iterable[Shard], recipe: TextRecipe, wanted: set[str]) -> dict[str, Home]:
    """Of the prompts that are wanted those whose cond the cache has: prompt -> the first file that has it."""
    homes: dict[str, Home] = {}
    for shard in shards if wanted else ():
        if shard.text_file is None:
            continue
        with suppress(UserError):  # damaged: nothing will be taken from it
            text = shard.open_text(storage)
            if text.cond and is_of_recipe(text, recipe):
                for prompt in text.prompt:
                    if prompt in wanted and prompt not in homes:
                        homes[prompt] = Home(shard.id, shard.text_id, shard.text_file)
    return homes
