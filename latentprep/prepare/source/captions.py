"""Caption files, metadata files and file names -> the captions of every item."""

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import regex  # re's syntax, with a limit of time

from latentprep.errors import UserError
from latentprep.keys import name_of, split_suffix, suffix_of
from latentprep.options import CAPTION_COLUMN, TextOptions
from latentprep.prepare.source.door import TEXTS
from latentprep.prepare.source.kohya_metadata import read_captions_file
from latentprep.prepare.source.listing import Listing, is_image, stem
from latentprep.prepare.source.metadata import MAX_CAPTION, READERS, list_tables, read_json, read_metadata, read_text
from latentprep.records import Item, Skip

JSON_COLUMNS = (
    CAPTION_COLUMN,
    "caption",
)  # of .json sidecars, if no column was asked for: img2dataset writes "caption"
REGEX_SECONDS = 2  # for one file name


class TooSlowError(UserError):
    """The expression is at fault, and not the image."""


NUMBERS_AT_START = re.compile(r"^[-\d]+\s*")  # stable-diffusion-webui, modules/textual_inversion/dataset.py
REPEATS_AT_START = re.compile(r"^\d+_")  # kohya's sd-scripts, library/config_util.py


@dataclass(frozen=True)
class Captioned:
    """Items with their captions, and what a person should know about where those came from."""

    items: list[Item]
    origins: Counter[str]
    without_image: list[str]  # sidecars that belong to no image, and images that only metadata knows
    shared: list[str]  # stems that several images share, so that one sidecar captions them all
    second: list[str]  # caption files that are not read, since their image has a better one
    skips: list[Skip]  # images whose caption cannot be read
    num_long: int  # sidecars of several lines that are taken as one caption
    ignored: Counter[str]  # suffix -> how many files that are neither images nor captions
    excluded: Counter[str]  # pattern -> how many files it left out


def add_captions(listing: Listing, options: TextOptions) -> Captioned:
    """Each item's captions: a sidecar of the same stem, else a metadata file, else the file name (--caption-from).

    The source says which suffixes are sidecars. A .json of the same stem is a sidecar in tars only: in a folder of
    photos it may well be another program's. An image whose caption cannot be read is a skip. Raises UserError for a bad
    --word-regex and a broken metadata file.
    """
    try:
        word = regex.compile(options.word_regex) if options.word_regex else None
    except regex.error as error:
        raise UserError(f"--word-regex {options.word_regex}: not a regular expression ({error}).") from None
    suffixes = list_suffixes(listing, options)
    keys = listing.keys() if has_others(listing, options) else set()
    stems = Counter(map(stem, keys))
    sidecars = list_sidecars(listing, stems, suffixes)
    check_column(listing, sidecars, options)
    has_files = options.caption_from in ("auto", "file")
    metadata = read_metadata(listing, options.caption_columns, options.caption_encoding) if has_files else {}
    unmatched: list[str] = []
    if options.captions_file is not None:
        metadata, unmatched = read_captions_file(options.captions_file, listing, options)
        left = Counter({f"not in {options.captions_file}": len(listing.items) - len(metadata)})
        chosen = [item for item in listing.items if item.key in metadata]
        listing, sidecars = replace(listing, items=chosen, excluded=listing.excluded + left), {}
    items: list[Item] = []
    skips: list[Skip] = []
    for item in listing.take_items():
        try:
            captions, origin = _find_texts(item.key, listing, suffixes, sidecars, metadata, word, options)
        except TooSlowError:
            raise
        except UserError as error:
            skips.append(item.skip("bad_caption", str(error)))
        else:
            own = decorate(tidy(captions), options)
            items.append(Item(item.key, item.size, item.nbytes, item.version, own, origin))
    with_sidecar = {name for name, _ in sidecars}
    texts = {*TEXTS, *filter(is_text, suffixes)}
    used = set(sidecars.values())
    of_text = list(filter(is_text, suffixes))

    def has_better(name: str, suffix: str) -> bool:
        """Whether an image has a caption file that counts before that with a suffix."""
        return suffix in of_text and any((name, better) in sidecars for better in of_text[: of_text.index(suffix)])

    return Captioned(
        items,
        Counter(item.caption_origin for item in items),
        without_image=[key for (name, _), key in sidecars.items() if name not in stems]
        + [key for key in metadata if key not in keys]
        + unmatched,
        shared=sorted(name for name, count in stems.items() if count > 1 and name in with_sidecar),
        second=[key for (name, suffix), key in sidecars.items() if name in stems and has_better(name, suffix)],
        skips=skips,
        num_long=count_long(items, suffixes) if sidecars else 0,
        ignored=Counter(
            suffix_of(key) or name_of(key)
            for key in listing.others
            if key not in used and suffix_of(key) not in texts and name_of(key) not in READERS
        ),
        excluded=listing.excluded,
    )


def has_others(listing: Listing, options: TextOptions) -> bool:
    """Whether there are files that may say something of an image."""
    return bool(listing.others) or options.captions_file is not None


def count_long(items: Iterable[Item], suffixes: tuple[str, ...]) -> int:
    """Caption files of several lines that are taken as one caption."""
    of_files = (item for item in items if f".{item.caption_origin}" in suffixes)
    return len({stem(item.key) for item in of_files if "\n" in item.captions[0]})


