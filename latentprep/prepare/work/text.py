"""The worker that makes texts: shards, and what their rows are to say, become text files; with cond, or without."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import numpy as np

from latentprep.cache.cond import CondFile, open_cond, open_uncond, write_cond, write_uncond
from latentprep.cache.names import cond_name, make_cond_id, make_text_id, make_uncond_id, text_name, uncond_name
from latentprep.cache.seal import check_seal, check_stamp
from latentprep.cache.sets import recipe_of
from latentprep.cache.storage import Stamp, Storage
from latentprep.cache.text import Text, open_text, write_text
from latentprep.errors import UnreadableError, UserError
from latentprep.options import TextOptions
from latentprep.prepare.images.load import LoadOptions
from latentprep.prepare.images.pillow import limit_pixels
from latentprep.prepare.plan.plan import live_rows
from latentprep.prepare.plan.tasks import Borrowed, CondTask, TextTask
from latentprep.prepare.work.compose import compose, compose_seeing
from latentprep.prepare.work.cond import CondMaker, MadeCond
from latentprep.prepare.work.events import Event, Failure, Step, TextResult
from latentprep.prepare.work.seen import SeenImages
from latentprep.prepare.work.stored import StoredCond
from latentprep.prepare.work.writing import Writing
from latentprep.recipe import TextRecipe
from latentprep.records import Row

if TYPE_CHECKING:
    from latentprep.prepare.models.doors import TextModel


@dataclass(frozen=True)
class EmptyPrompt:
    """The task of the empty prompt's cond, which training drops captions to."""

    number: int = 0  # of the rank that makes it: each makes its own
    id: ClassVar = ""


Task = CondTask | TextTask | EmptyPrompt


@dataclass(frozen=True)
class TextWorker:
    """All that is needed to make texts; it may be sent to another process, and opens its models there."""

    out: str  # root of the cache
    recipe: TextRecipe
    libraries: Mapping[str, str]
    options: TextOptions
    seed: int
    text: "TextModel | None"  # None: no conditioning
    device: str
    max_pixels: int
    load: LoadOptions | None  # how images are read, if prompts see them

    def run(self, tasks: Iterable[Task]) -> Iterator[Event]:
        """Do the tasks in their order; a result is given once its file is on disk.

        A task that fails is a Failure, the others go on. Raises UserError for cond that cannot be stored, and if
        nothing can be written.
        """
        limit_pixels(self.max_pixels)
        with ThreadPoolExecutor(1, thread_name_prefix="write") as writer:
            yield from Run(self).run(tasks, writer)


Opened = TypeVar("Opened")
Write = Callable[[], TextResult]  # writes a file that is made


