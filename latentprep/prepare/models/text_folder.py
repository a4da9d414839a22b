"""What a plan must know of text encoders, and the pipeline folder they are loaded from. Loads no weights by itself."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import TextOptions
from latentprep.prepare.models.families import FAMILIES, find_family
from latentprep.prepare.models.family import Family, Stored, is_there
from latentprep.prepare.models.files import blame, digest_model, hash_files, read_json
from latentprep.prepare.models.load_text import (
    MAX_LAYERS,
    check_encoder,
    check_text_config,
    made_config,
    make_pipeline,
    pipeline_class,
    pipeline_default,
    text_config,
)
from latentprep.prepare.models.load_tokenizer import check_tokenizer, load_tokenizer_of
from latentprep.prepare.models.processor import ImageSize, Processor, check_image_token, read_processor
from latentprep.prepare.models.refused import refusal_of
from latentprep.prepare.models.split_text import find_places
from latentprep.prepare.models.text_places import Place, Weights, find_tokenizer, own_place
from latentprep.records import Size

if TYPE_CHECKING:
    import torch

    from latentprep.prepare.models.doors import PromptEncoder
    from latentprep.prepare.models.token_counter import TokenCounter


# Packages by the names that they are imported by -> the names that pip knows them by.
PACKAGES = {"bs4": "beautifulsoup4", "ftfy": "ftfy", "sentencepiece": "sentencepiece"}
ZEROS_SINCE = (0, 36)  # of diffusers; see _check_zeros


@dataclass(frozen=True)
class TextFacts:
    """What a plan must know of the text encoders of a model."""

    digest: str  # of weights, configs and tokenizers
    family: Family
    window: int  # tokens that its CLIP takes at once, start and end included
    num_layers: int  # of its CLIP
    widths: Mapping[str, int]  # name of what is stored -> values of a token
    pipeline_settings: Mapping[str, Any]  # what model_index.json says beside its parts, if cond depends on it

    def settings(self, options: TextOptions) -> dict[str, Any]:
        """What the options change about cond. Raises UserError for what these encoders cannot do."""
        return self.family.settings(options, self.window, self.num_layers)

    def num_values(self, options: TextOptions) -> int:
        """Numbers that are stored of one prompt, all tensors together; the most, if lengths differ."""
        return self.values_of(self.family.num_tokens(options.max_tokens, self.window))

    def values_of(self, num_tokens: int) -> int:
        """The same of a prompt that has so many tokens."""
        in_sequence = self.family.stored_tokens(num_tokens, self.window)
        stores = self.family.stores
        return sum(width * (stores[name].tokens or in_sequence) for name, width in self.widths.items())

    def more_tokens(self, max_tokens: int) -> int | None:
        """A larger --max-tokens that keeps more of prompts that were cut at `max_tokens`; None if there is none."""
        return self.family.more_tokens(max_tokens, self.window)


class TextFiles(TextFacts, ABC):
    """Text encoders on disk, described by paths and configs alone: small, and can be sent to another process."""

    @abstractmethod
    def load_pipeline(self, dtype: "torch.dtype") -> Any:
        """The base pipeline of its family, on the CPU, with nothing but text encoders and tokenizers.

        Raises UserError if weights are missing, or files do not make a model.
        """

    @abstractmethod
    def load_tokenizers(self) -> dict[str, Any]:
        """Encoder -> its tokenizer, of those that are there; no weights are read. Raises UserError."""

    def open_counter(self, options: TextOptions) -> "TokenCounter":
        """What counts tokens, without the text encoders. Raises UserError."""
        from latentprep.prepare.models.token_counter import TokenCounter

        return TokenCounter(self, self.load_tokenizers(), options)

    def open(self, device: "torch.device", dtype: "torch.dtype", options: TextOptions | None = None) -> "PromptEncoder":
        """The text encoders at work, on their device. Raises UserError like load_pipeline."""
        from latentprep.prepare.models.text_encoder import TextEncoder

        return TextEncoder(self, device, dtype, options)


@dataclass(frozen=True)
class TextFolder(TextFiles):
    """A pipeline folder whose text encoders and tokenizers are to be used; some may come from elsewhere."""

    path: Path
    left_out: tuple[str, ...]  # encoders that the family has, and this model does without
    places: Mapping[str, Place]  # encoder -> where it comes from, for those that are there
    tokenizers: Mapping[str, str]  # encoder -> class of its tokenizer
    given: tuple[str, ...] = ()  # encoders that do not come from the folder
    processor: Mapping[str, Any] | None = None  # read_processor's; None: prompts see no images

    @property
    def where(self) -> str:
        return " and ".join(str(place.weights) for place in self.places.values())

    def load_pipeline(self, dtype: "torch.dtype") -> Any:
        pipeline_class(self.family)  # first: diffusers brings a class of text encoders along
        parts: dict[str, Any] = dict(self.pipeline_settings)
        for part in self.left_out:
            parts |= {part: None, self.family.tokenizer_of(part): None}
        for part, place in self.places.items():
            tokenizer: Any = self.load_tokenizer(part)
            if self.processor is not None:
                tokenizer = Processor(tokenizer, self.processor, str(place.tokenizer))
            parts |= {part: place.load(part, dtype), self.family.tokenizer_of(part): tokenizer}
        pipeline = make_pipeline(self.family, parts)
        if self.family.sequence in self.left_out:  # encode_prompt asks the transformer how wide zeros for its T5 are
            width = self.widths["prompt_embeds"]
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=width))
        return pipeline

    def check(self) -> None:
        """Raise UserError for what would fail when it is loaded, as far as headers and configs tell."""
        from latentprep.prepare.models.token_counter import TokenCounter

        for part, place in self.places.items():
            if part not in self.given:  # those have been compared already
                check_encoder(place.kind, place.read_config(), place.weights.read_shapes(), place.config, part)
        tokenizers, sequence = self.load_tokenizers(), self.family.sequence
        if self.processor is not None:
            ((part, place),) = self.places.items()
            config = made_config(place.kind, place.read_config(), str(place.config))
            check_image_token(tokenizers[part], config.image_token_id, str(place.tokenizer))
        if sequence is None or sequence not in tokenizers:
            return
        with blame(f"{self.path}: its tokenizer does not do for {self.family.pipeline}"):
            short, long = TokenCounter(self, tokenizers, TextOptions()).count(["a", "a photo of a cat"])
        if short >= long:
            raise UserError(
                f"{self.path}: {self.family.tokenizer_of(sequence)} gives a longer prompt no more tokens, so prompts "
                "do not reach the text encoder. Is its chat_template.jinja whole? Download it again."
            )

    def load_tokenizers(self) -> dict[str, Any]:
        return {part: self.load_tokenizer(part) for part in self.places}

    def load_tokenizer(self, part: str) -> Any:
        """The tokenizer of an encoder. Raises UserError if its files make none."""
        place = self.places[part]
        config = text_config(place.kind, place.read_config(), str(place.config))
        side, is_padded = self.family.padding_side, part not in self.family.without_pad
        return load_tokenizer_of(place.tokenizer, self.tokenizers[part], config, side, is_padded)

    def count_image_tokens(self, sizes: Sequence[Size]) -> int:
        """Tokens that control images of these sizes take of a prompt, beyond one for each."""
        from PIL import Image

        from latentprep.prepare.models.encode_prompt import show_images

        assert self.processor is not None
        blank = [Image.new("RGB", (width, height)) for height, width in sizes]
        shown = show_images(make_pipeline(self.family, {}), self.family, blank)["image"]
        size = ImageSize(self.processor)
        return sum(size.count(own.height, own.width) - 1 for own in (shown if isinstance(shown, list) else [shown]))

    def describe_given(self) -> list[str]:
        """A line for each encoder that does not come from the folder."""
        lines = []
        for part in self.given:
            place = self.places[part]
            note = f", whose 8-bit floats ({place.eight_bits}) are cast" if place.eight_bits else ""
            lines.append(f"text     {part} from {place.weights}{note}")
        return lines


def check_refused(folder: Path, needs_text: bool) -> None:
    """Raise UserError for a model of which no cache can be made, or none with prompts."""
    if not (folder / "model_index.json").is_file():
        return
    name = read_json(folder / "model_index.json", "--model").get("_class_name")
    found = refusal_of(name) if find_family(name) is None else None
    if found is not None and (needs_text or not found.has_latents):
        advice = "Its latents alone: --no-cond." if found.has_latents else "Give another model."
        raise UserError(f"--model {folder}: {shortened(str(name))} {found.why}. {advice}")


def family_of(folder: Path) -> Family | None:
    """The family of a pipeline folder; None where it is of no known one, or a VAE alone."""
    if not (folder / "model_index.json").is_file():
        return None
    return find_family(read_json(folder / "model_index.json", "--model").get("_class_name"))


def open_text(folder: Path, option: str = "--model", given: Sequence[Weights] = ()) -> TextFolder:
    """The text encoders of a pipeline folder, with weights from elsewhere for some. Raises UserError."""
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{option} {folder}: has no model_index.json, so no text encoder. Give a pipeline folder, or --no-cond."
        )
    index = read_json(folder / "model_index.json", option)
    family = family_of(folder)
    if family is None:
        names = ", ".join(family.name for family in FAMILIES)
        raise UserError(
            f"{option} {folder}: a {shortened(str(index.get('_class_name')))}, expected a pipeline of {names}. "
            "Or encode with --no-cond."
        )
    pipeline_class(family)
    check_packages(family)
    from_elsewhere = find_places(given, folder, family, index, option)
    named = family.encoders(index)
    left_out = tuple(part for part in named if part not in from_elsewhere and _is_left_out(folder, part, index, family))
    encoders = [part for part in named if part not in left_out]
    if not encoders:
        raise UserError(f"{option} {folder}: its model_index.json names no text_encoder. Complete it, or --no-cond.")
    places = {part: from_elsewhere.get(part) or own_place(folder, part, family, index, option) for part in encoders}
    configs, tokenizers = {}, {}
    for part, place in places.items():
        if not place.tokenizer.is_dir():
            raise UserError(f"{option} {folder}: has no {family.tokenizer_of(part)} folder. Complete it, or --no-cond.")
        configs[part] = place.read_config()
        check_text_config(configs[part], place.config, option)
        tokenizers[part] = find_tokenizer(place, index, family.tokenizer_of(part), f"{option} {folder}")
        check_tokenizer(place.tokenizer, place.kind, tokenizers[part], option)
    settings = pipeline_settings(family, index, f"{option} {folder}")
    processor = None
    if family.num_images:
        (place,) = places.values()
        vision = made_config(place.kind, configs[encoders[0]], str(place.config)).vision_config
        processor = read_processor(place.tokenizer, vision, option)
    classes = {part: place.kind for part, place in places.items()}
    numbers = text_numbers(family, classes, configs, settings, f"{option} {folder}")
    hashed: list[Any] = [family.pipeline, *configs.values(), *([settings] if settings else [])]
    if family.sequence in left_out:
        _check_zeros(f"{option} {folder}", family)
        width = _joint_attention_dim(folder, option)
        numbers["widths"]["prompt_embeds"] = width
        hashed.append(width)
    weights = [line for part, place in places.items() for line in place.hash_weights(part)]
    vocabularies = hash_files([file for place in places.values() for file in place.list_vocabulary()])
    return TextFolder(
        digest_model(hashed, weights + vocabularies),
        family,
        **numbers,
        pipeline_settings=settings,
        path=folder,
        left_out=left_out,
        places=places,
        tokenizers=tokenizers,
        given=tuple(part for part in encoders if part in from_elsewhere),
        processor=processor,
    )


def check_packages(family: Family) -> None:
    """Raise UserError if a package is missing without which a pipeline encodes other text, or none."""
    missing = [PACKAGES[name] for name in family.packages if find_spec(name) is None]
    if missing:
        raise UserError(
            f"--model: {family.name} needs {' and '.join(missing)} to encode prompts. "
            f"pip install {' '.join(missing)}, or --no-cond."
        )


def pipeline_settings(family: Family, index: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What model_index.json says of the layers that a pipeline takes; {} if it says nothing. Raises UserError."""
    found: dict[str, Any] = {}
    for name in family.settings_of_pipeline:
        value = index.get(name)
        if value is None:
            continue
        is_list = isinstance(value, list) and 1 <= len(value) <= MAX_LAYERS
        if not is_list or any(type(n) is not int or not 0 <= n <= MAX_LAYERS for n in value):
            raise UserError(
                f"{where}: its model_index.json's {name} is {shortened(repr(value))}, expected a list of layers. "
                "Download it again."
            )
        found[name] = value
    return found


