"""How many tokens a prompt takes, by a model's tokenizers alone: no weights are needed."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from latentprep.options import TextOptions
from latentprep.prepare.models.clip_windows import ClipWindows
from latentprep.prepare.models.heard import CountedModel, HeardPrompts, lengths
from latentprep.prepare.models.load_tokenizer import read_special_tokens_as_text

AT_ONCE = 1000  # prompts that a tokenizer is given


class TokenCounter:
    """Counts tokens as the encoder of a family does that cuts prompts."""

    def __init__(
        self, model: CountedModel, tokenizers: Mapping[str, Any], options: TextOptions, widths: Sequence[int] = ()
    ) -> None:
        """`tokenizers` are those of the encoders that are there: text_encoder, text_encoder_2, ...

        `widths` are those of CLIPs, which only who encodes needs (ClipWindows).
        """
        family, there = model.family, sorted(tokenizers)
        if not family.has_special_tokens:
            for tokenizer in tokenizers.values():
                read_special_tokens_as_text(tokenizer)
        # what counts as truncated: tokens of the sequence; where there is none, those of CLIP
        counted = next((part for part in there if part == family.sequence), there[0])
        self.tokenizer = tokenizers[counted]
        self.max_tokens = family.num_tokens(options.max_tokens, model.window)
        self.windows: ClipWindows | None = None
        self.heard: HeardPrompts | None = None
        if family.sequence is None:
            room = model.window - 2  # without start and end
            num_windows = self.max_tokens // room
            self.max_tokens = num_windows * room + 2
            self.windows = ClipWindows(self.tokenizer, room, num_windows, options.emphasis, list(widths))
        elif counted != family.sequence:
            self.max_tokens = model.window  # of CLIPs beside a T5 that is left out
        elif counted == "text_encoder":  # prompts go to several encoders as they are; to one, as its pipeline has them
            self.heard = HeardPrompts(model, self.tokenizer, self.max_tokens)
            self.max_tokens = self.heard.max_tokens

    def see(self, num_images: int) -> None:
        """Count prompts that see so many images, each of which is one token here."""
        assert self.heard is not None
        self.heard.see(num_images)

    def count(self, prompts: list[str]) -> np.ndarray:
        """[P] int32: tokens that each whole prompt takes, start and end included; beyond max_tokens they are cut off.

        Tokens that are never stored, such as those of a template, do not count.
        """
        parts = [self._count(prompts[n : n + AT_ONCE]) for n in range(0, len(prompts), AT_ONCE)]
        return np.concatenate(parts) if parts else np.zeros(0, np.int32)

    def _count(self, prompts: list[str]) -> np.ndarray:
        if self.windows is not None:
            return self.windows.count_tokens(prompts)
        if self.heard is not None:
            return self.heard.count(prompts)
        ids = self.tokenizer(prompts, truncation=False, padding=False, return_attention_mask=False)["input_ids"]
        return np.array(lengths(ids), np.int32)
