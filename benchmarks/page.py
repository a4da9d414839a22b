"""docs/measured.md, and what README.md says of it, from measured.jsonl and elsewhere.toml.

    python benchmarks/page.py       # writes both anew, and measures nothing

What explains the numbers of a script is its docstring.
"""

import ast
import json
import re
import textwrap
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import Record, shown

HERE = Path(__file__).parent
MEASURED, ELSEWHERE = HERE / "measured.jsonl", HERE / "elsewhere.toml"
PAGE, README = HERE.parent / "docs" / "measured.md", HERE.parent / "README.md"
# heading -> its scripts, or the headings below it and theirs; in the order of the page, in which they run too
SECTIONS: dict[str, tuple[str, ...] | dict[str, tuple[str, ...]]] = {
    "Reading and encoding": {
        "Encoding": ("encode", "waits"),
        "Decoding": ("decode",),
        "Reading": ("read", "scale"),
        "Listing and planning": ("listing", "buckets", "repeated_prompts", "count_tokens"),
        "Memory": ("memory", "text_memory"),
        "Robustness": ("pillow_samples",),
    },
    "What each way of encoding and storing costs": ("precision",),
    "What fewer bits of conditioning cost": ("cond_dtype",),
}
NOT_MEASURED: dict[str, str] = {}  # script -> why the page has no numbers of it
NO_GPU = "no GPU"
BUSY = 0.1  # cores that other programs used, from which on the page says so
MARK = "\\*"  # of the rows that were measured meanwhile


@dataclass(frozen=True)
class Machine:
    """What the numbers of a run depend on beside the code."""

    processor: str
    cores: int
    memory: str
    device: str
    versions: Mapping[str, str]

    def __str__(self) -> str:
        return f"{self.processor}, {self.cores} cores, {self.memory} of memory, {self.device}"


@dataclass(frozen=True)
class Run:
    """A script that has run once."""

    script: str
    arguments: Mapping[str, Any]
    date: str
    seconds: float
    load: float  # average of the minute before
    others: float  # cores that other programs used meanwhile
    machine: Machine
    records: Sequence[Record]

    @property
    def is_disturbed(self) -> bool:
        return self.others >= BUSY


def main() -> None:
    write_pages(read_runs())


def list_scripts() -> list[str]:
    """All that are measured, in their order."""
    parts = [part.values() if isinstance(part, dict) else [part] for part in SECTIONS.values()]
    return [script for part in parts for scripts in part for script in scripts]


def read_runs() -> dict[str, Run]:
    """What has been measured, by script."""
    records: dict[str, list[Record]] = {}
    runs: dict[str, Run] = {}
    for line in MEASURED.read_text(encoding="utf-8").splitlines() if MEASURED.exists() else []:
        fields = json.loads(line)
        script = fields.pop("script")
        if "arguments" in fields:
            records[script] = []
            machine = Machine(**fields.pop("machine"))
            runs[script] = Run(script, machine=machine, records=records[script], **fields)
        else:
            records[script].append(Record(**fields))
    return runs


def write_pages(runs: Mapping[str, Run]) -> None:
    PAGE.write_text(make_page(runs), encoding="utf-8", newline="\n")
    README.write_text(with_lines(README.read_text(encoding="utf-8"), runs), encoding="utf-8", newline="\n")


def make_page(runs: Mapping[str, Run]) -> str:
    return "\n".join([*make_head(runs), *make_sections(runs), *make_elsewhere(), *make_list_of_runs(runs)])


def make_head(runs: Mapping[str, Run]) -> Iterator[str]:
    machine, dates = next(iter(runs.values())).machine, sorted({run.date for run in runs.values()})
    yield "# Measured\n"
    yield wrap(
        "`make bench` makes this page: it runs the scripts of `benchmarks/`, one after another, and writes down what "
        "they give. `make bench ONLY=decode` runs one of them again. Machines differ: compare the ratios. A \\* stands "
        "on rows that were measured while other programs were at work: times may be too long, and ratios chance."
    )
    yield from table(
        ["", ""],
        [
            ["machine", str(machine)],
            ["versions", ", ".join(f"{name} {version}" for name, version in machine.versions.items())],
            ["measured", " to ".join(dict.fromkeys((dates[0], dates[-1])))],
        ],
    )


def make_sections(runs: Mapping[str, Run]) -> Iterator[str]:
    for heading, part in SECTIONS.items():
        yield f"## {heading}\n"
        for below, scripts in part.items() if isinstance(part, dict) else [("", part)]:
            if below:
                yield f"### {below}\n"
            for script in scripts:
                yield from make_part(runs[script])


def make_part(run: Run) -> Iterator[str]:
    """What explains a script, and its tables."""
    yield wrap(explain(run.script))
    yield f"{command_of(run.script, run.arguments)} took {shown(run.seconds, 's')}.\n"
    for title, records in by_title(run.records).items():
        yield from make_table(title, records, MARK if run.is_disturbed else "")


def explain(script: str) -> str:
    """The docstring of a script, without the lines that show how it is started."""
    text = ast.get_docstring(ast.parse((HERE / f"{script}.py").read_text(encoding="utf-8"))) or ""
    return "\n\n".join(part for part in text.split("\n\n") if not part.startswith("    "))


def command_of(script: str, arguments: Mapping[str, Any]) -> str:
    """How it was started, with all options, so that it says the same after a default has changed."""
    given = {name.replace("_", "-"): value for name, value in arguments.items() if value not in (None, False)}
    options = [f" --{name} {value}" for name, value in given.items()]
    return f"`python benchmarks/{script}.py{''.join(options)}`"


def by_title(records: Sequence[Record]) -> dict[str, list[Record]]:
    found: dict[str, list[Record]] = {}
    for record in records:
        found.setdefault(record.table, []).append(record)
    return found


