"""`latentprep inspect`: its options, and which of its ways they ask for: tables, a list, a sheet, a page."""

import json
from collections.abc import Callable
from dataclasses import replace
from inspect import Parameter, unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from latentprep import api
from latentprep.cli.face import options_of, output, switch
from latentprep.cli.terminal import Terminal, fail, quiet, show, show_json
from latentprep.door import PREVIEW, list_parameters
from latentprep.errors import UserError

JSON = switch("as_json", "--json", "Print JSON, for machines.")
LIST = switch(
    "as_list", "--list", "List the images, one per line: path, bucket, original size, captions. PATTERN chooses some."
)
ENLARGED = switch("only_enlarged", "--enlarged", "Of --list: only images that were enlarged to fill their bucket.")
PATTERN = Parameter(
    "pattern",
    Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        str | None,
        typer.Argument(
            metavar="PATTERN",
            help="For --list and --preview: images whose path fits a shell pattern, such as 'birds/*'.",
        ),
    ],
)
SHEET = output(
    "sheet", "--preview", "FILE.png", "Draw a contact sheet: images, crops, decoded latents, weights and captions.",
    PREVIEW,
)  # fmt: skip
PAGE = output(
    "page", "--html", "FILE.html", "Make a page for a browser: charts, what stands out, and a gallery. Needs jinja2.",
    PREVIEW,
)  # fmt: skip
NUM = Parameter(  # each of the two has limits of its own
    "num",
    Parameter.KEYWORD_ONLY,
    default=None,
    annotation=Annotated[
        int | None,
        typer.Option(
            "--num", metavar="N", rich_help_panel=PREVIEW,
            help="How many samples to show, at most: 12, or with --html 2,000.",
        ),
    ],
)  # fmt: skip
OF_INSPECT, OF_PREVIEW, OF_REPORT = map(list_parameters, (api.inspect, api.preview, api.report))
SHARED = {parameter.name for parameter in OF_REPORT}
KNOWN = {parameter.name for parameter in OF_INSPECT} | {"pattern", "num"}
MORE = [option for option in options_of(api.preview) if option.name not in KNOWN] + [NUM]
OPTIONS = [PATTERN, LIST, ENLARGED, JSON, SHEET, PAGE, *MORE]  # that the command has, and its function not
# all that its errors may speak of
PARAMETERS = OF_INSPECT + tuple(
    replace(p, option=replace(p.option, least=None, most=None)) if p.name == "num" else p
    for p in OF_PREVIEW
    if p.name in {option.name for option in MORE}
)
inspect_, preview_, report_ = unwrap(api.inspect), unwrap(api.preview), unwrap(api.report)


def inspect(arguments: dict[str, Any]) -> None:
    """Print tables, JSON or a list; or write a sheet or a page."""
    as_json, as_list = arguments.pop("as_json", False), arguments.pop("as_list", False)
    only_enlarged, pattern = arguments.pop("only_enlarged", False), arguments.pop("pattern", None)
    sheet, page = arguments.pop("sheet", None), arguments.pop("page", None)
    if only_enlarged and not as_list:
        raise UserError("--enlarged: is for --list. Add it, or leave this out.")
    for flag, file, does in (("--preview", sheet, "draws"), ("--html", page, "makes a page")):
        others = {"--list": as_list, "--json": as_json, "--most-cropped": "most_cropped" in arguments}
        if file is not None and (given := [other for other, is_given in others.items() if is_given]):
            raise UserError(f"{given[0]} with {flag}: one prints, the other {does}. Give one of them.")
    if page is not None and sheet is not None:
        raise UserError("--preview with --html: one draws a sheet, the other makes a page. Give one of them.")
    if page is not None:
        others = {"PATTERN": pattern, "--key": arguments.get("key"), "--show": arguments.get("show")}
        if given := [other for other, value in others.items() if value is not None]:
            raise UserError(f"{given[0]} with --html: a page is about the whole cache. Leave it out.")
        write_report(page, arguments)
    elif sheet is not None:
        draw(sheet, arguments if pattern is None else {**arguments, "pattern": pattern})
    else:
        refuse_drawing(arguments)
        if as_list and arguments.get("key") is not None:
            raise UserError("--list with --key: one shows many images, the other one. Give one of them.")
        if pattern is not None and not as_list:
            raise UserError(f"PATTERN {pattern}: is for --list and --preview. Add one of them, or leave it out.")
        if as_list:
            list_images(arguments["cache"], "*" if pattern is None else pattern, only_enlarged, as_json)
        else:
            print_summary(arguments, as_json)


def refuse_drawing(arguments: dict[str, Any]) -> None:
    """Raise UserError for an option that only sheets and pages have."""
    for option in MORE:
        if option.name in arguments:
            is_shared = option.name in SHARED
            homes, missing = (
                ("--preview and --html", "one of them") if is_shared else ("--preview", "--preview FILE.png")
            )
            raise UserError(f"--{option.name}: is for {homes}. Add {missing}, or leave it out.")


def print_summary(arguments: dict[str, Any], as_json: bool) -> None:
    summary = inspect_(**arguments)
    if as_json:
        show_json(json.dumps(summary, indent=2))
    else:
        from rich.console import Console

        Console(highlight=False).print(summary.table(), markup=False)


def draw(file: str, arguments: dict[str, Any]) -> None:
    """Draw a preview, and write it."""
    quiet()
    from latentprep.previews import check_sheet, write_sheet

    check_limits(api.preview, arguments)
    check_sheet(Path(file))
    image = preview_(**arguments, progress=Terminal())
    write_sheet(image, Path(file))
    show(f"{file}: {image.width}x{image.height} pixels")


def write_report(file: str, arguments: dict[str, Any]) -> None:
    """Make a report, and write it."""
    quiet()
    from latentprep.human import human_bytes
    from latentprep.reports import check_page, write_page

    check_limits(api.report, arguments)
    check_page(Path(file))
    page = report_(**arguments, progress=Terminal())
    write_page(page, Path(file))
    show(f"{file}: {human_bytes(len(page.encode()))}, for a browser")


def check_limits(function: Callable[..., Any], arguments: dict[str, Any]) -> None:
    """Say which number is outside of what its function takes, and end."""
    for parameter in list_parameters(function):
        least, most, value = parameter.option.least, parameter.option.most, arguments.get(parameter.name)
        if value is not None and least is not None and most is not None and not least <= value <= most:
            fail(f"{parameter.flag} {value}: expected {parameter.expected}.")
            raise typer.Exit(2)


def list_images(cache: str, pattern: str, only_enlarged: bool, as_json: bool) -> None:
    """Print each image as soon as it is read."""
    from latentprep.look.tables import row_line
    from latentprep.runs import run_list

    for row in run_list(cache, pattern, only_enlarged):
        if as_json:
            show_json(json.dumps(row))
        else:
            show(row_line(row))
