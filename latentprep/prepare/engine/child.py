"""The life of a process that an engine has started: it asks for tasks, does them, and tells what happens."""

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection
from multiprocessing.reduction import ForkingPickler
from typing import Any

from latentprep.system import share_freed_memory

ASK = "next"  # what a process sends to be given a task; it is sent None if there is none


class Unheard(BaseException):
    """The parent listens no longer. No worker takes it for the failure of a task, as it does an Exception."""


class Channel:
    """The connection to the parent, for all threads of a process."""

    def __init__(self, connection: Connection) -> None:
        self.connection, self.lock, self.is_whole = connection, threading.Lock(), True
        self.is_stopped = False  # by a signal, whose exception a library may have swallowed

    def send(self, message: object) -> None:
        """Send a message to the parent. Raises Unheard if it listens no longer."""
        with self.lock:
            if self.is_stopped or not self.is_whole:  # or a message was interrupted in its midst
                raise Unheard
            self.is_whole = False
            try:
                self.connection.send(message)
            except OSError:
                raise Unheard from None
            self.is_whole = True

    def tasks(self) -> Iterator[Any]:
        """What the parent gives, as long as it has something. Raises Unheard."""
        self.send(ASK)
        while (task := self._receive()) is not None:
            yield task
            self.send(ASK)

    def _receive(self) -> Any:
        try:
            return self.connection.recv()
        except (OSError, EOFError):
            raise Unheard from None


def serve(worker: Any, connection: Connection, num_threads: int) -> None:
    """What the process runs. The last line ends it, even if a thread of it hangs in a read."""
    code, channel = 0, Channel(connection)

    def stop(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)
        channel.is_stopped = True
        raise KeyboardInterrupt

    try:
        signal.signal(signal.SIGTERM, stop)
        for name in ("SIGINT", "SIGHUP"):  # a terminal sends them to all processes: the parent decides
            if hasattr(signal, name):
                signal.signal(getattr(signal, name), signal.SIG_IGN)
        threading.Thread(target=_end_with_parent, daemon=True).start()
        _work(worker, channel, num_threads)
    except (KeyboardInterrupt, Unheard):
        pass  # what is done is kept
    except BaseException:  # a fault of ours, or of what is installed: the parent points to what stands above
        traceback.print_exc()
        code = 1
    finally:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):  # there may be none
                stream.flush()
        os._exit(code)


def _work(worker: Any, channel: Channel, num_threads: int) -> None:
    import warnings

    import torch

    from latentprep.prepare.devices import quiet_libraries

    share_freed_memory()
    warnings.filterwarnings("ignore")
    quiet_libraries()
    torch.set_num_threads(num_threads)  # the same bytes as in the parent's process
    try:
        with closing(worker.run(channel.tasks())) as events:
            for event in events:
                channel.send(event)
    except Exception as error:  # what ends a run ends it here as it does in a single process: the parent raises it
        channel.send(portable(error))


def portable(error: Exception) -> Exception:
    """An exception that can be sent, with a note of where it was raised."""
    error.add_note("".join(traceback.format_exception(error)))
    try:
        ForkingPickler.loads(ForkingPickler.dumps(error))  # some cannot be made again from what they hold
    except Exception:  # whatever their classes raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _end_with_parent() -> None:
    """End this process if its parent is gone, however it went."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
