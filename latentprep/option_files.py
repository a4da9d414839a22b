"""TOML files of options and of sets -> arguments of encode; and those that a cache remembers.

If an argument is given in several places, the first of these wins: a set; the call; --options FILE; what a cache
remembers (--again); the top of the .toml file that is the source.
"""

import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from latentprep.door import LISTS, Parameter
from latentprep.errors import UserError
from latentprep.human import expand_user, printable
from latentprep.kohya.dataset_toml import OF_FILES, is_kohya, read_dataset_config
from latentprep.kohya.folders import list_folders
from latentprep.sets import OWN, Origin, check_names, check_path, exists, is_tables

MAX_BYTES = 2**24
SUFFIX = ".toml"
# arguments of one call: they are not remembered, and not read from files
OF_CALL = (
    "again", "options", "dry_run", "overwrite", "allow_gone", "retry_skipped", "check_content", "only", "rank",
    "world_size", "progress",
)  # fmt: skip
# keys of sets that only files of captions have
ONLY_FILES = ("caption_extension", "caption_lines", "first_line", "default_caption", "captions_file")
OF_MACHINE = ("workers", "log")  # they only cost time, and are not remembered either
Arguments = dict[str, Any]


def expand(given: Mapping[str, Any], parameters: Sequence[Parameter]) -> list[Arguments]:
    """The arguments of each run that a call asks for: files are read, `source` is an Origin. Raises UserError."""
    found = {name: value for name, value in given.items() if name not in ("again", "options")}
    if given.get("options"):
        path = Path(given["options"])
        found = merge(read_options(path, load_toml(path, "--options"), parameters), found)
    if given.get("again"):
        recalled = recall(str(given["again"]), found.get("source"), parameters)
        found = merge({**recalled, "out": str(given["again"])}, found)
    source = found.get("source")
    if isinstance(source, Iterable) and not isinstance(source, str | bytes | Path | Mapping):
        source = found["source"] = list(source)
    if source is None:
        raise UserError("SOURCE: is missing. Give a folder of images, a .toml file of sets, or --again CACHE.")
    if not isinstance(source, str | Path):
        origin = list_of_sets(source)
        return [with_origin(found, origin, remember_sets(found, origin, parameters))]
    if not str(source):
        raise UserError("SOURCE: is empty, expected a folder of images.")
    check_path("SOURCE", source)
    path = Path(source)
    remembered = {**remember(found, parameters), "source": str(path.absolute())}
    if path.suffix.lower() == SUFFIX and not path.is_dir():
        return expand_file(found, path, remembered, parameters)
    return [of_folder(found, path, remembered)]


def expand_file(
    found: Arguments, path: Path, remembered: Arguments, parameters: Sequence[Parameter]
) -> list[Arguments]:
    """The arguments of each run of a .toml file that stands in the place of a source. Raises UserError."""
    table = load_toml(path, "SOURCE")
    out = str(found.get("out") or path.with_suffix(".latents"))
    if is_kohya(table):
        return expand_kohya(found, path, table, out, remembered, parameters)
    sets = table.pop("set", None)
    options = read_options(path, table, parameters, more=("set",))
    source = options.pop("source", None)
    if (sets is None) == (source is None):
        raise UserError(f"{path}: expected [[set]] tables, each with a source = ..., or one source = ... at the top.")
    found = {"out": out, **merge(options, found)}
    if sets is None:
        if not isinstance(source, str) or not source:
            raise UserError(f"{path}: source = {source!r:.80}: expected a folder. Several are [[set]] tables.")
        check_path(f"{path}: source", source)
        return [of_folder(found, Path(source), remembered)]
    if not is_tables(sets):
        raise UserError(f"{path}: set: expected [[set]] tables, in double brackets.")
    own = tuple(read_table(path, f"[[set]] {n}: ", values, set_names(parameters)) for n, values in enumerate(sets, 1))
    return [with_origin(found, Origin(path, own), remembered)]


