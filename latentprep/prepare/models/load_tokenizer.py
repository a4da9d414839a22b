"""Tokenizers of text encoders, each by a class that is known here, from files that are known here."""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import regex
from tokenizers import Regex, pre_tokenizers

from latentprep.errors import UserError
from latentprep.prepare.models.chat_template import MAX_TEMPLATE, bounded_chat
from latentprep.prepare.models.files import blame, read_json
from latentprep.prepare.models.load_text import KINDS, UNUSED, known_class

TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
TOKENIZER_FILES = (
    "tokenizer.json", "vocab.json", "merges.txt", "spiece.model", "tokenizer.model", "vocab.txt",
    "special_tokens_map.json", "added_tokens.json", CHAT_TEMPLATE,
)  # fmt: skip
# Of a processor that prompts need only half of, the tokenizer: as its tokenizer.json or its family has it.
LOADED_AS = {"PixtralProcessor": "PreTrainedTokenizerFast", "Qwen2VLProcessor": "Qwen2TokenizerFast"}
OF_BYTES = ("ByT5Tokenizer",)  # tokenizers that need no vocabulary
MODULES = {"ChatGLMTokenizer": "diffusers.pipelines.kolors.tokenizer"}  # of tokenizers that transformers does not have


def check_tokenizer(folder: Path, kind: str, own: str, option: str) -> None:
    """Raise UserError where the vocabulary of the tokenizer of a text encoder is missing; `own` is its class."""
    there = {name for name in TOKENIZER_FILES if (folder / name).is_file()}
    wanted = KINDS[kind].vocabularies
    if own not in OF_BYTES and not any(names <= there for names in wanted):
        expected = " or ".join(" and ".join(sorted(names)) for names in wanted)
        raise UserError(f"{option} {folder}: has no vocabulary, expected {expected}. Download the model again.")
    for name in there:
        if name.endswith(".json"):
            read_json(folder / name, option)
    if CHAT_TEMPLATE in there and (folder / CHAT_TEMPLATE).stat().st_size > MAX_TEMPLATE:
        raise UserError(f"{option}: {folder / CHAT_TEMPLATE} has over {MAX_TEMPLATE:,} bytes, which no template has.")


def load_tokenizer_of(folder: Path, kind: str, config: Any, padding_side: str | None, is_padded: bool = True) -> Any:
    """A tokenizer by its class, from its known files alone, for the text encoder of this config. Raises UserError.

    config: what load_text.text_config gives. padding_side: Family.padding_side. is_padded: whether it has to name a pad
    token. The tokenizer sees a copy of its files, since from_pretrained would also look at a config.json and the
    auto_map in it.
    """
    own: dict[str, Any] = {}
    vocab_size = getattr(config, "vocab_size", getattr(config, "padded_vocab_size", None))
    with TemporaryDirectory() as copy:
        for name in TOKENIZER_FILES:
            if (folder / name).is_file():
                shutil.copyfile(folder / name, Path(copy) / name)
        if (folder / TOKENIZER_CONFIG).exists():
            found = read_json(folder / TOKENIZER_CONFIG, "--model")
            own = {key: value for key, value in found.items() if key not in UNUSED and not key.endswith("_file")}
        if len(str(own.get("chat_template", ""))) > MAX_TEMPLATE:  # a text, or several with names
            raise UserError(
                f"{folder / TOKENIZER_CONFIG} has a chat_template of over {MAX_TEMPLATE:,} characters, which none has. "
                "Download it again."
            )
        if kind in KINDS["CLIPTextModel"].tokenizers:
            own["model_max_length"] = clip_length(folder, own, config.max_position_embeddings)
        (Path(copy) / TOKENIZER_CONFIG).write_text(json.dumps(own), encoding="utf-8")
        with blame(f"{folder}: its files make no {kind}"):
            loaded_as = known_class(LOADED_AS.get(kind, kind), MODULES.get(kind, "transformers"))
            tokenizer = loaded_as.from_pretrained(copy, local_files_only=True)
            check_padding(tokenizer.padding_side, padding_side, folder)  # ChatGLM's fails at its first word otherwise
            size = len(tokenizer)
            if tokenizer.pad_token is not None:
                tokenizer(["a photo"], padding="max_length", max_length=8, truncation=True)
    if is_padded and tokenizer.pad_token is None:
        raise UserError(f"{folder}: names no pad_token. Set it in its tokenizer_config.json.")
    tokenizer.apply_chat_template = bounded_chat(tokenizer.apply_chat_template, folder)
    if vocab_size is not None and size > vocab_size:
        raise UserError(f"{folder}: has {size:,} tokens, but its text encoder knows {vocab_size:,}. Download it again.")
    return tokenizer


def check_padding(found: str, wanted: str | None, folder: Path) -> None:
    """Raise UserError where a tokenizer pads on another side than its family: encode_prompt would say nothing."""
    if wanted not in (None, found):
        raise UserError(
            f"{folder}: its tokenizer pads prompts on the {found}, expected the {wanted}. "
            f'Set "padding_side": "{wanted}" in its tokenizer_config.json.'
        )


def clip_length(folder: Path, tokenizer: Mapping[str, Any], window: int) -> int:
    """The tokens that a CLIP takes at once, which pipelines ask its tokenizer for: those of the text encoder.

    A tokenizer that was saved from its vocabulary alone says 10**30 or nothing. Raises UserError for one that says
    less: a pipeline would cut prompts there.
    """
    said = tokenizer.get("model_max_length")
    if type(said) is int and 0 < said < window:
        raise UserError(
            f"--model {folder / TOKENIZER_CONFIG}: model_max_length is {said}, but its text encoder takes {window} "
            f"tokens. Set it to {window}."
        )
    return window


def read_special_tokens_as_text(tokenizer: Any) -> None:
    """Let <|endoftext|>, </s> and the like in a caption be text, for counting and for encode_prompt.

    The switch for that is not enough for two kinds. CLIP's in Python has them in a pattern and in a table. T5's in Rust
    has them in its vocabulary, where SentencePiece itself never finds them: they are cut behind their first character.
    """
    tokenizer.split_special_tokens = True
    if hasattr(tokenizer, "pat") and hasattr(tokenizer, "cache"):  # CLIP's in Python, up to transformers 4
        for token in tokenizer.all_special_tokens:
            tokenizer.cache.pop(token, None)  # where it would find them whole
        words = tokenizer.pat.pattern.replace(r"<\|startoftext\|>|<\|endoftext\|>|", "")
        tokenizer.pat = regex.compile(words, regex.IGNORECASE)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and type(backend.model).__name__ == "Unigram":
        special = sorted({str(token) for token in tokenizer.added_tokens_decoder.values() if token.special})
        cut = "|".join(f"{re.escape(word[0])}(?={re.escape(word[1:])})" for word in special if len(word) > 1)
        before = [backend.pre_tokenizer] if backend.pre_tokenizer is not None else []
        split = pre_tokenizers.Split(Regex(cut), "isolated")
        backend.pre_tokenizer = pre_tokenizers.Sequence([*before, split]) if cut else backend.pre_tokenizer
