"""Images that belong to those of a source, by path and stem or by name: masks, and control images."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from latentprep.errors import UserError
from latentprep.human import printable
from latentprep.prepare.images.pillow import is_image_name
from latentprep.prepare.source.door import File, Source
from latentprep.prepare.source.listing import is_plain, stem
from latentprep.prepare.source.sources import NoSourceError, open_source
from latentprep.records import Skip


@dataclass(frozen=True, slots=True)
class Partner:
    """A file that belongs to an image: key in its own source, bytes (-1: cannot be looked at) and version."""

    key: str
    nbytes: int
    version: int


@dataclass(frozen=True)
class Partners:
    """Partners by the images that they belong to."""

    source: Source
    by_stem: dict[str, Partner]  # key of an image without its suffix -> its partner
    by_key: dict[str, Partner] = field(default_factory=dict)  # key of an image -> its partner; goes before by_stem
    column: str | None = None  # of SOURCE's metadata files, which names them; None: path and stem do

    @property
    def said(self) -> str:
        """Where they come from, for people."""
        return f"column {printable(self.column)}" if self.column is not None else self.source.where

    @property
    def why_none(self) -> str:
        """Why an image has none, as the detail of its skip."""
        if self.column is not None:
            return f"the metadata files name none as {printable(self.column)}"
        return "no image of its path and stem"

    def find(self, key: str) -> Partner | None:
        """The partner of an image; None where it has none."""
        return self.by_key.get(key) or self.by_stem.get(stem(key))

    def locate(self, partner: Partner) -> str:
        """Where a partner is, for messages."""
        return self.source.locate(partner.key)

    def why_unreadable(self, partner: Partner) -> str:
        """What reading a partner that could not be looked at says."""
        if not is_plain(partner.key):
            return "its name leads outside of the source"
        try:
            self.source.read(partner.key, 0)
        except OSError as error:
            return error.strerror or str(error)
        return "it was not listed: it is hidden (.name), in another cache, or it came meanwhile"


def in_order(masks: Partners | None, controls: Iterable[Partners]) -> tuple[Partners, ...]:
    """The order in which what belongs to an image counts: its mask, then its control images."""
    return (*([masks] if masks is not None else []), *controls)


def list_partners(where: Path | str, option: str, noun: str, missing: str) -> Partners:
    """Every image of a source, as the partner of the image of the same stem. Raises UserError.

    `noun` is what a partner is called, `missing` what is wrong if there is no such source.
    """
    try:
        source = open_source(where, option)
    except NoSourceError:
        raise UserError(f"{option} {where}: {missing}") from None
    by_stem: dict[str, Partner] = {}
    for key, file in list_files(source, option):
        if isinstance(file, Skip):
            raise UserError(f"{option} {where}/{key}: cannot be listed ({file.detail}). Make it readable.")
        if (
            is_image_name(key)
            and (other := by_stem.setdefault(stem(key), Partner(key, file.nbytes, file.version))).key != key
        ):
            raise UserError(f"{option} {where}: {other.key} and {key} are two {noun}s of one image. Remove one.")
    if not by_stem:
        raise UserError(f"{option} {where}: no {noun}s in it. Expected images with the stems of those in SOURCE.")
    return Partners(source, by_stem)


def list_files(source: Source, option: str) -> list[tuple[str, File | Skip]]:
    """Key and file of all that a source holds, sorted by key. Raises UserError."""
    try:
        found = {file.key: file for file in source.list()}
    except OSError as error:
        said = f"cannot be listed ({error.strerror or error}). Make it readable."
        raise UserError(f"{option} {source.where}: {said}") from error
    if not source.is_there():
        raise UserError(
            f"{option} {source.where}: vanished while it was listed. Mount it again, and run the same command."
        )
    return sorted(found.items())
