"""How fast prompts are counted for `encode --dry-run`, by tokenizers alone.

    python benchmarks/count_tokens.py                     # 50,000 captions

CLIP's own vocabulary, in windows as Stable Diffusion takes them; and a T5's tokenizer whose vocabulary is letters and
some words, which has more to do for each word than the true one. Captions have 5 to 60 words of the same twenty.
"""

import random
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer
from results import Results, run
from transformers import T5TokenizerFast

from latentprep.options import TextOptions
from latentprep.prepare.models.clip_tokenizer import load_tokenizer
from latentprep.prepare.models.families import find_family
from latentprep.prepare.models.family import Family
from latentprep.prepare.models.single_file import ARCHITECTURES
from latentprep.prepare.models.token_counter import TokenCounter

WORDS = "a photo of the red old house with snow on its roof dog cat walking in light by lake under tall trees".split()


@dataclass(frozen=True)
class Model:
    """What a TokenCounter asks of a model: CLIP's window is of 77 tokens."""

    family: Family
    window: int = 77
    pipeline_settings: Mapping[str, Any] = field(default_factory=dict)


def make_t5() -> T5TokenizerFast:
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    vocab += [(f"▁{word}", -4.0) for word in WORDS[::2]] + [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    with tempfile.TemporaryDirectory() as folder:
        T5TokenizerFast(vocab=vocab, extra_ids=0).save_pretrained(folder)
        return T5TokenizerFast.from_pretrained(folder, local_files_only=True)


def main(results: Results, count: Annotated[int, typer.Option(help="Prompts.")] = 50_000) -> None:
    draw = random.Random(0)
    prompts = [" ".join(draw.choices(WORDS, k=draw.randint(5, 60))) for _ in range(count)]
    clip = load_tokenizer(Path(ARCHITECTURES) / "sd1" / "tokenizer")
    table = results.table("prompts that are counted", {"time": "s", "rate": "prompts/s"})
    for name, pipeline, tokenizers in (
        ("CLIP", "StableDiffusionPipeline", {"text_encoder": clip}),
        ("T5", "FluxPipeline", {"text_encoder_2": make_t5()}),
    ):
        family = find_family(pipeline)
        assert family is not None
        counter = TokenCounter(Model(family), tokenizers, TextOptions())
        started = time.perf_counter()
        counter.count(prompts)
        seconds = time.perf_counter() - started
        table.add(name, seconds, count / seconds)


if __name__ == "__main__":
    run(main)
