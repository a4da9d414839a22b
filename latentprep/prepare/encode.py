"""The run of `latentprep encode`, from top to bottom: list -> plan -> latents -> text -> commit."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from latentprep.cache.leftovers import clear_cache, clear_temporaries
from latentprep.cache.sets import list_runs
from latentprep.prepare.engine import ranks, run
from latentprep.prepare.finish import check_usable, finish
from latentprep.prepare.outcome import Outcome, collect
from latentprep.prepare.plan.shared import Prompter, Sharing
from latentprep.prepare.plan.tasks import CondTask, TextTask
from latentprep.prepare.survey import Prepared
from latentprep.prepare.work.events import LatentsResult
from latentprep.prepare.work.text import EmptyPrompt

MakeBar = Callable[[int, str], Any]  # total and stage -> a tqdm-like bar of images


def encode(prepared: Prepared, make_bar: MakeBar) -> Outcome:
    """Do what is planned, and commit it.

    In two passes, so that the VAE and the text encoders are never in memory together. Raises UserError, and
    KeyboardInterrupt once every finished file is safe on disk.
    """
    plan, where, started = prepared.plan, prepared.where, time.perf_counter()
    if prepared.options.overwrite:
        clear_cache(prepared.storage)
    if where.world_size == 1:
        clear_temporaries(prepared.storage)
    else:
        ranks.begin(prepared.storage, where)

    latents = collect(run(prepared.latents_worker(), plan.units, where), make_bar(plan.num_unit_items, "latents"))
    encoded = time.perf_counter()
    check_usable(prepared, latents)
    tasks = list_text_tasks(prepared, latents.latents)
    texts = collect(run(prepared.text_worker(), tasks, prepared.text_where), make_bar(count_images(tasks), "text"))

    encode_seconds = encoded - started - latents.waits["load"] / len(where.devices)
    return finish(prepared, latents, texts, time.perf_counter() - started, encode_seconds)


def list_text_tasks(prepared: Prepared, results: Sequence[LatentsResult]) -> list[CondTask | TextTask | EmptyPrompt]:
    """Tasks of the text pass: cond files of shared prompts, texts of new shards and of shards whose text changes, and
    the empty prompt. Without text encoders: the texts alone.
    """
    units = {unit.id: unit for unit in prepared.plan.units}
    made: list[TextTask] = []
    for result in results:
        if result.shard is not None:
            skipped = {skip.key for skip in result.skips}
            rows = tuple(item.row for item in units[result.id].items if item.key not in skipped)
            sets = list_runs((row.key for row in rows), prepared.images.facts)
            made.append(TextTask(result.shard.with_sets(sets), rows, units[result.id].number))
    made.sort(key=lambda task: task.number)
    tasks = [*made, *prepared.plan.text_tasks]
    if prepared.models.text is None or prepared.recipe.text.sees_images:
        return [*tasks]
    sharing = prepared.sharing
    texts = [with_sharing(task, prepared.prompter, sharing) for task in tasks]
    return [*sharing.tasks, *texts, EmptyPrompt(prepared.where.rank)]


def with_sharing(task: TextTask, prompter: Prompter, sharing: Sharing) -> TextTask:
    """A task that knows where the cond of its prompts is, if it is elsewhere."""
    prompts = prompter.plan_text(task.id, task.rows, task.shard.dead).prompts
    return replace(
        task,
        homes={prompt: sharing.homes[prompt] for prompt in prompts if prompt in sharing.homes},
        borrowed={prompt: sharing.borrowed[prompt] for prompt in prompts if prompt in sharing.borrowed},
    )


def count_images(tasks: Sequence[CondTask | TextTask | EmptyPrompt]) -> int:
    return sum(task.shard.num_images for task in tasks if isinstance(task, TextTask))
