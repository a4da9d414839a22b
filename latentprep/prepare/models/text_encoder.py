"""The text encoders of a model at work: prompts -> cond, batch by batch."""

import inspect
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image

from latentprep.cache.ragged import Conds, join_conds, take_conds
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import TextOptions
from latentprep.prepare.devices import empty_cache, is_out_of_memory
from latentprep.prepare.models.encode_prompt import call_pipeline, make_arguments, show_images
from latentprep.prepare.models.heard import CountedModel
from latentprep.prepare.models.processor import IMAGE_TOKEN
from latentprep.prepare.models.token_counter import TokenCounter
from latentprep.prepare.models.windows import join

# Tokens of a batch, padding included: 32 prompts of one window of CLIP, or 4 of 512 tokens of T5. More is not needed:
# the weights are read once for all of these rows. Less is not needed either: what a layer of T5-XXL gives of them
# (2,464 rows of 10,240 numbers) has 50 MB in 16 bits, its weights 9.5 GB. A full memory halves the batch all the same.
TOKENS_AT_ONCE = 32 * 77


class TextSource(CountedModel, Protocol):
    """What also loads the base pipeline of its family, such as models.TextFolder."""

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
        self.stored_tokens = family.stored_tokens(num_tokens, source.window)
        self.tokens_at_once = TOKENS_AT_ONCE  # less, once memory has run out
        self.batch_limit = ""
        kind = type(self.pipeline)
        self.arguments = [make_arguments(family, call, kind, device, num_tokens) for call in family.calls]
        if options.clip_skip != 1:
            for arguments in self.arguments:  # diffusers counts the layers that are left out
                arguments["clip_skip"] = options.clip_skip - 1
            mend_clip_skip(self.pipeline.text_encoder)

        components = self.pipeline.components
        there = [
            name for name in sorted(components) if name.startswith("text_encoder") and components[name] is not None
        ]
        tokenizers = {name: getattr(self.pipeline, family.tokenizer_of(name)) for name in there}
        if family.num_images:
            mend_positions(self.pipeline.text_encoder)
            tokenizers = {name: processor.tokenizer for name, processor in tokenizers.items()}
        widths = [components[name].config.hidden_size for name in there] if family.sequence is None else []
        self.counter = TokenCounter(source, tokenizers, options, widths)
        self.windows = self.counter.windows
        self.max_tokens: int | None = self.counter.max_tokens
        self.counted: tuple[list[str], np.ndarray] = ([], np.zeros(0, np.int32))  # what was counted last

    @torch.inference_mode()
    def encode(self, prompts: list[str]) -> Conds:
        """Cond of P prompts: name -> [P,T,D] (pooled_prompt_embeds: [P,D]) float32 on the CPU, or rows [T,D].

        If memory does not suffice, batches are halved. Raises RuntimeError if it does not for one prompt.
        """
        tokens = self._padded_tokens(prompts)
        order = np.argsort(-tokens, kind="stable")  # those of like length together: then little is padding
        parts: list[Conds] = []
        done = 0
        while done < len(order):
            longest = int(tokens[order[done]])
            chosen = order[done : done + max(1, self.tokens_at_once // longest)]
            try:
                parts.append(self._encode_batch([prompts[n] for n in chosen]))
                done += len(chosen)
                continue
            except RuntimeError as error:
                if len(chosen) == 1 or not is_out_of_memory(error):
                    raise
            # here, and not above: the exception holds the tensors that did not fit
            empty_cache()
            half = len(chosen) // 2
            self.tokens_at_once = half * longest
            self.batch_limit = f"out of memory with {len(chosen)} prompts at once: went on with {half}"
        return take_conds(join_conds(parts), np.argsort(order))

    @torch.inference_mode()
    def encode_seeing(self, prompts: list[str], images: Iterable[Sequence[np.ndarray]]) -> Conds:
        """Cond of P prompts, each with its control images [H,W,3] uint8, as `encode` gives it.

        Raises UserError for a prompt that has the token of an image itself.
        """
        parts = []
        shown: dict[str, Any] = {}
        before: Sequence[np.ndarray] | None = None
        for prompt, own in zip(prompts, images, strict=True):
            if IMAGE_TOKEN in prompt:
                raise UserError(
                    f"the prompt {shortened(prompt)!r} has {IMAGE_TOKEN}, which stands for an image. Take it out of "
                    "the caption."
                )
            if own is not before:  # several prompts of an image come one after the other
                shown = show_images(self.pipeline, self.family, [Image.fromarray(pixels) for pixels in own])
                before = own
            arguments = [{**call, **shown} for call in self.arguments]
            parts.append(call_pipeline(self.pipeline, self.family, arguments, [prompt]))
        return join_conds(parts)

    def _padded_tokens(self, prompts: list[str]) -> np.ndarray:
        """[P]: the tokens that each prompt would take if it were the longest of its batch."""
        if not self.family.pads_to_longest:
            return np.full(len(prompts), self.stored_tokens)
        return np.minimum(self.count_tokens(prompts), self.stored_tokens).clip(1)

    def _encode_batch(self, prompts: list[str]) -> Conds:
        if self.windows is None:
            return call_pipeline(self.pipeline, self.family, self.arguments, prompts)
        windows = self.windows.split(prompts)
        texts = [join(window) for window in windows]
        return self.windows.merge(call_pipeline(self.pipeline, self.family, self.arguments, texts), windows)

    def count_tokens(self, prompts: list[str]) -> np.ndarray:
        """[P] int32: tokens that each whole prompt takes; see TokenCounter. Asked again, it does not count again."""
        if self.counted[0] != prompts:
            self.counted = (list(prompts), self.counter.count(prompts))
        return self.counted[1]


def mend_positions(text_encoder: Any) -> None:
    """Let a Qwen2.5-VL know which tokens are of images, which transformers has asked for since 5, and diffusers leaves
    out: without, all of them have positions as if they were text.

    Needed until https://github.com/huggingface/diffusers/issues/14194 is closed.
    """
    name = "mm_token_type_ids"
    if name not in inspect.signature(text_encoder.forward).parameters:
        return

    def tell(module: Any, arguments: tuple[Any, ...], given: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        is_image = given["input_ids"] == module.config.image_token_id
        return arguments, {name: is_image.int(), **given}

    text_encoder.register_forward_pre_hook(tell, with_kwargs=True)


def mend_clip_skip(text_encoder: Any) -> None:
    """Let encode_prompt find the final layer norm where diffusers looks for it, and transformers has had it up to 5.5.

    Needed until https://github.com/huggingface/diffusers/issues/14124 is closed.
    """
    if not hasattr(text_encoder, "text_model"):
        object.__setattr__(text_encoder, "text_model", text_encoder)  # torch would make it a part of itself