def list_suffixes(listing: Listing, options: TextOptions) -> tuple[str, ...]:
    """Suffixes of files that caption the image of their stem, the best first. Raises UserError."""
    if options.caption_from not in ("auto", "file"):
        return ()
    if not options.caption_extension:
        return listing.source.sidecars
    suffix = f".{options.caption_extension.strip().removeprefix('.').lower()}"
    if suffix == "." or PurePosixPath(f"x{suffix}").suffix != suffix or is_image(f"x{suffix}"):
        raise UserError(
            f"--caption-extension {options.caption_extension}: expected the ending of caption files, such as .txt."
        )
    return (suffix,)


def is_text(suffix: str) -> bool:
    """Whether files with this suffix hold a caption and nothing else."""
    return suffix != ".json"


def list_sidecars(listing: Listing, stems: Counter[str], suffixes: tuple[str, ...]) -> dict[tuple[str, str], str]:
    """(stem, suffix) -> key of a file that captions one image. Text files are in it even if no image has their stem."""
    return {
        (name, suffix): key
        for key in listing.others
        if (suffix := suffix_of(key)) in suffixes and ((name := stem(key)) in stems or suffix in TEXTS)
    }


def check_column(listing: Listing, sidecars: dict[tuple[str, str], str], options: TextOptions) -> None:
    """Raise UserError if a column is asked for, and nothing has columns."""
    has_json = any(not is_text(suffix) for _, suffix in sidecars)
    if is_asked(options) and not has_json and not list_tables(listing):
        kinds = [*READERS, *(f"{suffix} beside images" for suffix in listing.source.sidecars if suffix not in TEXTS)]
        raise UserError(
            f"--caption-column {options.caption_columns[0]}: SOURCE {listing.source.where} holds no {', '.join(kinds)}."
        )


def is_asked(options: TextOptions) -> bool:
    """Whether a column was asked for."""
    return options.caption_columns != (CAPTION_COLUMN,)


def _find_texts(
    key: str,
    listing: Listing,
    suffixes: tuple[str, ...],
    sidecars: dict[tuple[str, str], str],
    metadata: dict[str, list[str]],
    word: "regex.Pattern[str] | None",
    options: TextOptions,
) -> tuple[list[str], str]:
    """The captions of an image as they are written, and where they were found. Raises UserError.

    If a column was asked for, a .json goes before a .txt: img2dataset writes both.
    """
    asked, encoding = options.caption_columns if is_asked(options) else None, options.caption_encoding
    name = stem(key) if sidecars else ""
    for suffix in sorted(suffixes, key=is_text) if asked else suffixes:
        if (sidecar := sidecars.get((name, suffix))) is None:
            continue
        if not is_text(suffix):
            if (texts := read_json(listing, sidecar, asked, JSON_COLUMNS, encoding)) is not None:
                return texts, suffix[1:]
            continue
        text = read_text(listing, sidecar, encoding, MAX_CAPTION)
        if options.caption_lines or options.first_line:
            lines = [line for line in text.splitlines() if line.strip()]
            return lines if options.caption_lines else lines[:1], suffix[1:]
        return [text], suffix[1:]
    if key in metadata:
        return metadata[key], "metadata"
    if options.default_caption:
        return list(options.default_caption), "default"
    if options.caption_from in ("auto", "name"):
        return [caption_from_name(key, word, options.joiner)], "filename"
    if options.caption_from == "folder":
        return [caption_from_folder(key, listing.source.where)], "folder"
    return [""], "nothing"


def tidy(texts: list[str]) -> tuple[str, ...]:
    """Captions as they are stored: without space around them; blank ones are left out, unless there is no other."""
    # names that are not UTF-8, and broken JSON escapes, hold lone surrogates: no tokenizer takes them
    stripped = [text.encode("utf-8", "replace").decode("utf-8").strip() for text in texts]
    return tuple(filter(None, stripped)) or ("",)


def decorate(captions: tuple[str, ...], options: TextOptions) -> tuple[str, ...]:
    """Captions with the prefix before them and the suffix behind; and the trigger first, if one does not begin with it.

    Prefix and suffix are joined by a space, as in kohya's sd-scripts (library/train_util.py, process_caption).
    """
    prefix, suffix, trigger = options.caption_prefix.strip(), options.caption_suffix.strip(), options.trigger.strip()
    if not (prefix or suffix or trigger):
        return captions
    found = []
    for caption in captions:
        text = " ".join(filter(None, (prefix, caption, suffix)))
        if trigger and not re.match(rf"{re.escape(trigger)}(?!\w)", text, re.IGNORECASE):
            text = f"{trigger}, {text}" if text else trigger
        found.append(text)
    return tuple(found)


def caption_from_folder(key: str, where: str) -> str:
    """The name of the folder that an image is in, without kohya's number of repeats: "10_sks dog" -> "sks dog"."""
    name = PurePosixPath(key).parent.name or Path(where).resolve().name  # SOURCE may be "."
    return REPEATS_AT_START.sub("", name).strip()


def caption_from_name(key: str, word: "regex.Pattern[str] | None" = None, joiner: str = " ") -> str:
    """The ancestor's rule: the stem without leading digits and dashes; with `word`, its matches joined.

    Raises UserError for an expression that takes longer than REGEX_SECONDS: some take for ever.
    """
    text = NUMBERS_AT_START.sub("", split_suffix(name_of(key))[0])
    if word is not None:
        try:
            text = joiner.join(match.group() for match in word.finditer(text, timeout=REGEX_SECONDS))
        except TimeoutError:
            raise TooSlowError(
                f"--word-regex {word.pattern}: takes over {REGEX_SECONDS} s for the file name {key}. Simplify it."
            ) from None
    return text.strip()
