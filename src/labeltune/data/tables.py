"""Tables -> records: lines of separated cells, and the sheet of an Excel file. Every cell is a string."""

from __future__ import annotations

import csv
import importlib.util
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, BinaryIO

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
            yield _row(where, header, row)
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
    twice = next((name for at, name in enumerate(header) if name in header[:at]), None)
    if twice is not None:
        return f"two columns are called {twice!r}; rename one; the rest was not read"
    return ""


def _row(where: str, header: Sequence[str], row: Sequence[str]) -> Record:
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
                    yield _row(f"{name}:{last}", header, row)
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
