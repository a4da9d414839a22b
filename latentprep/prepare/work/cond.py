"""Prompts -> their cond: what is there already is taken over, the rest is encoded and checked for overflow."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

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
    from latentprep.prepare.models.doors import PromptEncoder, SeeingEncoder, TextModel
    from latentprep.prepare.plan.tasks import Homes
    from latentprep.prepare.work.seen import SeenImages
    from latentprep.prepare.work.stored import StoredCond

NOWHERE: "Homes" = MappingProxyType({})
NOT_TRUNCATED = Truncated()


@dataclass(frozen=True, eq=False)
class MadeCond:
    """Cond of P prompts, and what it took."""

    cond: Conds = field(default_factory=dict)  # name -> [P,...] as stored
    num_tokens: np.ndarray | None = None  # [P] int32
    max_tokens: int | None = None
    num_encoded: int = 0  # prompts
    truncated: Truncated = field(default_factory=Truncated)
    batch_limit: str = ""  # the message that a full memory made batches smaller; empty: memory has always sufficed


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

        Cond is taken from `old`, if that was made by the same encoder in the same precision, or else from the prompts'
        `homes`; what is in neither is encoded. Raises UserError for cond that overflows.
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
        return self._join([place[prompt] for prompt in prompts], len(fresh), truncated)

    def make_seeing(self, asked: Sequence[tuple[int, str]], seen: "SeenImages", old: Text | None = None) -> MadeCond:
        """Cond of prompts that see images, each given with the number of its row; nothing for none.

        What `old`, a text of the same rows, holds of them is taken over like `make` does. Raises UnseenError too.
        """
        if not asked:
            return MadeCond()
        known = find_seeing(old, self.recipe)
        fresh = [pair for pair in asked if pair not in known]
        place = {pair: (old, n) for pair, n in known.items() if old is not None}
        if fresh:
            text = self._encode_seeing(fresh, seen)
            place.update((pair, (text, n)) for n, pair in enumerate(fresh))
        return self._join([place[pair] for pair in asked], len(fresh))

    def _join(
        self, chosen: Sequence[tuple[Text, int]], num_encoded: int, truncated: Truncated = NOT_TRUNCATED
    ) -> MadeCond:
        """Cond of prompts that stand in texts, each at a number."""
        tokens = [source.num_tokens[n] for source, n in chosen if source.num_tokens is not None]
        first = chosen[0][0]
        cond = {
            name: stack_rows([source.cond[name][n] for source, n in chosen], isinstance(value, Ragged))
            for name, value in first.cond.items()
        }
        num_tokens = np.array(tokens, np.int32) if len(tokens) == len(chosen) else None
        limit = self.encoder.batch_limit if self.encoder is not None else ""
        return MadeCond(cond, num_tokens, first.max_tokens, num_encoded, truncated, limit)

    def _encode(self, prompts: list[str]) -> Text:
        """Prompts with their cond, as it is stored."""
        with told_if_memory_is_full(self.device):
            encoder = self._open()
            num_tokens = encoder.count_tokens(prompts)
            encoded = encoder.encode(prompts)
        return self._store(prompts, encoded, num_tokens, encoder.max_tokens)

    def _encode_seeing(self, asked: Sequence[tuple[int, str]], seen: "SeenImages") -> Text:
        """The same of prompts that see images: all of their tokens are kept."""
        prompts = [prompt for _, prompt in asked]
        with told_if_memory_is_full(self.device):
            encoder = cast("SeeingEncoder", self._open())
            encoded = encoder.encode_seeing(prompts, seen.each(row for row, _ in asked))
        return self._store(prompts, encoded, lengths_of(encoded), encoder.max_tokens)

    def _open(self) -> "PromptEncoder":
        """The text encoders, loaded once."""
        if self.encoder is None:
            assert self.recipe.dtype is not None
            empty_cache()  # of what the VAE has left
            dtype = TORCH_DTYPES[self.recipe.dtype]
            self.encoder = self.model.open(torch.device(self.device), dtype, self.options)
        return self.encoder

    def _store(self, prompts: list[str], encoded: Conds, num_tokens: np.ndarray | None, max_tokens: int | None) -> Text:
        """Prompts with their cond, as it is stored. Raises UserError for cond that overflows."""
        assert self.recipe.store_dtype is not None
        cond = store_as(encoded, self.recipe.store_dtype)
        option = "--cond-dtype" if self.options.cond_dtype else "--store-dtype"
        check_finite(prompts, encoded, cond, self.recipe, self.model.where, option)
        return Text([], prompts, cond, num_tokens, max_tokens)


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


def find_seeing(old: Text | None, recipe: TextRecipe) -> dict[tuple[int, str], int]:
    """Row and prompt -> number of the prompt, of those whose cond can be taken over from a text of the same rows.

    What was a dead row then points to the prompt of another.
    """
    if old is None or not is_of_recipe(old, recipe):
        return {}
    rows = (own for group in old.groups for own in group.numbers(np.arange(len(group))).tolist())
    dead = frozenset(old.dead)
    return {(row, old.prompt[n]): n for row, own in enumerate(rows) if row not in dead for n in own}


def lengths_of(conds: Conds) -> np.ndarray:
    """[P] int32: tokens of each prompt, of cond that has all of them."""
    found = next(value for value in conds.values() if isinstance(value, Ragged))
    return np.diff(found.offsets).astype(np.int32)


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
