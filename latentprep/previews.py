"""What `preview` does, once its arguments are checked: samples chosen, shown, drawn; and the file that it becomes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentprep.cache.storage import Storage
from latentprep.door import Parameter
from latentprep.errors import UserError, check_choice
from latentprep.human import counted
from latentprep.option_files import expand
from latentprep.options import SHOWS, ImageSet
from latentprep.outputs import MARK, check_output, write_output
from latentprep.progress import Progress
from latentprep.quiet import quiet_logs, quiet_warnings
from latentprep.runs import choose_sets
from latentprep.sets import make_sets

if TYPE_CHECKING:
    from latentprep.cache.manifest import Manifest
    from latentprep.prepare.preview import Colors
    from latentprep.prepare.preview_source import Reader


@dataclass(frozen=True)
class Pictures:
    """Where the pictures of a cache come from: its images, and latents that a VAE decodes."""

    source: Path | None  # where the images are; None: where they were
    named: tuple[tuple[ImageSet, ...], ...]  # if the source is a .toml file: the sets of each of its runs
    parameters: Sequence[Parameter]  # of encode, by which the arguments that a cache remembers are read
    model: str | None  # whose VAE decodes; None: the cache's own
    vae: str | None
    device: str


class Remarks:
    """Lines that are said while pictures are made, and stand on what is made."""

    def __init__(self, progress: Progress) -> None:
        self.progress, self.lines = progress, list[str]()

    def add(self, line: str) -> None:
        self.progress.say(f"note     {line}")
        self.lines.append(line)


def run_preview(
    cache: str,
    progress: Progress,
    pictures: Pictures,
    *,
    pattern: str | None,
    key: str | None,
    show: str,
    num: int,
    seed: int,
) -> Any:
    """A contact sheet of some images of a cache. Raises UserError."""
    from latentprep.cache.manifest import open_manifest
    from latentprep.cache.readers import Reading
    from latentprep.look.samples import RANKINGS, choose_samples
    from latentprep.prepare.images.pillow import kept_limit
    from latentprep.prepare.preview import make_cards, without_weight
    from latentprep.sheet import draw_sheet

    check_choice("--show", show, SHOWS)
    if pattern is not None and key is not None:
        raise UserError("--key with PATTERN: one is a name, the other fits many. Give one of them.")
    remarks, storage = Remarks(progress), Storage(cache)
    with Reading(storage), quiet_warnings, kept_limit():
        manifest = open_manifest(storage)
        samples, num_images = choose_samples(storage, manifest, show, num, seed, pattern, key)
        with quiet_logs:
            reader = find_reader(storage, manifest, pictures, remarks)
            colors = find_colors(storage, manifest, pictures, reader, remarks, seed)
            progress.say(f"latents  {colors.says}")
            with progress.bar(len(samples), "preview") as bar:
                cards = list(make_cards(storage, manifest, samples, reader, colors, bar.update))
    order = RANKINGS[show].order if show in RANKINGS else f"at random (seed {seed})"
    heading = [cache, f"{counted(len(samples), 'sample')} of {counted(num_images, 'image')}, {order}", colors.says]
    return draw_sheet(heading, remarks.lines, without_weight(cards))


def find_reader(storage: Storage, manifest: "Manifest", pictures: Pictures, remarks: Remarks) -> "Reader | None":
    """What reads the images of a cache, from the source or where they were; None, and a remark, if they are not there.

    Raises UserError if a source was given that is not there.
    """
    from latentprep.prepare.preview_source import open_reader

    try:
        where, named = pictures.source, pictures.named
        if where is None:
            if not manifest.made_with.source:
                raise UserError("the cache does not say where they were. Give --source.")
            where = Path(manifest.made_with.source)
            runs = expand({"again": storage.root}, pictures.parameters) if manifest.sets else []
            named = tuple(make_sets(run["source"].sets, {}, pictures.parameters) for run in runs if run["source"].sets)
        sets = choose_sets(where, named, manifest) if named else ()
        return open_reader(storage, manifest, where, sets, remarks.add)
    except (UserError, OSError) as error:  # of a path that is too long, say
        if pictures.source is not None:
            raise
        remarks.add(f"no images: {error}")
        return None


def find_colors(
    storage: Storage, manifest: "Manifest", pictures: Pictures, reader: "Reader | None", remarks: Remarks, seed: int
) -> "Colors":
    """What makes pictures of latents; a remark if that is not the cache's VAE. Raises UserError."""
    from latentprep.prepare.preview import open_colors

    colors, why = open_colors(
        storage, manifest, reader, model=pictures.model, vae=pictures.vae, device=pictures.device, seed=seed
    )
    if why:
        remarks.add(why)
    return colors


def check_sheet(file: Path) -> None:
    """Raise UserError unless a sheet may be written there: nothing is overwritten but an earlier sheet."""
    check_output("--preview", file, ".png", "sheet")


def write_sheet(image: Any, file: Path) -> None:
    """Write a sheet as PNG: all of it, or nothing. Raises UserError, also for OSError."""
    from io import BytesIO

    from PIL.PngImagePlugin import PngInfo

    mark, data = PngInfo(), BytesIO()
    mark.add_text("Software", MARK.format(kind="sheet"))
    image.save(data, "PNG", pnginfo=mark)
    write_output("--preview", file, ".png", "sheet", data.getvalue())
