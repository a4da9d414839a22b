"""The commands: each a face of one function, which it calls and of which it prints the result. No logic of its own."""

import json
import sys
from contextlib import nullcontext
from inspect import unwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from latentprep import __version__, api
from latentprep.cli.face import Command, face, switch
from latentprep.cli.inspect import OPTIONS, PARAMETERS, inspect
from latentprep.cli.terminal import JsonLines, Terminal, fail, quiet, say, show, show_json, unbreakable
from latentprep.door import OUTPUT, list_parameters, list_runs
from latentprep.errors import UserError
from latentprep.progress import Progress, Silent
from latentprep.results import join_runs

app = typer.Typer(
    help="Encode an image folder once into a latent cache; train diffusion models from it many times.",
    invoke_without_command=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)


DRY_LIST = switch("as_list", "--list", "With --dry-run: a line for each image.", OUTPUT)
EVENTS_JSON = switch(
    "as_json", "--json", "Print JSON, one object per line: images and totals; on stderr, messages and progress.", OUTPUT
)
RESULT_JSON = switch("as_json", "--json", "Print the result as JSON on one line; on stderr, messages and progress.")
QUIET = switch("is_quiet", "--quiet", "Print nothing, unless something went wrong.")
QUIET_ENCODE = switch("is_quiet", "--quiet", "Print nothing, unless something went wrong.", OUTPUT)
KEYS = switch("as_list", "--list", "Before the summary, a line for each image that differs.")
FUNCTIONS = (api.encode, api.inspect, api.verify, api.diff, api.compact, api.merge, api.bench)
DOORS = {function.__name__: list_parameters(function) for function in FUNCTIONS} | {"inspect": PARAMETERS}
# the functions whose errors speak of options, as their commands do; those of api speak of keywords
encode_, verify_, diff_ = unwrap(api.encode), unwrap(api.verify), unwrap(api.diff)
compact_, merge_, bench_ = unwrap(api.compact), unwrap(api.merge), unwrap(api.bench)
UsageError: type[Exception] = typer.BadParameter.__mro__[1]  # click's, or that of typer which has click built in


def _version(wanted: bool) -> None:
    if wanted:
        show(f"latentprep {__version__}")
        raise typer.Exit


@app.callback()
def latentprep(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.", metavar="")
    ] = False,
) -> None:
    if context.invoked_subcommand is None:
        if text := context.get_help():  # with rich it prints it itself
            show(text)
        raise typer.Exit(2)


def encode(arguments: dict[str, Any]) -> None:
    """Plan, encode and report; the exit code tells the truth."""
    quiet()
    from latentprep.cli.stop import end_if_stuck, stoppable
    from latentprep.messages import command_to_go_on, interrupted_text, list_lines

    is_dry_run = arguments.get("dry_run", False)
    as_list, as_json = arguments.pop("as_list", False), arguments.pop("as_json", False)
    is_quiet = arguments.pop("is_quiet", False)
    if as_list and not is_dry_run:
        raise UserError("--list without --dry-run: it prints what a run would do.")
    if is_quiet and is_dry_run:
        raise UserError("--quiet with --dry-run: it has nothing but words to give. Leave one of them out.")
    if as_list and as_json:
        raise UserError("--list with --json: JSON names every image already. Give one of them.")
    try:
        with nullcontext() if is_dry_run else stoppable():
            results = []
            for run in list_runs(api.encode, {**arguments, "progress": choose_progress(is_quiet, as_json)}):
                results.append(encode_(**run))  # noqa: PERF401  # one frame less between a command and its work
            result = join_runs(results)
    except KeyboardInterrupt as stop:
        out, log = getattr(stop, "cache", None), getattr(stop, "log", None)
        say(interrupted_text(out, sys.argv[1:]))
        if out is not None and log is not None:
            log.write(f"         {command_to_go_on(out, sys.argv[1:])}")
        code = 128 + (stop.args[0] if stop.args else 2)
        end_if_stuck(code)
        raise typer.Exit(code) from None
    if as_json:
        for value in result.list_json():
            show_json(json.dumps(value))
    elif not (is_quiet and result.ok):
        show("\n".join([*list_lines(result), "", result.totals]) if as_list else result.report)
    raise typer.Exit(0 if result.ok or is_dry_run else 1)


def choose_progress(is_quiet: bool, as_json: bool, has_bars: bool | None = True) -> Progress:
    """How a command says what it does."""
    return Silent() if is_quiet else JsonLines() if as_json else Terminal(has_bars)


