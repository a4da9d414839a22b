"""The text encoders of a model at work: prompts -> cond, batch by batch, and how long each prompt is."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch

from latentprep.cache.ragged import Conds, join_conds
from latentprep.options import TextOptions
from latentprep.prepare.models.clip_windows import ClipWindows
from latentprep.prepare.models.count import PromptCounter
from latentprep.prepare.models.encode_prompt import call_pipeline, make_arguments
from latentprep.prepare.models.family import Family, tokenizer_of
from latentprep.prepare.models.load_tokenizer import read_special_tokens_as_text
from latentprep.prepare.models.windows import join

TOKENS_AT_ONCE = 32 * 77  # 32 prompts of one window of CLIP; 4 of 512 tokens of T5, which is far larger


class TextSource(Protocol):
    """What knows a model's family and loads its base pipeline, such as models.TextFolder."""

    @property
    def family(self) -> Family: ...
    @property
    def window(self) -> int: ...
    @property
    def pipeline_settings(self) -> Mapping[str, Any]: ...
    def load_pipeline(self, dtype: torch.dtype) -> Any: ...


class TextEncoder:
    """The text encoders of a model, on their device in their dtype: a doors.PromptEncoder."""

    def __init__(
        self, source: TextSource, device: torch.device, dtype: torch.dtype, options: TextOptions | None = None
    ) -> None:
        options, family = options or TextOptions(), source.family
        self.family = family
        self.pipeline = source.load_pipeline(dtype).to(device)
        num_tokens = family.num_tokens(options.max_tokens, source.window)
        self.batch_size = max(1, TOKENS_AT_ONCE // family.stored_tokens(num_tokens, source.window))
        kind = type(self.pipeline)
        self.arguments = [make_arguments(family, call, kind, device, num_tokens) for call in family.calls]
        if options.clip_skip != 1:
            for arguments in self.arguments:  # diffusers counts the layers that are left out
                arguments["clip_skip"] = options.clip_skip - 1
            mend_clip_skip(self.pipeline.text_encoder)

        encoders = {name: part for name, part in self.pipeline.components.items() if name.startswith("text_encoder")}
        there = sorted(name for name, part in encoders.items() if part is not None)
        if not family.has_special_tokens:
            for part in encoders:
                if (tokenizer := getattr(self.pipeline, tokenizer_of(part), None)) is not None:
                    read_special_tokens_as_text(tokenizer)
        # what counts as truncated: tokens of the sequence; where there is none, those of CLIP
        self.counter: PromptCounter | None = None
        self.windows: ClipWindows | None = None
        self.max_tokens: int | None = num_tokens
        if family.sequence is not None and family.sequence in there:
            self.counter = PromptCounter(source, getattr(self.pipeline, tokenizer_of(family.sequence)), options)
            self.max_tokens = self.counter.max_tokens
            return
        self.tokenizer = getattr(self.pipeline, tokenizer_of(there[0]))
        self.max_tokens = source.window  # of CLIPs beside a T5 that is left out
        if family.sequence is None:
            room = source.window - 2  # without start and end
            num_windows = num_tokens // room
            self.max_tokens = num_windows * room + 2
            widths = [encoders[part].config.hidden_size for part in there]
            self.windows = ClipWindows(self.tokenizer, room, num_windows, options.emphasis, widths)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Conds:
        """Cond of P prompts: name -> [P,T,D] (pooled_prompt_embeds: [P,D]) float32 on the CPU, or rows [T,D]."""
        size = self.batch_size
        return join_conds([self._encode_batch(prompts[n : n + size]) for n in range(0, len(prompts), size)])

    def _encode_batch(self, prompts: list[str]) -> Conds:
        if self.windows is None:
            return call_pipeline(self.pipeline, self.family, self.arguments, prompts)
        windows = self.windows.split(prompts)
        texts = [join(window) for window in windows]
        return self.windows.merge(call_pipeline(self.pipeline, self.family, self.arguments, texts), windows)

    def count_tokens(self, prompts: list[str]) -> np.ndarray | None:
        """[P] int32: tokens of each whole prompt, start and end included; those beyond max_tokens are cut off."""
        if self.counter is not None:
            return self.counter.count(prompts)
        if self.windows is not None:
            return self.windows.count_tokens(prompts)
        ids = self.tokenizer(prompts, truncation=False, padding=False)["input_ids"]
        return np.array([len(tokens) for tokens in ids], np.int32)


def mend_clip_skip(text_encoder: Any) -> None:
    """Let encode_prompt find the final layer norm where diffusers looks for it, and transformers has had it up to 5.5.

    Needed until https://github.com/huggingface/diffusers/issues/14124 is closed.
    """
    if not hasattr(text_encoder, "text_model"):
        object.__setattr__(text_encoder, "text_model", text_encoder)  # torch would make it a part of itself
