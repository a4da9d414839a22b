"""The text encoders of a model at work: prompts -> cond, batch by batch, and how long each prompt is."""

import re
from typing import Any, Protocol

import numpy as np
import regex
import torch
from tokenizers import Regex, pre_tokenizers

from latentprep.cache.ragged import Conds, join_conds
from latentprep.options import TextOptions
from latentprep.prepare.models.clip_windows import ClipWindows
from latentprep.prepare.models.encode_prompt import call_pipeline, make_arguments
from latentprep.prepare.models.families import Family, tokenizer_of
from latentprep.prepare.models.load_text import chat_of
from latentprep.prepare.models.windows import join

TOKENS_AT_ONCE = 32 * 77  # 32 prompts of one window of CLIP; 4 of 512 tokens of T5, which is far larger


class TextSource(Protocol):
    """What knows a model's family and loads its base pipeline, such as models.TextFolder."""

    @property
    def family(self) -> Family: ...
    @property
    def window(self) -> int: ...
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
        if family.chat is None:  # a chat is made of special tokens
            for part in encoders:
                if (tokenizer := getattr(self.pipeline, tokenizer_of(part), None)) is not None:
                    read_special_tokens_as_text(tokenizer)
        # what counts as truncated: tokens of the sequence; where there is none, those of CLIP
        counted = next((part for part in there if part == family.sequence), there[0])
        self.tokenizer = getattr(self.pipeline, tokenizer_of(counted))
        self.windows: ClipWindows | None = None
        self.max_tokens: int | None = num_tokens
        if counted != family.sequence:
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
        """[P] int32: tokens that each whole prompt takes, start and end included; beyond max_tokens they are cut off.

        A chat counts with all that stands around the prompt.
        """
        if self.windows is not None:
            return self.windows.count_tokens(prompts)
        chat = self.family.chat
        texts = [chat_of(self.tokenizer, prompt, chat) for prompt in prompts] if chat is not None else prompts
        ids = self.tokenizer(texts, truncation=False, padding=False)["input_ids"]
        return np.array([len(tokens) for tokens in ids], np.int32)


def read_special_tokens_as_text(tokenizer: Any) -> None:
    """Let <|endoftext|>, </s> and the like in a caption be text, for counting and for encode_prompt.

    The switch for that is not enough for two kinds. CLIP's in Python has them in a pattern and in a table. T5's in Rust
    has them in its vocabulary, where SentencePiece itself never finds them: they are cut behind their first character.
    """
    tokenizer.split_special_tokens = True
    if hasattr(tokenizer, "pat") and hasattr(tokenizer, "cache"):  # CLIP's in Python, up to transformers 4
        for token in tokenizer.all_special_tokens:
            tokenizer.cache.pop(token, None)  # where it would find them whole
        words = tokenizer.pat.pattern.replace(r"<\|startoftext\|>|<\|endoftext\|>|", "")
        tokenizer.pat = regex.compile(words, regex.IGNORECASE)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and type(backend.model).__name__ == "Unigram":
        special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special})
        cut = "|".join(f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in special if len(word) > 1)
        before = [backend.pre_tokenizer] if backend.pre_tokenizer is not None else []
        split = pre_tokenizers.Split(Regex(cut), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split]) if cut else backend.pre_tokenizer


def mend_clip_skip(text_encoder: Any) -> None:
    """Let encode_prompt find the final layer norm where diffusers looks for it, and transformers has had it up to 5.5.

    Needed until https://github.com/huggingface/diffusers/issues/14124 is closed.
    """
    if not hasattr(text_encoder, "text_model"):
        object.__setattr__(text_encoder, "text_model", text_encoder)  # torch would make it a part of itself
