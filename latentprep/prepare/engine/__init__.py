"""Engines: who decides which worker gets which tasks. A new one is a function, and a row here."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from latentprep.prepare.engine import local, ranks
from latentprep.prepare.engine.where import Where
from latentprep.prepare.work.events import Event

Engine = Callable[[Any, Sequence[Any], Where], Iterator[Event]]
ENGINES: dict[str, Engine] = {"local": local.run, "ranks": ranks.run}


def run(worker: Any, tasks: Sequence[Any], where: Where) -> Iterator[Event]:
    """What a worker tells of its tasks: results in any order, failures are results too. Raises UserError."""
    return ENGINES[where.engine](worker, tasks, where)
