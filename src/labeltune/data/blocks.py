"""A file cut into blocks of neighbouring records, each of which can be read without the others, by another process or machine.

A block is read to the same records, with the same places in the file, as a pass over the whole file gives.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import BinaryIO

import pyarrow
import pyarrow.parquet

from labeltune.data.formats import Reading
from labeltune.data.records import (
    LongLine,
    Record,
    bounded_lines,
    decoded_lines,
    json_records,
)
from labeltune.data.sources import find_form, records_of
from labeltune.data.tables import columns_problem, parquet_records
from labeltune.errors import DataError, first_line

#: Blocks are cut to be predicted: rows need no answer.
TO_PREDICT = Reading(answers=False)
#: A block that has as many bytes ends, also before it has all its rows.
MOST_BYTES = 32 << 20


@dataclass(frozen=True)
class Block:
    """Neighbouring records of a file.

    Attributes:
        file: name of the file, as messages show it.
        number: the block's number in its file, from 0.
        first: number of its first record in the file, from 0.
        rows: how many records it has.
        line: number of its first line, from 1 (text files).
        start: where it begins, in bytes (text files).
        end: where it ends, in bytes, exclusive.
        whole: no part of the file can be read by itself; what stands before the block is read and passed over.
    """

    file: str
    number: int
    first: int
    rows: int
    line: int = 1
    start: int = 0
    end: int = 0
    whole: bool = False


def joined(blocks: Sequence[Block]) -> Block:
    """Neighbouring blocks of a file as one."""
    first, last = blocks[0], blocks[-1]
    return replace(first, rows=last.first + last.rows - first.first, end=last.end)


class _Counted:
    """Lines, and how many bytes of them have been handed out."""

    def __init__(self, lines: Iterable[bytes]) -> None:
        self.lines, self.bytes = lines, 0

    def __iter__(self) -> Iterator[bytes]:
        for raw in self.lines:
            self.bytes += raw.size if isinstance(raw, LongLine) else len(raw)
            yield raw


def cut_file(
    name: str,
    file: BinaryIO,
    rows: int,
    multiple: int = 1,
    most_bytes: int = MOST_BYTES,
    *,
    encoding: str = "utf-8",
    reading: Reading = TO_PREDICT,
) -> Iterator[Block]:
    """Blocks of any file; one block where its rows do not stand in lines of their own.

    Args:
        name: the file's name, which ends as those of data files do.
        file: opened for reading; it can be positioned.
        rows, multiple, most_bytes: as of `cut_lines`.
        encoding: of a text file.
        reading: what rows of an annotation tool are read for.

    Raises:
        pyarrow.ArrowException: a parquet file is damaged.
    """
    form = find_form(name, file, encoding, reading)
    if form.readable_parquet:
        yield from cut_parquet(name, file, rows)
    elif form.plain:
        yield from cut_lines(name, bounded_lines(file), rows, multiple, most_bytes)
    else:
        count = sum(1 for _ in records_of(name, file, form, reading))
        if count:
            yield Block(name, 0, 0, count, whole=True)


def cut_lines(
    name: str, lines: Iterable[bytes], rows: int, multiple: int = 1, most_bytes: int = MOST_BYTES
) -> Iterator[Block]:
    """Blocks of lines of JSON, in one pass that keeps no line.

    Args:
        name: the file's name.
        lines: as `bounded_lines` gives them.
        rows: records of a block.
        multiple: a block that ends early, because of its bytes, has a multiple of this many records.
    """
    counted = _Counted(lines)
    number = first = count = start = 0
    begin = 1
    for at, line in decoded_lines(name, counted):
        last = isinstance(line, Record) and line.kind == "encoding"
        if not isinstance(line, Record) and (not line or line.isspace()):
            continue
        count += 1
        full = count >= rows or (counted.bytes - start >= most_bytes and count % multiple == 0)
        if full or last:
            yield Block(name, number, first, count, begin, start, counted.bytes)
            number, first, count = number + 1, first + count, 0
            begin, start = at + 1, counted.bytes
        if last:
            return
    if count:
        yield Block(name, number, first, count, begin, start, counted.bytes)


def cut_parquet(name: str, file: BinaryIO, rows: int) -> Iterator[Block]:
    """Blocks of a parquet file by its metadata."""
    total = int(pyarrow.parquet.ParquetFile(file).metadata.num_rows)
    if columns_problem(file):
        total = 1  # a row that says so
    for number, first in enumerate(range(0, total, rows)):
        yield Block(name, number, first, min(rows, total - first))


def file_records(
    name: str, file: BinaryIO, encoding: str = "utf-8", reading: Reading = TO_PREDICT
) -> Iterator[Record]:
    """The records of a whole file that is open.

    Raises:
        pyarrow.ArrowException: a parquet file is damaged.
    """
    form = find_form(name, file, encoding, reading)
    if form.readable_parquet:
        return parquet_records(name, file, classes=reading.classes)
    return records_of(name, file, form, reading)


def read_block(
    block: Block, file: BinaryIO, encoding: str = "utf-8", reading: Reading = TO_PREDICT
) -> Iterator[Record]:
    """The records of a block, with the places they have in the whole file.

    Args:
        file: the file, opened for reading; it can be positioned.
        encoding: of a text file, as it was cut.

    Raises:
        pyarrow.ArrowException: a parquet file is damaged.
    """
    if block.whole:
        form = find_form(block.file, file, encoding, reading)
        records = records_of(block.file, file, form, reading)
        return islice(records, block.first, block.first + block.rows)
    if block.file.lower().endswith(".parquet"):
        return _parquet_rows(block, file, reading.classes)
    file.seek(block.start)
    lines = _Counted(bounded_lines(file))
    decoded = decoded_lines(block.file, _until(lines, block.end - block.start), block.line, block.start)
    return json_records(block.file, decoded)


def block_records(
    block: Block, file: BinaryIO, encoding: str = "utf-8", reading: Reading = TO_PREDICT
) -> Iterator[Record]:
    """`read_block` with errors that say which rows.

    Raises:
        DataError: the file is damaged, or cannot be read there.
    """
    try:
        yield from read_block(block, file, encoding, reading)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        first, last = block.first + 1, block.first + block.rows
        raise DataError(
            f"{block.file}: rows {first} to {last} cannot be read: {first_line(error)}"
        ) from error


def _until(lines: _Counted, size: int) -> Iterator[bytes]:
    for raw in lines:
        yield raw
        if lines.bytes >= size:
            return


def _parquet_rows(block: Block, file: BinaryIO, classes: tuple[str, ...] | None) -> Iterator[Record]:
    """Only the row groups that hold the block are read; what stands before it in its first one is passed over."""
    metadata = pyarrow.parquet.ParquetFile(file).metadata
    groups: list[int] = []
    before = at = 0
    for group in range(metadata.num_row_groups):
        size = metadata.row_group(group).num_rows
        if at < block.first + block.rows and at + size > block.first:
            if not groups:
                before = block.first - at
            groups.append(group)
        at += size
    rows = parquet_records(block.file, file, groups, skip=before, first=block.first, classes=classes)
    return islice(rows, block.rows)