class Run:
    """One run of a TextWorker."""

    def __init__(self, worker: TextWorker) -> None:
        self.worker, self.storage = worker, Storage(worker.out)
        self.recipe = worker.recipe.to_json()
        self.cond = None
        stored = StoredCond(self.storage, worker.recipe)
        if worker.text is not None:
            self.cond = CondMaker(worker.recipe, worker.text, worker.device, worker.options, stored)
        self.writing = Writing()

    def run(self, tasks: Iterable[Task], writer: ThreadPoolExecutor) -> Iterator[Event]:
        """See TextWorker.run. While one file is written, the next is made."""
        writing: Future[TextResult | Failure] | None = None
        for task in tasks:
            begun = time.perf_counter()
            try:
                write = self._make(task)
            except UserError:
                raise
            except Exception as error:  # of a library, or ours
                yield Failure.of(task.id, error)
                continue
            made = time.perf_counter()
            before = writing.result() if writing is not None else None
            writing = writer.submit(self._write, task.id, write)
            waits = {"text": made - begun, "write": time.perf_counter() - made}
            yield Step(task.id, task.shard.num_images if isinstance(task, TextTask) else 0, waits=waits)
            if before is not None:
                yield before
        if writing is not None:
            yield writing.result()

    def _write(self, task_id: str, write: Write) -> TextResult | Failure:
        """In the writer's thread. Raises WriteError if nothing can be written any more."""
        try:
            result = write()
            self.writing.went_well()
            return result
        except Exception as error:
            return self.writing.failed(task_id, error)

    def _make(self, task: Task) -> Write:
        if isinstance(task, TextTask):
            return self._make_text(task)
        return self._make_cond(task) if isinstance(task, CondTask) else self._make_uncond()

    def _make_text(self, task: TextTask) -> Write:
        """The text of a shard, unless it is there from a run that was stopped."""
        shard, (rows, old, damaged) = task.shard, self._open_old(task)
        recipe = recipe_of(self.recipe, (row.key for row in live_rows(rows, shard.dead)))
        text_id = make_text_id(shard.id, rows, recipe, shard.dead)
        name = text_name(shard.id, text_id)
        lenders = {cond_file for cond_file, _ in task.borrowed.values()}
        found = self._find(name, lambda: open_text(self.storage, shard.id, text_id, shard.groups))
        if found is not None and found[1].rows() == [*rows] and lenders.issuperset(found[1].cond_files):
            there = TextResult(shard.id, shard.with_text(text_id, found[0], found[1].cond_files), damaged=damaged)
            return lambda: there
        text, made = self._compose(task, rows, old, self._metadata(recipe))
        cond_files = text.cond_files

        def write() -> TextResult:
            written = shard.with_text(text_id, write_text(self.storage, shard.id, text_id, text), cond_files)
            return TextResult(shard.id, written, None, made.num_encoded, made.truncated, made.batch_limit, damaged)

        return write

    def _open_old(self, task: TextTask) -> tuple[tuple[Row, ...], Text | None, str]:
        """What the new text says; the text there is now, of which cond is taken over; and what is wrong with that."""
        shard, rows = task.shard, task.rows
        if shard.text_file is None:
            return rows, None, ""
        try:
            check_stamp(self.storage, shard.text_name, shard.text_file)
            return rows, shard.open_text(self.storage), ""
        except UnreadableError:
            raise
        except UserError as error:  # nothing of it is taken over: what dead rows said is not known any more
            dead = frozenset(shard.dead)
            known = (Row(f"unknown/{n}", -1, -1, ("",)) if n in dead else row for n, row in enumerate(rows))
            return tuple(known), None, str(error)

    def _compose(
        self, task: TextTask, rows: tuple[Row, ...], old: Text | None, metadata: dict[str, Any]
    ) -> tuple[Text, MadeCond]:
        """The text of a shard, with the cond of its prompts."""
        worker, shard = self.worker, task.shard
        dead = frozenset(shard.dead)
        if worker.load is not None and self.cond is not None:
            found = compose_seeing(rows, shard.groups, dead, worker.options, worker.seed)
            seen = SeenImages(self.storage, shard, rows, worker.load)
            made = self.cond.make_seeing([*zip(found.rows, found.prompts, strict=True)], seen, old)
            lent = place_borrowed([], {})
        else:
            found = compose(rows, shard.groups, dead, task.borrowed, worker.options, worker.seed)
            own = [prompt for prompt in found.prompts if prompt not in task.borrowed]
            made = self.cond.make(own, old, task.homes) if self.cond is not None else MadeCond()
            lent = place_borrowed(found.prompts[len(own) :], task.borrowed)
        text = Text(
            found.groups, found.prompts, made.cond, made.num_tokens, made.max_tokens, metadata, shard.dead, *lent
        )  # fmt: skip
        return text, made

    def _make_cond(self, task: CondTask) -> Write:
        """The cond that several texts borrow, unless it is there."""
        assert self.cond is not None
        found = self._find(cond_name(task.id), lambda: open_cond(self.storage, task.id))
        if found is not None and make_cond_id([*found[1].prompt], self.worker.recipe) == task.id:
            there = TextResult(task.id, cond_file=found[0])
            return lambda: there
        made = self.cond.make([*task.prompts], homes=task.homes)
        metadata = self._metadata(self.worker.recipe.cond)
        cond = CondFile(task.prompts, made.cond, made.num_tokens, made.max_tokens, metadata)

        def write() -> TextResult:
            stamp = write_cond(self.storage, task.id, cond)
            return TextResult(task.id, None, None, made.num_encoded, made.truncated, made.batch_limit, cond_file=stamp)

        return write

    def _make_uncond(self) -> Write:
        """The cond of the empty prompt, unless it is there."""
        assert self.cond is not None
        recipe = self.worker.recipe
        uncond = make_uncond_id(recipe)
        found = self._find(uncond_name(uncond), lambda: open_uncond(self.storage, uncond))
        if found is not None and TextRecipe.cond_of(found[1][0].get("recipe", {})) == recipe.cond:
            there = TextResult("", uncond_file=found[0])
            return lambda: there
        made = self.cond.make([""])
        metadata = self._metadata(recipe.cond)

        def write() -> TextResult:
            stamp = write_uncond(self.storage, uncond, made.cond, metadata)
            return TextResult("", None, stamp, made.num_encoded, made.truncated, made.batch_limit)

        return write

    def _metadata(self, recipe: dict[str, Any]) -> dict[str, Any]:
        return {"recipe": recipe, "libraries": dict(self.worker.libraries)}

    def _find(self, name: str, open_it: Callable[[], Opened]) -> tuple[Stamp, Opened] | None:
        """A file that is there already, as it was written."""
        try:
            return check_seal(self.storage, name), open_it()
        except UnreadableError:
            raise
        except (UserError, FileNotFoundError):
            return None  # not there, or damaged: it is made anew


def place_borrowed(prompts: Sequence[str], borrowed: Borrowed) -> tuple[tuple[str, ...], np.ndarray]:
    """The cond files of some prompts by their ids, and [P,2] int32: for each prompt the number of one, and the row."""
    places = [borrowed[prompt] for prompt in prompts]
    cond_files = sorted({cond_file for cond_file, _ in places})
    numbers = {cond_file: number for number, cond_file in enumerate(cond_files)}
    rows = [(numbers[cond_file], row) for cond_file, row in places]
    return tuple(cond_files), np.array(rows, np.int32).reshape(-1, 2)
