"""Makes of a training script of diffusers one that reads a latent cache, and writes it beside the script.

    python examples/diffusers/patch.py train_text_to_image_lora.py

For each script there is a recipe, a file of edits beside this one. Edits are found in the syntax tree of the script, so
that formatting and comments do not matter. All of them are found, or nothing is written.
"""

import ast
import importlib
import textwrap
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from edits import AFTER, BEFORE, Edit, Recipe

from latentprep.human import printable

RECIPES = ("text_to_image_lora", "text_to_image_lora_sdxl", "dreambooth_lora_flux", "dreambooth_lora_z_image")
MARK = "# Reads a latent cache: patched by latentprep's examples/diffusers/patch.py."


@dataclass(frozen=True)
class Statement:
    """A statement of a script."""

    text: str  # as ast.unparse writes it
    block: int  # number of the block that it stands in
    start: int  # its lines, from 0
    stop: int  # behind the last
    depth: int  # columns that it is indented by


@dataclass(frozen=True)
class Place:
    """Lines of a script, from 0, and what stands there instead."""

    start: int
    stop: int
    lines: list[str]


class PatchError(Exception):
    """One line that says why a script cannot be patched."""


def main(
    script: Annotated[Path, typer.Argument(help="Your copy of a training script of diffusers.")],
    out: Annotated[
        Path | None, typer.Option(help="The script that reads a cache. [default: SCRIPT with _cached in its name]")
    ] = None,
) -> None:
    out = out or script.with_name(f"{script.stem}_cached.py")
    try:
        recipe = find_recipe(script)
        patched = patch(read(script), recipe, script)
        write(out, patched)
    except PatchError as error:
        raise SystemExit(printable(f"Error: {error}")) from None
    print(printable(f"Wrote {out}. Give it --cache DIR, a cache of latentprep encode."))


def find_recipe(script: Path) -> Recipe:
    """The recipe of a script, by its name. Raises PatchError."""
    name = script.stem.removeprefix("train_")
    if name not in RECIPES:
        known = ", ".join(f"train_{recipe}.py" for recipe in RECIPES)
        raise PatchError(f"{script}: there is no recipe for a script of this name. There is one for {known}.")
    recipe = importlib.import_module(name).RECIPE
    assert isinstance(recipe, Recipe)
    return recipe


def read(script: Path) -> str:
    """The text of a script. Raises PatchError."""
    try:
        return script.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise PatchError(f"{script}: cannot be read: {error}") from None


def write(out: Path, text: str) -> None:
    """Write a file that is not there yet. Raises PatchError."""
    try:
        with out.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise PatchError(f"{out}: is there already. Delete it, or name another file with --out.") from None
    except OSError as error:
        raise PatchError(f"{out}: cannot be written: {error}") from None


def patch(text: str, recipe: Recipe, script: Path) -> str:
    """The text of the patched script. Raises PatchError if an edit has no place in it, or more than one."""
    if MARK in text:
        raise PatchError(f"{script}: is patched already. Nothing was written.")
    lines = text.splitlines()
    statements = list_statements(parse(text, script))
    places = []
    for number, edit in enumerate(recipe.edits, start=1):
        try:
            places.append(find_place(edit, statements, lines))
        except PatchError as error:
            where = f"edit {number} of {len(recipe.edits)}"
            raise PatchError(f"{script}: {where} {error}. {written_for(recipe)}") from None
    places.sort(key=lambda place: (place.start, place.stop))
    assert all(one.stop <= next_.start for one, next_ in pairwise(places)), "edits overlap"
    for place in reversed(places):
        lines[place.start : place.stop] = place.lines
    head = 1 if lines[0].startswith("#!") else 0
    lines[head:head] = [MARK, f"# The recipe is for {recipe.script} as commit {recipe.commit} of diffusers left it."]
    patched = "\n".join(lines) + "\n"
    try:
        ast.parse(patched)
    except SyntaxError as error:
        raise PatchError(f"{script}: is no Python once it is patched: {error}. {written_for(recipe)}") from None
    return patched


def written_for(recipe: Recipe) -> str:
    """What to do if a recipe does not fit."""
    return (
        f"The recipe is for {recipe.script} as commit {recipe.commit} of diffusers left it: take the script of that "
        "commit. Nothing was written."
    )


def parse(text: str, script: Path) -> ast.Module:
    """The syntax tree. Raises PatchError."""
    try:
        return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError) as error:
        raise PatchError(f"{script}: is no Python of this version: {error}") from None


def list_statements(tree: ast.Module) -> list[Statement]:
    """Every statement of a script, in all blocks."""
    found, number = [], 0
    for node in ast.walk(tree):
        for name in ("body", "orelse", "finalbody"):
            block = getattr(node, name, None)
            if isinstance(block, list):
                number += 1
                found += [
                    Statement(ast.unparse(own), number, own.lineno - 1, own.end_lineno or own.lineno, own.col_offset)
                    for own in block
                ]
    return found


def find_place(edit: Edit, statements: list[Statement], lines: list[str]) -> Place:
    """What an edit does to which lines. Raises PatchError."""
    first = find_statement(edit.at, statements)
    last = find_statement(edit.to or edit.at, statements)
    if first.block != last.block or last.start < first.start:
        raise PatchError(f"looks for {show(edit.to)} behind {show(edit.at)}, and it stands elsewhere")
    put = textwrap.indent(edit.put.strip("\n"), " " * first.depth).splitlines()
    if edit.where == BEFORE:
        return Place(first.start, first.start, put)
    if edit.where == AFTER:
        return Place(last.stop, last.stop, put)
    start = first.start
    while not put and start and lines[start - 1].lstrip().startswith("#"):
        start -= 1  # a comment goes with what it is about
    return Place(start, last.stop, put)


def find_statement(begins: str, statements: list[Statement]) -> Statement:
    """The only statement that begins so. Raises PatchError."""
    found = [statement for statement in statements if statement.text.startswith(begins)]
    if len(found) != 1:
        at = ", ".join(str(statement.start + 1) for statement in found)
        where = f"{len(found)} times, in lines {at}" if found else "nowhere"
        raise PatchError(f"looks for {show(begins)} and finds it {where}, expected once")
    return found[0]


def show(begins: str) -> str:
    """How a statement begins, in one line."""
    return f"`{' '.join(begins.split())}`"


if __name__ == "__main__":
    typer.run(main)
