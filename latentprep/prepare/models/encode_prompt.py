"""Prompts -> cond, through the pipeline's own encode_prompt, as a family's row says: what every family has in common.

The result is what inference uses: where encode_prompt and __call__ have other defaults, those of __call__ count.
"""

import inspect
from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from latentprep.cache.ragged import Cond, Conds, Ragged, join_conds
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.prepare.models.family import FIXED, LIST, MASK, Call, Family
from latentprep.prepare.models.files import blame


def inference_defaults(kind: type) -> dict[str, Any]:
    """The arguments of a pipeline's encode_prompt for which its __call__ has another default: name -> that one.

    kind: a class of diffusers.
    """
    of_encode, of_call = (inspect.signature(getattr(kind, name)).parameters for name in ("encode_prompt", "__call__"))
    found = {}
    for name in of_encode.keys() & of_call.keys():
        default = of_call[name].default
        is_asked = name in ("self", "prompt") or default is inspect.Parameter.empty
        if not is_asked and not _is_same(default, of_encode[name].default):
            found[name] = default
    return found


def _is_same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and bool(one == other)


def make_arguments(family: Family, call: Call, kind: type, device: torch.device, num_tokens: int) -> dict[str, Any]:
    """All arguments of one call of encode_prompt but the prompts.

    Those that not every pipeline has are left out where it has none.
    """
    known = inspect.signature(kind.encode_prompt).parameters  # type: ignore[attr-defined]
    own: dict[str, Any] = {"device": device, "num_images_per_prompt": 1, "do_classifier_free_guidance": False}
    if family.sequence is not None and family.tokens_argument is not None:
        own[family.tokens_argument] = num_tokens
    arguments = {**inference_defaults(kind), **own, **call.arguments}
    return {name: value for name, value in arguments.items() if name in known}


def show_images(pipeline: Any, family: Family, images: Sequence[Image.Image]) -> dict[str, Any]:
    """Control images as the pipeline's own __call__ hands them to encode_prompt: the argument for them.

    Raises UserError for what a library raises.
    """

    def hear(**arguments: Any) -> None:
        raise Shown(arguments["image"])

    pipeline.encode_prompt = hear
    try:
        with blame(f"--model: {type(pipeline).__name__} takes no such control images"):
            pipeline(image=images[0] if family.num_images == 1 else list(images), prompt="")
    except Shown as shown:
        return {"image": shown.images}
    finally:
        del pipeline.encode_prompt
    raise AssertionError(f"{type(pipeline).__name__} did not encode its prompt")


class Shown(BaseException):
    """Ends a pipeline's __call__ once it has made images ready for its prompt."""

    def __init__(self, images: Any) -> None:
        super().__init__()
        self.images = images


def call_pipeline(pipeline: Any, family: Family, arguments: list[dict[str, Any]], prompts: list[str]) -> Conds:
    """Cond of P prompts, name -> [P,...] float32 on the CPU, or rows of lengths of their own.

    `arguments` are those of each of the family's calls.
    """
    if family.one_by_one and len(prompts) > 1:
        return join_conds([call_pipeline(pipeline, family, arguments, [prompt]) for prompt in prompts])
    conds: Conds = {}
    for call, own in zip(family.calls, arguments, strict=True):
        result = run(pipeline, own, prompts)
        returned = result if isinstance(result, tuple) else (result,)
        named = {name: value for name, value in zip(call.returns, returned, strict=True) if name is not None}
        for name, value in named.items():
            if family.length == MASK and name.endswith("_mask"):
                continue
            conds[name] = take_rows(name, family, value, find_mask(name, named), len(prompts))
            if name not in family.may_be_empty:
                check_tokens(name, conds[name], prompts)
    return {name: value.to(torch.float32) for name, value in conds.items()}


def run(pipeline: Any, arguments: dict[str, Any], prompts: list[str]) -> Any:
    """What encode_prompt returns for P prompts.

    Raises UserError for what a library raises: text encoders and tokenizers are a stranger's.
    """
    own = {"batch_size": len(prompts)} if "batch_size" in inspect.signature(pipeline.encode_prompt).parameters else {}
    with blame(f"--model: {type(pipeline).__name__} cannot encode {shortened(prompts[0])!r}"):
        return pipeline.encode_prompt(prompt=list(prompts), **arguments, **own)  # a copy: Z-Image's overwrites it


def find_mask(name: str, named: dict[str, Any]) -> Tensor | None:
    """The mask of a tensor; positions have that of the embeddings, of which they are the positions."""
    mask: Tensor | None = named.get(f"{'prompt_embeds' if name.endswith('_ids') else name}_mask")
    return mask


def take_rows(name: str, family: Family, value: Any, mask: Tensor | None, num_prompts: int) -> Cond:
    """What encode_prompt gave under one name => a row for each prompt, on the CPU.

    A mask that is None counts all tokens (Qwen-Image). Positions [T,3] (FLUX.1's text_ids) are the same for all.
    """
    if family.length == LIST and isinstance(value, (list, tuple)):
        return Ragged.of([row.cpu() for row in value])
    value = value.cpu().movedim(family.batch_axis.get(name, 0), 0)
    if value.ndim == 2 and name.endswith("_ids"):
        value = value.expand(num_prompts, -1, -1)
    if family.length == FIXED or value.ndim < 3:  # pooled embeddings have no tokens
        return value.contiguous()
    if mask is None:
        return Ragged.of(list(value))
    masks = mask.cpu().bool().reshape(*value.shape[:2], -1)[..., 0]  # AuraFlow's has the shape of the embeddings
    if not family.has_gaps:
        check_first(name, masks, family)
    return Ragged.of([row[counts] for row, counts in zip(value, masks, strict=True)])


def check_first(name: str, masks: Tensor, family: Family) -> None:
    """Raise UserError unless the tokens that count [P,T] are the first ones: then their number tells which they are.

    All tokenizers pad on the right here (Family.padding_side), so another diffusers would be the cause.
    """
    is_first = torch.arange(masks.shape[1])[None] < masks.sum(1)[:, None]
    if not torch.equal(is_first, masks):
        raise UserError(
            f"--model: {family.pipeline} of diffusers {version('diffusers')} gives a mask of {name} that counts tokens "
            "which are not the first ones, and this is not supported. Use another diffusers, or --no-cond."
        )


def check_tokens(name: str, cond: Cond, prompts: list[str]) -> None:
    """Raise UserError for a prompt of no tokens, which nothing can be trained on."""
    if isinstance(cond, Ragged):
        for prompt, count in zip(prompts, np.diff(cond.offsets).tolist(), strict=True):
            if not count:
                raise UserError(f"--model: its {name} gives no tokens for {shortened(prompt)!r}. Use another model.")
