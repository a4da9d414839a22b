"""What `report` does, once its arguments are checked: a cache is counted, its images are shown, a page is made."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from latentprep.cache.storage import Storage
from latentprep.outputs import check_output, write_output
from latentprep.previews import Pictures, Remarks, find_colors, find_reader
from latentprep.progress import Progress
from latentprep.quiet import quiet_logs, quiet_warnings

if TYPE_CHECKING:
    from latentprep.cache.manifest import Manifest
    from latentprep.look.render import Shot
    from latentprep.look.report import Report
    from latentprep.prepare.preview_source import Reader
    from latentprep.prepare.thumbnails import Painter

PICTURE_BYTES = 8_000_000  # of all pictures together: 11 MB as base64


def run_report(
    cache: str,
    progress: Progress,
    pictures: Pictures,
    *,
    num: int,
    seed: int,
) -> str:
    """A page of HTML about a cache. Raises UserError."""
    from latentprep.look.render import check_jinja

    check_jinja()
    from latentprep.cache.manifest import open_manifest
    from latentprep.cache.readers import Reading
    from latentprep.look.render import render
    from latentprep.look.report import make_report, num_looked
    from latentprep.prepare.devices import choose_device
    from latentprep.prepare.images.pillow import kept_limit
    from latentprep.prepare.preview import Colors
    from latentprep.prepare.thumbnails import MAX_DECODED, Painter, read_whole

    remarks, storage = Remarks(progress), Storage(cache)
    with Reading(storage), quiet_warnings, kept_limit(), quiet_logs:
        manifest = open_manifest(storage)
        with progress.bar(num_looked(manifest), "latents") as bar:
            report = make_report(storage, manifest, num, seed, bar.update)
        reader = find_reader(storage, manifest, pictures, remarks)

        def open_painter() -> Colors:
            colors = find_colors(storage, manifest, pictures, reader, remarks, seed)
            remarks.add(f"pictures of latents: {colors.says}")
            return colors

        is_slow = choose_device(pictures.device)[0] == "cpu"
        painter = Painter(open_painter, MAX_DECODED if is_slow else float("inf"))
        limit = PICTURE_BYTES // max(1, len(report.cards))
        with progress.bar(len(report.cards), "pictures") as bar:
            shots = make_shots(storage, manifest, report, reader, painter, limit, bar.update)
        if painter.map is not None:
            remarks.add(
                "the VAE did not decode all latents, which takes long on a CPU: the others are in the colours of a map"
            )
        keys = [skip.key for _, examples in report.skips for skip in examples]
        found = read_whole(reader, keys, limit) if reader is not None else ()
        skipped = {key: jpeg for key, jpeg in zip(keys, found, strict=False) if jpeg is not None}
        return render(report, shots, skipped, remarks.lines)


def make_shots(
    storage: Storage,
    manifest: "Manifest",
    report: "Report",
    reader: "Reader | None",
    painter: "Painter",
    limit: int,
    progress: Callable[[int], object],
) -> list["Shot"]:
    """The pictures of a report's cards."""
    from latentprep.look.render import Shot, make_shot
    from latentprep.prepare.thumbnails import Thumbnail, make_thumbnails

    places = [report.images.place(card.number) for card in report.cards]
    made = make_thumbnails(storage, manifest, places, reader, painter, limit, progress)
    return [
        make_shot(card, found.jpeg, found.width, found.box, found.origin, found.warning, found.weight)
        if isinstance(found, Thumbnail)
        else Shot(warning=found)
        for card, found in zip(report.cards, made, strict=True)
    ]


def check_page(file: Path) -> None:
    """Raise UserError unless a page may be written there: nothing is overwritten but an earlier one."""
    check_output("--html", file, ".html", "report")


def write_page(page: str, file: Path) -> None:
    """Write a page: all of it, or nothing. Raises UserError, also for OSError."""
    write_output("--html", file, ".html", "report", page.encode())
