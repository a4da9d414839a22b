"""What a run was asked for, before it is made options: one source, or several sets with options of their own."""

import math
import os
import re
import shlex
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from latentprep.door import Parameter
from latentprep.errors import UserError
from latentprep.human import expand_user, printable, shortened
from latentprep.options import ImageSet, TextOptions
from latentprep.prompts import load_template, read_lines
from latentprep.records import MAX_CONTROLS, MAX_REPEATS, MAX_SET_NAME, SET_NAME

# keys of a set that are no options of encode -> what they take
OWN = {
    "name": "a text without a slash, of at most 255 characters",
    "source": "a folder, or a tar",
    "repeats": 'a whole number of at least 1, or "auto"',
    "sample_weight": "a number of 0 or more",
    "caption_dropout": "a probability, 0 to 1",
    "flip": "true or false",
    "first_line": "true or false",  # of a caption file only its first line counts
    "captions_file": "a metadata file of kohya's sd-scripts",
}


@dataclass(frozen=True)
class Origin:
    """Where the images of a run come from, and the arguments that ask for the same run again."""

    where: Path  # a folder or a tar; of sets the file that names them, or the folder that holds them
    sets: tuple[Mapping[str, Any], ...] = ()  # of each its options, and keys of OWN
    notes: tuple[str, ...] = ()  # what a person is to be told
    remembered: Mapping[str, Any] = field(default_factory=dict)


def make_text(arguments: Mapping[str, Any]) -> TextOptions:
    """The options of captions, of arguments of encode. Raises UserError."""
    found = dict(arguments)
    template, columns = found.pop("template", None), found.pop("caption_column", None)
    if found.get("placeholder") and not template:
        raise UserError(
            f"--placeholder {found['placeholder']}: without a --template nothing has a [name] to be filled. "
            f"To begin each caption with it: --trigger {shlex.quote(found['placeholder'])}."
        )
    if columns:
        found["caption_columns"] = as_tuple(columns)
    if default := found.pop("default_caption", None):
        found["default_caption"] = read_captions(str(default))
    return TextOptions(template=load_template(str(template)) if template else None, **found)


def read_captions(text: str) -> tuple[str, ...]:
    """--default-caption: a caption, or the lines of a .txt file. Raises UserError."""
    if not text.lower().endswith(".txt"):
        return (text,)
    return tuple(read_lines("--default-caption", text, expand_user(text)))


def make_sets(
    sets: Sequence[Mapping[str, Any]],
    common: Mapping[str, Any],
    parameters: Iterable[Parameter],
    exclude: Sequence[str] = (),
) -> tuple[ImageSet, ...]:
    """The sets of a run, checked. Raises UserError, which names the set.

    common: the arguments for captions that count if a set has none of its own. exclude: patterns for all sets.
    """
    allowed = {p.name: p for p in parameters if p.option.of_set}
    found: dict[str, ImageSet] = {}
    for number, own in enumerate(sets, 1):
        given = own.get("name") or own.get("source") or number
        try:
            made = make_set(own, common, allowed)
            made = replace(made, exclude=(*exclude, *made.exclude))
            if made.name in found:
                raise UserError(f"name: another set is called {made.name} too. Give each its own: name = ...")
        except UserError as error:
            raise type(error)(f"set {printable(str(given))}: {error}") from None
        found[made.name] = made
    return tuple(found.values())


def make_set(own: Mapping[str, Any], common: Mapping[str, Any], allowed: Mapping[str, Parameter]) -> ImageSet:
    """One set. Raises UserError."""
    check_names(own, [*OWN, *allowed])
    values = {name: allowed[name].check(value) for name, value in own.items() if name in allowed}
    exclude, weights = values.pop("exclude", ()), str(values.pop("weights", "none"))
    controls = as_folders("control", values.pop("control", ()))
    columns = as_columns("control_column", values.pop("control_column", ()))
    source = own.get("source")
    if not isinstance(source, str | Path) or not str(source):
        raise UserError(f"source: expected {OWN['source']}.")
    check_path("source", source)
    check_path("weights", weights)
    name = own.get("name", name_of(Path(source)))
    repeats = own.get("repeats", 1)
    check_own("name", {"name": name}, isinstance(name, str) and is_name(name))
    check_own("repeats", own, repeats == "auto" or (is_number(repeats, int) and 1 <= repeats <= MAX_REPEATS))
    weight, dropout, flip = own.get("sample_weight", 1.0), own.get("caption_dropout", 0.0), own.get("flip", True)
    check_own("sample_weight", own, is_number(weight) and 0 <= weight <= 1e9)
    check_own("caption_dropout", own, is_number(dropout) and 0 <= dropout <= 1)
    check_own("flip", own, isinstance(flip, bool))
    check_own("first_line", own, isinstance(own.get("first_line", False), bool))
    table = own.get("captions_file")
    check_own("captions_file", own, table is None or (isinstance(table, str | Path) and str(table) != ""))
    of_files = {"first_line": own.get("first_line", False), "captions_file": Path(table) if table else None}
    return ImageSet(
        name, Path(source), make_text({**common, **of_files, **values}),
        as_tuple(exclude),
        Path(weights) if weights not in ("alpha", "none") else None,
        controls, columns,
        None if repeats == "auto" else int(repeats), float(weight), float(dropout), flip,
    )  # fmt: skip


def as_tuple(texts: str | Path | Iterable[str | Path] | None) -> tuple[str, ...]:
    """One text, several or none, as an option that may be given again takes them."""
    return (str(texts),) if isinstance(texts, str | Path) else tuple(map(str, texts or ()))


