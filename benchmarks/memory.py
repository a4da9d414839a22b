"""Peak memory of `latentprep encode` over few and over many images: it must not grow with the folder.

    python benchmarks/memory.py                      # 200 and 5,000 images, `tiny` at 256
    python benchmarks/memory.py --many 20000

Each run is a process of its own; peak memory is its maximum resident set size, as the kernel counts it. Images are JPEG
files of 800x600, fifty different ones and links to them.
"""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from drawn import draw
from results import Results, run


def measure(images: Path, cache: Path, resolution: int) -> tuple[float, float]:
    """Peak memory in MB, and seconds, of encoding a folder."""
    command = [
        sys.executable, "-m", "latentprep", "encode", str(images), "--out", str(cache), "--model", "tiny",
        "--resolution", str(resolution),
    ]  # fmt: skip
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"exit code {os.waitstatus_to_exitcode(status)}: {' '.join(command)}")
    return usage.ru_maxrss / 1000, time.perf_counter() - started


def main(
    results: Results,
    few: Annotated[int, typer.Option(help="Images of the first run.")] = 200,
    many: Annotated[int, typer.Option(help="Images of the second run.")] = 5000,
    resolution: Annotated[int, typer.Option(help="Of the buckets, in pixels.")] = 256,
) -> None:
    peaks = []
    table = results.table("encode", {"memory at most": "MB", "against the first": "times", "time": "s"})
    with tempfile.TemporaryDirectory() as folder:
        for count in (few, many):
            images = Path(folder) / f"images{count}"
            draw(images, count, (600, 800), different=50)
            peak, seconds = measure(images, Path(folder) / f"cache{count}", resolution)
            peaks.append(peak)
            table.add(f"{count:,} images", peak, peak / peaks[0], seconds)


if __name__ == "__main__":
    run(main)
