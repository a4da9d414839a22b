"""Prompts -> their cond: what is there already is taken over, the rest is encoded and checked for overflow."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING

import numpy as np
import torch

from latentprep.cache.cond import CondFile
from latentprep.cache.int8 import SCALE, store_as
from latentprep.cache.ragged import Conds, Ragged, finite_rows, stack_rows
from latentprep.cache.schema import TORCH_DTYPES
from latentprep.cache.text import Text
from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import TextOptions
from latentprep.prepare.devices import OutOfMemoryError, empty_cache, is_out_of_memory
from latentprep.prepare.work.events import Truncated
from latentprep.recipe import TextRecipe

if TYPE_CHECKING:
    from latentprep.prepare.models.doors import PromptEncoder, TextModel
    from latentprep.prepare.plan.tasks import Homes
    from latentprep.prepare.work.stored import StoredCond

NOWHERE: "Homes" = MappingProxyType({})


@dataclass(frozen=True, eq=False)
class MadeCond:
    """Cond of P prompts, and what it took."""

    cond: Conds = field(default_factory=dict)  # name -> [P,...] as stored
    num_tokens: np.ndarray | None = None  # [P] int32
    max_tokens: int | None = None
    num_encoded: int = 0  # prompts
    truncated: Truncated = field(default_factory=Truncated)
    batch_limit: str = ""  # how many prompts fit into memory at once; empty: it has always sufficed


class CondMaker:
    """Makes cond: what is stored is used again, the rest is encoded. The first such prompt loads the encoders."""

    def __init__(
        self,
        recipe: TextRecipe,
        model: "TextModel",
        device: str,
        options: TextOptions,
        stored: "StoredCond | None" = None,  # what other text files have
    ) -> None:
        self.recipe, self.model, self.device, self.options, self.stored = recipe, model, device, options, stored
        self.encoder: PromptEncoder | None = None

    def make(self, prompts: list[str], old: Text | None = None, homes: "Homes" = NOWHERE) -> MadeCond:
        """Cond of P prompts; nothing for none.

        What `old` holds of them is taken over, if it was made by the same encoder in the same precision; then what
        stands at their `homes`. Raises UserError for cond that overflows.
        """
        if not prompts:
            return MadeCond()
        place: dict[str, tuple[Text, int]] = {}
        if old is not None and is_of_recipe(old, self.recipe):
            place.update((prompt, (old, n)) for n, prompt in enumerate(old.prompt[: old.num_own]))
        missing = [prompt for prompt in prompts if prompt not in place]
        for prompt in missing:
            found = self.stored.find(homes[prompt]) if self.stored is not None and prompt in homes else None
            if found is not None and prompt in found.index:
                place[prompt] = (found.text, found.index[prompt])
        fresh = [prompt for prompt in missing if prompt not in place]
        truncated = Truncated()
        if fresh:
            text = self._encode(fresh)
            place.update((prompt, (text, n)) for n, prompt in enumerate(fresh))
            if text.num_tokens is not None and text.max_tokens is not None:
                truncated = Truncated.of(fresh, text.num_tokens, text.max_tokens)
        chosen = [place[prompt] for prompt in prompts]
        tokens = [source.num_tokens[n] for source, n in chosen if source.num_tokens is not None]
        first = chosen[0][0]
        cond = {
            name: stack_rows([source.cond[name][n] for source, n in chosen], isinstance(value, Ragged))
            for name, value in first.cond.items()
        }
        num_tokens = np.array(tokens, np.int32) if len(tokens) == len(chosen) else None
        limit = self.encoder.batch_limit if self.encoder is not None else ""
        return MadeCond(cond, num_tokens, first.max_tokens, len(fresh), truncated, limit)

    def _encode(self, prompts: list[str]) -> Text:
        """Prompts with their cond, as it is stored."""
        assert self.recipe.dtype is not None
        assert self.recipe.store_dtype is not None
        with told_if_memory_is_full(self.device):
            if self.encoder is None:
                empty_cache()  # of what the VAE has left
                dtype = TORCH_DTYPES[self.recipe.dtype]
                self.encoder = self.model.open(torch.device(self.device), dtype, self.options)
            num_tokens = self.encoder.count_tokens(prompts)
            encoded = self.encoder.encode(prompts)
        cond = store_as(encoded, self.recipe.store_dtype)
        option = "--cond-dtype" if self.options.cond_dtype else "--store-dtype"
        check_finite(prompts, encoded, cond, self.recipe, self.model.where, option)
        return Text([], prompts, cond, num_tokens, self.encoder.max_tokens)


@contextmanager
def told_if_memory_is_full(device: str) -> Iterator[None]:
    """A full memory is an error that ends the run: it would be as full for each text that follows."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfMemoryError(
            f"--text-device {device}: its memory does not hold the text encoder and one prompt. "
            f"Use {'a machine with more' if device == 'cpu' else '--text-device cpu or another GPU'}, "
            "or --dtype bfloat16 if it runs in float32."
        ) from None


def is_of_recipe(old: Text | CondFile, recipe: TextRecipe) -> bool:
    """Whether the cond of a file was made by the recipe's encoder, in its precision."""
    return TextRecipe.cond_of(old.metadata.get("recipe", {})) == recipe.cond


def list_missing(prompts: list[str], old: Text | None, recipe: TextRecipe) -> list[str]:
    """Those of some prompts for which `old` has no cond of its own that can be taken over."""
    known = set(old.prompt[: old.num_own]) if old is not None and is_of_recipe(old, recipe) else set()
    return [prompt for prompt in prompts if prompt not in known]


def check_finite(
    prompts: list[str], encoded: Conds, stored: Conds, recipe: TextRecipe, where: str, option: str = "--store-dtype"
) -> None:
    """Raise UserError for cond that overflows in the encoder, or in the store dtype: training would not show it.

    `where` is TextModel.where, `option` what says the store dtype.
    """
    for kept, value in stored.items():
        name = kept if kept in encoded else kept.removesuffix(SCALE)
        is_finite = finite_rows(value)
        if is_finite.all():
            continue
        n = int(is_finite.int().argmin())
        prompt = shortened(prompts[n])
        if encoded[name][n].isfinite().all():
            raise UserError(
                f"{option} {recipe.store_dtype}: cannot hold the {name} of {prompt!r}. "
                f"Use {option} bfloat16 or float32."
            )
        if recipe.dtype == "float32":
            raise UserError(
                f"--model: the text encoder in {where} gives no finite numbers for {prompt!r}, even in float32. "
                "Download it again, or use another model."
            )
        wider = "float32" if recipe.dtype == "bfloat16" else "bfloat16 or float32"
        raise UserError(
            f"--dtype {recipe.dtype}: the text encoder in {where} overflows for {prompt!r}. Use --dtype {wider}."
        )
