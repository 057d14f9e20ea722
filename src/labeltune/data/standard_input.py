"""Rows from standard input: read as a file's, where a line that is no JSON object is a document."""

from __future__ import annotations

import codecs
import re
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, islice
from typing import IO, BinaryIO, cast

from labeltune.config import ColumnsConfig, TaskName
from labeltune.data.columns import LOOKED_AT, find_columns
from labeltune.data.containers import Format, is_whole_json, opened
from labeltune.data.records import (
    MAX_LINE_BYTES,
    Record,
    bounded_lines,
    decoded_lines,
    json_records,
    value_records,
)
from labeltune.io.progress import note

NAME = "stdin"
#: Lines that are looked at for two that are not blank, and characters of rows that are held to find their columns.
_MOST_LINES = 1_000
_MOST_CHARACTERS = 1_000_000
_LIKE_JSON = re.compile(r'\s*\{\s*("|\}|$)')


@dataclass(frozen=True)
class _Document(Record):
    """A line that is the text itself."""

    text: str = ""


class _Replayed:
    """A file of which the beginning has been read: lines, the last of which may be cut."""

    def __init__(self, begin: list[bytes], file: IO[bytes]) -> None:
        self._begin, self._file = deque(begin), file

    def readline(self, limit: int) -> bytes:
        line = self._begin.popleft() if self._begin else b""
        if line.endswith(b"\n") or len(line) >= limit:
            return line
        return line + self._file.readline(limit - len(line))


def input_records(
    file: IO[bytes], task: TaskName, columns: ColumnsConfig, encoding: str = "utf-8"
) -> tuple[Iterator[Record], ColumnsConfig]:
    """The records of standard input, each with its line, and the names of their columns.

    A line that begins like a JSON object and is none is a record without values. Blank lines are no records; that some stood
    between others is said at the end.
    """
    form = Format("lines", encoding=codecs.lookup(encoding).name.removesuffix("-sig"))
    file = opened(cast(BinaryIO, file), form)
    begin: list[bytes] = []
    room = MAX_LINE_BYTES
    while room and len(begin) < _MOST_LINES and sum(1 for line in begin if line.strip()) < 2:
        line = file.readline(room)
        if not line:
            break
        begin.append(line)
        room -= len(line)
    text = b"".join(begin).decode("utf-8", "replace").removeprefix("\ufeff")
    if is_whole_json(NAME, text):
        records = value_records(NAME, chain(begin, iter(lambda: file.read(1 << 16), b"")), form.encoding)
    else:
        records = _line_records(bounded_lines(_Replayed(begin, file)), form.encoding)
    first, size = [], 0
    for record in islice(records, LOOKED_AT):
        first.append(record)
        size += len(record.text) if isinstance(record, _Document) else len(str(record.values))
        if size > _MOST_CHARACTERS:
            break
    rows = [record for record in first if not isinstance(record, _Document)]
    found = find_columns(rows, task, columns, answers_required=False)
    for told in found.notes:
        note(f"{NAME}: {told}")
    return _with_texts(chain(first, records), found.columns.text), found.columns


def _with_texts(records: Iterable[Record], column: str) -> Iterator[Record]:
    for record in records:
        yield Record(record.where, {column: record.text}) if isinstance(record, _Document) else record


def _line_records(lines: Iterable[bytes], encoding: str) -> Iterator[Record]:
    blank = skipped = 0
    for number, line in decoded_lines(NAME, lines, encoding=encoding):
        if isinstance(line, str) and (not line or line.isspace()):
            blank += 1
            continue
        skipped, blank = skipped + blank, 0
        if isinstance(line, str) and not _LIKE_JSON.match(line):
            yield _Document(f"{NAME}:{number}", {}, text=line.rstrip("\r\n"))
        else:
            yield from json_records(NAME, [(number, line)])
    if skipped:
        note(f"{NAME}: {skipped} blank lines were skipped; they are no rows and take no id")
