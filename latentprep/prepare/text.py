"""Prompts -> cond, through the diffusers pipeline's own encode_prompt, so that it equals what inference uses."""

import numpy as np
import torch
from torch import Tensor

from latentprep.prepare.models import PIPELINES, TextSource

PROMPTS_AT_ONCE = 32


class TextEncoder:
    """The text encoders of a pipeline folder, on their device in their dtype."""

    def __init__(self, source: TextSource, device: torch.device, dtype: torch.dtype) -> None:
        self.names = PIPELINES[source.pipeline]
        self.device = device
        self.pipeline = source.load_pipeline(dtype).to(device, dtype)
        self.max_tokens: int | None = int(self.pipeline.tokenizer.model_max_length)

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Cond of P prompts: name -> [P,T,D] (pooled: [P,D]) float32 on the CPU."""
        parts = [self._encode_batch(prompts[i : i + PROMPTS_AT_ONCE]) for i in range(0, len(prompts), PROMPTS_AT_ONCE)]
        return {name: torch.cat([part[name] for part in parts]) for name in self.names if name is not None}

    def _encode_batch(self, prompts: list[str]) -> dict[str, Tensor]:
        result = self.pipeline.encode_prompt(
            prompt=prompts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return {name: value.float().cpu() for name, value in zip(self.names, result, strict=True) if name is not None}

    def count_tokens(self, prompts: list[str]) -> np.ndarray | None:
        """[P] int32: tokens of each whole prompt, start and end included; beyond max_tokens they are cut off."""
        ids = self.pipeline.tokenizer(prompts, truncation=False, padding=False)["input_ids"]
        return np.array([len(tokens) for tokens in ids], np.int32)
