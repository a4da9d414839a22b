"""Folders as kohya's sd-scripts has them, such as `10_sks dog` -> sets: repeats from the number, and class words."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.human import counted, printable

FOLDER = re.compile(r"(\d+)_(.+)")
MOST_REPEATS = 999  # that a folder's name is taken to say; 2023_summer is a year


def list_folders(path: Path, mode: str) -> tuple[tuple[Mapping[str, Any], ...], tuple[str, ...]]:
    """The sets of a folder that holds folders such as `10_sks dog`, and what to tell a person; () if it is none.

    mode: auto: if all its folders have such names, and do not just count; kohya: those that have; plain: none.
    """
    from latentprep.prepare.images.pillow import is_image_name
    from latentprep.prepare.source.listing import EXCLUDED

    if mode == "plain":
        return (), ()
    try:
        found = sorted(
            entry for entry in path.iterdir() if not entry.name.startswith(".") and entry.name not in EXCLUDED
        )
        folders = {entry.name: FOLDER.fullmatch(entry.name) for entry in found if entry.is_dir()}
    except OSError:
        return (), ()  # the listing says so itself
    named = {name: (int(match[1]), match[2].strip()) for name, match in folders.items() if match and int(match[1])}
    if mode == "kohya":
        if not named:
            raise UserError(f"--folders kohya: SOURCE {path} holds no folders such as '10_sks dog'.")
        left = [name for name in folders if name not in named]
        notes = [f"{printable(name)}: left out, its name gives no repeats" for name in left]
        return make_tree(path, named), tuple(notes)
    if not named or any(is_image_name(entry.name) for entry in found if entry.name not in folders):
        return (), ()
    if len(named) == len(folders) and not is_numbering(named):
        line = f"{counted(len(named), 'folder')} named like kohya's: sets with repeats (--folders plain: just folders)"
        return make_tree(path, named), (line,)
    return (), (f"{len(named)} of {counted(len(folders), 'folder')} may be kohya's: --folders kohya makes them sets",)


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