def text_numbers(
    family: Family,
    classes: Mapping[str, str],
    configs: Mapping[str, dict[str, Any]],
    settings: Mapping[str, Any],
    where: str,
) -> dict[str, Any]:
    """window, num_layers and widths of TextFacts, from the configs of the encoders that are there."""
    made = {part: text_config(classes[part], config, f"{where}/{part}") for part, config in configs.items()}
    clip = next((config for part, config in made.items() if part != family.sequence), None)
    stores = family.stores or {name: Stored(tuple(made)) for name in family.names}
    return {
        "window": getattr(clip, "max_position_embeddings", 77),
        "num_layers": getattr(clip, "num_hidden_layers", 12),
        "widths": {name: width_of(stored, made, family, settings, where) for name, stored in stores.items()},
    }


def width_of(
    stored: Stored, configs: Mapping[str, Any], family: Family, settings: Mapping[str, Any], where: str
) -> int:
    """Values of a token of what is stored: the widths of those encoders that are there. Raises UserError."""
    there = [configs[part] for part in stored.encoders if part in configs]
    if isinstance(stored.layers, int):
        layers = stored.layers
    elif stored.layers in family.settings_of_pipeline:
        chosen = settings.get(stored.layers) or pipeline_default(family, stored.layers)
        if max(chosen) > there[0].num_hidden_layers:
            raise UserError(
                f"{where}: its pipeline takes layer {max(chosen)} of a text encoder of {there[0].num_hidden_layers}. "
                f"Complete {stored.layers} in its model_index.json, or download it again."
            )
        layers = len(chosen)
    else:
        layers = getattr(there[0], stored.layers)
    widths = [width for config in there if type(width := getattr(config, stored.width, None)) is int]
    if len(widths) < len(there):
        raise UserError(f"{where}: the config.json of its text encoder says no {stored.width}. Download it again.")
    return sum(widths) * layers + stored.values


