"""The recipe: everything that decides the numbers in a cache, its digest, and how two of them differ."""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from msgspec import Meta

from latentprep.geometry import Geometry
from latentprep.options import ImageOptions, TextOptions
from latentprep.records import MAX_CONTROLS, list_views

Dtype = Annotated[str, Meta(pattern="^(float32|float16|bfloat16)$")]  # options.DTYPES
MAX_TOKENS = 4096  # that a reader pads a prompt to
CondDtype = Annotated[str, Meta(pattern="^(float32|float16|bfloat16|int8)$")]  # options.COND_DTYPES
Store = Annotated[str, Meta(pattern=r"^mean(\+std)?$")]  # options.STORES


class Part:
    """A part of a recipe."""

    def to_json(self) -> dict[str, Any]:
        """Its fields, those that are None left out: so a field that comes later changes no digest."""
        found: dict[str, Any] = to_json(self)
        return found


@dataclass(frozen=True)
class LatentsRecipe(Part):
    """What decides the numbers in the latents files."""

    vae: str  # hash of its weights and config
    geometry: Geometry
    images: ImageOptions
    views: tuple[str, ...]
    dtype: Dtype  # that the VAE runs in
    store: Store
    store_dtype: Dtype
    tiling: Annotated[int, Meta(ge=4)] | None = None  # side of a tile in pixels; None: images are encoded whole
    num_controls: Annotated[int, Meta(ge=1, le=MAX_CONTROLS)] | None = None  # control images of each image
    control_size: Literal["own"] | None = None  # buckets of their own; None: those of their targets

    @classmethod
    def of(
        cls,
        *,
        vae: str,
        geometry: Geometry,
        images: ImageOptions,
        flip: bool,
        dtype: str,
        store: str,
        store_dtype: str,
        tiling: int | None = None,
        num_controls: int = 0,
        control_size: str = "target",
    ) -> Self:
        """The recipe of options, with the views that they ask for."""
        views = tuple(list_views(geometry.crops, flip))
        own_size: Literal["own"] | None = "own" if control_size == "own" else None
        return cls(vae, geometry, images, views, dtype, store, store_dtype, tiling, num_controls or None, own_size)


@dataclass(frozen=True, kw_only=True)
class WordingRecipe(Part):
    """How captions become prompts."""

    template: Annotated[tuple[str, ...], Meta(min_length=1)] | None = None
    placeholder: str
    shuffle_tags: bool
    tag_drop_out: float
    keep_tags: int
    wildcards: bool
    seed: int | None = None  # None: nothing is chosen

    @staticmethod
    def fields_of(options: TextOptions, seed: int) -> dict[str, Any]:
        return {
            "template": options.template,
            "placeholder": options.placeholder,
            "shuffle_tags": options.shuffle_tags,
            "tag_drop_out": float(options.tag_drop_out),
            "keep_tags": options.num_kept_tags,
            "wildcards": options.wildcards,
            "seed": seed if options.has_choices else None,
        }


@dataclass(frozen=True, kw_only=True)
class TextRecipe(WordingRecipe):
    """What decides the text files, captions aside."""

    text_encoder: str | None = None  # hash of its weights, config and tokenizer; None: there is no cond
    prompts_per_image: int
    dtype: Dtype | None = None  # of the text encoder
    store_dtype: CondDtype | None = None  # of cond
    # these three are None unless they are not the default
    max_tokens: int | None = None
    clip_skip: int | None = None
    emphasis: bool | None = None
    image_uncond: bool | None = None  # whether each image has cond of the empty prompt; None: prompts see no images
    fill: Annotated[str, Meta(pattern="^(zeros|repeat)$")] | None = None  # of prompts that have lengths of their own
    pad_to: dict[str, Annotated[int, Meta(ge=1, le=MAX_TOKENS)]] | None = None  # name -> its tokens, at least
    sets: dict[str, WordingRecipe] | None = None  # name of a set -> what counts for its images

    @classmethod
    def of(
        cls,
        *,
        text_encoder: str | None,
        settings: dict[str, Any],
        options: TextOptions,
        seed: int,
        dtype: str,
        store_dtype: str,
    ) -> Self:
        """The recipe of options; `settings` are what Family.settings gives: what is not the default.

        `store_dtype` is that of latents, and of cond if the options say nothing else.
        """
        own = {name: WordingRecipe(**cls.fields_of(text, seed)) for name, text in options.sets.items()}
        return cls(
            **cls.fields_of(TextOptions() if own else options, seed),
            sets=own or None,
            text_encoder=text_encoder,
            prompts_per_image=options.prompts_per_image,
            dtype=dtype if text_encoder else None,
            store_dtype=(options.cond_dtype or store_dtype) if text_encoder else None,
            **settings,
        )

    SEES_IMAGES: ClassVar = "image_uncond"  # the field that says so
    COND_FIELDS: ClassVar = ("text_encoder", "dtype", "store_dtype", "max_tokens", "clip_skip", "emphasis")

    @property
    def sees_images(self) -> bool:
        """Whether the cond of a prompt depends on the control images of its row."""
        return self.image_uncond is not None

    @property
    def cond(self) -> dict[str, Any]:
        """The part that decides the cond of a prompt, in JSON."""
        return self.cond_of(self.to_json())

    @classmethod
    def cond_of(cls, recipe: dict[str, Any]) -> dict[str, Any]:
        """The same of a recipe in JSON."""
        return {name: recipe[name] for name in cls.COND_FIELDS if name in recipe}


@dataclass(frozen=True)
class Recipe(Part):
    latents: LatentsRecipe
    text: TextRecipe
    libraries: dict[str, str] = field(default_factory=dict)  # name -> version; not compared


def to_json(value: Any) -> Any:
    """JSON values of dataclasses within each other; fields that are None are left out."""
    if is_dataclass(value):
        named = ((part.name, getattr(value, part.name)) for part in fields(value))
        return {name: to_json(inner) for name, inner in named if inner is not None}
    if isinstance(value, Mapping):
        return {name: to_json(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [to_json(inner) for inner in value]
    return value


def digest_of(value: Any) -> str:
    """32 hex digits: BLAKE2b of a JSON value in canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def recipe_changes(before: Any, after: Any, at: str = "") -> Iterator[tuple[str, Any, Any]]:
    """(field, value before, value after) for every leaf of two JSON values that differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        for name in sorted(before.keys() | after.keys()):
            yield from recipe_changes(before.get(name), after.get(name), f"{at}.{name}" if at else name)
    elif before != after:
        yield at, before, after


def tell_changes(before: Any, after: Any) -> str:
    """'field: value before -> value after' for every leaf of two JSON values that differs, in one line."""
    return "; ".join(f"{at}: {json.dumps(old)} -> {json.dumps(new)}" for at, old, new in recipe_changes(before, after))
