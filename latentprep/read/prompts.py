"""Which prompt each sample of a batch has: one of the stored prompts, or a new one made from the image's captions."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from latentprep.errors import UserError
from latentprep.prompts import counter, expand_wildcards, make_prompt, vary_tags
from latentprep.read.arguments import check_flags, check_int, check_kind, check_share
from latentprep.read.cond import StoredCond
from latentprep.read.counters import CAPTION, DROP, PROMPT
from latentprep.read.draws import Draws
from latentprep.read.rows import OpenRows


@dataclass(frozen=True)
class Wording:
    """How prompts are made anew of captions, for every sample and epoch. Raises UserError for what does not fit."""

    template: tuple[str, ...] | None = None  # lines
    placeholder_token: str = ""
    shuffle_tags: bool = False
    keep_tags: int = 0
    tag_drop_out: float = 0.0
    wildcards: bool = False

    def __post_init__(self) -> None:
        check_flags(shuffle_tags=self.shuffle_tags, wildcards=self.wildcards)
        check_kind("placeholder_token", self.placeholder_token, (str,), "a text")
        check_share("tag_drop_out", self.tag_drop_out)
        check_int("keep_tags", self.keep_tags, 0)
        if self.template and any("[name]" in line for line in self.template) and not self.placeholder_token:
            raise UserError("template: uses [name]. Say what it stands for: placeholder_token='sks dog'.")
        if self.placeholder_token and self.template is None:
            raise UserError("placeholder_token: without a template there is no [name]. Give template= as well.")
        if self.keep_tags and not (self.shuffle_tags or self.tag_drop_out):
            raise UserError(f"keep_tags={self.keep_tags}: nothing is shuffled or dropped. Give shuffle_tags=True.")

    @property
    def makes_prompts(self) -> bool:
        """Whether prompts are made from captions; if not, the stored prompts are used."""
        return self.template is not None or self.shuffle_tags or self.tag_drop_out > 0 or self.wildcards

    def make(self, key: str, captions: list[str], seed: int) -> str:
        """A prompt of one of an image's captions: tags dropped and shuffled, a line of the template filled."""
        random = np.random.default_rng(seed)
        caption = captions[int(random.integers(len(captions)))] if captions else ""
        caption = expand_wildcards(caption, random) if self.wildcards else caption
        caption = vary_tags(caption, random, self.shuffle_tags, self.tag_drop_out, self.keep_tags)
        of_line = random if self.wildcards else None
        return make_prompt(self.template, caption, self.placeholder_token, seed, key, wildcards=of_line)


def check_cond_model(cond_model: Any, wording: Wording, *, include_cond: bool, is_stored: bool) -> None:
    """Raise UserError if prompts are made anew and nothing makes their cond, or cond_model would have nothing to do."""
    if wording.makes_prompts and include_cond and is_stored and cond_model is None:
        raise UserError(
            "template, shuffle_tags, tag_drop_out and wildcards make prompts anew, which the stored cond does not "
            "fit. Give cond_model=, a callable from prompts to cond, or include_cond=False."
        )
    if cond_model is None:
        return
    if not callable(cond_model):
        raise UserError(f"cond_model: a {type(cond_model).__name__}, expected a callable from prompts to cond.")
    if not wording.makes_prompts and is_stored:
        raise UserError(
            "cond_model: the cond is stored already. It is for prompts that are made anew: template, shuffle_tags, "
            "tag_drop_out, wildcards."
        )
    if not wording.makes_prompts and not include_cond:
        raise UserError("cond_model: include_cond=False asks for no cond. Leave one of the two out.")


@dataclass(frozen=True, eq=False)
class StoredPrompts:
    """The stored prompts of a batch, decoded when they are asked for: many loops never ask."""

    rows: OpenRows
    numbers: np.ndarray  # [B]
    is_dropped: np.ndarray | None

    def read(self) -> list[str]:
        stored = [run.group.prompt[n] for run in self.rows.runs for n in self.numbers[run.span].tolist()]
        return drop(stored, self.is_dropped)


class TextOfBatch(NamedTuple):
    """The prompts of a batch, and their stored cond."""

    prompts: list[str] | StoredPrompts  # B
    cond: dict[str, Tensor] | None  # name -> [B,...] as stored; None: there is none, or it is to be made
    lengths: dict[str, Tensor]  # name -> [B] int64, of cond that is padded


