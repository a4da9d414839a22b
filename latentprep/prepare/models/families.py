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
T5_LIMIT = 512  # tokens; what the pipelines of SD 3 and FLUX take at most


@dataclass(frozen=True)
class Family:
    """A row of FAMILIES."""

    name: str
    stem: str  # how its class names begin; VARIANTS is how they go on
    returns: tuple[str | None, ...]  # what encode_prompt returns, in order; None is not kept (the negative prompt's)
    # encoder -> the field of its config that tells its share of a token's values in prompt_embeds; so too of pooled
    width: Mapping[str, str]
    pooled: Mapping[str, str] = field(default_factory=dict)
    # encoder -> its class in transformers, if it is no CLIPTextModel; a model that names another is refused
    classes: Mapping[str, str] = field(default_factory=dict)
    optional: tuple[str, ...] = ()  # encoders that a model may do without
    t5: str | None = None  # which of the encoders is a T5; None: they are CLIPs
    t5_tokens: int = 0  # max_sequence_length unless asked for otherwise
    has_clip_tokens: bool = True  # in prompt_embeds: those of FLUX are T5's alone
    takes_clip_skip: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)  # of encode_prompt, that have no default or a wrong one
    heeds_force_upcast: bool = False  # whether its pipelines take the VAE in float32 where its config says so
    patch: int = 1  # latent pixels that the denoiser takes as one, each way

    @property
    def pipeline(self) -> str:
        """Name of the diffusers class that encodes its prompts."""
        return f"{self.stem}Pipeline"

    def class_of(self, encoder: str) -> str:
        """Name of the transformers class that an encoder is loaded by, whatever the model's files say."""
        return self.classes.get(encoder, "CLIPTextModel")

    @property
    def encoders(self) -> list[str]:
        """text_encoder, text_encoder_2, ...; each has a tokenizer of the same number."""
        return sorted(self.width.keys() | self.pooled.keys())

    def num_tokens(self, asked: int | None, window: int) -> int:
        """Tokens kept of a prompt: T5's max_sequence_length, or K windows of CLIP without their starts and ends.

        `asked` is --max-tokens, `window` what CLIP takes at once, start and end included. Raises UserError.
        """
        if self.t5 is not None:
            if asked is None or 1 <= asked <= T5_LIMIT:
                return asked or self.t5_tokens
            near = min(max(asked, 1), T5_LIMIT)
            raise UserError(f"--max-tokens {asked}: {self.name} takes 1 to {T5_LIMIT}. Try {near}.")
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

        Raises UserError for what this family, or a CLIP of so many layers, cannot do.
        """
        found: dict[str, Any] = {}
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
            if self.t5 is not None:
                raise UserError(f"--emphasis: for CLIP alone, and {self.name} has a T5 too. Leave it out.")
            found["emphasis"] = True
        return found

    def stored_tokens(self, num_tokens: int, window: int) -> int:
        """T of prompt_embeds [P,T,D]."""
        if self.t5 is None:
            return num_tokens // (window - 2) * window
        return num_tokens + (window if self.has_clip_tokens else 0)

    def more_tokens(self, max_tokens: int, window: int) -> int | None:
        """A larger --max-tokens where prompts were cut at `max_tokens`; None where there is none that helps."""
        if self.t5 is None:
            return max_tokens + window - 4
        return None if max_tokens in (window, T5_LIMIT) else T5_LIMIT  # window: the T5 is left out, and CLIP has cut


FAMILIES = (
    Family(
        "Stable Diffusion 1 and 2",
        "StableDiffusion",
        returns=("prompt_embeds", None),
        width={"text_encoder": "hidden_size"},
        arguments={"do_classifier_free_guidance": False},
        takes_clip_skip=True,
    ),
    Family(
        "SDXL",
        "StableDiffusionXL",
        returns=("prompt_embeds", None, "pooled_prompt_embeds", None),
        width={"text_encoder": "hidden_size", "text_encoder_2": "hidden_size"},
        pooled={"text_encoder_2": "projection_dim"},
        classes={"text_encoder_2": "CLIPTextModelWithProjection"},
        optional=("text_encoder",),  # the refiner has but the second
        heeds_force_upcast=True,
        arguments={"do_classifier_free_guidance": False},
    ),
    Family(
        "Stable Diffusion 3",
        "StableDiffusion3",
        returns=("prompt_embeds", None, "pooled_prompt_embeds", None),
        width={"text_encoder_3": "d_model"},  # CLIP's tokens are filled up with zeros
        pooled={"text_encoder": "projection_dim", "text_encoder_2": "projection_dim"},
        classes={
            "text_encoder": "CLIPTextModelWithProjection",
            "text_encoder_2": "CLIPTextModelWithProjection",
            "text_encoder_3": "T5EncoderModel",
        },
        optional=("text_encoder_3",),
        t5="text_encoder_3",
        t5_tokens=256,
        arguments={"do_classifier_free_guidance": False, "prompt_2": None, "prompt_3": None},
        patch=2,
    ),
    Family(
        "FLUX.1",
        "Flux",
        returns=("prompt_embeds", "pooled_prompt_embeds", "text_ids"),
        width={"text_encoder_2": "d_model"},
        pooled={"text_encoder": "hidden_size"},
        classes={"text_encoder_2": "T5EncoderModel"},
        t5="text_encoder_2",
        t5_tokens=512,
        has_clip_tokens=False,
        arguments={"prompt_2": None},  # has no default in diffusers 0.33
        patch=2,
    ),
)


def find_family(class_name: object) -> Family | None:
    """The family of a pipeline class, by its name; None where it is none of FAMILIES."""
    return next((family for family in FAMILIES if re.fullmatch(family.stem + VARIANTS, str(class_name))), None)


def tokenizer_of(encoder: str) -> str:
    """text_encoder_2 -> tokenizer_2."""
    return encoder.replace("text_encoder", "tokenizer")
