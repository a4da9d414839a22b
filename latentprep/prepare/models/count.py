"""How many tokens prompts take, by the tokenizer alone: no weight is read.

What a tokenizer is handed is the pipeline's own to say: a prompt may be cleaned, and stand in a template. So
encode_prompt is called with a tokenizer that listens, and a text encoder that stops the call.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch

from latentprep.options import TextOptions
from latentprep.prepare.models.encode_prompt import make_arguments, run
from latentprep.prepare.models.family import Family, tokenizer_of
from latentprep.prepare.models.load_text import make_pipeline

AT_ONCE = 256  # prompts
NO_LIMIT = 2**20  # tokens; a tokenizer that cuts nothing says 10**30
CUTTING = ("padding", "truncation", "max_length", "return_tensors", "return_length", "return_overflowing_tokens")


class TextModel(Protocol):
    """What is known of a model's text encoders, such as a TextFolder."""

    @property
    def family(self) -> Family: ...
    @property
    def window(self) -> int: ...
    @property
    def pipeline_settings(self) -> Mapping[str, Any]: ...


class PromptCounter:
    """Counts the tokens of prompts as the encoder of a family's sequence gets them."""

    def __init__(self, model: TextModel, tokenizer: Any, options: TextOptions) -> None:
        family = self.family = model.family
        assert family.sequence is not None
        self.tokenizer = tokenizer
        self.max_tokens = family.num_tokens(options.max_tokens, model.window)  # that are kept of a prompt
        self.hidden = 0  # tokens around a prompt that are not kept
        # prompts go to several encoders as they are; where one is the first, they may be put into a template for it
        self.is_plain = family.sequence != "text_encoder"
        if self.is_plain:
            return
        self.listening = Listening(tokenizer)
        parts = {family.sequence: Stopping(), tokenizer_of(family.sequence): self.listening}
        self.pipeline = make_pipeline(family, {**model.pipeline_settings, **parts})
        kind, device = type(self.pipeline), torch.device("cpu")
        self.arguments = make_arguments(family, family.calls[0], kind, device, self.max_tokens)
        told = self._hear([""])[1]
        if told is None:
            self.max_tokens = min(tokenizer.model_max_length, NO_LIMIT)
        elif family.hidden_tokens is not None:
            self.hidden = family.hidden_tokens
        else:
            self.hidden = told - self.max_tokens

    def count(self, prompts: list[str]) -> np.ndarray:
        """Tokens of each whole prompt [P] int32; those that are never stored, such as a template's, do not count."""
        if self.is_plain:
            whole = self.tokenizer(prompts, truncation=False, padding=False)
            return np.array(lengths(whole["input_ids"]), np.int32)
        at_once = 1 if self.family.one_by_one else AT_ONCE
        batches = [self._hear(prompts[n : n + at_once])[0] for n in range(0, len(prompts), at_once)]
        return np.array([count - self.hidden for found in batches for count in found], np.int32)

    def _hear(self, prompts: list[str]) -> tuple[list[int], int | None]:
        """Tokens of what the tokenizer is handed for each prompt, whole; and where it is told to cut."""
        self.listening.heard.clear()
        with suppress(Stopped):
            run(self.pipeline, self.arguments, prompts)
        heard = list(self.listening.heard)
        return [count for counts, _ in heard for count in counts], heard[0][1] if heard else None


class Listening:
    """A tokenizer that writes down how long whatever it is asked to cut is; in all else it is the one it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__["tokenizer"] = tokenizer
        self.__dict__["heard"] = []  # of each call: the tokens of its texts, and max_length

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.tokenizer, name, value)  # pipelines set padding_side

    def __call__(self, text: Any, **options: Any) -> Any:
        self._hear(self.tokenizer, text, options)
        return self.tokenizer(text, **options)

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        if options.get("tokenize", True):
            self._hear(self.tokenizer.apply_chat_template, conversation, options)
        return self.tokenizer.apply_chat_template(conversation, **options)

    def _hear(self, tokenize: Any, text: Any, options: dict[str, Any]) -> None:
        if options.get("truncation"):
            whole = {name: value for name, value in options.items() if name not in CUTTING}
            found = tokenize(text, truncation=False, padding=False, **whole)
            self.heard.append((lengths(found["input_ids"]), options.get("max_length")))


class Stopped(Exception):  # noqa: N818
    """What is asked of a text encoder, when prompts are only counted."""


class Stopping(torch.nn.Module):
    """A text encoder that ends the call of encode_prompt."""

    dtype, device = torch.float32, torch.device("cpu")

    def forward(self, *arguments: Any, **options: Any) -> Any:
        raise Stopped


def lengths(ids: Any) -> list[int]:
    """Tokens of each text, of what a tokenizer gives for one or several."""
    return [len(ids)] if ids and isinstance(ids[0], int) else [len(row) for row in ids]