class Prompts:
    """Prompts and stored cond of samples. With caption_dropout, some samples get the empty prompt and its cond."""

    def __init__(
        self, wording: Wording, stored: StoredCond, *, include_cond: bool, caption_dropout: float | None
    ) -> None:
        """caption_dropout: None: each set's own."""
        if caption_dropout is not None:
            check_share("caption_dropout", caption_dropout)
        self.wording, self.stored = wording, stored
        self.include_cond, self.caption_dropout = include_cond, caption_dropout

    def describe_state(self) -> dict[str, Any]:
        """What prompts depend on, name -> JSON value."""
        wording = asdict(self.wording)
        lines = wording.pop("template")
        return {
            "caption_dropout": self.caption_dropout or 0.0, **wording,
            "template": None if lines is None else f"{counter(*lines):016x}",
        }  # fmt: skip

    def drops(self, draws: Draws, share: "float | np.ndarray") -> np.ndarray | None:
        """[B] bool: which samples get the empty prompt; None: none does."""
        return draws.happens(DROP, share) if isinstance(share, np.ndarray) or share else None

    def choose(self, rows: OpenRows, draws: Draws, span: slice) -> np.ndarray:
        """[n] int64: one of the K prompts of each sample's image, as the prompt's number in the shard."""
        table = (
            rows.take("prompt_of") if len({group.prompt_of.shape[1] for group in rows.opened.values()}) == 1 else None
        )
        if table is not None:
            count = table.shape[1]
            variant = draws.pick(PROMPT, count, span) if count > 1 else np.zeros(len(rows), np.int64)
            return table.numpy()[np.arange(len(rows)), variant].astype(np.int64)
        parts = []
        for run in rows.runs:
            own = slice(span.start + run.span.start, span.start + run.span.stop)
            parts.append(run.group.prompt_of[run.image_rows, draws.pick(PROMPT, run.group.prompt_of.shape[1], own)])
        return np.concatenate(parts).astype(np.int64)

    def take(
        self, rows: OpenRows, numbers: np.ndarray, seeds: np.ndarray | None, is_dropped: np.ndarray | None
    ) -> TextOfBatch:
        """Prompts and cond of a batch. numbers [B]: from `choose`. seeds [B]: from `seeds`; None: stored prompts.

        is_dropped [B] bool: the samples that get the empty prompt. Raises UserError if its cond is needed and cannot be
        read.
        """
        if is_dropped is not None and not is_dropped.any():
            is_dropped = None
        if seeds is not None:
            return TextOfBatch(drop(self._made(rows, seeds), is_dropped), None, {})
        prompts = StoredPrompts(rows, numbers, is_dropped)
        if not self.include_cond or rows.one.cond is None or not rows.one.cond.kinds:
            return TextOfBatch(prompts, None, {})
        if is_dropped is not None and self.stored.sees_images:
            return TextOfBatch(prompts, *self.stored.take(rows, with_own_empty(rows, numbers, is_dropped), None))
        return TextOfBatch(prompts, *self.stored.take(rows, numbers, is_dropped))

    def seeds(self, draws: Draws) -> np.ndarray | None:
        """[n] uint64: what prompts that are made anew start from; None: the stored ones count."""
        return draws.numbers(CAPTION) if self.wording.makes_prompts else None

    def _made(self, rows: OpenRows, seeds: np.ndarray) -> list[str]:
        images = [(run.group, n) for run in rows.runs for n in run.image_rows.tolist()]
        return [
            self.wording.make(group.key[n], group.caption[n], seed)
            for (group, n), seed in zip(images, seeds.tolist(), strict=True)
        ]


def with_own_empty(rows: OpenRows, numbers: np.ndarray, is_dropped: np.ndarray) -> np.ndarray:
    """The numbers of prompts [B], but that of an image's own empty prompt for what is dropped. Raises UserError."""
    empty = rows.take_if_there("uncond_of")
    if empty is None:
        raise UserError("caption_dropout: a shard has no cond of the empty prompt. Run latentprep verify.")
    return np.where(is_dropped, empty.numpy(), numbers)


def drop(prompts: list[str], is_dropped: np.ndarray | None) -> list[str]:
    """The prompts, but the empty one in place of those that are dropped, [B] bool; None: none is."""
    if is_dropped is None:
        return prompts
    return ["" if gone else prompt for prompt, gone in zip(prompts, is_dropped.tolist(), strict=True)]
