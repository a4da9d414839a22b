"""What a plan must know of text encoders, and the pipeline folder they are loaded from. Loads no weights by itself."""

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import TextOptions
from latentprep.prepare.models.families import FAMILIES, Family, find_family, tokenizer_of
from latentprep.prepare.models.files import (
    TEXT_WEIGHTS,
    check_whole,
    digest_model,
    find_weights,
    hash_files,
    read_header,
    read_json,
    read_weights,
)
from latentprep.prepare.models.load_text import (
    KINDS,
    chat_of,
    check_class,
    check_encoder,
    check_text_config,
    check_tokenizer,
    load_encoder,
    load_tokenizer_of,
    make_pipeline,
    pipeline_class,
)

if TYPE_CHECKING:
    import torch

    from latentprep.prepare.models.doors import PromptEncoder


ZEROS_SINCE = (0, 36)  # of diffusers; see _check_zeros


@dataclass(frozen=True)
class TextFacts:
    """What a plan must know of the text encoders of a model."""

    digest: str  # of weights, configs and tokenizers
    family: Family
    window: int  # tokens that its CLIP takes at once, start and end included
    num_layers: int  # of its CLIP
    width: int  # values of a token in prompt_embeds
    pooled: int  # values of pooled_prompt_embeds; 0: there is none

    def settings(self, options: TextOptions) -> dict[str, Any]:
        """What the options change about cond. Raises UserError for what these encoders cannot do."""
        return self.family.settings(options, self.window, self.num_layers)

    def num_values(self, options: TextOptions) -> int:
        """Numbers that are stored of one prompt, all tensors together; the most, if lengths differ."""
        num_tokens = self.family.num_tokens(options.max_tokens, self.window)
        per_token = self.width + (3 if "text_ids" in self.family.names else 0)
        return self.family.stored_tokens(num_tokens, self.window) * per_token + self.pooled

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

    def open(self, device: "torch.device", dtype: "torch.dtype", options: TextOptions | None = None) -> "PromptEncoder":
        """The text encoders at work, on their device. Raises UserError like load_pipeline."""
        from latentprep.prepare.models.text_encoder import TextEncoder

        return TextEncoder(self, device, dtype, options)


@dataclass(frozen=True)
class TextFolder(TextFiles):
    """A pipeline folder whose text encoders and tokenizers are to be used."""

    path: Path
    left_out: tuple[str, ...]  # encoders that the family has, and this model does without
    classes: Mapping[str, str]  # encoder -> its class, for those that are there
    tokenizers: Mapping[str, str]  # encoder -> class of its tokenizer

    def load_pipeline(self, dtype: "torch.dtype") -> Any:
        parts: dict[str, Any] = {}
        for part in self.left_out:
            parts |= {part: None, tokenizer_of(part): None}
        for part in self.classes:
            parts |= self._load_part(part, dtype)
        pipeline = make_pipeline(self.family, parts)
        if self.family.sequence in self.left_out:  # encode_prompt asks the transformer how wide zeros for its T5 are
            pipeline.transformer = SimpleNamespace(config=SimpleNamespace(joint_attention_dim=self.width))
        return pipeline

    def check(self) -> None:
        """Raise UserError for what would fail when it is loaded, as far as headers and configs tell."""
        for part in self.tokenizers:
            folder, kind = self.path / part, self.classes[part]
            config = read_json(folder / "config.json", "--model")
            shapes = read_header(find_weights(folder, TEXT_WEIGHTS, "--model", index_first=False), "--model")
            check_encoder(kind, config, shapes, folder, part)
            tokenizer = load_tokenizer_of(self.path / tokenizer_of(part), self.tokenizers[part], config)
            if self.family.chat is not None:
                chat_of(tokenizer, "a photo", self.family.chat)

    def _load_part(self, part: str, dtype: "torch.dtype") -> dict[str, Any]:
        """An encoder and its tokenizer."""
        folder, kind = self.path / part, self.classes[part]
        config = read_json(folder / "config.json", "--model")
        tokenizer = load_tokenizer_of(self.path / tokenizer_of(part), self.tokenizers[part], config)
        tensors = read_weights(find_weights(folder, TEXT_WEIGHTS, "--model", index_first=False), ("",), "--model")
        model, info = load_encoder(kind, config, tensors, dtype, _no_model(folder, kind))
        check_whole(folder, "transformers", info["missing_keys"])
        return {part: model, tokenizer_of(part): tokenizer}


