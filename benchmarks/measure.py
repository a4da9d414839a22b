"""Runs the scripts of this folder, keeps what they measure in measured.jsonl, and makes docs/measured.md of it.

    make bench                   # all of them, one after another
    make bench ONLY=decode       # one of them again; the rows of the others stay

Rows of one page are of one machine and its versions: `ONLY` is refused if those of the others are different.
"""

import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer
from page import HERE, MEASURED, NO_GPU, Machine, Run, list_scripts, read_runs, write_pages
from results import Record

PACKAGES = ("torch", "diffusers", "transformers", "pillow", "latentprep")


def describe_machine() -> Machine:
    """This one. Linux alone."""
    import torch

    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    processor = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else NO_GPU
    versions = {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}}
    return Machine(processor, len(os.sched_getaffinity(0)), f"{memory / 1e9:.0f} GB", device, versions)


def busy_seconds() -> float:
    """Processor time of all programs since the machine was started, and what the machine's host took away."""
    user, nice, system, _, _, irq, softirq, steal, *_ = Path("/proc/stat").read_text().split("\n")[0].split()[1:]
    return sum(map(int, (user, nice, system, irq, softirq, steal))) / os.sysconf("SC_CLK_TCK")


def own_seconds() -> float:
    """Processor time of this process and of those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def measure(script: str, machine: Machine) -> Run:
    """Run a script. Raises CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "results"
        load, started = os.getloadavg()[0], time.perf_counter()
        busy, own = busy_seconds(), own_seconds()
        # a limit of the shell, as of OMP_NUM_THREADS, would be in the numbers, and nobody would see it
        free = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
        subprocess.run([sys.executable, HERE / f"{script}.py", "--json", found], check=True, env=free)
        seconds = time.perf_counter() - started
        others = max(0.0, (busy_seconds() - busy - (own_seconds() - own)) / seconds)
        head, *lines = map(json.loads, found.read_text(encoding="utf-8").splitlines())
    records = [Record(**{name: value for name, value in line.items() if name != "script"}) for line in lines]
    today = date.today().isoformat()
    return Run(script, head["arguments"], today, round(seconds, 1), round(load, 2), round(others, 2), machine, records)


def write_runs(runs: Mapping[str, Run]) -> None:
    """measured.jsonl, with the scripts in the order of the page."""
    runs = {script: runs[script] for script in list_scripts() if script in runs}
    lines = []
    for run in runs.values():
        head = asdict(run)
        lines += [head, *({"script": run.script, **record} for record in head.pop("records"))]
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    MEASURED.write_text(text, encoding="utf-8", newline="\n")


def main(only: Annotated[str, typer.Option(help="Scripts to run, with commas between; empty: all.")] = "") -> None:
    scripts, machine = only.split(",") if only else list_scripts(), describe_machine()
    if unknown := set(scripts) - set(list_scripts()):
        raise SystemExit(f"ONLY={only}: no such script as {', '.join(sorted(unknown))}. There are: {list_scripts()}")
    runs = read_runs()
    others = (run.machine for script, run in runs.items() if script not in scripts)
    if different := next((other for other in others if other != machine), None):
        raise SystemExit(
            f"ONLY={only}: this is {machine}, with {dict(machine.versions)}.\nThe other rows of measured.jsonl are of "
            f"{different}, with {dict(different.versions)}.\nLeave ONLY out: then all are measured here."
        )
    failed = []
    for script in scripts:
        try:
            runs[script] = measure(script, machine)
        except subprocess.CalledProcessError:
            failed.append(script)
        runs = {script: run for script, run in runs.items() if run.machine == machine}
        write_runs(runs)
    if missing := [script for script in list_scripts() if script not in runs]:
        raise SystemExit(f"No rows of {', '.join(missing)}: docs/measured.md is not made.")
    write_pages(read_runs())
    if failed:
        raise SystemExit(f"failed: {', '.join(failed)}. Their rows are those of before.")


if __name__ == "__main__":
    typer.run(main)
