"""metadata.jsonl, .csv and .parquet, in the Hub's imagefolder layout -> captions and control images by key."""

import csv
import json
import posixpath
from codecs import BOM_UTF8, BOM_UTF16_BE, BOM_UTF16_LE, BOM_UTF32_BE, BOM_UTF32_LE
from collections.abc import Callable, Collection, Iterator, Sequence
from io import StringIO
from pathlib import PurePosixPath
from typing import Any

from latentprep.errors import UserError
from latentprep.human import human_bytes, printable
from latentprep.keys import name_of
from latentprep.prepare.source.door import NotRegularError
from latentprep.prepare.source.listing import Listing

MAX_CAPTION = (
    64_000  # bytes of a caption file, characters of a cell: 15,000 words; a tokenizer takes a minute for 10 MB
)
MAX_JSON = 2**20  # bytes of one image's .json: img2dataset puts all of EXIF into it
PARQUET_ROWS = 1024  # at once: a small file may hold long texts many times
MAX_METADATA = 2**30  # bytes of a metadata file, which is read as a whole
MAX_PATH = 4096  # characters of the path of a control image, as Linux has it: messages and skips repeat it
FILE_NAME = "file_name"  # the column that names the image, relative to the metadata file
CAPTION_ADVICE = "Say which holds the captions: --caption-column NAME."
CONTROL_ADVICE = "Say which holds the control images: --control-column NAME."
# first bytes of a file -> the encoding that they stand for
MARKS = {
    BOM_UTF8: "UTF-8", BOM_UTF32_LE: "UTF-32", BOM_UTF32_BE: "UTF-32", BOM_UTF16_LE: "UTF-16", BOM_UTF16_BE: "UTF-16",
}  # fmt: skip
Line = tuple[str, dict[str, Any]]  # where it stands; column -> value


def list_tables(listing: Listing) -> list[str]:
    """Keys of the metadata files of a source."""
    return [key for key in listing.others if name_of(key) in READERS]


def read_metadata(listing: Listing, columns: tuple[str, ...], encoding: str) -> dict[str, list[str]]:
    """Key -> captions, of every metadata file: what `columns` hold, in order; rows of one image add up.

    Raises UserError, naming file and line, for what is no such file, and for a column that it does not have.
    """
    captions: dict[str, list[str]] = {}
    num_characters = 0
    for where, table, row in read_rows(listing, list_tables(listing), columns, CAPTION_ADVICE, encoding):
        own = captions.setdefault(key_of(table, row[FILE_NAME]), [])
        for column in columns:
            texts = texts_of(row[column], where, column)
            num_characters += sum(map(len, texts))
            if num_characters > MAX_METADATA:  # a Parquet file of some kB may say a long text a million times
                raise UserError(f"{where}: over {MAX_METADATA:,} characters of captions up to here. Shorten them.")
            own += texts
    return captions


def read_controls(listing: Listing, tables: Sequence[str], column: str, encoding: str) -> dict[str, str | None]:
    """Key -> the key of the control image that `column` names, beside the metadata file or below it; None: none.

    Every image of the metadata files `tables` is in it. Raises UserError, naming file and line, for what is no such
    file, for a column that it does not have, and for an image with two control images.
    """
    found: dict[str, str | None] = {}
    for where, table, row in read_rows(listing, tables, (column,), CONTROL_ADVICE, encoding):
        key, value = key_of(table, row[FILE_NAME]), row[column] or None
        if not isinstance(value, str | None):
            raise UserError(f"{where}: expected the path of an image as {column!r}, got {_short(value)}.")
        if value is not None and len(value) > MAX_PATH:
            raise UserError(f"{where}: a path of over {MAX_PATH:,} characters as {column!r}. Shorten it.")
        control = key_of(table, value) if value is not None else None
        if found.setdefault(key, control) != control:
            raise UserError(
                f"{where}: {printable(key)} has two control images as {column!r}: {printable(str(found[key]))} and "
                f"{printable(str(control))}. Expected one; a second one needs a column of its own."
            )
    return found