def expand_kohya(
    found: Arguments,
    path: Path,
    table: Mapping[str, Any],
    out: str,
    remembered: Arguments,
    parameters: Sequence[Parameter],
) -> list[Arguments]:
    """The arguments of each run that a dataset.toml of sd-scripts asks for. Raises UserError."""
    runs = read_dataset_config(path, table, found.get("resolution"))
    count = len(runs)
    expanded = []
    for number, run in enumerate(runs, 1):
        folder = out if count == 1 else f"{out.rstrip('/')}/{run.name}"
        notes = run.notes if count == 1 else (f"[[datasets]] {number} of {count}: {folder}", *run.notes)
        origin = Origin(path, fit_captions(run.sets, found), notes)
        options = merge({**run.options, **(OF_FILES if takes_files(found) else {})}, found)
        if count > 1 or not run.is_anywhere:  # the file asks for more, or means something else in another folder
            remembered = remember_sets(options, origin, parameters)
        expanded.append(with_origin({**options, "out": folder}, origin, remembered))
    return expanded


def merge(options: Mapping[str, Any], typed: Mapping[str, Any]) -> Arguments:
    """The options of a file, and those that were typed, which count first. A typed size replaces all of the file's."""
    sizes = ("resolution", "width", "height")
    is_typed = any(name in typed for name in sizes)
    return {**{name: value for name, value in options.items() if not (is_typed and name in sizes)}, **typed}


def of_folder(found: Arguments, path: Path, remembered: Arguments) -> Arguments:
    """The arguments of a run over a folder, or a tar; folders such as kohya's are sets. Raises UserError."""
    sets, notes = list_folders(path, found.get("folders", "auto")) if path.is_dir() else ((), ())
    if sets:
        is_named = str(path.absolute()) == remembered["source"]  # and not by a file
        remembered = {**remembered, "folders": "kohya"} if is_named else remembered
    return with_origin(found, Origin(path, fit_captions(sets, found), notes), remembered)


def takes_files(found: Arguments) -> bool:
    """Whether captions come from files."""
    return found.get("caption_from", "auto") in ("auto", "file")


def fit_captions(sets: Sequence[Mapping[str, Any]], found: Arguments) -> tuple[Mapping[str, Any], ...]:
    """Sets of sd-scripts without what only files of captions have, if captions are to come from elsewhere."""
    if takes_files(found):
        return tuple(sets)
    return tuple({name: value for name, value in own.items() if name not in ONLY_FILES} for own in sets)


def with_origin(found: Arguments, origin: Origin, remembered: Arguments) -> Arguments:
    """The arguments of a run, with those that its cache is to remember."""
    return {**found, "source": replace(origin, remembered=remembered)}


def remember(found: Arguments, parameters: Sequence[Parameter]) -> Arguments:
    """The arguments of a call that count for its next run too, as JSON values. Raises UserError."""
    kept = {}
    for parameter in parameters:
        if parameter.name in {*OF_CALL, *OF_MACHINE, "out", "source"} or parameter.name not in found:
            continue
        value = parameter.check(found[parameter.name])
        if int in parameter.kinds and isinstance(value, str) and value.isdecimal():
            value = int(value)  # as the command line gives it
        if not {*LISTS}.isdisjoint(parameter.kinds) and isinstance(value, str | Path):
            value = [value]
        if value is not None and value != parameter.default:
            kept[parameter.name] = value
    return absolute(kept)


def remember_sets(found: Arguments, origin: Origin, parameters: Sequence[Parameter]) -> Arguments:
    """The arguments that count for the next run too, with the sets themselves as its source. Raises UserError."""
    return {**remember(found, parameters), "source": list(map(absolute, origin.sets))}


def list_of_sets(sets: Any) -> Origin:
    """Sets as a call in Python gives them. Raises UserError."""
    if not isinstance(sets, list) or not all(isinstance(own, Mapping) for own in sets):
        raise UserError(
            f'source={sets!r:.80}: expected a text or a path. A list of sets has dicts, such as {{"source": "dog"}}.'
        )
    if not sets:
        raise UserError("SOURCE: the list of sets is empty, expected at least one.")
    places = [str(Path(str(own.get("source", "."))).absolute().parent) for own in sets]
    return Origin(Path(os.path.commonpath(places)), tuple(sets))


def load_toml(path: Path, option: str) -> dict[str, Any]:
    """The table of a TOML file. Raises UserError."""
    try:
        if exists(path) and not path.is_file():
            raise UserError(f"{option} {path}: not a file, expected one of options.")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise UserError(f"{option} {path}: over {MAX_BYTES:,} bytes, expected a file of options.")
        return tomllib.loads(data.decode("utf-8-sig"))
    except OSError as error:
        raise UserError(f"{option} {path}: cannot be read ({error.strerror or error}).") from None
    except (ValueError, RecursionError) as error:
        said = " ".join(str(error).split())[:200]
        hint = " A path with \\ stands between single quotes." if "\\" in said or "hex" in said else ""
        raise UserError(f"{option} {path}: not TOML ({said}).{hint}") from None


