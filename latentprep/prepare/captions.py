"""Sidecars, metadata.jsonl and file names -> the caption of every item."""

import json
import re
import stat
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from latentprep.config import TextOptions
from latentprep.errors import UserError
from latentprep.prepare.source import Source
from latentprep.records import Item

SIDECARS = (".txt", ".caption")
NUMBERS_AT_START = re.compile(r"^[-\d]+\s*")  # stable-diffusion-webui, modules/textual_inversion/dataset.py


@dataclass(frozen=True)
class Captioned:
    """Items with their captions, and what a person should know about where those came from."""

    items: list[Item]
    origins: Counter[str]
    without_image: list[str]  # sidecars that belong to no image
    shared: list[str]  # stems that several images share, so that one sidecar captions them all


def add_captions(source: Source, options: TextOptions) -> Captioned:
    """Each item's caption: a sidecar of the same stem, else metadata.jsonl, else the file name.

    Raises UserError for a bad --word-regex, a broken metadata.jsonl and a caption that is not text.
    """
    try:
        word = re.compile(options.word_regex) if options.word_regex else None
    except re.error as error:
        raise UserError(f"--word-regex {options.word_regex}: not a regular expression ({error}).") from None
    others = set(source.others)
    metadata = _read_metadata(
        source.folder, [key for key in source.others if PurePosixPath(key).name == "metadata.jsonl"]
    )
    items: list[Item] = []
    bad: list[str] = []
    for item in source.items:
        try:
            items.append(_caption(item, source.folder, others, metadata, word, options.joiner))
        except UserError as error:
            bad.append(str(error))
    if bad:
        raise UserError(bad[0] + (f" ({len(bad) - 1} more such files.)" if len(bad) > 1 else ""))
    stems = Counter(_stem(item.key) for item in source.items) + Counter(_stem(skip.key) for skip in source.skips)
    sidecars = {key: _stem(key) for key in source.others if PurePosixPath(key).suffix.lower() in SIDECARS}
    used = set(sidecars.values())
    return Captioned(
        items,
        Counter(item.caption_origin for item in items),
        [key for key, stem in sidecars.items() if stem not in stems],
        sorted(stem for stem, count in stems.items() if count > 1 and stem in used),
    )


def _stem(key: str) -> str:
    return PurePosixPath(key).with_suffix("").as_posix()


def _caption(
    item: Item, folder: Path, others: set[str], metadata: dict[str, str], word: re.Pattern[str] | None, joiner: str
) -> Item:
    text, origin = caption_from_name(item.key, word, joiner), "filename"
    sidecar = next((_stem(item.key) + suffix for suffix in SIDECARS if _stem(item.key) + suffix in others), None)
    if sidecar is not None:
        text, origin = read_text(folder, sidecar), PurePosixPath(sidecar).suffix[1:]
    elif item.key in metadata:
        text, origin = metadata[item.key], "metadata"
    # names that are not UTF-8, and broken JSON escapes, hold lone surrogates: no tokenizer takes them
    text = text.encode("utf-8", "replace").decode("utf-8")
    return replace(item, caption=text.strip(), caption_origin=origin)


def caption_from_name(key: str, word: re.Pattern[str] | None = None, joiner: str = " ") -> str:
    """The ancestor's rule: the stem without leading digits and dashes; with `word`, its matches joined."""
    text = NUMBERS_AT_START.sub("", PurePosixPath(key).stem)
    if word is not None:
        text = joiner.join(match.group() for match in word.finditer(text))
    return text.strip()


def read_text(folder: Path, name: str) -> str:
    """Text of a caption file: UTF-8, or UTF-16 with its byte order mark. Raises UserError."""
    try:
        if not stat.S_ISREG((folder / name).stat().st_mode):
            raise UserError(f"{name}: not a regular file. Remove it.")
        data = (folder / name).read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}).") from error
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig"
    try:
        return data.decode(encoding)
    except UnicodeDecodeError as error:
        raise UserError(f"{name}: not {encoding.upper()} text at byte {error.start}. Save it as UTF-8.") from None


def _read_metadata(folder: Path, keys: list[str]) -> dict[str, str]:
    """key -> text, of every metadata.jsonl (the Hub's imagefolder layout: file_name is relative to that file)."""
    captions: dict[str, str] = {}
    for key in keys:
        for number, line in enumerate(read_text(folder, key).splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                name, text = row["file_name"], row["text"]
            except (ValueError, KeyError, TypeError):
                name = text = None
            if not isinstance(name, str) or not isinstance(text, str):
                raise UserError(f'{key} line {number}: expected {{"file_name": "...", "text": "..."}}, got {line[:80]}')
            captions[(PurePosixPath(key).parent / name).as_posix()] = text
    return captions
