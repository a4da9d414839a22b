"""Prompts -> cond, through the diffusers pipeline's own encode_prompt, so that it equals what inference uses."""

import re
from typing import Any, Protocol

import numpy as np
import regex
import torch
from tokenizers import Regex, pre_tokenizers
from torch import Tensor

from latentprep.cache.ragged import Conds
from latentprep.options import TextOptions
from latentprep.prepare.models.families import Family, tokenizer_of
from latentprep.prepare.models.windows import Fragment, join, parse_emphasis, split_windows

TOKENS_AT_ONCE = 32 * 77  # 32 prompts of one window of CLIP; 4 of 512 tokens of T5, which is far larger


class TextSource(Protocol):
    """What knows a model's family and loads its base pipeline, such as models.TextFolder."""

    @property
    def family(self) -> Family: ...
    @property
    def window(self) -> int: ...
    def load_pipeline(self, dtype: torch.dtype) -> Any: ...


class TextEncoder:
    """The text encoders of a model, on their device in their dtype."""

    def __init__(
        self, source: TextSource, device: torch.device, dtype: torch.dtype, options: TextOptions | None = None
    ) -> None:
        options, family = options or TextOptions(), source.family
        self.names = family.returns
        self.emphasis = options.emphasis
        self.pipeline = source.load_pipeline(dtype).to(device)
        num_tokens = family.num_tokens(options.max_tokens, source.window)
        self.batch_size = max(1, TOKENS_AT_ONCE // family.stored_tokens(num_tokens, source.window))
        self.room = source.window - 2  # of a window of CLIP, without start and end
        self.num_windows = num_tokens // self.room if family.t5 is None else 1

        self.arguments = {**family.arguments, "device": device, "num_images_per_prompt": 1}
        if family.t5 is not None:
            self.arguments["max_sequence_length"] = num_tokens
        if options.clip_skip != 1:
            self.arguments["clip_skip"] = options.clip_skip - 1  # diffusers counts the layers that are left out
            mend_clip_skip(self.pipeline.text_encoder)

        for part in family.encoders:
            if (tokenizer := getattr(self.pipeline, tokenizer_of(part), None)) is not None:
                read_special_tokens_as_text(tokenizer)

        there = [part for part in family.encoders if getattr(self.pipeline, part) is not None]
        self.widths = [getattr(self.pipeline, part).config.hidden_size for part in there]  # for --emphasis
        # what counts as truncated: T5's tokens; where there is none, those of CLIP
        counted = family.t5 if family.t5 in there else there[0]
        self.tokenizer = getattr(self.pipeline, tokenizer_of(counted))
        self.max_tokens: int | None = num_tokens if counted == family.t5 else self.num_windows * self.room + 2

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Conds:
        """Cond of P prompts: name -> [P,T,D] (pooled_prompt_embeds: [P,D]) float32 on the CPU."""
        size = self.batch_size
        parts = [self._encode_batch(prompts[n : n + size]) for n in range(0, len(prompts), size)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.names if name is not None}

    def _encode_batch(self, prompts: list[str]) -> dict[str, Tensor]:
        windows = self._make_windows(prompts)
        result = self.pipeline.encode_prompt(prompt=[join(window) for window in windows], **self.arguments)
        cond = {name: value.float().cpu() for name, value in zip(self.names, result, strict=True) if name is not None}
        if self.emphasis:
            embeds = cond["prompt_embeds"]
            cond["prompt_embeds"] = emphasize(embeds, self._make_weights(windows, embeds.shape[1]), self.widths)
        if "text_ids" in cond:  # [T,3], the same for all: one row per prompt, like every stored tensor
            cond["text_ids"] = cond["text_ids"].expand(len(prompts), -1, -1)
        if self.num_windows > 1:  # side by side; pooled is the first window's, as in the web UI
            rows = {name: value.unflatten(0, (len(prompts), self.num_windows)) for name, value in cond.items()}
            cond = {name: row.flatten(1, 2) if row.ndim == 4 else row[:, 0] for name, row in rows.items()}
        return cond

    def _make_windows(self, prompts: list[str]) -> list[list[Fragment]]:
        """The windows of P prompts one after the other, `num_windows` of each."""
        fragments = [parse_emphasis(prompt) if self.emphasis else [(prompt, 1.0)] for prompt in prompts]
        return [
            window for parts in fragments for window in split_windows(parts, self.num_windows, self.room, self._count)
        ]

    def _make_weights(self, windows: list[list[Fragment]], num_tokens: int) -> Tensor:
        """[N,T]: the weight of each token of N windows; 1 for start, end and padding."""
        weights = torch.ones(len(windows), num_tokens)
        for row, window in zip(weights, windows, strict=True):
            counts = self._count([text for text, _ in window]) if window else []
            each = [weight for (_, weight), count in zip(window, counts, strict=True) for _ in range(count)][
                : self.room
            ]
            row[1 : 1 + len(each)] = torch.tensor(each)
        return weights

    def _count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, without start and end."""
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False, truncation=False)["input_ids"]]

    def count_tokens(self, prompts: list[str]) -> np.ndarray | None:
        """[P] int32: tokens that each whole prompt takes, start and end included; beyond max_tokens they are cut off.

        If a prompt is cut off, a window that ends early to keep a word whole counts as full.
        """
        texts = [join(window) for window in self._make_windows(prompts)]
        ids = self.tokenizer(texts, truncation=False, padding=False)["input_ids"]
        counts = np.array([len(tokens) for tokens in ids], np.int32).reshape(len(prompts), self.num_windows)
        last, before = counts[:, -1], counts[:, :-1] - 2
        full = np.full_like(before, self.room)
        return last + np.where(last > self.room + 2, full.sum(1), before.sum(1)).astype(np.int32)


def emphasize(embeds: Tensor, weights: Tensor, widths: list[int]) -> Tensor:
    """Embeddings [N,T,D] times the weights [N,T] of their tokens, then scaled back to the mean they had.

    The web UI's "Original" emphasis (modules/sd_emphasis.py), for each of several encoders by itself: their `widths`
    add up to D. The mean is one window's, where the web UI takes that of all in the batch. A window whose weights are
    all 1 stays as it is, to the last bit.
    """
    result = embeds.clone()
    chosen = (weights != 1).any(dim=1)
    for part in result.split(widths, dim=-1):
        before = part[chosen]
        after = before * weights[chosen, :, None]
        part[chosen] = after * (before.mean((1, 2), keepdim=True) / after.mean((1, 2), keepdim=True))
    return result


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
