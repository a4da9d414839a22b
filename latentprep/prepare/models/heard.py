"""How many tokens prompts take as a pipeline hands them to its tokenizer: cleaned, or in a template.

That is the pipeline's own to say. So encode_prompt is called with a tokenizer that listens, and ends the call once it
has heard every prompt: no weight is needed.
"""

from collections.abc import Mapping
from contextlib import suppress
from typing import Any, Protocol

import numpy as np
import torch

from latentprep.prepare.models.encode_prompt import make_arguments, run
from latentprep.prepare.models.family import Family
from latentprep.prepare.models.load_text import make_pipeline

NO_LIMIT = 2**20  # tokens; a tokenizer that cuts nothing says 10**30
CUTTING = ("padding", "truncation", "max_length", "return_tensors", "return_length", "return_overflowing_tokens")
IMAGES = "images"  # what a processor is handed beside texts


class CountedModel(Protocol):
    """What is known of a model's text encoders, such as a TextFolder."""

    @property
    def family(self) -> Family: ...
    @property
    def window(self) -> int: ...
    @property
    def pipeline_settings(self) -> Mapping[str, Any]: ...


class HeardPrompts:
    """Prompts as the tokenizer of a family's sequence hears them."""

    def __init__(self, model: CountedModel, tokenizer: Any, max_tokens: int) -> None:
        """max_tokens is what is kept of a prompt."""
        family = self.family = model.family
        assert family.sequence is not None
        self.max_tokens = max_tokens
        self.hidden = 0  # tokens around a prompt that are not kept
        self.listening = Listening(tokenizer)
        parts = {family.sequence: Absent(), family.tokenizer_of(family.sequence): self.listening}
        self.pipeline = make_pipeline(family, {**model.pipeline_settings, **parts})
        kind, device = type(self.pipeline), torch.device("cpu")
        self.arguments = make_arguments(family, family.calls[0], kind, device, max_tokens)
        told = self._hear([""])[1]
        if told is None:
            self.max_tokens = min(tokenizer.model_max_length, NO_LIMIT)
        if family.hidden_tokens is not None:
            self.hidden = family.hidden_tokens
        elif told is not None:
            self.hidden = told - max_tokens

    def see(self, num_images: int) -> None:
        """Count prompts with so many images, each of which is one token here."""
        self.arguments["image"] = [Absent()] * num_images

    def count(self, prompts: list[str]) -> np.ndarray:
        """Tokens of each whole prompt [P] int32; those that are never stored, such as a template's, do not count."""
        batches = [[prompt] for prompt in prompts] if self.family.one_by_one else [prompts]
        counts = [count - self.hidden for batch in batches for count in self._hear(batch)[0]]
        return np.array(counts, np.int32)

    def _hear(self, prompts: list[str]) -> tuple[list[int], int | None]:
        """Tokens of what the tokenizer is handed for each prompt, whole; and where it is told to cut."""
        self.listening.expect(len(prompts))
        with suppress(AllHeard):
            run(self.pipeline, self.arguments, prompts)
        return self.listening.counts, self.listening.told


class Listening:
    """A tokenizer that writes down how long whatever it is asked to cut is; in all else it is the one it was given."""

    def __init__(self, tokenizer: Any) -> None:
        self.__dict__["tokenizer"] = tokenizer
        self.expect(0)

    def expect(self, count: int) -> None:
        """Begin to listen, until so many texts were heard."""
        self.__dict__.update(counts=[], told=None, expected=count)

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
        if not options.get("truncation") and IMAGES not in options:
            return
        whole = {name: value for name, value in options.items() if name not in (*CUTTING, IMAGES)}
        ids = tokenize(text, truncation=False, padding=False, **whole)["input_ids"]
        self.counts.extend([len(ids)] if isinstance(text, str) else lengths(ids))
        self.__dict__["told"] = options.get("max_length")
        if len(self.counts) >= self.expected:
            raise AllHeard


class AllHeard(BaseException):
    """Ends the call of encode_prompt."""


class Absent(torch.nn.Module):
    """In the place of a text encoder, which is never asked."""

    dtype, device = torch.float32, torch.device("cpu")


def lengths(ids: Any) -> list[int]:
    """Tokens of each text, of what a tokenizer gives for one or several."""
    return [len(ids)] if ids and isinstance(ids[0], int) else [len(row) for row in ids]
