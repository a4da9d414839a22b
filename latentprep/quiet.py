"""Other libraries say nothing while a run goes on, and are afterwards as they were: in a notebook they are its own."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from threading import Lock


class Shared:
    """A context that all threads share: it begins with the first of them, and ends with the last.

    What it changes belongs to the whole process: the last to end must not restore what the first has changed.
    """

    def __init__(self, context: Callable[[], AbstractContextManager[None]]) -> None:
        self.context = context
        self.lock = Lock()
        self.num_inside = 0
        self.stack = ExitStack()

    def __enter__(self) -> None:
        with self.lock:
            if not self.num_inside:
                self.stack.enter_context(self.context())
            self.num_inside += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.num_inside -= 1
            if not self.num_inside:
                self.stack.close()


VERBOSITY = "TRANSFORMERS_VERBOSITY"  # transformers reads it when it is imported, where it already talks


@contextmanager
def _without_warnings() -> Iterator[None]:
    """No warnings, and none of what transformers says while it is imported."""
    is_ours = VERBOSITY not in os.environ and "transformers" not in sys.modules
    if is_ours:
        os.environ[VERBOSITY] = "error"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        if is_ours:
            del os.environ[VERBOSITY]
            if "transformers" in sys.modules:
                sys.modules["transformers"].utils.logging.set_verbosity_warning()  # its default


@contextmanager
def _without_logs() -> Iterator[None]:
    import diffusers.utils.logging
    import huggingface_hub.utils
    import transformers.utils.logging

    from latentprep.prepare.devices import quiet_libraries

    logs = diffusers.utils.logging, transformers.utils.logging
    before = [library.get_verbosity() for library in logs]
    had_bars = transformers.utils.logging.is_progress_bar_enabled()  # diffusers does not say
    had_downloads = not huggingface_hub.utils.are_progress_bars_disabled()
    quiet_libraries()
    try:
        yield
    finally:
        for library, verbosity in zip(logs, before, strict=True):
            library.set_verbosity(verbosity)
            if had_bars:
                library.enable_progress_bar()
        if had_downloads:
            huggingface_hub.utils.enable_progress_bars()


quiet_warnings = Shared(_without_warnings)
quiet_logs = Shared(_without_logs)
