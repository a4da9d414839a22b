"""Processes of an engine that end before they begin: no endless row of others follows them."""

import os
from dataclasses import dataclass

import pytest

from latentprep.errors import UserError
from latentprep.prepare.engine import local
from latentprep.prepare.engine.where import Where


@dataclass(frozen=True)
class Task:
    id: str
    number: int = 0


def end(device: str) -> "Stillborn":
    """What a process does as it takes its worker out of the pipe."""
    os._exit(9)


@dataclass(frozen=True)
class Stillborn:
    device: str = ""

    def __reduce__(self):
        return end, (self.device,)


@pytest.mark.slow
def test_two_processes_that_never_begin_end_the_run():
    events = local.run(Stillborn(), [Task("a"), Task("b")], Where(("cpu", "cpu")))
    with pytest.raises(UserError, match=r"^--devices: the process for cpu ended before it began, with exit code 9\."):
        list(events)
