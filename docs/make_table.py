"""The table of models in docs/models.md, from the rows of FAMILIES. `python docs/make_table.py` writes it anew."""

import inspect
import re
from pathlib import Path

import diffusers

from latentprep.prepare.models.families import FAMILIES
from latentprep.prepare.models.family import FIXED, Family, Stored
from latentprep.prepare.models.text_file import PIPELINES_OF_PARTS

PAGE = Path(__file__).with_name("models.md")
HEAD = "| model | pipeline | VAE | one file | stored of a prompt | tokens |\n|---|---|---|---|---|---|\n"
CLIP_WINDOW = 77
# Checkpoints in one file whose configs and tokenizers a diffusers folder gives: tests/test_split_files.py has those.
WITH_CONFIG = dict.fromkeys(("StableDiffusion3", "Flux"), "with `--config`")


def main() -> None:
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(text.replace(find_table(text), make_table()), encoding="utf-8", newline="\n")


def find_table(text: str) -> str:
    """The table as models.md has it."""
    start = text.index(HEAD.partition("\n")[0])
    return text[start : text.index("\n\n", start) + 1]


def make_table() -> str:
    return HEAD + "".join(f"| {' | '.join(make_row(family))} |\n" for family in FAMILIES)


def make_row(family: Family) -> list[str]:
    stored = ", ".join(f"`{name}` [{','.join(shape_of(family, name))}]" for name in family.names)
    one_file = "yes" if family.pipeline in PIPELINES_OF_PARTS.values() else WITH_CONFIG.get(family.stem, "no")
    return [family.name, f"`{family.stem}`", " or ".join(list_vaes(family)), one_file, stored, count_tokens(family)]


def shape_of(family: Family, name: str) -> list[str]:
    """The axes of what is stored of one prompt. T: as many tokens as the prompt has, D: a width of the model."""
    stored = family.stores[name]
    tokens, width = tokens_of(family, stored), str(stored.values) if stored.values else "D"
    if name.endswith("_mask"):
        return [tokens]
    if tokens == "1":
        return [width]
    if isinstance(stored.layers, str):  # an axis of their own; a number of them stands side by side
        return ["layers", tokens, width] if name in family.batch_axis else [tokens, "layers", width]
    return [tokens, width]


def tokens_of(family: Family, stored: Stored) -> str:
    if family.length != FIXED:
        return "T"
    if stored.tokens:
        return str(stored.tokens)
    return str(family.stored_tokens(family.num_tokens(None, CLIP_WINDOW), CLIP_WINDOW))


def list_vaes(family: Family) -> list[str]:
    """Names of the classes that its pipeline takes."""
    taken = inspect.signature(getattr(diffusers, family.pipeline).__init__).parameters["vae"].annotation
    return [f"`{name}`" for name in dict.fromkeys(re.findall(r"Autoencoder\w+", str(taken)))]


def count_tokens(family: Family) -> str:
    """Tokens kept of a prompt, and how many can be asked for."""
    if family.sequence is None:
        return "75, 150, ..."
    if family.num_images:
        return "all"
    more = f", up to {family.most_tokens}" if family.most_tokens > family.default_tokens else ""
    return f"{family.default_tokens}{more}"


if __name__ == "__main__":
    main()
