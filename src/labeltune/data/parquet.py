"""Parquet files a few rows at a time, however far their values unfold."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from labeltune.errors import first_line

if TYPE_CHECKING:
    import pyarrow.parquet

_BATCH_ROWS = 1024
#: Bytes of values that are turned into Python objects at once.
_BATCH_BYTES = 32 * 2**20


def iter_rows(path: Path, max_length: int) -> Iterator[dict[str, Any] | str]:
    """Every row in order, or in its place why it cannot be read.

    Args:
        max_length: characters that a string may have.
    """
    import pyarrow

    try:
        yield from read_rows(path, max_length)
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        yield f"not readable parquet: {error}"


def read_rows(
    source: Path | BinaryIO | pyarrow.NativeFile,
    max_length: int,
    groups: list[int] | None = None,
    skip: int = 0,
) -> Iterator[dict[str, Any] | str]:
    """The same for a path or an open file, or for some of its row groups.

    Args:
        groups: numbers of row groups; all when None.
        skip: rows of these groups that are passed over.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    import pyarrow.parquet

    twice = repeated_column(source)
    if twice is not None:
        yield f"two columns are called {twice!r}; rename one; the rest was not read"
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
            yield from _rows(wanted, max_length)


def repeated_column(source: Path | BinaryIO | pyarrow.NativeFile) -> str | None:
    """The name that two columns of a parquet file have, if any.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(source).names
    return next((str(name) for i, name in enumerate(names) if name in names[:i]), None)


def _batch_rows(file: pyarrow.parquet.ParquetFile) -> int:
    """Rows to read at once, by the size that the file gives for its row groups."""
    rows = _BATCH_ROWS
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        a_row = max(1, group.total_byte_size // max(1, group.num_rows))
        rows = min(rows, max(1, _BATCH_BYTES // a_row))
    return rows


def _rows(batch: pyarrow.RecordBatch, max_length: int) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch, a few at a time where values are long; of a row that Python cannot hold, the reason."""
    import pyarrow
    from pyarrow import compute

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
            found = [_row(part, number) for number in range(len(part))]
        for values in found:
            yield _too_long(values, max_length) or values if longest > max_length else values


def _plain(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    import pyarrow

    columns = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _row(batch: pyarrow.RecordBatch, number: int) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = batch.slice(number, 1).to_pylist()[0]
        return row
    except Exception as error:
        return f"not readable parquet: {first_line(error)}"


def _too_long(values: dict[str, Any] | str, max_length: int) -> str | None:
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, str) and len(value) > max_length:
                return (
                    f"{name} has {len(value)} characters, and a row may have {max_length}; split the document"
                )
    return None
