"""A dataset.toml of kohya's sd-scripts -> the runs that it asks for. What has no equivalent is said.

The rules are those of sd-scripts' library/config_util.py and library/train_util.py.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from latentprep.errors import UserError
from latentprep.geometry import parse_sides
from latentprep.kohya.keys import OF_DATASET, OF_SUBSET, OF_SUBSET_ALONE, check_table, list_notes
from latentprep.kohya.options import bucket_options, common_options
from latentprep.kohya.subsets import choose_subsets, is_beside, make_set, name_sets, say_choices
from latentprep.sets import check_names, is_tables

# what sd-scripts does if nothing is said of captions; it may be typed otherwise
OF_FILES = {"caption_from": "file", "caption_extension": ".caption"}


@dataclass(frozen=True)
class Run:
    """One entry of [[datasets]]: arguments of encode."""

    name: str  # of its folder, if there are several
    options: Mapping[str, Any]
    sets: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    is_anywhere: bool  # whether the same file means the same, whatever folder one is in


def is_kohya(table: Mapping[str, Any]) -> bool:
    """Whether a TOML file is one of sd-scripts."""
    return "datasets" in table or "general" in table


def read_dataset_config(path: Path, table: Mapping[str, Any], resolution: str | int | None = None) -> list[Run]:
    """The runs that a dataset.toml asks for, one for each of its [[datasets]].

    `resolution` is the one that was typed: that of datasets without one. Raises UserError.
    """
    try:
        check_names(table, ["general", "datasets"])
        general, datasets = table.get("general", {}), table.get("datasets", [])
        if not isinstance(general, dict) or not is_tables(datasets):
            raise UserError("expected a table [general], and [[datasets]] with [[datasets.subsets]].")
        runs = [read_dataset(path, n, dataset, general, resolution) for n, dataset in enumerate(datasets, 1)]
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    names = unlike([run.name for run in runs])
    return [replace(run, name=name) for name, run in zip(names, runs, strict=True)]


def unlike(names: Sequence[str]) -> list[str]:
    """Names, each once: those that come again are numbered."""
    found: list[str] = []
    for name in names:
        count = sum(other == name or other.startswith(f"{name}-") for other in found)
        found.append(f"{name}-{count + 1}" if count else name)
    return found


def read_dataset(
    path: Path,
    number: int,
    dataset: Mapping[str, Any],
    general: Mapping[str, Any],
    resolution: str | int | None,
) -> Run:
    """One of [[datasets]]. Raises UserError."""
    where = f"[[datasets]] {number}"
    every = {**OF_DATASET, **OF_SUBSET}
    check_table("[general]", general, every)
    check_table(where, dataset, {**every, "subsets": (is_tables, "[[datasets.subsets]]")})
    merged = {**general, **dataset}
    subsets = merged.pop("subsets", None)
    if subsets is None:
        raise UserError(f"{where}: has no [[datasets.subsets]].")
    for n, subset in enumerate(subsets, 1):
        check_table(f"{where}, subset {n}", subset, {**OF_SUBSET, **OF_SUBSET_ALONE})
    notes = list_notes([("", merged), *((f"subset {n}", subset) for n, subset in enumerate(subsets, 1))])
    width, height = read_size(where, merged, resolution)
    try:
        chosen, more = choose_subsets(path, [{**merged, **subset} for subset in subsets])
    except UserError as error:
        raise UserError(f"{where}, {error}") from None
    if not chosen:
        raise UserError(f"{where}: none of its subsets has images and a num_repeats of at least 1.")
    options = {**bucket_options(where, merged, width, height), **common_options(where, chosen)}
    sets = name_sets([make_set(subset) for subset in chosen])
    lines = tuple(notes + more + say_choices(chosen))
    return Run(f"{width}x{height}", options, sets, lines, all(is_beside(path, subset) for subset in chosen))


def read_size(where: str, dataset: Mapping[str, Any], resolution: str | int | None) -> tuple[int, int]:
    """Width and height of a dataset, as sd-scripts orders them, or of the typed resolution. Raises UserError."""
    size = dataset.get("resolution")
    if size is None:
        if resolution is None:
            raise UserError(f"{where}: resolution: is missing. Give --resolution 512, or write it into the file.")
        return parse_sides(str(resolution))
    return (size, size) if isinstance(size, int) else (size[0], size[1])
