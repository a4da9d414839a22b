"""Workers that do what their tasks say, for tests of engines: processes of their own import this module."""

import os
import signal
import threading
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from latentprep.errors import UserError
from latentprep.prepare.work.events import Event, Step, TextResult


class OddError(Exception):
    """An exception that cannot be made again from what it holds."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@dataclass(frozen=True)
class Task:
    id: str
    do: str = ""
    number: int = 0


@dataclass(frozen=True)
class Worker:
    """Does what tasks say, with a file in `folder` for every time that one is begun."""

    folder: str
    ahead: int = 1  # tasks that it takes before it does the first of them
    device: str = ""

    def run(self, tasks: Iterable[Task]) -> Iterator[Event]:
        held: list[Task] = []
        try:
            for task in tasks:
                held.append(task)
                if len(held) == self.ahead:
                    yield from self.do(held.pop(0))
            while held:
                yield from self.do(held.pop(0))
        finally:
            (Path(self.folder) / f"closed-{os.getpid()}").write_text(self.device)

    def do(self, task: Task) -> Iterator[Event]:
        begun = Path(self.folder) / f"{task.id}-{os.getpid()}"
        is_first = not list(Path(self.folder).glob(f"{task.id}-*"))
        begun.write_text(self.device)
        yield Step(task.id, 1)
        if task.do == "die" or (task.do == "die once" and is_first):
            os.kill(os.getpid(), signal.SIGKILL)
        elif task.do == "user error":
            raise UserError(f"{task.id}: not\x1b[2J good.")
        elif task.do == "os error":
            raise PermissionError(13, "Permission denied", "/a/b")
        elif task.do == "odd error":
            raise OddError(1, 2)
        elif task.do == "fault":
            raise ZeroDivisionError("a fault")
        elif task.do == "flood":  # more than a pipe holds, from two threads
            threading.Thread(target=self.wait, daemon=True).start()
            while True:
                yield Step(task.id, 1, waits={"x" * 5000: 1.0})
        elif task.do == "swallow":  # as a library may, that catches all
            while True:
                try:
                    self.wait(60)
                except KeyboardInterrupt:
                    (Path(self.folder) / f"swallowed-{os.getpid()}").write_text("")
                    yield Step(task.id, 1)
        elif task.do == "hang":  # as a read of a network disk
            ThreadPoolExecutor(1).submit(self.wait)
            time.sleep(0.05)
            self.wait()
        elif task.do == "wait":
            time.sleep(0.2)
        yield TextResult(task.id)

    @staticmethod
    def wait(seconds: float = 600) -> None:
        time.sleep(seconds)