def _is_left_out(folder: Path, part: str, index: dict[str, Any], family: Family) -> bool:
    """Whether a model does without an encoder: it says so, or nobody has downloaded its T5, the largest part of all."""
    if part not in family.optional:
        return False
    return not is_there(index.get(part)) or (part == family.sequence and not (folder / part).is_dir())


def _check_zeros(where: str, family: Family) -> None:
    """Raise UserError if diffusers is too old to leave the T5 out.

    Zeros stand for its tokens. Before 0.36 there are as many as CLIP takes, and not the max_sequence_length that was
    asked for (_get_t5_prompt_embeds), so a cache would get cond of another length after an upgrade.
    """
    found = version("diffusers")
    if tuple(map(int, re.findall(r"\d+", found)[:2])) < ZEROS_SINCE:
        raise UserError(
            f"{where}: has no {family.sequence}, and diffusers {found} has another number of zeros in its place than "
            f"newer ones. Upgrade diffusers to {'.'.join(map(str, ZEROS_SINCE))} or later, add that folder, "
            "or --no-cond."
        )


def _joint_attention_dim(folder: Path, option: str) -> int:
    """Values of a token where there is no T5 that tells."""
    path = folder / "transformer" / "config.json"
    found = read_json(path, option).get("joint_attention_dim") if path.is_file() else None
    if not isinstance(found, int):
        raise UserError(
            f"{option} {folder}: has no T5, so {path} must say joint_attention_dim. Add that file, or --no-cond."
        )
    return found
