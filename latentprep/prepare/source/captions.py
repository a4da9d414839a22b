"""Caption files, metadata files and file names -> the captions of every item."""

import re
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import regex  # re's syntax, with a limit of time

from latentprep.errors import UserError
from latentprep.options import TextOptions
from latentprep.prepare.source.folder import Source, stem
from latentprep.prepare.source.metadata import MAX_CAPTION, READERS, read_metadata, read_text
from latentprep.records import Item, Skip

SIDECARS = (".txt", ".caption")
REGEX_SECONDS = 2  # for one file name


class TooSlowError(UserError):
    """The expression is at fault, and not the image."""


NUMBERS_AT_START = re.compile(r"^[-\d]+\s*")  # stable-diffusion-webui, modules/textual_inversion/dataset.py


@dataclass(frozen=True)
class Captioned:
    """Items with their captions, and what a person should know about where those came from."""

    items: list[Item]
    origins: Counter[str]
    without_image: list[str]  # sidecars that belong to no image, and images that only metadata knows
    shared: list[str]  # stems that several images share, so that one sidecar captions them all
    skips: list[Skip]  # images whose caption cannot be read
    num_long: int  # sidecars of several lines that are taken as one caption
    ignored: Counter[str]  # suffix -> how many files that are neither images nor captions


def add_captions(source: Source, options: TextOptions) -> Captioned:
    """Each item's captions: a sidecar of the same stem, else a metadata file, else the file name.

    An image whose caption cannot be read is a skip. Raises UserError for a bad --word-regex and a broken metadata file.
    """
    try:
        word = regex.compile(options.word_regex) if options.word_regex else None
    except regex.error as error:
        raise UserError(f"--word-regex {options.word_regex}: not a regular expression ({error}).") from None
    sidecars = {(stem(key), suffix): key for key in source.others if (suffix := _suffix(key)) in SIDECARS}
    metadata = read_metadata(source.folder, source.others, options.caption_columns)
    items: list[Item] = []
    skips: list[Skip] = []
    for item in source.items:
        try:
            texts, origin = _find_texts(item.key, source.folder, sidecars, metadata, word, options)
        except TooSlowError:
            raise
        except UserError as error:
            skips.append(item.skip("bad_caption", str(error)))
        else:
            items.append(replace(item, captions=tidy(texts), caption_origin=origin))
    keys = {item.key for item in source.items} | {skip.key for skip in source.skips}
    stems = Counter(map(stem, keys))
    with_sidecar = {name for name, _ in sidecars}
    return Captioned(
        items,
        Counter(item.caption_origin for item in items),
        without_image=[key for (name, _), key in sidecars.items() if name not in stems]
        + [key for key in metadata if key not in keys],
        shared=sorted(name for name, count in stems.items() if count > 1 and name in with_sidecar),
        skips=skips,
        num_long=len({stem(i.key) for i in items if f".{i.caption_origin}" in SIDECARS and "\n" in i.captions[0]}),
        ignored=Counter(
            _suffix(key) or PurePosixPath(key).name
            for key in source.others
            if _suffix(key) not in SIDECARS and PurePosixPath(key).name not in READERS
        ),
    )


def _suffix(key: str) -> str:
    return PurePosixPath(key).suffix.lower()


def _find_texts(
    key: str,
    folder: Path,
    sidecars: dict[tuple[str, str], str],
    metadata: dict[str, list[str]],
    word: "regex.Pattern[str] | None",
    options: TextOptions,
) -> tuple[list[str], str]:
    """What stands somewhere as the captions of an image, and where. Raises UserError."""
    for suffix in SIDECARS:
        if (sidecar := sidecars.get((stem(key), suffix))) is not None:
            text = read_text(folder, sidecar, MAX_CAPTION)
            return text.splitlines() if options.caption_lines else [text], suffix[1:]
    if key in metadata:
        return metadata[key], "metadata"
    return [caption_from_name(key, word, options.joiner)], "filename"


def tidy(texts: list[str]) -> tuple[str, ...]:
    """Captions as they are stored: without space around them; blank ones are left out, unless there is no other."""
    # names that are not UTF-8, and broken JSON escapes, hold lone surrogates: no tokenizer takes them
    stripped = [text.encode("utf-8", "replace").decode("utf-8").strip() for text in texts]
    return tuple(filter(None, stripped)) or ("",)


def caption_from_name(key: str, word: "regex.Pattern[str] | None" = None, joiner: str = " ") -> str:
    """The ancestor's rule: the stem without leading digits and dashes; with `word`, its matches joined.

    Raises UserError for an expression that takes longer than REGEX_SECONDS: some take for ever.
    """
    text = NUMBERS_AT_START.sub("", PurePosixPath(key).stem)
    if word is not None:
        try:
            text = joiner.join(match.group() for match in word.finditer(text, timeout=REGEX_SECONDS))
        except TimeoutError:
            raise TooSlowError(
                f"--word-regex {word.pattern}: takes over {REGEX_SECONDS} s for the file name {key}. Simplify it."
            ) from None
    return text.strip()
