"""Prompts that several shards have: each is encoded once, and its cond is stored once, in a cond file.

Which they are is known before anything is encoded. So no text waits for another, on this device or on others.
"""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass

from latentprep.cache.cond import open_cond
from latentprep.cache.names import cond_name, make_cond_id, make_text_id, text_name
from latentprep.cache.seal import check_stamp
from latentprep.cache.sets import recipe_of
from latentprep.cache.shard import Shard
from latentprep.cache.storage import Stamp, Storage
from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.plan.plan import Plan, live_rows
from latentprep.prepare.plan.tasks import Borrowed, CondTask, Home, Homes
from latentprep.prepare.work.cond import is_of_recipe
from latentprep.prompts import list_prompts, list_seeing_prompts
from latentprep.recipe import TextRecipe
from latentprep.records import Row


@dataclass(frozen=True)
class PlannedText:
    """A text that is to be made, if it is not there yet."""

    shard: str  # its id
    text_id: str
    prompts: tuple[str, ...]  # each once; of every row, if they see its images
    asked: tuple[tuple[int, str], ...] = ()  # of prompts that see images: the number of the row, and the prompt

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
        rows, dead = list(rows), tuple(dead)
        live = list(live_rows(rows, frozenset(dead)))
        recipe = recipe_of(self.recipe.to_json(), (row.key for row in live))
        text_id = make_text_id(shard, rows, recipe, dead)
        if self.recipe.sees_images:
            asked = tuple(list_seeing_prompts(rows, self.options, self.seed, frozenset(dead)))
            return PlannedText(shard, text_id, tuple(prompt for _, prompt in asked), asked)
        return PlannedText(shard, text_id, tuple(list_prompts(live, self.options, self.seed)))

    def plan_texts(self, plan: Plan) -> Iterator[PlannedText]:
        """The texts of a plan, as if no image turned out to be damaged."""
        for unit in plan.units:
            yield self.plan_text(unit.id, [item.row for item in unit.items])
        for task in plan.text_tasks:
            yield self.plan_text(task.id, task.rows, task.shard.dead)


@dataclass(frozen=True)
class Sharing:
    """Where the cond of prompts comes from: a cond file (`borrowed`), or a text file that it is copied from (`homes`).

    A prompt in neither is encoded by its own text.
    """

    tasks: tuple[CondTask, ...]  # the cond files to make
    borrowed: Borrowed
    homes: Homes


def share_prompts(
    storage: Storage,
    plan: Plan,
    prompter: Prompter,
    cond_files: Mapping[str, Stamp],
    prompts_per_file: int,
) -> Sharing:
    """Decides which prompts are borrowed: those of the cond files that are there, and those of two or more texts.

    Cond that a text file of the cache has is taken from there; not at a URL, where a file would be read as a whole,
    again and again, for a few of its prompts. Prompts that see images share nothing: each has the cond of its row.
    """
    if prompter.recipe.text_encoder is None or prompter.recipe.sees_images:
        return Sharing((), {}, {})
    counts: dict[str, int] = {}
    for text in prompter.plan_texts(plan):
        for prompt in text.prompts:
            counts[prompt] = counts.get(prompt, 0) + 1
    borrowed = find_borrowed(storage, cond_files, prompter.recipe, counts)
    stored = [*plan.kept, *(task.shard for task in plan.text_tasks)] if storage.is_local else []
    homes = find_homes(storage, stored, prompter.recipe, counts.keys() - borrowed.keys())
    shared = [prompt for prompt, count in counts.items() if count > 1 and prompt not in borrowed]
    tasks: list[CondTask] = []
    for start in range(0, len(shared), prompts_per_file):
        prompts = tuple(shared[start : start + prompts_per_file])
        cond_file = make_cond_id(prompts, prompter.recipe)
        own = {prompt: homes[prompt] for prompt in prompts if prompt in homes}
        tasks.append(CondTask(cond_file, prompts, len(tasks), own))
        borrowed |= {prompt: (cond_file, row) for row, prompt in enumerate(prompts)}
    return Sharing(tuple(tasks), borrowed, homes)


def find_borrowed(
    storage: Storage, cond_files: Mapping[str, Stamp], recipe: TextRecipe, wanted: Iterable[str]
) -> dict[str, tuple[str, int]]:
    """Prompts that are wanted and in a cond file: prompt -> (the cond file's id, the row in it)."""
    wanted, found = frozenset(wanted), dict[str, tuple[str, int]]()
    for cond_file in sorted(cond_files if wanted else ()):
        with suppress(UserError):  # damaged: nothing is taken from it
            cond = open_cond(storage, cond_file)
            if make_cond_id([*cond.prompt], recipe) != cond_file:
                continue  # of another recipe; or another file, that somebody has put in its place
            own = {prompt: (cond_file, row) for row, prompt in enumerate(cond.prompt) if prompt in wanted}
            if own.keys() - found.keys():
                check_stamp(storage, cond_name(cond_file), cond_files[cond_file])
                found = {**own, **found}
    return found


def find_homes(storage: Storage, shards: Iterable[Shard], recipe: TextRecipe, wanted: Iterable[str]) -> dict[str, Home]:
    """Prompts that are wanted and whose cond is in a text file: prompt -> the first such file."""
    wanted, homes = frozenset(wanted), dict[str, Home]()
    for shard in shards if wanted else ():
        if shard.text_file is None:
            continue
        with suppress(UserError):  # damaged: nothing will be taken from it
            text = shard.open_text(storage)
            if text.cond and is_of_recipe(text, recipe):
                for prompt in text.prompt[: text.num_own]:
                    if prompt in wanted and prompt not in homes:
                        homes[prompt] = Home(shard.id, shard.text_id, shard.text_file)
    return homes
