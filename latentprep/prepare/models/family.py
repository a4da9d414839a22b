"""What a row of FAMILIES says: how the prompts of a family of models are encoded, and what is stored of them."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentprep.errors import UserError
from latentprep.options import TextOptions

# How the number of tokens of a prompt is known. fixed: all prompts have the same, and padding counts. mask: of each
# kept tensor X a mask X_mask says which tokens count. list: each prompt has a tensor of its own.
FIXED, MASK, LIST = "fixed", "mask", "list"
SEQUENCE = 0  # Stored.tokens: as many as max_sequence_length


@dataclass(frozen=True)
class Call:
    """One call of the pipeline's encode_prompt."""

    returns: tuple[str | None, ...]  # what it returns, in order; None is not kept (the negative prompt's)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # beside those that every call gets (encode_prompt.py)


@dataclass(frozen=True)
class Stored:
    """The size of one tensor that is stored of each prompt: tokens times values."""

    encoders: tuple[str, ...] = ()  # whose widths add up to the values of a token
    width: str = "hidden_size"  # the field of their configs that tells it
    layers: int | str = 1  # layers of an encoder that stand side by side: a number, or the field that tells it
    values: int = 0  # values of a token that comes from no encoder, such as a position
    tokens: int = SEQUENCE  # the most of them


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES."""

    name: str
    stem: str  # how its class names begin; families.VARIANTS is how they go on
    calls: tuple[Call, ...]
    stores: Mapping[str, Stored] = field(default_factory=dict)  # names that calls return -> their sizes, without masks
    length: str = FIXED
    fill: str = "zeros"  # what a shorter prompt of a batch is padded with, if lengths differ: cache.ragged.FILLS
    is_full: bool = False  # whether it is padded to the most tokens, and not to the longest of the batch
    has_gaps: bool = False  # whether padding may stand before tokens that count, and their places do not
    may_be_empty: tuple[str, ...] = ()  # names of which a prompt may have no token
    batch_axis: Mapping[str, int] = field(default_factory=dict)  # names whose prompts are not along axis 0 -> which
    # encoder -> its classes in transformers, of load_text.KINDS; a model that names another is refused. Of a family
    # that names none, model_index.json says which there are.
    classes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()  # encoders that a model may do without
    # the encoder whose tokens are counted and cut; None: they are CLIPs, which take windows
    sequence: str | None = None
    default_tokens: int = 0  # tokens kept of a prompt, unless asked for otherwise: as in the pipeline's __call__
    least_tokens: int = 1  # what its pipeline takes at least
    most_tokens: int = 0  # and at most
    tokens_argument: str | None = "max_sequence_length"  # of encode_prompt; None: it takes no number of tokens
    # tokens around a prompt that are not stored; None: as many as the tokenizer is told beyond those that are kept
    hidden_tokens: int | None = None
    has_clip_tokens: bool = False  # in prompt_embeds, beside those of the sequence
    # whether its pipeline pads prompts to the longest of their batch; else each of them to the most tokens
    pads_to_longest: bool = False
    # whether the pipeline puts prompts into a template of special tokens: then those in a caption count as such too
    has_special_tokens: bool = False
    # the side that its tokenizers have to pad on; None: its pipeline sees to that itself, or either side gives the same
    padding_side: str | None = "right"
    without_pad: tuple[str, ...] = ()  # encoders whose tokenizer needs to name no pad token
    one_by_one: bool = False  # whether what a prompt is encoded with would change its numbers
    call_defaults: tuple[str, ...] = ()  # arguments whose default is another in __call__ than in encode_prompt
    settings_of_pipeline: tuple[str, ...] = ()  # lists of layers in model_index.json that its cond depends on
    packages: tuple[str, ...] = ()  # without which its pipeline quietly encodes other text, or fails
    # encoders of which a single file may leave text_projection out: then it is the identity
    identity_projection: tuple[str, ...] = ()
    takes_clip_skip: bool = False
    num_images: int = 0  # control images that its prompts see at most: they are encoded together; 0: they see none
    heeds_force_upcast: bool = False  # whether its pipelines take the VAE in float32 where its config says so
    patch: int = 1  # latent pixels that the denoiser takes as one, each way
    norm_eps: float | None = None  # what its pipeline adds to the variance of a VAE's batch norm, if not the config's

    @property
    def pipeline(self) -> str:
        """Name of the diffusers class that encodes its prompts."""
        return f"{self.stem}Pipeline"

    @property
    def names(self) -> list[str]:
        """What is stored of each prompt; masks are not, since the lengths say the same."""
        kept = [name for call in self.calls for name in call.returns if name is not None]
        return [name for name in kept if self.length != MASK or not name.endswith("_mask")]

    def encoders(self, index: Mapping[str, Any]) -> list[str]:
        """text_encoder, text_encoder_2, ...; each has a tokenizer of the same number. `index` is model_index.json."""
        if self.classes:
            return sorted(self.classes)
        return sorted(part for part in index if re.fullmatch(r"text_encoder(_\d)?", part) and is_there(index[part]))

    def tokenizer_of(self, encoder: str) -> str:
        """text_encoder_2 -> tokenizer_2; of prompts that see images, the processor that has a tokenizer of its own."""
        return "processor" if self.num_images else encoder.replace("text_encoder", "tokenizer")

    def num_tokens(self, asked: int | None, window: int) -> int:
        """Tokens kept of a prompt: max_sequence_length, or K windows of CLIP without their starts and ends.

        `asked` is --max-tokens, `window` what CLIP takes at once, start and end included. Raises UserError.
        """
        if self.sequence is not None:
            if asked in (None, self.default_tokens):
                return self.default_tokens
            if self.tokens_argument is None:
                raise UserError(f"--max-tokens {asked}: its pipeline takes none for {self.name}. Leave it out.")
            least, most = self.least_tokens, self.most_tokens
            if least <= asked <= most:
                return asked
            near = min(max(asked, least), most)
            raise UserError(f"--max-tokens {asked}: {self.name} takes {least} to {most}. Try {near}.")
        room = window - 2
        if asked is None or asked == window:
            return room
        if asked < 1 or asked % room:
            raise UserError(
                f"--max-tokens {asked}: {self.name} takes windows of {room} tokens, so a multiple of {room}. "
                f"Try {(max(asked, 0) // room + 1) * room}."
            )
        return asked

    def settings(self, options: TextOptions, window: int, num_layers: int) -> dict[str, Any]:
        """What the options change about cond: only what is not the default, so that equal settings are equal.

        Also `fill` and `pad_to`, if prompts have lengths of their own: a reader pads by them. Raises UserError for what
        this family, or a CLIP of so many layers, cannot do.
        """
        found: dict[str, Any] = {"fill": self.fill} if self.length != FIXED else {}
        num_tokens = self.num_tokens(options.max_tokens, window)
        if self.is_full:
            found["pad_to"] = {name: stored.tokens or num_tokens for name, stored in self.stores.items()}
        if num_tokens != self.num_tokens(None, window):
            found["max_tokens"] = num_tokens
        if options.clip_skip != 1:
            if not self.takes_clip_skip:
                raise UserError(
                    f"--clip-skip {options.clip_skip}: for Stable Diffusion 1 and 2, not for {self.name}. Leave it out."
                )
            if not 1 <= options.clip_skip <= num_layers:
                raise UserError(
                    f"--clip-skip {options.clip_skip}: this text encoder takes 1 (its last layer, the default) "
                    f"to {num_layers}."
                )
            found["clip_skip"] = options.clip_skip
        if options.emphasis:
            if self.sequence is not None:
                why = "has a T5 too" if self.classes.get(self.sequence) == ("T5EncoderModel",) else "has none"
                raise UserError(f"--emphasis: for CLIP alone, and {self.name} {why}. Leave it out.")
            found["emphasis"] = True
        if self.num_images:
            found["image_uncond"] = options.image_uncond
        elif options.image_uncond:
            raise UserError(
                f"--image-uncond: the prompts of {self.name} see no images, so one empty prompt is stored for all of "
                "them. Leave it out."
            )
        return found

    def stored_tokens(self, num_tokens: int, window: int) -> int:
        """T of prompt_embeds [P,T,D]; the most, if prompts have lengths of their own."""
        if self.sequence is None:
            return num_tokens // (window - 2) * window
        return num_tokens + (window if self.has_clip_tokens else 0)

    def more_tokens(self, max_tokens: int, window: int) -> int | None:
        """A larger --max-tokens where prompts were cut at `max_tokens`; None where there is none that helps."""
        if self.sequence is None:
            return max_tokens + window - 4
        # window: the T5 is left out, and CLIP has cut
        is_most = self.tokens_argument is None or max_tokens in (window, self.most_tokens)
        return None if is_most else self.most_tokens


def is_there(named: object) -> bool:
    """Whether model_index.json names a class for a part, or says that the model does without it."""
    return named not in (None, [], [None, None])
