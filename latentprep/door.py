"""Functions whose keyword arguments are options: read once, for Python, for the command line and for the docs."""

import inspect
import os
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

from latentprep.errors import UserError
from latentprep.human import harmless
from latentprep.keywords import Keywords

P = ParamSpec("P")
R = TypeVar("R")

PANELS = INPUT, OUTPUT, MODEL, GEOMETRY, CAPTIONS, PERFORMANCE, MACHINES, PREVIEW = (
    "Input", "Output", "Model", "Geometry", "Captions", "Performance", "Several machines", "Preview and report",
)  # fmt: skip


class Paths:
    """Stands for a list of paths among the kinds of an argument."""


LISTS = (Sequence, Paths)  # kinds of options that may be given again
# what an argument may be -> in words
KINDS = {
    int: "a whole number", float: "a number", bool: "True or False", str: "a text", Path: "a path",
    Sequence: "a list of texts", Paths: "a list of paths", type(None): "None",
}  # fmt: skip


@dataclass(frozen=True)
class Option:
    """What an argument is for; stands in its Annotated."""

    metavar: str = ""  # PIXELS, or auto|PIXELS; of a Literal it may be left out
    help: str = ""
    panel: str = ""  # one of PANELS: the heading of its part of --help
    shown: str = ""  # the default in words, if it is None
    least: float | None = None
    most: float | None = None
    is_argument: bool = False  # on the command line it stands without a name
    in_python_only: bool = False
    of_set: bool = False  # whether a set may have its own


@dataclass(frozen=True)
class Parameter:
    """One argument of a door."""

    name: str
    kinds: tuple[Any, ...]  # types; those of KINDS are checked
    literals: tuple[str, ...]  # the only texts that it may be; (): any
    default: Any  # inspect.Parameter.empty: it is to be given
    option: Option

    @property
    def flag(self) -> str:
        """What it is called on the command line, and in errors."""
        return self.option.metavar if self.option.is_argument else "--" + self.name.replace("_", "-")

    @property
    def metavar(self) -> str:
        """What may be given: choices, and words for others in capitals, with | between them."""
        return self.option.metavar or "|".join(self.literals)

    @property
    def limits(self) -> str:
        """The least and the most that it may be."""
        least, most = self.option.least, self.option.most
        if least is None:
            return f"at most {most:,}"
        return f"at least {least:g}" if most is None else f"{least:g} to {most:g}"

    @property
    def expected(self) -> str:
        """What may be given on the command line, in words."""
        kinds = [KINDS[kind] for kind in self.kinds if kind is not type(None)]
        return " or ".join(kinds) + (f", {self.limits}" if self.option.least is not None else "")

    def check(self, value: Any) -> Any:
        """An argument as one of the kinds. Raises UserError."""
        if not set(self.kinds) <= KINDS.keys():
            return value  # the function's own to check
        kind = next((kind for kind in self.kinds if is_kind(value, kind)), None)
        if kind is None:
            expected = " or ".join(KINDS[kind] for kind in self.kinds)
            raise UserError(f"{self.name}={value!r:.80}: expected {expected}.")
        least, most = self.option.least, self.option.most
        if (least is not None and not value >= least) or (most is not None and not value <= most):
            raise UserError(f"{self.name}={value!r}: expected {self.limits}.")
        return kind(value) if kind in (int, float) else value


def is_kind(value: Any, kind: Any) -> bool:
    """Whether a value is of a kind; numpy's numbers are numbers, and True is none."""
    if kind is int:
        return isinstance(value, Integral) and not isinstance(value, bool)
    if kind is float:
        return isinstance(value, Real) and not isinstance(value, bool)
    if kind is Path:
        return isinstance(value, os.PathLike)
    if kind in LISTS:
        parts = str if kind is Sequence else (str, os.PathLike)
        return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(v, parts) for v in value)
    return isinstance(value, kind)


@cache
def list_parameters(function: Callable[..., Any]) -> tuple[Parameter, ...]:
    """The arguments of a door, in their order."""
    hints = get_type_hints(function, include_extras=True)
    found = []
    for name, parameter in inspect.signature(inspect.unwrap(function)).parameters.items():
        plain, option = get_args(hints[name])
        kinds, literals = split_type(plain)
        found.append(Parameter(name, kinds, literals, parameter.default, option))
    return tuple(found)


