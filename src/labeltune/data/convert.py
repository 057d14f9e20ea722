"""A labelled file -> the instruction/input/output jsonl of the original recipe, or a file of another tool."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path

from labeltune.config import RunConfig
from labeltune.data.check import first_error
from labeltune.data.columns import columns_of_file, reading_of
from labeltune.data.records import without_key
from labeltune.data.schemas import parse_record
from labeltune.data.sources import iter_records, resolve_data
from labeltune.errors import DataError, printable
from labeltune.io.outputs import check_file, open_whole
from labeltune.types import Example


def convert_file(
    spec: str,
    output: Path,
    config: RunConfig,
    write: Callable[[Iterable[Example]], Iterator[str]],
    skip: bool = False,
) -> tuple[int, int]:
    """Stream a labelled file into another; the output appears whole or not at all.

    Args:
        write: examples -> the text of the output, in pieces.
        skip: leave faulty rows out; else the first one stops the conversion. A fault of the whole file always does.

    Returns:
        Rows written and rows skipped.

    Raises:
        DataError: a row has a fault and `skip` is off, cannot be written in that format, or there is no row to write.
        OutputError: the output cannot be written.
    """
    path = resolve_data(spec, config.hub)
    check_file(output, [path])
    counts = {True: 0, False: 0}
    with open_whole(output) as file:
        for piece in write(_good(path, config, skip, counts)):
            file.write(piece.encode())
        if not counts[True]:
            raise DataError(f"{printable(str(path))} holds no {'usable row' if counts[False] else 'rows'}")
    return counts[True], counts[False]


def _good(path: Path, config: RunConfig, skip: bool, counts: dict[bool, int]) -> Iterator[Example]:
    """The rows without a fault; `counts` is told how many rows have none, and have one."""
    data = config.data
    columns = columns_of_file(path, config.task, data)
    records = columns.records(iter_records(path, data.encoding, reading_of(data, config.task)))
    for number, record in enumerate(islice(records, data.max_rows)):
        example, faults = parse_record(
            record,
            number,
            config.task,
            columns.columns,
            data.labels,
            integer_labels=columns.integer_labels,
            nested=data.entities == "nested",
        )
        counts[example is not None] += 1
        if example is not None:
            yield example
        elif record.whole:
            raise DataError(without_key(str(first_error(faults))))
        elif not skip:
            raise DataError(f"{first_error(faults)}; repair it, or skip faulty rows with --on-error skip")
