"""Parquet files, whole or some of their row groups -> records, a few rows in memory at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from labeltune.data import sources
from labeltune.data.sources import Record
from labeltune.errors import first_line

_PARQUET_BATCH = 1024
#: Bytes of parquet values that are turned into Python objects at once.
_PARQUET_BYTES = 32 * 2**20


def repeated_column(source: Any) -> str | None:
    """The name that two columns of a parquet file have, if any.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    import pyarrow.parquet

    names = pyarrow.parquet.read_schema(source).names
    return next((str(name) for i, name in enumerate(names) if name in names[:i]), None)


def parquet_records(
    name: str, source: Any, groups: list[int] | None = None, first: int = 0, skip: int = 0
) -> Iterator[Record]:
    """The rows of a parquet file, or of some of its row groups.

    Args:
        name: the file's name for messages.
        source: its path, or the open file.
        groups: numbers of row groups; all when None.
        first: number of the first row that is given out, from 0.
        skip: rows of these groups before it.

    Raises:
        pyarrow.ArrowException: the file is damaged.
    """
    import pyarrow.parquet

    twice = repeated_column(source)
    if twice is not None:
        problem = f"two columns are called {twice!r}; rename one; the rest was not read"
        yield Record(f"{name}:row 1", None, "unparsable_line", problem)
        return
    # As dictionaries, so that a value that stands in a million rows is read once.
    strings = [
        f.name
        for f in pyarrow.parquet.read_schema(source)
        if pyarrow.types.is_string(f.type) or pyarrow.types.is_large_string(f.type)
    ]
    row = first
    with pyarrow.parquet.ParquetFile(
        source, read_dictionary=strings, page_checksum_verification=True
    ) as file:
        for batch in file.iter_batches(batch_size=_batch_rows(file), row_groups=groups):
            wanted = batch.slice(min(skip, len(batch)))
            skip -= len(batch) - len(wanted)
            for values in _parquet_rows(wanted):
                row += 1
                where = f"{name}:row {row}"
                if isinstance(values, dict):
                    yield Record(where, values)
                else:
                    yield Record(where, None, "unparsable_line", f"not readable parquet: {values}")


def _batch_rows(file: Any) -> int:
    """Rows to read at once, by the size that the file gives for its row groups."""
    rows = _PARQUET_BATCH
    for number in range(file.metadata.num_row_groups):
        group = file.metadata.row_group(number)
        a_row = max(1, group.total_byte_size // max(1, group.num_rows))
        rows = min(rows, max(1, _PARQUET_BYTES // a_row))
    return rows


def _parquet_rows(batch: Any) -> Iterator[dict[str, Any] | str]:
    """The rows of a batch, a few at a time where values are long; of a row that Python cannot hold, the reason."""
    import pyarrow
    from pyarrow import compute

    longest = 1
    for column in batch.columns:
        if pyarrow.types.is_dictionary(column.type) and len(column.dictionary):
            longest = max(longest, compute.max(compute.binary_length(column.dictionary)).as_py() or 1)
    at_once = max(1, _PARQUET_BYTES // longest)
    for begin in range(0, len(batch), at_once):
        # Plain values are turned into Python's several times faster than those of a dictionary.
        part = _plain(batch.slice(begin, at_once))
        try:
            found: list[dict[str, Any] | str] = list(part.to_pylist())
        except (
            Exception
        ):  # a date beyond Python's, an unknown time zone, bytes that are not UTF-8: the row is found below
            found = [_parquet_row(part, number) for number in range(len(part))]
        for values in found:
            yield _too_long(values) or values if longest > sources.MAX_LINE_BYTES else values


def _plain(batch: Any) -> Any:
    import pyarrow

    columns = [c.dictionary_decode() if pyarrow.types.is_dictionary(c.type) else c for c in batch.columns]
    return pyarrow.RecordBatch.from_arrays(columns, names=batch.schema.names)


def _parquet_row(batch: Any, number: int) -> dict[str, Any] | str:
    try:
        row: dict[str, Any] = batch.slice(number, 1).to_pylist()[0]
        return row
    except Exception as error:
        return first_line(error)


def _too_long(values: dict[str, Any] | str) -> str | None:
    if isinstance(values, dict):
        for name, value in values.items():
            if isinstance(value, str) and len(value) > sources.MAX_LINE_BYTES:
                return f"{name} has {len(value)} characters, and a row may have {sources.MAX_LINE_BYTES}; split the document"
    return None
