"""docs/options.md: every option of every command, from the signatures. `python docs/make_options.py` writes it anew."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import typer

from latentprep.cli import commands
from latentprep.door import PANELS, Parameter

PAGE = Path(__file__).with_name("options.md")
HEAD = """# Options

Every option of every command. `python docs/make_options.py` makes this page from the functions in `latentprep/api.py`.

- In Python, names have `_` instead of `-`: `--bucket-step 32` is `bucket_step=32`, and `--flip` is `flip=True`.
- Words in capitals stand for what you give. `|` stands between choices.
- An option that is marked *Of a set* can also be given for one [set](caches.md#several-sets) in a `.toml` file.
- `latentprep COMMAND --help` shows the same, `latentprep --version` the version.
"""
WORDS = {int: "NUMBER", float: "NUMBER"}  # what an option takes, if its metavar does not say it


def main() -> None:
    PAGE.write_text(make_page(), encoding="utf-8", newline="\n")


def make_page() -> str:
    app: Any = typer.main.get_command(commands.app)
    chapters = [line for name, command in app.commands.items() for line in make_chapter(name, command)]
    return "\n".join([HEAD, *chapters])


def make_chapter(name: str, command: Any) -> Iterator[str]:
    """The lines of a command: what it does, its arguments, and its options by panel."""
    yield f"## {name}\n\n{command.help.partition(chr(10))[0]}\n"
    ours = {parameter.name: parameter for parameter in commands.DOORS.get(name, ())}
    shown = [param for param in command.params if param.name != "help"]
    for panel, params in groupby(sorted(shown, key=lambda p: rank_of(panel_of(p))), panel_of):
        if panel:
            yield f"### {name}: {panel}\n"
        yield from (describe(param, ours.get(param.name)) for param in params)
        yield ""


def panel_of(param: Any) -> str:
    return getattr(param, "rich_help_panel", None) or ""


def rank_of(panel: str) -> int:
    """Panels in the order of --help; what has none comes first."""
    return PANELS.index(panel) if panel else -1


def describe(param: Any, parameter: Parameter | None) -> str:
    """An argument or option: what it takes, what it is for, its default and its limits."""
    is_argument = param.param_type_name == "argument"
    name = param.metavar if is_argument else param.opts[0]
    facts = [param.help.rstrip(".").replace("*", r"\*") + "."]
    takes = "" if is_argument else param.metavar or ""
    if parameter is not None and not is_argument:
        takes = parameter.metavar or next((WORDS[kind] for kind in parameter.kinds if kind in WORDS), "")
        facts += list_facts(parameter)
    return f"- **`{name}{f' {takes}' if takes else ''}`**: {' '.join(facts)}"


def list_facts(parameter: Parameter) -> Iterator[str]:
    option, default = parameter.option, parameter.default
    if option.shown:
        yield f"Default: {option.shown}."
    elif default not in (None, "", " ") and default is not False:
        yield f"Default: `{default}`."
    if option.least is not None or option.most is not None:
        yield f"Limits: {parameter.limits}."
    if option.of_set:
        yield "*Of a set.*"


if __name__ == "__main__":
    main()
