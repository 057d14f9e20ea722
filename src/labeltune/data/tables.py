"""Tables -> records: lines of separated cells and the sheet of an Excel file, where every cell is a string, and parquet."""

from __future__ import annotations

import csv
import importlib.util
import json
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow
import pyarrow.parquet
from pyarrow import compute

from labeltune.data import records
from labeltune.data.records import Record
from labeltune.errors import MissingExtraError, first_line

if TYPE_CHECKING:
    from openpyxl.worksheet.worksheet import Worksheet

#: Bytes that an Excel file may have when it is unpacked; one that is made to fill a disk has more.
_MOST_UNPACKED = 2 << 30


class _DecodedLines:
    """Feeds csv with checked lines, and remembers the fault that ended them.

    Attributes:
        room: characters that the current row may still have; without it a quote that is never closed reads the whole file.
    """

    def __init__(self, lines: Iterable[tuple[int, str | Record]]) -> None:
        self._lines = iter(lines)
        self.fault: Record | None = None
        self.room = records.MAX_LINE_BYTES

    def __iter__(self) -> _DecodedLines:
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        if isinstance(line, Record):
            self.fault = line
            raise StopIteration
        self.room -= len(line)
        if self.room < 0:
            raise csv.Error(
                f"the row has more than {records.MAX_LINE_BYTES} characters; perhaps a quote is not closed"
            )
        return line


def table_records(name: str, decoded: Iterable[tuple[int, str | Record]], delimiter: str) -> Iterator[Record]:
    """Lines of cells -> records; the first row names the columns.

    Args:
        name: the file's name for messages.
        decoded: as `records.decoded_lines` gives them.
    """
    csv.field_size_limit(1 << 30)
    lines = _DecodedLines(decoded)
    reader = csv.reader(lines, strict=True, delimiter=delimiter)
    header: list[str] | None = None
    while True:
        where = f"{name}:{reader.line_num + 1}"
        lines.room = records.MAX_LINE_BYTES
        try:
            row = next(reader)
        except StopIteration:
            break
        except csv.Error as error:
            if lines.fault is not None:
                break
            yield Record(where, None, "unparsable_line", f"not valid CSV: {error}; the rest was not read")
            return
        if not row or (header is None and _announces_separator(row, delimiter)):
            continue
        if header is None:
            header = [_name(cell) for cell in row]
            problem = _header_problem(header)
            if problem:
                yield Record(where, None, "unparsable_line", problem, whole=True)
                return
        else:
            yield _table_row(where, header, row)
    if lines.fault is not None:
        yield lines.fault


def _announces_separator(row: Sequence[str], delimiter: str) -> bool:
    """Whether this is the line `sep=,` that Excel writes and reads."""
    return row[0] == f"sep={delimiter}" or (row[0] == "sep=" and row[1:] in ([""], ["", ""]))


def _name(cell: str) -> str:
    """A column's name without what cannot be seen around it."""
    return cell.strip().strip("\ufeff\u200b").strip()


def _header_problem(header: Sequence[str]) -> str:
    """Why columns cannot be told apart."""
    unnamed = [number for number, name in enumerate(header, start=1) if not name]
    if len(unnamed) > 1:
        shown = ", ".join(map(str, unnamed[:10]))
        return f"columns {shown} have no name in the header; name them, or delete them; the rest was not read"
    return _named_twice(header)


def _named_twice(names: Sequence[str]) -> str:
    """Why columns cannot be told apart of which two have one name; empty where all differ."""
    twice = next((name for at, name in enumerate(names) if name in names[:at]), None)
    return "" if twice is None else f"two columns are called {twice!r}; rename one; the rest was not read"


def _table_row(where: str, header: Sequence[str], row: Sequence[str]) -> Record:
    if len(row) > len(header) and not any(row[len(header) :]):
        row = row[: len(header)]  # separators at the end of the line, with nothing between them
    if len(row) == len(header):
        return Record(where, dict(zip(header, row, strict=True)))
    problem = f"the header names {len(header)} columns, this row has {len(row)}"
    if len(row) > len(header):
        problem += "; put a value that holds the separator into double quotes"
    return Record(where, None, "unparsable_line", problem)


def sheet_records(name: str, file: BinaryIO) -> Iterator[Record]:
    """The one sheet with rows of an Excel file -> records, each at the number that Excel shows.

    Raises:
        MissingExtraError: openpyxl is not installed.
    """
    if importlib.util.find_spec("openpyxl") is None:
        raise MissingExtraError(f"reading {name}", "xlsx")
    import openpyxl

    last = 0
    try:
        with zipfile.ZipFile(file) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > _MOST_UNPACKED:
            yield _unread(name, f"it has {size} bytes when it is unpacked; save it as .csv")
            return
        file.seek(0)
        book = openpyxl.load_workbook(file, read_only=True, data_only=True)
        filled = [sheet for sheet in book.worksheets if _first_row(sheet) is not None]
        if len(filled) > 1:
            sheets = ", ".join(repr(sheet.title) for sheet in filled[:10])
            yield _unread(
                name, f"{len(filled)} sheets hold rows: {sheets}; keep one, or save the one you mean as .csv"
            )
            return
        for sheet in filled:
            header: list[str] | None = None
            for last, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
                row = [_cell(value) for value in cells]
                if not any(row):
                    continue
                if header is None:
                    while row and not row[-1]:
                        row.pop()
                    header = [_name(cell) for cell in row]
                    problem = _header_problem(header)
                    if problem:
                        yield Record(f"{name}:{last}", None, "unparsable_line", problem, whole=True)
                        return
                else:
                    row += [""] * (len(header) - len(row))
                    yield _table_row(f"{name}:{last}", header, row)
    except Exception as error:  # whatever a damaged workbook makes openpyxl, zipfile and the XML parser say
        problem = f"not a readable Excel file ({first_line(error)}); save it again, or as .csv"
        yield Record(f"{name}:{last + 1}", None, "unparsable_line", problem, whole=not last)


