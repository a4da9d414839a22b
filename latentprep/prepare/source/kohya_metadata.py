"""The metadata file of kohya's fine-tuning (.json, or .jsonl) -> captions by image."""

import json
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import shortened
from latentprep.options import TextOptions
from latentprep.prepare.source.listing import Listing, stem
from latentprep.prepare.source.metadata import MAX_CAPTION, MAX_METADATA

SEPARATOR = ","  # between caption and tags, as sd-scripts' FineTuningDataset has it


def read_captions_file(path: Path, listing: Listing, options: TextOptions) -> dict[str, list[str]]:
    """Key -> captions, of the images that the file names.

    It does so by their paths: absolute, or from the folder; with their ending, or without. Raises UserError for what is
    no such file.
    """
    root = Path(listing.source.where).absolute()
    named: dict[str, list[str]] = {}
    for image, fields in read_file(path).items():
        place = Path(image)
        key = place.relative_to(root) if place.is_absolute() and place.is_relative_to(root) else place
        named[key.as_posix()] = make_captions(path, image, fields, options)
    found = {item.key: named.get(item.key, named.get(stem(item.key))) for item in listing.items}
    return {key: captions for key, captions in found.items() if captions is not None}


def read_file(path: Path) -> dict[str, dict[str, Any]]:
    """Path of an image -> what is said of it. Raises UserError."""
    try:
        if path.stat().st_size > MAX_METADATA:
            raise UserError(f"metadata_file {path}: too large, expected at most {MAX_METADATA:,} bytes.")
        text = path.read_text(encoding="utf-8-sig")
        if path.suffix.lower() == ".jsonl":
            lines = [json.loads(line) for line in text.splitlines() if line.strip()]
            found = {line["image_path"]: line for line in lines}
        else:
            found = json.loads(text)
    except OSError as error:
        raise UserError(f"metadata_file {path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise UserError(f"metadata_file {path}: not as sd-scripts writes it ({shortened(str(error), 100)}).") from None
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise UserError(f'metadata_file {path}: expected {{"path of an image": {{"caption": ..., "tags": ...}}}}.')
    return found


def make_captions(path: Path, image: str, fields: dict[str, Any], options: TextOptions) -> list[str]:
    """Caption and tags, joined; with wildcards each line of the caption is one. Raises UserError."""
    caption, tags = (fields.get(name) or "" for name in ("caption", "tags"))
    if not isinstance(caption, str) or not isinstance(tags, str) or len(caption) + len(tags) > MAX_CAPTION:
        raise UserError(f"metadata_file {path}: {shortened(image)}: expected texts as caption and tags.")
    tags = tags.replace("\n", SEPARATOR) if options.caption_lines else tags
    lines = [line for line in caption.splitlines() if line.strip()] if options.caption_lines else [caption]
    joined = [SEPARATOR.join(filter(None, (line, tags))) for line in lines or [""]]
    return [text.split("\n")[0] for text in joined]
