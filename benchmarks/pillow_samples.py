"""Every sample image of Pillow's own source distribution: does each end in the cache, or in skipped.jsonl?

    python benchmarks/pillow_samples.py                 # of the installed Pillow, from the package index
    python benchmarks/pillow_samples.py --folder DIR    # or takes images that are there

They are a thousand odd, old, damaged and hostile files. Each has a name that `encode` takes for an image. They are
encoded in a process of its own, whose peak memory is shown. The script fails if a file is lost, or if anything raised.
"""

import json
import resource
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import PIL
import typer
from results import Results, run

from latentprep.cache.manifest import open_manifest
from latentprep.cache.storage import Storage
from latentprep.prepare.images.pillow import is_image_name


def fetch_samples(folder: Path) -> Path:
    """Download Pillow's source distribution with pip and unpack its sample images."""
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--no-binary",
        ":all:",
        "--dest",
        folder,
    ]
    subprocess.run([*command, f"pillow=={PIL.__version__}"], check=True)
    (archive,) = folder.glob("pillow-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data", members=(m for m in tar if "/Tests/images/" in m.name))
    return next(folder.glob("pillow-*/Tests/images"))


def link_samples(samples: Path, folder: Path) -> int:
    """Name every file so that `encode` takes it for an image: .png is added where the suffix is another."""
    count = 0
    for path in sorted(samples.rglob("*")):
        if path.is_file():
            name = f"{count:04d} {path.name}"
            (folder / (name if is_image_name(name) else f"{name}.png")).symlink_to(path.resolve())
            count += 1
    return count


def main(
    results: Results,
    folder: Annotated[Path | None, typer.Option(help="Sample images that are there already.")] = None,
    size: Annotated[int, typer.Option(metavar="PIXELS", help="Every image is fitted into this square.")] = 64,
) -> None:
    with tempfile.TemporaryDirectory() as name:
        here = Path(name)
        (here / "images").mkdir()
        count = link_samples(folder or fetch_samples(here), here / "images")
        command = ["encode", here / "images", "--out", here / "cache", "--model", "tiny", "--no-cond", "--fit", "pad"]
        started = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "latentprep", *command, "--width", str(size), "--height", str(size)],
            capture_output=True, text=True, errors="replace",
        )  # fmt: skip
        seconds = time.perf_counter() - started
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
        if done.returncode or "Traceback" in done.stderr:
            raise SystemExit(f"{done.stdout}\n{done.stderr}")
        cached = open_manifest(Storage(here / "cache")).num_images
        skips = [json.loads(line) for line in (here / "cache" / "skipped.jsonl").read_text("utf-8").splitlines()]
        if cached + len(skips) != count:
            raise SystemExit(f"{count} files, of which {cached} are in the cache and {len(skips)} are skipped")
    table = results.table("a run", {"images": "", "time": "s", "memory at most": "MB"})
    table.add("all", count, seconds, peak)
    table.add("in the cache", cached, None, None)
    table.add("skipped, with a reason", len(skips), None, None)
    reasons = results.table("reasons of skips", {"images": ""})
    for reason, number in Counter(skip["reason"] for skip in skips).most_common():
        reasons.add(f"`{reason}`", number)


if __name__ == "__main__":
    run(main)