def _no_model(folder: Path, kind: str) -> str:
    return f"{folder}: the weights and config.json make no {kind}"


def family_of(folder: Path) -> Family | None:
    """The family of a pipeline folder; None where it is of no known one, or a VAE alone."""
    if not (folder / "model_index.json").is_file():
        return None
    return find_family(read_json(folder / "model_index.json", "--model").get("_class_name"))


def open_text(folder: Path, option: str = "--model") -> TextFolder:
    """The text encoders of a pipeline folder. Raises UserError."""
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
    named = family.encoders(index)
    left_out = tuple(part for part in named if _is_left_out(folder, part, index, family))
    encoders = [part for part in named if part not in left_out]
    if not encoders:
        raise UserError(f"{option} {folder}: its model_index.json names no text_encoder. Complete it, or --no-cond.")
    for part in encoders:
        if not (folder / part).is_dir() or not (folder / tokenizer_of(part)).is_dir():
            raise UserError(
                f"{option} {folder}: has no {part} and {tokenizer_of(part)} folders. Complete it, or --no-cond."
            )
    configs = {part: read_json(folder / part / "config.json", option) for part in encoders}
    classes, tokenizers = {}, {}
    for part, config in configs.items():
        allowed = (family.classes[part],) if family.classes else tuple(KINDS)
        kind = classes[part] = check_class(index, part, allowed, f"{option} {folder}")
        tokenizers[part] = check_class(index, tokenizer_of(part), KINDS[kind].tokenizers, f"{option} {folder}")
        check_text_config(config, folder / part, option)
        check_tokenizer(folder / tokenizer_of(part), kind, option)
    numbers = text_numbers(family, classes, configs, folder, option)
    hashed: list[Any] = [family.pipeline, *configs.values()]
    if family.sequence in left_out:
        _check_zeros(f"{option} {folder}", family)
        numbers["width"] = _joint_attention_dim(folder, option)
        hashed.append(numbers["width"])
    weights = [
        file for part in encoders for file in find_weights(folder / part, TEXT_WEIGHTS, option, index_first=False)
    ]
    vocabularies = [
        file for part in encoders for file in sorted((folder / tokenizer_of(part)).iterdir()) if file.is_file()
    ]
    digest = digest_model(hashed, hash_files(weights + vocabularies))
    return TextFolder(digest, family, **numbers, path=folder, left_out=left_out, classes=classes, tokenizers=tokenizers)


def text_numbers(
    family: Family, classes: Mapping[str, str], configs: dict[str, dict[str, Any]], folder: Path, option: str
) -> dict[str, int]:
    """window, num_layers, width and pooled of TextFacts, from the configs of the encoders that are there."""
    clip = next((config for part, config in configs.items() if part != family.sequence), {})
    width = family.width or {part: KINDS[classes[part]].width for part in configs}
    return {
        "window": clip.get("max_position_embeddings", 77),
        "num_layers": clip.get("num_hidden_layers", 12),
        "width": _add_up(width, configs, folder, option),
        "pooled": _add_up(family.pooled, configs, folder, option),
    }


def _is_left_out(folder: Path, part: str, index: dict[str, Any], family: Family) -> bool:
    """Whether a model does without an encoder: it says so, or nobody has downloaded its T5, the largest part of all."""
    if part not in family.optional:
        return False
    says_so = index.get(part) in (None, [], [None, None])
    return says_so or (part == family.sequence and not (folder / part).is_dir())


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


def _add_up(fields: Mapping[str, str], configs: dict[str, dict[str, Any]], folder: Path, option: str) -> int:
    """The sum of a field of each encoder's config, of those that are there."""
    for part, name in fields.items():
        if part in configs and not isinstance(configs[part].get(name), int):
            raise UserError(f"{option}: {folder / part / 'config.json'} says no {name}, expected a text encoder's.")
    return sum(configs[part][name] for part, name in fields.items() if part in configs)