def _unread(name: str, problem: str) -> Record:
    return Record(f"{name}:1", None, "unparsable_line", problem, whole=True)


def _first_row(sheet: Worksheet) -> int | None:
    """Number of the first row with a value."""
    if not hasattr(sheet, "iter_rows"):
        return None
    for number, cells in enumerate(sheet.iter_rows(values_only=True), start=1):
        if any(_cell(value) for value in cells):
            return number
    return None


def _cell(value: object) -> str:
    """As Excel writes it into CSV."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return str(value)


_BATCH_ROWS = 1024
#: Bytes of values that are turned into Python objects at once.
_BATCH_BYTES = 32 * 2**20


def parquet_records(
    name: str,
    source: Path | BinaryIO,
    groups: list[int] | None = None,
    *,
    skip: int = 0,
    first: int = 0,
    classes: Sequence[str] | None = None,
) -> Iterator[Record]:
    """Rows of a parquet file -> records, a few at a time, however far their values unfold.

    Args:
        name: the file's name for messages.
        groups: numbers of row groups; all when None.
        skip: rows of these groups that are passed over.
        first: number of the first row behind them, from 0.
        classes: names that the file may have for numbers of classes; any when None.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    names: dict[str, list[str]] | None = None
    for row, values in enumerate(_parquet_rows(source, groups, skip), start=first + 1):
        if isinstance(values, dict):
            names = _class_names(source, classes) if names is None else names
            yield Record(f"{name}:row {row}", _with_names(values, names) if names else values)
        else:
            yield Record(f"{name}:row {row}", None, "unparsable_line", values)


def _class_names(source: Path | BinaryIO, classes: Sequence[str] | None) -> dict[str, list[str]]:
    """Names that numbers of columns stand for, as Hugging Face's datasets write them into the file's metadata; all of them among `classes`."""
    metadata = pyarrow.parquet.read_schema(source).metadata or {}
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"].items()
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}
    found = {}
    for column, feature in features:
        inner = feature.get("feature", feature) if isinstance(feature, dict) else (feature or [None])[0]
        if (
            isinstance(inner, dict)
            and inner.get("_type") == "ClassLabel"
            and isinstance(inner.get("names"), list)
        ):
            names = inner["names"]
            if classes is None or set(names) <= set(classes):
                found[column] = names
    return found


def _with_names(values: dict[str, Any], classes: dict[str, list[str]]) -> dict[str, Any]:
    def named(value: Any, names: list[str]) -> Any:
        if isinstance(value, list):
            return [named(each, names) for each in value]
        # -1 says that there is no label.
        return names[value] if isinstance(value, int) and 0 <= value < len(names) else None

    return values | {
        column: named(values[column], names) for column, names in classes.items() if column in values
    }


def _parquet_rows(
    source: Path | BinaryIO, groups: list[int] | None, skip: int
) -> Iterator[dict[str, Any] | str]:
    """Every row in order, or in its place why it cannot be read."""
    if problem := columns_problem(source):
        yield problem
        return
    # As dictionaries, so that a value that stands in a million rows is read once.
    strings = [
        f.name
        for f in pyarrow.parquet.read_schema(source)
        if pyarrow.types.is_string(f.type) or pyarrow.types.is_large_string(f.type)
    ]
    with pyarrow.parquet.ParquetFile(
        source, read_dictionary=strings, page_checksum_verification=True
    ) as file:
        for batch in file.iter_batches(batch_size=_batch_rows(file), row_groups=groups):
            wanted = batch.slice(min(skip, len(batch)))
            skip -= len(batch) - len(wanted)
            yield from _batch_values(wanted)


def columns_problem(source: Path | BinaryIO) -> str:
    """Why the columns of a parquet file cannot be told apart; empty where they can.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    return _named_twice(pyarrow.parquet.read_schema(source).names)


def _batch_rows(file: pyarrow.parquet.ParquetFile) -> int:
    """Rows to read at once, by the size that the file gives for its row groups."""
    rows = _BATCH_ROWS
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        a_row = max(1, group.total_byte_size // max(1, group.num_rows))
        rows = min(rows, max(1, _BATCH_BYTES // a_row))
    return rows


def _batch_values(batch: pyarrow.RecordBatch) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch, a few at a time where values are long; of a row that Python cannot hold, the reason."""
    longest = 1
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type) and len(column.dictionary):
            longest = max(longest, compute.max(compute.binary_length(column.dictionary)).as_py() or 1)
    at_once = max(1, _BATCH_BYTES // longest)
    for begin in range(0, len(batch), at_once):
        # Plain values are turned into Python's several times faster than those of a dictionary.
        part = _plain(batch.slice(begin, at_once))
        try:
            found: list[dict[str, Any] | str] = list(part.to_pylist())
        except (
            Exception
        ):  # a date beyond Python's, an unknown time zone, bytes that are not UTF-8: the row is found below
            found = [_row_values(part, number) for number in range(len(part))]
        for values in found:
            yield _too_long(values) or values if longest > records.MAX_LINE_BYTES else values


def _plain(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    columns = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _row_values(batch: pyarrow.RecordBatch, number: int) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = batch.slice(number, 1).to_pylist()[0]
        return row
    except Exception as error:
        return f"not readable parquet: {first_line(error)}"


def _too_long(values: dict[str, Any] | str) -> str | None:
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, str) and len(value) > records.MAX_LINE_BYTES:
                return f"{name} has {len(value)} characters, and a row may have {records.MAX_LINE_BYTES}; split the document"
    return None
