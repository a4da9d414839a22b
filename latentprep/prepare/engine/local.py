"""Runs a worker on this machine's devices: in this process for one, in a process each for several.

A process is given a task when it asks for one. If it dies, each task that it had is tried once more, in a process of
its own: then it is clear which of them has killed it.
"""

import multiprocessing
import signal
import sys
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from latentprep.errors import UserError
from latentprep.prepare.engine.child import ASK, serve
from latentprep.prepare.engine.where import Where
from latentprep.prepare.work.events import Event, Failure, Step

MAX_DEATHS = 3  # of processes of one device with nothing done in between: then the device is left alone


def run(worker: Any, tasks: Sequence[Any], where: Where) -> Iterator[Event]:
    """What a worker tells of its tasks, on one device or several. Raises UserError, and KeyboardInterrupt."""
    if len(where.devices) == 1:
        yield from replace(worker, device=where.devices[0]).run(tasks)
    else:
        yield from Pool(worker, tasks, where.devices).run()


@dataclass(eq=False)
class Child:
    """A process with a worker."""

    process: Any
    connection: Connection
    slot: int  # number of its device
    left: deque[Any]  # where its tasks come from
    tasks: dict[str, Any] = field(default_factory=dict)  # those that it was given and has not done
    has_asked: bool = False  # for a task: it has begun
    steps: Counter[tuple[str, bool]] = field(default_factory=Counter)  # id of a task, is_new -> images that are done


class Pool:
    """Processes with a worker each, one for each device, and the tasks that are left."""

    def __init__(self, worker: Any, tasks: Sequence[Any], devices: Sequence[str]) -> None:
        self.worker, self.devices = worker, devices
        self.left = deque(tasks)
        self.again: list[tuple[Any, int]] = []  # tasks whose process died, and the number of its device
        self.children: list[Child] = []
        self.num_stillborn = 0  # processes in a row that ended before they had begun
        self.deaths: Counter[int] = Counter()  # number of a device -> processes that died since its last result
        self.last_code: int | None = None  # exit code of the one that died last

    def run(self) -> Iterator[Event]:
        """The events of all processes, as they come."""
        try:
            self._fill()
            while self.children:
                for ready in wait([child.connection for child in self.children]):
                    child = next(child for child in self.children if child.connection is ready)
                    yield from self._hear(child)
                self._fill()
            if self.left or self.again:
                raise UserError(
                    f"--devices {','.join(self.devices)}: their processes keep ending too early, the last with exit "
                    f"code {self.last_code}; -9 may mean that memory ran out. What is done is kept."
                )
        finally:
            self._stop()

    def _fill(self) -> None:
        """Start a process on each device that has none, as long as there is something for it to do."""
        usable = [slot for slot in range(len(self.devices)) if self.deaths[slot] < MAX_DEATHS]
        for slot in usable:
            if any(child.slot == slot for child in self.children):
                continue
            if len(self.left) > sum(not child.has_asked for child in self.children):
                self._start(slot, self.left)
                continue
            for pair in self.again:
                if pair[1] != slot or usable == [slot]:  # the device may be what kills
                    self.again.remove(pair)
                    self._start(slot, deque([pair[0]]))
                    break

    def _start(self, slot: int, left: deque[Any]) -> None:
        """Start a process, from a thread: a KeyboardInterrupt cannot end that half-way and leave a lost process."""
        import torch

        with ThreadPoolExecutor(1, thread_name_prefix="start") as starter:
            starter.submit(self._spawn, slot, left, torch.get_num_threads()).result()

    def _spawn(self, slot: int, left: deque[Any], num_threads: int) -> None:
        if multiprocessing.current_process().daemon:
            raise UserError(
                f"--devices {','.join(self.devices)}: each needs a process, and a DataLoader's worker may start none. "
                "Call encode in the main process, or give one device."
            )
        context = multiprocessing.get_context("spawn")  # CUDA cannot be used in a forked process
        device = self.devices[slot]
        ours, theirs = context.Pipe()
        arguments = (replace(self.worker, device=device), theirs, num_threads)
        process = context.Process(target=serve, args=arguments, name=f"latentprep on {device}")
        with without_main(), deaf():
            process.start()
        theirs.close()
        self.children.append(Child(process, ours, slot, left))

    def _hear(self, child: Child) -> Iterator[Event]:
        """What a process has to say."""
        try:
            message = child.connection.recv()
        except (EOFError, OSError):
            yield from self._bury(child)
            return
        if isinstance(message, Exception):
            raise message
        if message != ASK:
            if isinstance(message, Step):
                child.steps[message.id, message.is_new] += message.num_images
            else:
                child.tasks.pop(message.id, None)
                self.deaths[child.slot] = 0
            yield message
            return
        child.has_asked, self.num_stillborn = True, 0
        task = child.left.popleft() if child.left else None
        if task is not None:
            child.tasks[task.id] = task
        with suppress(OSError):  # it has died: that is heard next
            child.connection.send(task)

    def _bury(self, child: Child) -> Iterator[Event]:
        """A process has ended. Each task that it has not done is tried once more; the second time it is a Failure.

        Raises UserError if two processes in a row ended before they began.
        """
        child.process.join()
        child.connection.close()
        self.children.remove(child)
        device, code, is_second = self.devices[child.slot], child.process.exitcode, child.left is not self.left
        self.num_stillborn += not child.has_asked
        if self.num_stillborn > 1:  # one may have been killed; two will be followed by others without end
            raise UserError(
                f"--devices: the process for {device} ended before it began, with exit code {code}. What it wrote "
                "above may say why. Leave --devices out to use one device."
            )
        if is_second:
            self.again += [(task, child.slot) for task in child.left]  # it had not begun
            for task in child.tasks.values():
                yield Failure(task.id, f"two processes died with it; the last, on {device}, with exit code {code}")
        elif child.tasks or not child.has_asked:
            self.again += [(task, child.slot) for task in child.tasks.values()]
            yield from (Step(id_, -n, is_new) for (id_, is_new), n in child.steps.items() if id_ in child.tasks)
            self.deaths[child.slot] += 1
            self.last_code = code

    def _stop(self) -> None:
        """End the processes that still run; each keeps what its device has done.

        They are told twice: by a signal (not on Windows, where it would end all at once), and by the silence of the
        connection. A process whose library has swallowed the signal ends when it has something to tell.
        """
        for child in self.children:
            if sys.platform != "win32":
                child.process.terminate()
            child.connection.close()
        for child in self.children:
            child.process.join()


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


@contextmanager
def deaf() -> Iterator[None]:
    """Processes that this thread starts meanwhile do not hear the terminal, which sends its signals to all.

    They would end in the midst of their imports, each with a traceback, before they can say themselves what to ignore.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    resource_tracker.ensure_running()  # its first start would take the mask back
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