def verify(arguments: dict[str, Any]) -> None:
    quiet()
    as_json, is_quiet = arguments.pop("as_json", False), arguments.pop("is_quiet", False)
    result = verify_(**arguments, progress=choose_progress(is_quiet, as_json, has_bars=None))
    if as_json:
        show_json(json.dumps(result.to_json()))
    elif not (is_quiet and result.ok):
        show(repr(result))
    raise typer.Exit(0 if result.ok else 1)


def diff(arguments: dict[str, Any]) -> None:
    """As of diff(1), 1 says that something differs; so what cannot be compared is 2."""
    quiet()
    as_json, as_list = arguments.pop("as_json", False), arguments.pop("as_list", False)
    try:
        if as_json and as_list:
            raise UserError("--list with --json: JSON names every image already. Give one of them.")
        result = diff_(**arguments, progress=choose_progress(False, as_json, has_bars=None))
    except (UserError, OSError) as error:
        fail(describe_error(error), as_json)
        raise typer.Exit(2) from None
    if as_json:
        show_json(json.dumps(result.to_json()))
    else:
        show("\n".join([*(result.list_keys() if as_list else ()), repr(result)]))
    raise typer.Exit(0 if result.is_same else 1)


def compact(arguments: dict[str, Any]) -> None:
    result = compact_(**arguments, progress=Terminal(has_bars=None))
    show(repr(result))
    raise typer.Exit(0 if result.ok else 1)


def merge(arguments: dict[str, Any]) -> None:
    quiet()
    show(repr(merge_(**arguments)))


def bench(arguments: dict[str, Any]) -> None:
    quiet()
    from latentprep.cli.stop import end_if_stuck, stoppable

    as_json = arguments.pop("as_json", False)
    try:
        with stoppable():
            result = bench_(**arguments, progress=choose_progress(False, as_json, has_bars=None))
    except KeyboardInterrupt as stop:
        say("stopped; the temporary files are deleted")
        code = 128 + (stop.args[0] if stop.args else 2)
        end_if_stuck(code)
        raise typer.Exit(code) from None
    if as_json:
        show_json(json.dumps(result.to_json()))
    else:
        show(repr(result))


app.command("encode", cls=Command)(face(api.encode, encode, DRY_LIST, EVENTS_JSON, QUIET_ENCODE))
app.command("inspect", cls=Command)(face(api.inspect, inspect, *OPTIONS))
app.command("verify", cls=Command)(face(api.verify, verify, RESULT_JSON, QUIET))
app.command("diff", cls=Command)(face(api.diff, diff, KEYS, RESULT_JSON))
app.command("compact", cls=Command)(face(api.compact, compact))
app.command("merge", cls=Command)(face(api.merge, merge))
app.command("bench", cls=Command)(face(api.bench, bench, RESULT_JSON))


@app.command()
def templates() -> None:
    """List the prompt templates that ship with latentprep, with their lines."""
    from latentprep.prompts import list_templates

    for name, lines in list_templates().items():
        show(name)
        for line in lines:
            show(f"    {line}")


@app.command()
def demo(
    out: Annotated[Path, typer.Argument(metavar="DIR", help="Folder for the demo's images and cache.")] = Path("demo"),
) -> None:
    """Draw images with captions and alpha, and encode them with the built-in model `tiny`."""
    from latentprep.demo import OPTIONS, draw_folder

    images = out / "images"
    draw_folder(images)
    say(f"drew {images}: landscapes with captions, some with alpha, some turned by EXIF, and one broken file")
    encode({"source": str(images), "out": str(out / "cache"), **OPTIONS})


def describe_error(error: UserError | OSError) -> str:
    """The line about an error that is the person's to mend."""
    if isinstance(error, UserError):
        return str(error)
    # of the file system, wherever it comes up: a name that is too long, a disk that fails
    where = f"{error.filename}: " if error.filename else ""
    return f"{where}{error.strerror or error}. Mend that, and run the same command again."


def main() -> None:
    """Entry point: errors that are the person's to mend are one line, and no traceback."""
    as_json = "--json" in sys.argv[1:]
    with unbreakable() as descriptors:
        try:
            code = app(prog_name="latentprep", standalone_mode=False) or 0
        except UsageError as error:
            from latentprep.cli.usage import describe_usage

            fail(describe_usage(error, DOORS, sys.argv[1:]), as_json)
            code = 2
        except (UserError, OSError) as error:
            fail(describe_error(error), as_json)
            code = 1
    if as_json and any(descriptor.is_full for descriptor in descriptors[:1]):
        code = code or 1  # a program would take what it got for all of it
    sys.exit(code)


if __name__ == "__main__":
    main()
