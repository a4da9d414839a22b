"""The chat template of a tokenizer, a stranger's program, within bounds: what it writes, and how long it takes.

transformers runs it in a sandbox, where it reaches no file and no code.
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.prepare.models.files import blame

MAX_TEMPLATE = 2**16  # characters; Qwen3's has 4,000
MAX_CHAT = 2**20  # characters that it makes of one prompt, of which a caption may have 64,000
MAX_SECONDS = 10.0  # of the processor, for one prompt; Qwen3's takes less than a thousandth of that
# arguments of apply_chat_template that are for tokens, and not for the text
OF_TOKENS = ("tokenize", "return_dict", "return_tensors", "padding", "truncation", "max_length")
AS_IT_IS = "{{ messages[0].content }}"
JINJA_FILE = "<template>"  # what Jinja calls the file of a template that has none


def bounded_chat(call: Callable[..., Any], folder: Path) -> Callable[..., Any]:
    """apply_chat_template with the errors of a model's own template as one line, and an end to its time and its text.

    The template runs once for each prompt; tokens are made of what it wrote.
    """
    what = f"{folder}: its files make no chat of a prompt"

    def write(chat: Any, options: dict[str, Any]) -> str:
        with blame(what), time_limit(what):
            text: str = call(chat, **options, tokenize=False)
        if len(text) > MAX_CHAT:
            raise UserError(f"{what} ({len(text):,} characters of one prompt, expected up to {MAX_CHAT:,}).")
        return text

    def checked(conversation: Any, **options: Any) -> Any:
        plain = {name: value for name, value in options.items() if name not in OF_TOKENS}
        is_one = isinstance(conversation[0], dict)
        texts = [write(chat, plain) for chat in ([conversation] if is_one else conversation)]
        if not options.get("tokenize", True):
            return texts[0] if is_one else texts
        written = [[{"role": "user", "content": text}] for text in texts]
        own = {name: value for name, value in options.items() if name in OF_TOKENS}
        with blame(what):
            return call(written[0] if is_one else written, chat_template=AS_IT_IS, **own)

    return checked


@contextmanager
def time_limit(what: str) -> Iterator[None]:
    """Raise UserError, which begins with `what`, once the block has had MAX_SECONDS of the processor.

    It is looked at before each line of a template, and each call of a function. One step in C, such as a power of large
    numbers, is not interrupted.
    """
    end, own_end = time.monotonic() + MAX_SECONDS, time.thread_time() + MAX_SECONDS

    def look(frame: Any, event: str, argument: Any) -> Any:
        if time.monotonic() > end and time.thread_time() > own_end:  # the second takes ten times as long to ask
            raise OutOfTime
        return look if frame.f_code.co_filename == JINJA_FILE else None

    before = sys.gettrace()
    sys.settrace(look)
    try:
        yield
    except OutOfTime:
        raise UserError(
            f"{what} (its chat_template takes over {MAX_SECONDS:g} seconds for one prompt). Use another model."
        ) from None
    finally:
        sys.settrace(before)


class OutOfTime(BaseException):
    """Ends a template. No Exception: Jinja passes over some of them."""
