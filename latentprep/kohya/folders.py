"""Folders as kohya's sd-scripts has them, such as `10_sks dog` -> sets: repeats from the number, and class words."""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import counted, printable

FOLDER = re.compile(r"(\d+)_(.+)")
MOST_REPEATS = 999  # that a folder's name is taken to say; 2023_summer is a year


def list_folders(path: Path, mode: str) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """The sets of a folder that holds folders such as `10_sks dog`, and what to tell a person.

    mode: auto: sets if all folders of images have such names, no image is beside them, and their numbers are no count
    and no years; kohya: those that have such names; plain: no sets. Raises UserError if kohya is asked for, and none
    has one.
    """
    if mode == "plain":
        return (), ()
    folders, loose = list_entries(path)
    if mode == "auto" and not any(map(FOLDER.fullmatch, folders)):
        return (), tuple(describe_parent(path, folders))
    with_images = [name for name in folders if has_images(path / name)]
    matches = {name: FOLDER.fullmatch(name) for name in with_images}
    named = {name: (int(match[1]), match[2].strip()) for name, match in matches.items() if match and int(match[1])}
    notes = [f"{printable(name)}: left out, no images are in it" for name in folders if name not in with_images]
    if mode == "kohya":
        if not named:
            raise UserError(f"--folders kohya: SOURCE {path} holds no folders of images such as '10_sks dog'.")
        left = [name for name in with_images if name not in named]
        notes += [f"{printable(name)}: left out, its name does not begin with a number of repeats" for name in left]
        if loose:
            notes.append(f"{counted(len(loose), 'image')} beside the folders left out, such as {printable(min(loose))}")
        return make_tree(path, named), tuple(notes)
    if not named:
        return (), ()
    if len(named) < len(with_images) or loose or is_numbering(named):
        beside = f", with {counted(len(loose), 'image')} beside them" if loose else ""
        said = f"{len(named)} of {counted(len(with_images), 'folder')} may be kohya's{beside}"
        return (), (f"{said}: plain folders for now. --folders kohya makes them sets, with repeats",)
    line = f"{counted(len(named), 'folder')} named like kohya's: sets with repeats (--folders plain: just folders)"
    return make_tree(path, named), (line, *notes)


def list_entries(path: Path) -> tuple[list[str], list[str]]:
    """Names of the folders in a folder, sorted, and of the images; what is hidden or beside photos is left out."""
    from latentprep.prepare.images.pillow import is_image_name
    from latentprep.prepare.source.folder import is_folder
    from latentprep.prepare.source.listing import EXCLUDED

    folders, images = [], []
    try:
        with os.scandir(path) as entries:  # it tells folders without a look at each: there may be a million files
            for entry in entries:
                if entry.name.startswith(".") or entry.name in EXCLUDED:
                    continue
                if is_folder(entry):
                    folders.append(entry.name)
                elif is_image_name(entry.name):
                    images.append(entry.name)
    except OSError:
        return [], []  # the listing says so itself
    return sorted(folders), images


def has_images(folder: Path) -> bool:
    """Whether an image is in a folder, or below it."""
    from latentprep.prepare.images.pillow import is_image_name

    return any(is_image_name(name) for _, _, names in os.walk(folder) for name in names)


def describe_parent(path: Path, folders: Sequence[str]) -> Iterator[str]:
    """A line for each folder that itself holds folders such as kohya's: the one to give may be that."""
    for name in folders[:10]:
        inner, _ = list_entries(path / name)
        if inner and all(FOLDER.fullmatch(own) for own in inner):
            where = printable(str(path / name))
            yield f"{printable(name)} holds folders such as kohya's. If you mean these, give {where}"


def is_numbering(named: Mapping[str, tuple[int, str]]) -> bool:
    """Whether the numbers of folders are years, or count them: 01, 02 or 1, 2, 3."""
    numbers = sorted(number for number, _ in named.values())
    is_row = len(numbers) > 1 and numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    return is_row or numbers[-1] > MOST_REPEATS or any(name.startswith("0") for name in named)


def make_tree(path: Path, named: Mapping[str, tuple[int, str]]) -> tuple[Mapping[str, Any], ...]:
    return tuple(
        {"name": name, "source": str(path / name), "repeats": repeats, "default_caption": words}
        for name, (repeats, words) in named.items()
    )