def read_rows(
    listing: Listing, tables: Sequence[str], columns: tuple[str, ...], advice: str, encoding: str
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each row of the metadata files `tables`: where it stands, the key of its file, and its values by column.

    The value of FILE_NAME is a text.

    Raises UserError, with `advice` if there is no such column.
    """
    for name in tables:
        for where, row in READERS[name_of(name)](listing, name, (FILE_NAME, *columns), advice, encoding):
            image = row[FILE_NAME]
            if not isinstance(image, str):
                raise UserError(f"{where}: expected a text as {FILE_NAME!r}, got {_short(image)}.")
            yield where, name, row


def key_of(table: str, image: str) -> str:
    """The key of an image that a metadata file names, relative to its own folder: ../a.png lies beside that."""
    return posixpath.normpath(PurePosixPath(table).parent / image)


def texts_of(value: Any, where: str, column: str) -> list[str]:
    """The captions of one cell: a text, a list of texts, or nothing."""
    texts = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(text, str) for text in texts):
        raise UserError(f"{where}: expected a text or a list of texts as {column!r}, got {_short(value)}.")
    if any(len(text) > MAX_CAPTION for text in texts):
        raise UserError(f"{where}: a caption of over {MAX_CAPTION:,} characters as {column!r}. Shorten it.")
    return texts


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)[:80]


def check_columns(where: str, wanted: tuple[str, ...], there: Collection[str], advice: str) -> None:
    """Raise UserError, naming those that are there, where a column is missing."""
    for column in wanted:
        if column not in there:
            hint = "" if column == FILE_NAME else f" {advice}"
            raise UserError(f"{where}: no column {column!r}, only {', '.join(map(repr, there)) or 'none'}.{hint}")


def read_jsonl(listing: Listing, name: str, columns: tuple[str, ...], advice: str, encoding: str) -> Iterator[Line]:
    """A JSON object a line."""
    for number, line in enumerate(read_text(listing, name, encoding).split("\n"), 1):
        if not line.strip():
            continue
        where = f"{name} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            raise UserError(f'{where}: expected {{"{FILE_NAME}": "...", "{columns[-1]}": "..."}}, got {line[:80]}')
        check_columns(where, columns, row, advice)
        yield where, row


def read_csv(listing: Listing, name: str, columns: tuple[str, ...], advice: str, encoding: str) -> Iterator[Line]:
    """Values between commas; the first line names the columns."""
    lines = csv.reader(StringIO(read_text(listing, name, encoding), newline=""), strict=True)
    try:
        header = next(lines, [])
        check_columns(name, columns, header, advice)
        for values in filter(None, lines):  # blank lines have no values
            where = f"{name} line {lines.line_num}"
            if len(values) != len(header):
                raise UserError(
                    f"{where}: {len(values)} values, expected {len(header)}, as in the first line. "
                    'A text with a comma stands between quotes: "a cat, sitting".'
                )
            yield where, dict(zip(header, values, strict=True))
    except csv.Error as error:
        raise UserError(f"{name} line {lines.line_num}: not CSV ({error}).") from None


def read_parquet(listing: Listing, name: str, columns: tuple[str, ...], advice: str, _encoding: str) -> Iterator[Line]:
    """A Parquet table, of which only `columns` are read: others may hold the images. Its texts are UTF-8 always."""
    try:
        from pyarrow import ArrowException, BufferReader, parquet
    except ModuleNotFoundError:
        raise UserError(f"{name}: reading it takes pyarrow. Type: pip install 'latentprep[parquet]'") from None
    data = read_bytes(listing, name, MAX_METADATA)
    try:
        with parquet.ParquetFile(BufferReader(data)) as file:
            check_columns(name, columns, file.schema_arrow.names, advice)
            batches = file.iter_batches(PARQUET_ROWS, columns=list(dict.fromkeys(columns)))
            for number, row in enumerate((row for batch in batches for row in batch.to_pylist()), 1):
                yield f"{name} row {number}", row
    except (ArrowException, OSError, OverflowError, ValueError) as error:  # of dates that Python has not, too
        raise UserError(f"{name}: cannot be read as Parquet ({' '.join(str(error).split())[:200]}).") from None


READERS: dict[str, Callable[[Listing, str, tuple[str, ...], str, str], Iterator[Line]]] = {
    "metadata.jsonl": read_jsonl,
    "metadata.csv": read_csv,
    "metadata.parquet": read_parquet,
}


def read_json(
    listing: Listing, name: str, columns: tuple[str, ...] | None, usual: tuple[str, ...], encoding: str
) -> list[str] | None:
    """The captions in the .json of one image: what all `columns` hold. If `columns` is None: what the first of the
    `usual` ones holds that is there; None if none is there. Raises UserError."""
    try:
        row = json.loads(read_text(listing, name, encoding, MAX_JSON))
    except (ValueError, RecursionError):
        row = None
    if not isinstance(row, dict):
        raise UserError(f"{name}: not a JSON object. Mend or remove it.")
    if columns is None:
        columns = tuple(column for column in usual if column in row)[:1]
        if not columns:
            return None
    check_columns(name, columns, row, CAPTION_ADVICE)
    return [text for column in columns for text in texts_of(row[column], name, column)]


def read_text(listing: Listing, name: str, encoding: str, max_bytes: int = MAX_METADATA) -> str:
    """Text of a file. Raises UserError, also beyond `max_bytes`."""
    return decode(read_bytes(listing, name, max_bytes), name, encoding)


def decode(data: bytes, name: str, encoding: str) -> str:
    """Text of the bytes of a file: by its byte order mark, else in `encoding`. Raises UserError, naming the file."""
    marked = next((own for mark, own in MARKS.items() if data.startswith(mark)), None)
    said = marked or encoding.upper()
    try:
        text = data.decode("utf-8-sig" if marked == "UTF-8" else said)
    except UnicodeError as error:  # of some encodings it is no UnicodeDecodeError, and has no place
        place = getattr(error, "start", 0)
        raise UserError(f"{name}: not {said} text at byte {place}. {suggest(data, marked)}") from None
    if "\0" in text:
        raise UserError(f"{name}: not a text file, it has NUL characters. {suggest(data, marked)}")
    return text


def suggest(data: bytes, marked: str | None) -> str:
    """What to do with bytes that are no text as they were read: in UTF-16 every other byte of most texts is 0."""
    if marked:
        return f"It begins with the mark of {marked}: save it anew."
    half = max(1, len(data) // 2)
    for part, order in ((data[1::2], "le"), (data[::2], "be")):
        if part.count(0) > half / 2:
            return f"It looks like utf-16-{order} without a byte order mark: name that with --caption-encoding."
    return "Save it as UTF-8, or give its encoding, such as --caption-encoding cp1252."


def read_bytes(listing: Listing, name: str, max_bytes: int) -> bytes:
    """All of a file that was listed. Raises UserError, also beyond `max_bytes`."""
    nbytes = listing.others[name]
    try:
        data = listing.source.read(name, max_bytes) if nbytes <= max_bytes else b""
    except NotRegularError:
        raise UserError(f"{name}: not a regular file. Remove it.") from None
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror or error}).") from error
    if (nbytes := max(nbytes, len(data))) > max_bytes:
        raise UserError(f"{name}: {human_bytes(nbytes)}, expected at most {human_bytes(max_bytes)}. Shorten it.")
    return data
