"""Families of models that are trained from latents: how their prompts are encoded, and in which shapes that is stored.

A family is chosen by the `_class_name` in a folder's model_index.json. Its prompts are encoded by the encode_prompt of
its base pipeline, which the variants for img2img, inpainting, ControlNet and the like have copied.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from latentprep.errors import UserError
from latentprep.options import TextOptions

VARIANTS = r"(Control(Net(Union|XS)?)?)?(PAG)?(Depth2Img|Img2Img|Inpaint(ing)?|Fill|Kontext(Inpaint)?)?Pipeline"
# How the number of tokens of a prompt is known. fixed: all prompts have the same, and padding counts. mask: of each
# kept tensor X a mask X_mask says which tokens count. list: each prompt has a tensor of its own.
FIXED, MASK, LIST = "fixed", "mask", "list"


@dataclass(frozen=True)
class Call:
    """One call of the pipeline's encode_prompt."""

    returns: tuple[str | None, ...]  # what it returns, in order; None is not kept (the negative prompt's)
    arguments: Mapping[str, Any] = field(default_factory=dict)  # beside those that every call gets (encode_prompt.py)


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES."""

    name: str
    stem: str  # how its class names begin; VARIANTS is how they go on
    calls: tuple[Call, ...]
    length: str = FIXED
    fill: str = "zeros"  # what a shorter prompt of a batch is padded with, if lengths differ: cache.ragged.FILLS
    # encoder -> its class in transformers, of load_text.KINDS; a model that names another is refused. Of a family that
    # names none, model_index.json says which there are.
    classes: Mapping[str, str] = field(default_factory=dict)
    # encoder -> the field of its config that tells its share of a token's values in prompt_embeds; so too of pooled.
    # Of a family that names none, it is the width of all encoders together.
    width: Mapping[str, str] = field(default_factory=dict)
    pooled: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()  # encoders that a model may do without
    # the encoder whose tokens max_sequence_length counts; None: they are CLIPs, which take windows
    sequence: str | None = None
    default_tokens: int = 0  # max_sequence_length unless asked for otherwise: that of the pipeline's __call__
    most_tokens: int = 0  # what its pipeline takes at most
    has_clip_tokens: bool = False  # in prompt_embeds, beside those of the sequence
    chat: Mapping[str, Any] | None = None  # how the pipeline makes a chat of a prompt, before it is tokenized
    takes_clip_skip: bool = False
    heeds_force_upcast: bool = False  # whether its pipelines take the VAE in float32 where its config says so
    patch: int = 1  # latent pixels that the denoiser takes as one, each way

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
        return sorted(part for part in index if re.fullmatch(r"text_encoder(_\d)?", part) and _is_there(index[part]))

    def num_tokens(self, asked: int | None, window: int) -> int:
        """Tokens kept of a prompt: max_sequence_length, or K windows of CLIP without their starts and ends.

        `asked` is --max-tokens, `window` what CLIP takes at once, start and end included. Raises UserError.
        """
        if self.sequence is not None:
            if asked is None or 1 <= asked <= self.most_tokens:
                return asked or self.default_tokens
            near = min(max(asked, 1), self.most_tokens)
            raise UserError(f"--max-tokens {asked}: {self.name} takes 1 to {self.most_tokens}. Try {near}.")
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

        Also `fill`, if prompts have lengths of their own: a reader pads by it. Raises UserError for what this family,
        or a CLIP of so many layers, cannot do.
        """
        found: dict[str, Any] = {"fill": self.fill} if self.length != FIXED else {}
        num_tokens = self.num_tokens(options.max_tokens, window)
        if num_tokens != self.num_tokens(None, window):
            found["max_tokens"] = num_tokens
        if options.clip_skip != 1:
            if not self.takes_clip_skip:
                others = " or ".join(family.name for family in FAMILIES if family.takes_clip_skip)
                raise UserError(f"--clip-skip {options.clip_skip}: for {others}, not for {self.name}. Leave it out.")
            if not 1 <= options.clip_skip <= num_layers:
                raise UserError(
                    f"--clip-skip {options.clip_skip}: this text encoder takes 1 (its last layer, the default) "
                    f"to {num_layers}."
                )
            found["clip_skip"] = options.clip_skip
        if options.emphasis:
            if self.sequence is not None:
                why = "has a T5 too" if self.classes.get(self.sequence) == "T5EncoderModel" else "has none"
                raise UserError(f"--emphasis: for CLIP alone, and {self.name} {why}. Leave it out.")
            found["emphasis"] = True
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
        return None if max_tokens in (window, self.most_tokens) else self.most_tokens


def _is_there(named: object) -> bool:
    """Whether model_index.json names a class for a part, or says that the model does without it."""
    return named not in (None, [], [None, None])


FAMILIES = (
    Family(
        "Stable Diffusion 1 and 2",
        "StableDiffusion",
        calls=(Call(("prompt_embeds", None), {"do_classifier_free_guidance": False}),),
        classes={"text_encoder": "CLIPTextModel"},
        width={"text_encoder": "hidden_size"},
        takes_clip_skip=True,
    ),
    Family(
        "SDXL",
        "StableDiffusionXL",
        calls=(Call(("prompt_embeds", None, "pooled_prompt_embeds", None), {"do_classifier_free_guidance": False}),),
        classes={"text_encoder": "CLIPTextModel", "text_encoder_2": "CLIPTextModelWithProjection"},
        width={"text_encoder": "hidden_size", "text_encoder_2": "hidden_size"},
        pooled={"text_encoder_2": "projection_dim"},
        optional=("text_encoder",),  # the refiner has but the second
        heeds_force_upcast=True,
    ),
    Family(
        "Stable Diffusion 3",
        "StableDiffusion3",
        calls=(
            Call(
                ("prompt_embeds", None, "pooled_prompt_embeds", None),
                {"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None},
            ),
        ),
        classes={
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        width={"text_encoder_3": "d_model"},  # CLIP's tokens are filled up with zeros
        pooled={"text_encoder": "projection_dim", "text_encoder_2": "projection_dim"},
        optional=("text_encoder_3",),
        sequence="text_encoder_3",
        default_tokens=256,
        most_tokens=512,
        has_clip_tokens=True,
        patch=2,
    ),
    Family(
        "FLUX.1",
        "Flux",
        # prompt_2 has no default in diffusers 0.33
        calls=(Call(("prompt_embeds", "pooled_prompt_embeds", "text_ids"), {"prompt_2": None}),),
        classes={"text_encoder": "CLIPTextModel", "text_encoder_2": "T5EncoderModel"},
        width={"text_encoder_2": "d_model"},
        pooled={"text_encoder": "hidden_size"},
        sequence="text_encoder_2",
        default_tokens=512,
        most_tokens=512,
        patch=2,
    ),
    Family(
        "Z-Image",
        "ZImage",
        calls=(Call(("prompt_embeds", None), {"do_classifier_free_guidance": False}),),
        length=LIST,
        sequence="text_encoder",
        default_tokens=512,
        most_tokens=512,
        chat={"add_generation_prompt": True, "enable_thinking": True},
        patch=2,
    ),
)


def find_family(class_name: object) -> Family | None:
    """The family of a pipeline class, by its name; None where it is none of FAMILIES."""
    return next((family for family in FAMILIES if re.fullmatch(family.stem + VARIANTS, str(class_name))), None)


def tokenizer_of(encoder: str) -> str:
    """text_encoder_2 -> tokenizer_2."""
    return encoder.replace("text_encoder", "tokenizer")
