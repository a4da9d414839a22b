"""The metadata file of kohya's fine-tuning (.json, or .jsonl) -> captions by image."""

import json
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import counted, shortened
from latentprep.options import TextOptions
from latentprep.prepare.source.listing import Listing, stem
from latentprep.prepare.source.metadata import MAX_CAPTION, MAX_METADATA, decode

SEPARATOR = ","  # between caption and tags, as sd-scripts' FineTuningDataset has it


def read_captions_file(path: Path, listing: Listing, options: TextOptions) -> tuple[dict[str, list[str]], list[str]]:
    """Key -> captions, of the images that the file names; and what it names that is no image here.

    It names images by their paths: absolute or relative to the folder, with or without suffix. Raises UserError if it
    is no such file, or names no image here.
    """
    root = Path(listing.source.where).absolute()
    named: dict[str, list[str]] = {}
    for image, fields in read_file(path, options.caption_encoding).items():
        place = Path(image)
        key = place.relative_to(root) if place.is_absolute() and place.is_relative_to(root) else place
        named[key.as_posix()] = make_captions(path, image, fields, options)
    places = {item.key: item.key if item.key in named else stem(item.key) for item in listing.items}
    found = {key: named[place] for key, place in places.items() if place in named}
    if not found:
        raise UserError(
            f"{path}: names none of the {counted(len(places), 'image')} in {listing.source.where}, but others such as "
            f"{shortened(next(iter(named), 'nothing'))}."
        )
    used = {places[key] for key in found}
    return found, [name for name in named if name not in used]


def read_file(path: Path, encoding: str) -> dict[str, dict[str, Any]]:
    """Path of an image -> what is said of it. Raises UserError."""
    try:
        if path.stat().st_size > MAX_METADATA:
            raise UserError(f"{path}: too large, expected at most {MAX_METADATA:,} bytes.")
        if not path.is_file():
            raise UserError(f"{path}: no such file. Give a metadata file of sd-scripts.")
        text = decode(path.read_bytes(), str(path), encoding)
        if path.suffix.lower() == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            found = {line["image_path"]: line for line in lines}
        else:
            found = json.loads(text)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"{path}: not as sd-scripts writes it ({shortened(str(error), 100)}).") from None
    if not isinstance(found, dict) or not all(isinstance(k, str) and isinstance(v, dict) for k, v in found.items()):
        raise UserError(f'{path}: expected {{"path of an image": {{"caption": ..., "tags": ...}}}}.')
    return found


def make_captions(path: Path, image: str, fields: dict[str, Any], options: TextOptions) -> list[str]:
    """Caption and tags, joined, up to the first line break; with `caption_lines` each line of the caption by itself.

    Raises UserError.
    """
    caption, tags = (fields.get(name) or "" for name in ("caption", "tags"))
    if not isinstance(caption, str) or not isinstance(tags, str) or len(caption) + len(tags) > MAX_CAPTION:
        raise UserError(f"{path}: {shortened(image)}: expected texts as caption and tags.")
    tags = tags.replace("\n", SEPARATOR) if options.caption_lines else tags
    lines = [line for line in caption.splitlines() if line.strip()] if options.caption_lines else [caption]
    joined = [SEPARATOR.join(filter(None, (line, tags))) for line in lines or [""]]
    return [text.split("\n")[0] for text in joined]
