"""CLIP's tokenizer from the merges that are built in, for checkpoints, which hold none."""

import json
import shutil
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

MERGES = Path(str(files("latentprep"))) / "clip" / "merges.txt"


def load_tokenizer(folder: Path) -> "CLIPTokenizer":
    """The tokenizer of a folder that has only its tokenizer_config.json, with CLIP's own vocabulary."""
    from transformers import CLIPTokenizer

    with TemporaryDirectory() as complete:
        shutil.copy(folder / "tokenizer_config.json", complete)
        shutil.copy(MERGES, complete)
        (Path(complete) / "vocab.json").write_text(json.dumps(make_vocabulary()), encoding="utf-8")
        return CLIPTokenizer.from_pretrained(complete)


def make_vocabulary() -> dict[str, int]:
    """Token -> id: 256 bytes, the same at the end of a word, what each merge makes, start and end; 49,408 in all.

    The order is that of openai/CLIP, clip/simple_tokenizer.py.
    """
    merges = MERGES.read_text(encoding="utf-8").splitlines()[1:]
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols), *(merge.replace(" ", "") for merge in merges)]
    return {token: number for number, token in enumerate([*tokens, "<|startoftext|>", "<|endoftext|>"])}


def byte_symbols() -> list[str]:
    """A printable character for each byte: itself where it is printable; those that are come first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [*map(chr, printable), *(chr(256 + n) for n in range(256 - len(printable)))]