def make_table(title: str, records: Sequence[Record], mark: str) -> Iterator[str]:
    """A table of records: what is a row, column is a column."""
    columns = list(dict.fromkeys(record.column for record in records))
    rows: dict[str, dict[str, str]] = {}
    for record in records:
        rows.setdefault(record.what, {})[record.column] = shown(record.value, record.unit)
    cells = [[f"{what}{mark}", *(row.get(column, "") for column in columns)] for what, row in rows.items()]
    yield from table([title, *columns], cells)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield "|---" * len(head) + "|"
    yield from (f"| {' | '.join(row)} |" for row in rows)
    yield ""


def make_elsewhere() -> Iterator[str]:
    """What was measured on other machines."""
    yield "## On other machines\n"
    for run in read_elsewhere():
        command = command_of(run["script"], run["arguments"])
        yield wrap(f"{command} on {run['machine']}, with {run['versions']}. {run['note']}")
        yield from make_table("", [Record(table="", **record) for record in run["records"]], "")


def read_elsewhere() -> list[dict[str, Any]]:
    return tomllib.loads(ELSEWHERE.read_text(encoding="utf-8"))["run"]


def make_list_of_runs(runs: Mapping[str, Run]) -> Iterator[str]:
    yield "## How it was run\n"
    minutes = sum(run.seconds for run in runs.values()) / 60
    yield wrap(
        f"One script after another, each in a process of its own; all together took {minutes:.0f} minutes. The load is "
        "the average of the minute before a script began, and has the script before it in it. What others used "
        "meanwhile is the processor's time that does not belong to the script."
    )
    head = ["script", "date", "took", "load at its start", "others used meanwhile"]
    yield from table(head, [describe(run) for run in runs.values()])
    yield from (f"- `{script}` is not measured: {why}" for script, why in NOT_MEASURED.items())


def describe(run: Run) -> list[str]:
    others = f"{run.others:.1f} of {run.machine.cores} cores{MARK if run.is_disturbed else ''}"
    return [f"`{run.script}`", run.date, shown(run.seconds, "s"), f"{run.load:.1f}", others]


def wrap(text: str) -> str:
    """Paragraphs in lines of 120 characters; commands stay on one line."""
    parts = [re.sub(r"`[^`]*`", lambda code: code[0].replace(" ", "\0"), part) for part in text.split("\n\n")]
    filled = [textwrap.fill(part, 120, break_long_words=False, break_on_hyphens=False) for part in parts]
    return "\n\n".join(filled).replace("\0", " ") + "\n"


# README.md's lines: what, the result with places for numbers, and where they stand: script, table, row, column
Place = tuple[str, str, str, str]
LINES: tuple[tuple[str, str, tuple[Place, ...]], ...] = (
    (
        "speed of a whole run on {here}: JPEG files of 256x256, Stable Diffusion's VAE",
        "{} of a plain loop of `AutoencoderKL.encode` over pixels in memory",
        (("encode", "whole runs to 256x256", "files of 256x256", "of the loop"),),
    ),
    (
        "the same at 512x512 on {elsewhere}, float16",
        "{}, {} of such a loop",
        (("elsewhere", "", "files of 512x512", "rate"), ("elsewhere", "", "files of 512x512", "of the loop")),
    ),
    (
        "reading a cache in one process, 184 kB a sample, means only",
        "{}, {} of `index_select` from RAM (which also copies the std)",
        (
            ("read", "184 kB a sample", "`LatentLoader`, deterministic", "rate"),
            ("read", "184 kB a sample", "`LatentLoader`, deterministic", "of the first"),
        ),
    ),
    (
        "error of latents encoded in float32 and stored in float16",
        "{} standard deviations of the latent, in the mean",
        (("precision", "`tiny`", "`--store-dtype float16`, the default", "mean"),),
    ),
    (
        "disk space for conditioning: 100,000 images, 1,000 different captions, FLUX.1",
        "{}; {} if each shard kept its own copies",
        (
            ("repeated_prompts", "prompts that are encoded and stored", "1,000 class captions", "these take"),
            ("repeated_prompts", "prompts that are encoded and stored", "1,000 class captions", "they take"),
        ),
    ),
    (
        "peak memory for 5,000 images, compared with 200 images",
        "{} as much",
        (("memory", "encode", "5,000 images", "against the first"),),
    ),
)


def make_lines(runs: Mapping[str, Run]) -> list[str]:
    """README.md's rows."""
    (away,) = (run for run in read_elsewhere() if run["script"] == "encode")
    machine = runs["encode"].machine
    here = f"{machine.cores} CPU cores" if machine.device == NO_GPU else machine.device
    lines = []
    for what, result, places in LINES:
        row = [what.format(here=here, elsewhere=away["machine"]), result.format(*(look_up(p, runs) for p in places))]
        lines.append(f"| {' | '.join(row)} |")
    return lines


def look_up(place: Place, runs: Mapping[str, Run]) -> str:
    """A number as the page shows it."""
    script, *where = place
    if script == "elsewhere":
        records = [Record(table="", **record) for run in read_elsewhere() for record in run["records"]]
    else:
        records = list(runs[script].records)
    (found,) = (r for r in records if [r.table, r.what, r.column] == where)
    return shown(found.value, found.unit)


def with_lines(readme: str, runs: Mapping[str, Run]) -> str:
    """README.md with the rows below its heading "Measured" made anew."""
    head = "## Measured\n\n| | |\n|---|---|\n"
    start = readme.index(head) + len(head)
    return readme[:start] + "\n".join(make_lines(runs)) + readme[readme.index("\n\n", start) :]


if __name__ == "__main__":
    main()
