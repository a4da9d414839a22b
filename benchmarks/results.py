"""What a script of this folder has measured: tables that a person reads as they grow, and records of the same.

`run` starts a script with the options of its `main`, and gives it the Results. With --json FILE the records are also
written there, as JSON lines: one for the script and its arguments, then one for each number.
"""

import inspect
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer


@dataclass(frozen=True)
class Record:
    """One number, and where it stands: the title of a table, a row and a column of it."""

    table: str
    what: str
    column: str
    value: float
    unit: str


@dataclass(frozen=True)
class Table:
    """A table that grows row by row."""

    title: str
    columns: Mapping[str, str]  # name -> unit
    records: list[Record]  # all of its script

    def add(self, what: str, *values: float | None) -> None:
        """Show a row of a value for each column, and keep them. None: there is no such value."""
        cells = []
        for (column, unit), value in zip(self.columns.items(), values, strict=True):
            cells.append("" if value is None else shown(value, unit))
            if value is not None:
                self.records.append(Record(self.title, what, column, rounded(value), unit))
        print_line(what, self.columns, cells)


class Results:
    """The tables of a script."""

    def __init__(self) -> None:
        self.records: list[Record] = []

    def table(self, title: str, columns: Mapping[str, str]) -> Table:
        """A new table; its head is shown. `columns` are names and units: "times", "%", or any that stands behind."""
        print(f"\n{title}")
        print_line("", columns, list(columns))
        return Table(title, columns, self.records)


def print_line(what: str, columns: Mapping[str, str], cells: list[str]) -> None:
    widths = [max(len(column), 14) for column in columns]
    print(f"{what:48}", *(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True)), flush=True)


def shown(value: float, unit: str) -> str:
    """A number with three digits, or all of a whole one, and its unit: 0.123 s, 98.8%, 12,300 samples/s, 3.3e-4."""
    if isinstance(value, int):
        number = f"{value:,}"
    elif value and abs(value) < 0.01 and not unit:
        digits, _, power = f"{value:.1e}".partition("e")
        number = f"{digits}e{int(power)}"
    else:
        number = f"{float(f'{value:.3g}'):,.10g}"
    return number + ("%" if unit == "%" else f" {unit}" if unit else "")


def rounded(value: float) -> float:
    """Six digits, which is more than any measurement has."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def run(main: Callable[..., None]) -> None:
    """Run `main(results, ...)` of a script with options of the command line, and --json."""
    script = Path(sys.argv[0]).stem

    def started(json: Path | None, **arguments: Any) -> None:
        print(f"{script}: torch {version('torch')}, {os.cpu_count()} cores")
        results = Results()
        main(results, **arguments)
        if json is not None:
            write_lines(json, script, arguments, results.records)

    _, *options = inspect.signature(main).parameters.values()
    file = Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the results there, as JSON lines.")]
    options.append(inspect.Parameter("json", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=file))
    started.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    started.__annotations__ = {option.name: option.annotation for option in options}
    started.__doc__ = sys.modules[main.__module__].__doc__
    typer.run(started)


def write_lines(path: Path, script: str, arguments: Mapping[str, Any], records: list[Record]) -> None:
    head = {"script": script, "arguments": {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}}
    lines = [head, *({"script": script, **asdict(record)} for record in records)]
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")