def as_folders(name: str, given: str | Path | Iterable[str | Path] | None) -> tuple[Path, ...]:
    """The folders of an option that may be given again. Raises UserError for what can be none, or for too many."""
    found = (given,) if isinstance(given, str | Path) else tuple(given or ())
    for folder in found:
        check_path(name, folder)
        if not str(folder):
            raise UserError(f"{name}: is empty, expected a folder of images.")
    if len(found) > MAX_CONTROLS:
        raise UserError(f"{name}: {len(found)} folders, expected at most {MAX_CONTROLS}.")
    return tuple(map(Path, found))


def as_columns(name: str, given: str | Iterable[str] | None) -> tuple[str, ...]:
    """The columns of an option that may be given again. Raises UserError for one that has no name, or comes twice."""
    found = as_tuple(given)
    for number, column in enumerate(found):
        if not column or column in found[:number]:
            raise UserError(f"{name} {column!r}: expected the name of a column, another each time.")
    return found


def check_controls(sets: Sequence[ImageSet], folders: Sequence[Path], columns: Sequence[str]) -> None:
    """Raise UserError unless all sets have as many control images of each image, and not too many.

    `folders` and `columns` are what was given for all.
    """
    if sets and (folders or columns):
        given, noun = (f"--control {folders[0]}", "folder") if folders else (f"--control-column {columns[0]}", "column")
        raise UserError(f"{given}: with several sets each has its own control images. Give the {noun} to its set.")
    for count in (len(folders) + len(columns), *(own.num_controls for own in sets)):
        if count > MAX_CONTROLS:
            raise UserError(f"--control: {count} control images of each image, expected at most {MAX_CONTROLS}.")
    for own in sets:
        if own.num_controls != sets[0].num_controls:
            one, other = (f"set {printable(part.name)} has {part.num_controls}" for part in (sets[0], own))
            raise UserError(
                f"control: {one}, {other}. A cache has as many of each image: give every set as many folders, or "
                "columns."
            )


def is_tables(value: Any) -> bool:
    """Whether a value of a TOML file is one or more tables in double brackets."""
    return isinstance(value, list) and bool(value) and all(isinstance(part, dict) for part in value)


def name_of(source: Path) -> str:
    """The name of a set whose file names none: that of its folder."""
    return source.name if source.name not in ("", "..") else source.resolve().name


def is_name(name: str) -> bool:
    """Whether a text may begin the keys of a set."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return re.fullmatch(SET_NAME, name) is not None and not has_controls(name) and len(name) <= MAX_SET_NAME


def has_controls(text: str) -> bool:
    """Whether control characters are in a text."""
    return any(unicodedata.category(char) == "Cc" for char in text)


def check_own(name: str, own: Mapping[str, Any], is_good: bool) -> None:
    if not is_good:
        raise UserError(f"{name} = {shortened(repr(own.get(name)), 60)}: expected {OWN[name]}.")


def is_number(value: Any, kind: type = float) -> bool:
    """Whether a value is a finite number; numpy's are, and True is none."""
    kinds = Integral if kind is int else Real
    try:
        return isinstance(value, kinds) and not isinstance(value, bool) and math.isfinite(float(value))
    except OverflowError:  # an int of 400 bits or more
        return False


def exists(path: Path) -> bool:
    """Whether a file or folder is there; a text that can be no path is none."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def check_path(name: str, value: str | Path) -> None:
    """Raise UserError for a text that can be no path."""
    text = str(value)
    try:
        os.fsencode(text)
    except UnicodeEncodeError:
        text = "\0"
    if "\0" in text:
        raise UserError(f"{name}: {str(value)!r:.80} can be no path.")


def check_names(given: Iterable[str], allowed: Sequence[str]) -> None:
    """Raise UserError for a key that is none of those that are allowed."""
    for name in given:
        if name not in allowed:
            near = get_close_matches(str(name), allowed, 1)
            some = ", ".join(allowed[:8]) + (", ..." if len(allowed) > 8 else "")
            hint = f"Did you mean {near[0]}?" if near else f"There are {some}."
            raise UserError(f"{shortened(str(name), 60)}: no such key. {hint}")


def join_weights(sets: Sequence[Mapping[str, Any]], common: str) -> str:
    """Where the weights of all sets come from: alpha, none, or a folder of masks, which stands for all such folders.

    `common` counts for sets that say nothing, unless others have masks: then they weigh evenly. Raises UserError if the
    sets differ otherwise: a cache has one way.
    """
    if common not in ("alpha", "none"):
        raise UserError(f"--weights {common}: with several sets each has its own masks. Give the folder to its set.")
    said = {str(own.get("name") or own.get("source")): str(own["weights"]) for own in sets if "weights" in own}
    folders = [weights for weights in said.values() if weights not in ("alpha", "none")]
    with_alpha = [name for name, weights in said.items() if weights == "alpha"]
    others = folders or "none" in said.values() or (len(said) < len(sets) and common == "none")
    if with_alpha and others:
        raise UserError(
            f'set {printable(with_alpha[0])}: weights = "alpha", and other sets have masks or none. A cache has its '
            'weights from alpha, or from masks and else evenly. Give all sets "alpha", or this one "none".'
        )
    if not folders and "none" in said.values() and len(said) < len(sets) and common == "alpha":
        raise UserError(
            'weights = "none" for some sets alone: a cache has weights from alpha, or none. Give it to all.'
        )
    return folders[0] if folders else next(iter(said.values()), common)
