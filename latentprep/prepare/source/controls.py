"""Control images by folder or by column -> items that have one of each. An edit starts from its control images."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from zlib import crc32

from latentprep.cache.schema import CONTROLS
from latentprep.errors import UserError
from latentprep.options import ImageSet
from latentprep.prepare.source.door import File
from latentprep.prepare.source.listing import EXCLUDED, MAX_VERSION, Listing, Patterns, is_image, is_plain
from latentprep.prepare.source.metadata import READERS, list_tables, read_controls
from latentprep.prepare.source.partners import Partner, Partners, list_files, list_partners
from latentprep.prepare.source.sources import open_source
from latentprep.records import Item, Skip

NO_FOLDER = "expected a folder of images, and there is no such folder."


@dataclass(frozen=True)
class Controls:
    """The control images of a source, in the order of control_1, control_2, ..."""

    partners: tuple[Partners, ...] = ()
    alone: frozenset[str] = frozenset()  # keys of images of the source that are control images, and no targets


def find_controls(part: ImageSet, missing: str = NO_FOLDER) -> Controls:
    """The control images of a set: those of its folders, then those that its columns name. Raises UserError.

    `missing` is what is wrong with a folder that is not there.
    """
    folders = [list_controls(folder, missing) for folder in part.controls]
    if not part.control_columns:
        return Controls(tuple(folders))
    columns, alone = list_columns(part)
    return Controls((*folders, *columns), alone)


def list_columns(part: ImageSet) -> tuple[list[Partners], frozenset[str]]:
    """The images of a set that columns of its metadata files name, and those of them that are no targets.

    A target is what a metadata file has a row for. Raises UserError.
    """
    # all of the source: what is no target, such as the folder of another set's control images, may be named too
    source, columns = open_source(part.source), part.control_columns
    files = {key: file for key, file in list_files(source, "SOURCE") if isinstance(file, File)}
    listing = Listing(source, [], [], {key: file.nbytes for key, file in files.items()})
    tables = [key for key in list_tables(listing) if not is_left_out(key, part)]
    if not tables:
        raise UserError(f"--control-column {columns[0]}: SOURCE {source.where} holds no {', '.join(READERS)}.")
    found: list[Partners] = []
    named, targets = set[str](), set[str]()
    for column in columns:
        control_of = read_controls(listing, tables, column, part.text.caption_encoding)
        partners = {key: as_partner(control, files) for key, control in control_of.items() if control is not None}
        found.append(Partners(source, {}, partners, column))
        targets |= control_of.keys()
        named |= {partner.key for partner in partners.values()}
    return found, frozenset(filter(is_image, (named & files.keys()) - targets))


def is_left_out(key: str, part: ImageSet) -> bool:
    """Whether a file of a set's source is none of the set, as list_images has it: captions do not come from it."""
    if Patterns((*EXCLUDED, *part.exclude)).find(key) is not None or not is_plain(key):
        return True
    folders = {folder.resolve() for folder in part.partners}
    return bool(folders) and not folders.isdisjoint((part.source / key).resolve().parents)


def as_partner(key: str, files: Mapping[str, File]) -> Partner:
    """A file of a source as the partner of an image; with -1 bytes if it is not there: its item then becomes a skip."""
    file = files.get(key)
    if file is None:
        return Partner(key, -1, -1)
    # its name counts: a row may come to name another file of the same size and time, as files of an archive are
    return Partner(key, file.nbytes, file.version ^ crc32(key.encode("utf-8", "surrogateescape")))


def list_controls(where: Path | str, missing: str = NO_FOLDER) -> Partners:
    """Every image of a source, as a control image of the target of the same stem. Raises UserError."""
    return list_partners(where, "--control", "control image", missing)


def add_controls(items: Sequence[Item], controls: Sequence[Partners]) -> tuple[list[Item], list[Skip]]:
    """The items with a control image in each of the sources, whose bytes and version are added; a skip for each other.

    Raises UserError if no item has one in some source.
    """
    for own in controls:
        if not any(own.find(item.key) is not None for item in items):
            raise UserError(
                f"--control-column {own.column}: the metadata files name no image in SOURCE that has one."
                if own.column is not None
                else f"--control {own.source.where}: none of its images has the path and stem of an image in SOURCE."
            )
    added = [add_own(item, controls) for item in items]
    return [own for own in added if isinstance(own, Item)], [own for own in added if isinstance(own, Skip)]


def add_own(item: Item, controls: Iterable[Partners]) -> Item | Skip:
    """An item with its control images, or the Skip that says which of them it lacks."""
    for name, own in zip(CONTROLS, controls, strict=False):
        control = own.find(item.key)
        if control is None:
            return item.skip("no_control", f"{name}: {own.why_none}")
        if control.nbytes < 0:
            return item.skip("io_error", f"its control image {own.locate(control)}: {own.why_unreadable(control)}")
        item = replace(item, nbytes=item.nbytes + control.nbytes, version=join_versions(item.version, control))
    return item


def join_versions(version: int, control: Partner) -> int:
    """A version of an item and a control image of it that differs if either does, or if the two change places.

    The sum would not: whoever gives SOURCE and --control the wrong way round, and then the right way, has the same
    names and the same sums. Files of an archive may all have one time, so the bytes count too.
    """
    return (31 * version + 17 * control.version + control.nbytes) & MAX_VERSION
