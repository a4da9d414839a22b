"""Ctrl-C and SIGTERM: the first one stops a run in good order, the second one at once."""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

# SIGHUP: the terminal was closed, or the connection to it has gone; Windows has none
SIGNALS = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))

PATIENCE = 3  # seconds for images that are just being decoded


@contextmanager
def stoppable() -> Iterator[None]:
    """The first signal raises KeyboardInterrupt(number) in the main thread; the second ends the process.

    A thread listens, since Python's own handlers wait until torch returns, which may be a minute on a CPU.
    """
    listener, sender = socket.socketpair()
    sender.setblocking(False)

    def listen() -> None:
        heard = 0
        while data := listener.recv(1):
            if data[0] not in SIGNALS:
                continue
            heard += 1
            if heard == 1:
                print("\nstopping once this batch is done; again to stop at once", file=sys.stderr, flush=True)
            else:
                os._exit(128 + data[0])

    def stop(number: int, frame: FrameType | None) -> None:
        for one in SIGNALS:
            signal.signal(one, lambda number, frame: None)  # not SIG_IGN: the listener is to hear it
        raise KeyboardInterrupt(number)

    handlers = {number: signal.signal(number, stop) for number in SIGNALS}
    descriptor = signal.set_wakeup_fd(sender.fileno(), warn_on_full_buffer=False)
    threading.Thread(target=listen, daemon=True, name="signals").start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        sender.close()


def end_if_stuck(code: int) -> None:
    """End the process if a thread still waits for a file, as on a network disk that hangs: Python would wait for it."""
    deadline = time.monotonic() + PATIENCE
    for thread in threading.enumerate():
        if thread.name.startswith("decode"):
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
