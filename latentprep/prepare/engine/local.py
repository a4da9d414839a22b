"""Runs a worker on this machine's devices: in this process for one, in a process each for several.

A process is given a task when it asks for one. If it dies, its tasks go to another process, each once.
"""

import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection, wait
from typing import Any

from latentprep.errors import UserError
from latentprep.prepare.engine.where import Where
from latentprep.prepare.work.events import Event, Failure, Step

ASK = "next"  # what a process sends to be given a task; it is sent None if there is none


def run(worker: Any, tasks: Sequence[Any], where: Where) -> Iterator[Event]:
    """What a worker tells of its tasks, on one device or several. Raises UserError, and KeyboardInterrupt."""
    if len(where.devices) == 1:
        yield from replace(worker, device=where.devices[0]).run(tasks)
    else:
        yield from Pool(worker, tasks).run(where.devices)


@dataclass(eq=False)
class Child:
    """A process with a worker, and the tasks that it was given and has not done."""

    process: Any
    connection: Connection
    device: str
    tasks: dict[str, Any] = field(default_factory=dict)
    has_asked: bool = False  # for a task: it has begun


class Pool:
    """Processes with a worker each, and the tasks that are left."""

    def __init__(self, worker: Any, tasks: Sequence[Any]) -> None:
        self.worker = worker
        self.left = deque(tasks)
        self.tried: set[str] = set()  # ids of tasks whose process died
        self.children: list[Child] = []
        self.num_stillborn = 0  # processes that ended before they had begun

    def run(self, devices: Sequence[str]) -> Iterator[Event]:
        """The events of all processes, as they come."""
        try:
            for device in devices[: len(self.left)]:
                self._start(device)
            while self.children:
                for ready in wait([child.connection for child in self.children]):
                    child = next(child for child in self.children if child.connection is ready)
                    yield from self._hear(child)
                if self.left and not self.children:  # all have ended, and one has left its tasks behind
                    self._start(devices[0])
        finally:
            self._stop()

    def _start(self, device: str) -> None:
        import torch

        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
        ours, theirs = context.Pipe()
        arguments = (replace(self.worker, device=device), theirs, torch.get_num_threads())
        process = context.Process(target=serve, args=arguments, name=f"latentprep on {device}")
        with without_main():
            process.start()
        theirs.close()
        self.children.append(Child(process, ours, device))

    def _hear(self, child: Child) -> Iterator[Event]:
        """What a process has to say."""
        try:
            message = child.connection.recv()
        except (EOFError, OSError):
            yield from self._bury(child)
            return
        if isinstance(message, UserError):
            raise message
        if message != ASK:
            if not isinstance(message, Step):
                child.tasks.pop(message.id, None)
            yield message
            return
        child.has_asked = True
        task = self.left.popleft() if self.left else None
        if task is not None:
            child.tasks[task.id] = task
        with suppress(OSError):  # it has died: that is heard next
            child.connection.send(task)

    def _bury(self, child: Child) -> Iterator[Failure]:
        """A process has ended: what it was given and has not done goes to another, the second time it is a failure."""
        child.process.join()
        child.connection.close()
        self.children.remove(child)
        self.num_stillborn += not child.has_asked
        if self.num_stillborn > 1:  # one may have been killed; two will be followed by others without end
            raise UserError(
                f"--devices: the process for {child.device} ended before it began, with exit code "
                f"{child.process.exitcode}. What it wrote above may say why. Leave --devices out to use one device."
            )
        for task in child.tasks.values():
            if task.id in self.tried:
                code = child.process.exitcode
                yield Failure(
                    task.id, f"two processes died with it; the last, on {child.device}, with exit code {code}"
                )
            else:
                self.tried.add(task.id)
                self.left.append(task)

    def _stop(self) -> None:
        """End the processes that still run; each keeps what its device has done."""
        for child in self.children:
            child.process.terminate()
        for child in self.children:
            child.process.join()
            child.connection.close()


@contextmanager
def without_main() -> Iterator[None]:
    """Processes that are started meanwhile do not run the caller's script again: a worker is all of latentprep's own.

    Else a script that calls encode() without `if __name__ == "__main__"` would call it in each of them.
    """
    main = sys.modules["__main__"]
    names = [name for name in ("__spec__", "__file__") if hasattr(main, name)]
    before = {name: vars(main)[name] for name in names}
    for name in names:
        setattr(main, name, None)
    try:
        yield
    finally:
        vars(main).update(before)


def serve(worker: Any, connection: Connection, num_threads: int) -> None:
    """The life of a process: ask for tasks, do them, tell what happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all: the parent decides
    signal.signal(signal.SIGTERM, _stop)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    import warnings

    import torch

    from latentprep.prepare.devices import quiet_libraries

    warnings.filterwarnings("ignore")
    quiet_libraries()
    torch.set_num_threads(num_threads)  # the same bytes as in the parent's process
    lock = threading.Lock()

    def send(message: object) -> None:
        with lock:
            connection.send(message)

    def ask() -> Iterator[Any]:
        send(ASK)
        while (task := connection.recv()) is not None:
            yield task
            send(ASK)

    try:
        with closing(worker.run(ask())) as events:
            for event in events:
                send(event)
    except UserError as error:
        send(error)
    except (KeyboardInterrupt, BrokenPipeError):
        pass  # what is done is kept


def _stop(number: int, frame: object) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise KeyboardInterrupt


def _end_with_parent() -> None:
    """End this process if its parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
