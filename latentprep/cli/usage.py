"""A command line that cannot be understood -> one line that says what is wrong and what to type."""

import re
import shlex
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from inspect import Signature
from itertools import pairwise
from pathlib import Path
from typing import Any

from latentprep.cli.foreign import hint_for
from latentprep.door import Parameter

Doors = Mapping[str, Sequence[Parameter]]  # name of a command -> its options


def describe_usage(error: Any, doors: Doors, words: Sequence[str]) -> str:
    """One line about an error of typer's; `words` is the command line.

    Errors are told apart by what they carry: typer has click built in from 0.26 on, and needs it before.
    """
    context = error.ctx
    command = f"latentprep {context.info_name}" if context is not None and context.parent is not None else "latentprep"
    parameters = {p.name: p for p in doors[context.info_name]} if _is_door(context, doors) else {}
    message = error.format_message().rstrip(".")
    if hasattr(error, "possibilities"):
        return unknown_option(error.option_name, context, command)
    if hasattr(error, "param_type"):
        return missing(error.param, parameters, command)
    if hasattr(error, "param") and error.param is not None:
        return bad_value(error.param, parameters.get(error.param.name), error.message, words)
    if hasattr(error, "option_name"):
        wants = "takes no value" if "not take" in message else "needs a value"
        return f"{error.option_name}: {wants}. latentprep COMMAND --help shows what options take."
    if found := re.search(r"No such command '(.*?)'", message, re.DOTALL):
        return unknown_command(found[1], list(context.command.commands))
    if found := re.search(r"unexpected extra arguments? ?(?:\(s\) )?\((.*)\)", message, re.DOTALL):
        return (
            f"{found[1]}: not expected here. Names of options begin with --, as in --out DIR; patterns such as '*.png' "
            f"and paths with spaces stand between quotes. {command} --help shows what it takes."
        )
    return f"{message}. {command} --help shows what it takes."


def _is_door(context: Any, doors: Doors) -> bool:
    return context is not None and context.info_name in doors


def unknown_option(option: str, context: Any, command: str) -> str:
    """An option that a command does not have: what it is here, or what comes near."""
    ours = [name for parameter in context.command.params for name in (*parameter.opts, *parameter.secondary_opts)]
    dashed = "--" + option.lstrip("-").replace("_", "-")
    if dashed in ours:
        return f"{option}: no such option, it is {dashed} here."
    hint = hint_for(option)
    if hint is not None:
        return f"{option}: no such option; {hint}"
    near = get_close_matches(dashed, [name for name in ours if name.startswith("--")], n=2)
    guess = f" Did you mean {' or '.join(near)}?" if near else ""
    return f"{option}: no such option of {command}.{guess} {command} --help lists them."


def missing(param: Any, parameters: Mapping[str, Parameter], command: str) -> str:
    """An argument that has to be there."""
    name = param.metavar or param.name.upper()
    what = f", expected: {parameters[param.name].option.help}" if param.name in parameters else "."
    needed = [p.flag for p in parameters.values() if p.option.is_argument and p.default is Signature.empty] or [name]
    return f"{name}: is missing{what} Type: {command} {' '.join(needed)}"


def bad_value(param: Any, parameter: Parameter | None, message: str, words: Sequence[str]) -> str:
    """A value that its option does not take."""
    flag = next((name for name in param.opts if name.startswith("--")), param.metavar or param.name)
    given = value_of(flag, words)
    said = f"{flag} {given}" if given is not None else flag
    return f"{said}: expected {parameter.expected}." if parameter is not None else f"{said}: {message}"


def value_of(flag: str, words: Sequence[str]) -> str | None:
    """What the command line gives for an option, the last time that it stands there."""
    values = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    values += [value for word, value in pairwise(words) if word == flag]
    return values[-1] if values else None


def unknown_command(name: str, commands: list[str]) -> str:
    """A word that is no command; the path of a folder is one to encode."""
    if Path(name).exists():
        return f"{name}: no such command. To encode it: latentprep encode {shlex.quote(name)}"
    near = get_close_matches(name, commands, n=1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return f"{name}: no such command.{guess} There are {', '.join(commands)}."