def read_options(
    path: Path, table: Mapping[str, Any], parameters: Sequence[Parameter], more: Sequence[str] = ()
) -> Arguments:
    """The arguments that the top of a file gives; `more` are other keys that it may have. Raises UserError."""
    for name in table:
        if str(name).replace("-", "_") in OF_CALL:
            raise UserError(f"{path}: {name}: is for one call. Type it, and leave it out of the file.")
    allowed = [*more, *(p.name for p in parameters if p.name not in OF_CALL)]
    found = read_table(path, "", table, allowed)
    checks = {p.name: p for p in parameters}
    try:
        return {name: checks[name].check(value) for name, value in found.items()}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def read_table(path: Path, where: str, table: Mapping[str, Any], allowed: Sequence[str]) -> Arguments:
    """A table with names as Python has them, and paths that begin at the file's folder. Raises UserError."""
    found: Arguments = {}
    for name, value in table.items():
        key = str(name).replace("-", "_")
        if key in found:
            raise UserError(f"{path}: {where}{key}: stands there twice, with - and with _. Leave one of them out.")
        found[key] = beside(path.parent, key, value)
    try:
        check_names(found, allowed)
    except UserError as error:
        raise UserError(f"{path}: {where}{error}") from None
    return found


def set_names(parameters: Sequence[Parameter]) -> list[str]:
    return [*OWN, *(p.name for p in parameters if p.option.of_set)]


WORDS = ("alpha", "none", "tiny")  # that are no paths, whatever stands in a folder
# arguments that may be paths, or other words
PATHS = ("weights", "control", "template", "captions_file", "model", "vae", "config", "text_encoder")


def beside(folder: Path, name: str, value: Any) -> Any:
    """A value of a file in this folder: if it is a path, it begins there; so do those of a list."""
    if isinstance(value, list):
        return [beside(folder, name, part) for part in value]
    if not isinstance(value, str) or not is_path(name, value, folder):
        return value
    return str(folder / expand_user(value))


def is_path(name: str, value: str, folder: Path) -> bool:
    """Whether the value of an argument is a path, of a file in this folder or elsewhere."""
    if "://" in value or value in ("", *WORDS):
        return False
    if name == "default_caption":
        return value.lower().endswith(".txt")
    return name in ("source", "out") or (name in PATHS and exists(folder / expand_user(value)))


def absolute(arguments: Mapping[str, Any]) -> Arguments:
    """Arguments as JSON values that mean the same in every folder."""

    def value_of(name: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return absolute(value)
        if isinstance(value, list | tuple):
            return [value_of(name, part) for part in value]
        if isinstance(value, Path) or (isinstance(value, str) and is_path(name, value, Path())):
            return str(expand_user(value).absolute())
        if isinstance(value, Real) and not isinstance(value, bool | int | float):  # numpy's
            return int(value) if isinstance(value, Integral) else float(value)
        return value

    return {name: value_of(name, value) for name, value in arguments.items()}


def recall(cache: str, source: Any, parameters: Sequence[Parameter]) -> Arguments:
    """The arguments that a cache was made with; `source` is one that was typed. Raises UserError."""
    from latentprep.cache.manifest import open_manifest
    from latentprep.cache.storage import Storage

    try:
        again = dict(open_manifest(Storage(cache)).made_with.again)
        if "source" not in again:
            raise UserError("it does not know the options it was made with. Give them once more.")
        if source is not None and str(again["source"]).lower().endswith(SUFFIX):
            raise UserError(f"was made from {printable(str(again['source']))}. Edit that, and give no SOURCE.")
        allowed = {p.name: p for p in parameters if p.name not in OF_CALL}
        unknown = [name for name in again if name not in allowed]
        if unknown:
            raise UserError(f"made with {printable(unknown[0])}, which this latentprep does not know.")
        return {name: value if name == "source" else allowed[name].check(value) for name, value in again.items()}
    except UserError as error:
        raise type(error)(f"--again {cache}: {error}") from None
