"""Templates and captions -> prompts. Pure text: used when preparing and when reading."""

import hashlib
import re
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from latentprep.errors import UserError
from latentprep.human import expand_user
from latentprep.options import TextOptions

if TYPE_CHECKING:
    import numpy as np

    from latentprep.records import Row

WILDCARD = re.compile(r"\{([^{}]*)\}")  # an innermost pair of braces
MAX_DEPTH = 100  # of wildcards within wildcards: each level reads the caption once more


def counter(*parts: object) -> int:
    """A 64-bit number that depends on every part and on nothing else: the seed of every random choice."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def template_folder() -> Path:
    """The templates that ship with latentprep: inside the wheel, or beside the package in a checkout."""
    inside = Path(str(files("latentprep"))) / "templates"
    return inside if inside.is_dir() else inside.parent.parent / "templates"


def list_templates() -> dict[str, list[str]]:
    """Name -> lines, of every template that ships with latentprep."""
    return {path.stem: read_template(path) for path in sorted(template_folder().glob("*.txt"))}


def read_template(path: Path) -> list[str]:
    """The lines of a template file that are not blank."""
    lines = path.read_text(encoding="utf-8-sig").splitlines()
    return [line.strip() for line in lines if line.strip()]


def load_template(name: str) -> tuple[str, ...]:
    """Lines of a template, by the name of a shipped one or by the path of a file. Raises UserError."""
    shipped = template_folder() / f"{name}.txt"
    path = expand_user(name)
    if not path.is_file() and Path(name).name == name and shipped.is_file():
        path = shipped
    if not path.is_file():
        names = ", ".join(list_templates())
        raise UserError(f"--template {name}: neither a file nor a shipped template. Shipped: {names}.")
    lines = read_lines("--template", name, path)
    if not lines:
        raise UserError(f"--template {name}: {path} has no lines. Write one prompt a line, with [name] or [filewords].")
    return tuple(lines)


def read_lines(option: str, name: str, path: Path) -> list[str]:
    """The lines of a text file that are not blank. Raises UserError."""
    try:
        lines = read_template(path)
    except UnicodeDecodeError:
        raise UserError(f"{option} {name}: {path} is not UTF-8 text. Save it as UTF-8.") from None
    except OSError as error:
        raise UserError(f"{option} {name}: cannot be read ({error.strerror or error}).") from None
    return lines


def make_prompts(captions: Sequence[str], key: str, options: TextOptions, seed: int) -> list[str]:
    """The K prompts of an image: prompt k depends on its captions, its set's options and (seed, key, k) alone.

    It takes caption k, round and round; its wildcards, then its tags; and the k-th line of the template, from the one
    that (seed, key) chooses on, so that K prompts take K lines where there are so many. No caption is an empty one.
    """
    captions, options = captions or ("",), options.of(key)
    return [_make_variant(captions[k % len(captions)], key, options, seed, k) for k in range(options.prompts_per_image)]


def list_prompts(rows: Iterable["Row"], options: TextOptions, seed: int) -> list[str]:
    """The prompts of rows, each once: those that the text file of their shard holds."""
    made = (prompt for row in rows for prompt in make_prompts(row.captions, row.key, options, seed))
    return list(dict.fromkeys(made))


def list_seeing_prompts(
    rows: Sequence["Row"], options: TextOptions, seed: int, dead: Collection[int] = ()
) -> list[tuple[int, str]]:
    """The prompts of rows that see images, each with the number of its row; with --image-uncond the empty one too."""
    found: dict[tuple[int, str], None] = {}
    for n, row in enumerate(rows):
        if n not in dead:
            prompts = make_prompts(row.captions, row.key, options, seed)
            found |= dict.fromkeys((n, prompt) for prompt in [*prompts, *([""] if options.image_uncond else [])])
    return list(found)


def _make_variant(caption: str, key: str, options: TextOptions, seed: int, k: int) -> str:
    import numpy as np

    wildcards = np.random.default_rng(counter("wildcards", seed, key, k)) if options.wildcards else None
    if wildcards is not None:
        caption = expand_wildcards(caption, wildcards)
    if options.shuffle_tags or options.tag_drop_out:
        random = np.random.default_rng(counter("tags", seed, key, k))
        caption = vary_tags(caption, random, options.shuffle_tags, options.tag_drop_out, options.num_kept_tags)
    return make_prompt(options.template, caption, options.placeholder, seed, key, k, wildcards)


def make_prompt(
    template: tuple[str, ...] | None,
    caption: str,
    placeholder: str,
    seed: int,
    key: str,
    k: int = 0,
    wildcards: "np.random.Generator | None" = None,
) -> str:
    """A prompt: the template's line k, counted from the one that (seed, key) chooses, filled as the ancestor filled it.

    [filewords] becomes the caption and [name] the placeholder. Without a template the caption is the prompt.
    `wildcards` draws those of the line; None leaves them as they are.
    """
    if template is None:
        return caption
    line = template[(counter("template", seed, key) + k) % len(template)].replace("[name]", placeholder)
    if wildcards is not None:  # before the caption comes in: a bar in that parts nothing
        line = expand_wildcards(line, wildcards)
    return line.replace("[filewords]", caption.replace("[name]", placeholder))


def expand_wildcards(text: str, random: "np.random.Generator") -> str:
    """Each {a|b|c} becomes one of its parts, the innermost first. Braces without partners stay, and those too deep."""

    def choose(found: re.Match[str]) -> str:
        parts = found[1].split("|")
        return parts[int(random.integers(len(parts)))]

    for _ in range(MAX_DEPTH):
        text, count = WILDCARD.subn(choose, text)
        if not count:
            break
    return text


def vary_tags(caption: str, random: "np.random.Generator", shuffle: bool, drop_out: float, keep: int) -> str:
    """A caption of comma-separated tags: shuffled, and each left out with the chance `drop_out`; the first `keep` stay.

    The ancestor's order: first what is left out, then the shuffle. Spaces around tags are made one behind each comma.
    """
    if not (shuffle or drop_out):
        return caption
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    first, rest = tags[:keep], tags[keep:]
    if drop_out:
        rest = [tag for tag, draw in zip(rest, random.random(len(rest)), strict=True) if draw >= drop_out]
    if shuffle:
        rest = [rest[n] for n in random.permutation(len(rest))]
    return ", ".join([*first, *rest])
