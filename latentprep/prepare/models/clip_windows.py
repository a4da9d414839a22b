"""CLIP's windows and emphasis around encode_prompt: prompts -> the texts of windows, and their cond put together."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from latentprep.cache.ragged import Conds
from latentprep.prepare.models.windows import Fragment, join, parse_emphasis, split_windows

Windows = list[list[Fragment]]


class ClipWindows:
    """How a model of CLIPs alone takes prompts: `num_windows` windows of `room` tokens each, side by side."""

    def __init__(self, tokenizer: Any, room: int, num_windows: int, emphasis: bool, widths: list[int]) -> None:
        """`widths` are those of the encoders, whose values stand side by side in a token."""
        self.tokenizer, self.room, self.num_windows = tokenizer, room, num_windows
        self.emphasis, self.widths = emphasis, widths

    def split(self, prompts: list[str]) -> Windows:
        """The windows of P prompts one after the other, `num_windows` of each."""
        fragments = [parse_emphasis(prompt) if self.emphasis else [(prompt, 1.0)] for prompt in prompts]
        return [
            window for parts in fragments for window in split_windows(parts, self.num_windows, self.room, self.count)
        ]

    def merge(self, cond: Conds, windows: Windows) -> Conds:
        """Cond of windows => cond of their prompts; pooled is the first window's, as in the web UI."""
        tensors = {name: value for name, value in cond.items() if isinstance(value, Tensor)}
        if self.emphasis:
            embeds = tensors["prompt_embeds"]
            tensors["prompt_embeds"] = emphasize(embeds, self._make_weights(windows, embeds.shape[1]), self.widths)
        if self.num_windows == 1:
            return dict(tensors)
        rows = {name: value.unflatten(0, (-1, self.num_windows)) for name, value in tensors.items()}
        return {name: row.flatten(1, 2) if row.ndim == 4 else row[:, 0] for name, row in rows.items()}

    def count_tokens(self, prompts: list[str]) -> np.ndarray:
        """[P] int32: as in TextEncoder; if a prompt is cut, a window that ends early to keep a word whole is full."""
        ids = self.tokenizer([join(window) for window in self.split(prompts)], truncation=False, padding=False)
        counts = np.array([len(tokens) for tokens in ids["input_ids"]], np.int32)
        counts = counts.reshape(len(prompts), self.num_windows)
        last, before = counts[:, -1], counts[:, :-1] - 2
        full = np.full_like(before, self.room)
        found: np.ndarray = last + np.where(last > self.room + 2, full.sum(1), before.sum(1)).astype(np.int32)
        return found

    def _make_weights(self, windows: Windows, num_tokens: int) -> Tensor:
        """[N,T]: the weight of each token of N windows; 1 for start, end and padding."""
        weights = torch.ones(len(windows), num_tokens)
        for row, window in zip(weights, windows, strict=True):
            counts = self.count([text for text, _ in window]) if window else []
            each = [weight for (_, weight), count in zip(window, counts, strict=True) for _ in range(count)][
                : self.room
            ]
            row[1 : 1 + len(each)] = torch.tensor(each)
        return weights

    def count(self, texts: list[str]) -> list[int]:
        """Tokens of each text, without start and end."""
        return [len(ids) for ids in self.tokenizer(texts, add_special_tokens=False, truncation=False)["input_ids"]]


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
