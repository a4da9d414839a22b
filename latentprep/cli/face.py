"""The command line's face of a function: an option for each of its arguments, from the same signature."""

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from latentprep.door import LISTS, Parameter, in_panels, list_parameters


class Command(TyperCommand):
    """A command whose usage line has arguments by their plain names: some versions of typer put them in braces."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.strip("{}") for piece in super().collect_usage_pieces(ctx)]


def face(function: Callable[..., Any], run: Callable[[dict[str, Any]], None], *own: inspect.Parameter) -> Any:
    """A command for typer with the options of a function: it calls `run` with what was typed, name -> value.

    `own` are options that the command alone has. The help is the part of the docstring before "In Python".
    """

    def command(context: typer.Context, **arguments: Any) -> None:
        source_of = context.get_parameter_source
        run({name: value for name, value in arguments.items() if getattr(source_of(name), "name", "") != "DEFAULT"})

    parameters = [inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += options_of(function)
    parameters += own
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    command.__doc__ = inspect.cleandoc(inspect.unwrap(function).__doc__ or "").partition("\n\nIn Python")[0]
    return command


def options_of(function: Callable[..., Any]) -> list[inspect.Parameter]:
    """The arguments of a function as typer wants them."""
    return [option_of(p) for p in in_panels(list_parameters(function)) if not p.option.in_python_only]


def option_of(parameter: Parameter) -> inspect.Parameter:
    """An argument as typer wants it."""
    option, default = parameter.option, parameter.default
    kind: Any = next(kind for kind in (bool, list, str, int, float) if kind in command_line_kinds(parameter))
    common: dict[str, Any] = {"help": option.help, "metavar": parameter.metavar or ("" if kind is bool else None)}
    if option.is_argument:
        info = typer.Argument(show_default=False, **common)
    else:
        has_value = default is not None and default != ""
        info = typer.Option(
            parameter.flag, show_default=option.shown or has_value, min=option.least, max=option.most,
            rich_help_panel=option.panel or None, **common,
        )  # fmt: skip
    if kind is list:
        kind = list[str]
    if default is None:
        kind = kind | None
    elif kind is str and default is not inspect.Parameter.empty:
        default = str(default)
    return inspect.Parameter(
        parameter.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, info]
    )


def command_line_kinds(parameter: Parameter) -> set[type]:
    """The kinds of an argument, of which the command line takes one; a list of texts is an option that comes again."""
    return {list if kind in LISTS else kind for kind in parameter.kinds}


def switch(name: str, flag: str, text: str, panel: str | None = None) -> inspect.Parameter:
    """An option that a command alone has, and not its function."""
    option = typer.Option(flag, help=text, rich_help_panel=panel, metavar="")
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Annotated[bool, option])


def output(name: str, flag: str, metavar: str, text: str, panel: str) -> inspect.Parameter:
    """An option that names a file to write."""
    option = typer.Option(flag, metavar=metavar, rich_help_panel=panel, help=text)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[str | None, option]
    )