def split_type(annotation: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """The kinds of values that a type allows, and its literals."""
    origin = get_origin(annotation)
    if origin in (Union, types.UnionType):
        parts = [split_type(part) for part in get_args(annotation)]
        return tuple(dict.fromkeys(kind for kinds, _ in parts for kind in kinds)), sum(
            (texts for _, texts in parts), ()
        )
    if origin is Literal:
        return (str,), get_args(annotation)
    kind = origin or annotation
    return ((Paths if annotation == Sequence[str | Path] else kind,), ())


@cache
def keywords_of(function: Callable[..., Any]) -> Keywords:
    """How errors that speak of the options of a command become those of its function."""
    parameters = list_parameters(function)
    names = {p.flag: f"{p.name}=True" if p.kinds == (bool,) else p.name for p in parameters}
    values = {p.flag: (*p.literals, *p.metavar.split("|")) for p in parameters if p.kinds != (bool,)}
    return Keywords(names, values)


Expand = Callable[[Mapping[str, Any]], list[dict[str, Any]]]  # the arguments of a call -> those of each run
Join = Callable[[list[Any]], Any]  # what runs have returned -> what the call returns


def door(function: Callable[P, R]) -> Callable[P, R]:
    """The function for Python: checks the types of its arguments, and names them in errors by their keywords."""
    return door_through(lambda given: [dict(given)], lambda results: results[0])(function)


def door_through(expand: Expand, join: Join) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A door whose arguments may stand in files, or ask for several runs."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        parameters, keywords = list_parameters(function), keywords_of(function)
        signature = inspect.signature(function)

        def list_runs(given: Mapping[str, Any]) -> list[dict[str, Any]]:
            """The arguments of each run, checked; errors speak of options."""
            runs = expand(given)
            for arguments in runs:
                for parameter in parameters:
                    if parameter.name in arguments:
                        arguments[parameter.name] = parameter.check(arguments[parameter.name])
            return runs

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            given = signature.bind(*args, **kwargs).arguments  # TypeError for an unknown keyword, as of any function
            try:
                result: R = join([function(**own) for own in list_runs(given)])  # type: ignore[call-arg]
                return result
            except UserError as error:
                raise type(error)(harmless(keywords.translate(str(error), given))) from None

        call.__doc__ = "\n".join([inspect.cleandoc(function.__doc__ or ""), *describe(parameters, keywords)])
        call.__signature__ = plain_signature(function)  # type: ignore[attr-defined]
        call.list_runs = list_runs  # type: ignore[attr-defined]
        return call

    return decorate


def list_runs(function: Callable[..., Any], given: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The arguments of each run that a call of a door asks for, for its function without the door. Raises UserError."""
    runs: list[dict[str, Any]] = function.list_runs(given)  # type: ignore[attr-defined]
    return runs


def plain_signature(function: Callable[..., Any]) -> inspect.Signature:
    """The signature with bare types: without what Annotated adds to them."""
    hints = get_type_hints(function)
    signature = inspect.signature(function)
    parameters = [p.replace(annotation=hints[name]) for name, p in signature.parameters.items()]
    return signature.replace(parameters=parameters, return_annotation=hints["return"])


def describe(parameters: Sequence[Parameter], keywords: Keywords) -> Iterator[str]:
    """A line for each argument, under the headings of --help."""
    panel = None
    for p in in_panels(parameters):
        if p.option.panel != panel:
            panel = p.option.panel
            yield f"\n{panel or 'Arguments'}:"
        default = "" if p.default is inspect.Parameter.empty else f"={p.default!r}"
        takes = f"{p.metavar}: " if p.metavar and not p.option.is_argument else ""
        shown = f" Default: {keywords.translate(p.option.shown)}." if p.option.shown else ""
        yield f"  {p.name}{default}  {takes}{keywords.translate(p.option.help)}{shown}"


def in_panels(parameters: Sequence[Parameter]) -> list[Parameter]:
    """The arguments in the order of PANELS; those without one first."""
    return sorted(parameters, key=lambda p: PANELS.index(p.option.panel) if p.option.panel else -1)
