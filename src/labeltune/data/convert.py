"""The instruction/input/output jsonl of the original recipe, as other fine-tuning tools read it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from labeltune.config import RunConfig
from labeltune.data.check import first_error
from labeltune.data.columns import columns_of_file
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
    render: Callable[[Example], dict[str, object]],
    skip: bool = False,
) -> tuple[int, int]:
    """Stream a labelled file into jsonl; the output appears whole or not at all.

    Args:
        render: example -> the row to write.
        skip: leave faulty rows out; else the first one stops the conversion. A fault of the whole file always does.

    Returns:
        Rows written and rows skipped.

    Raises:
        DataError: a row has a fault and `skip` is off, or there is no row to write.
        OutputError: the output cannot be written.
    """
    path = resolve_data(spec, config.hub)
    check_file(output, [path])
    columns = columns_of_file(path, config.task, config.data)
    written = skipped = 0
    with open_whole(output) as file:
        records = columns.records(iter_records(path, config.data.encoding))
        for number, record in enumerate(islice(records, config.data.max_rows)):
            example, faults = parse_record(
                record,
                number,
                config.task,
                columns.columns,
                config.data.labels,
                integer_labels=columns.integer_labels,
                nested=config.data.entities == "nested",
            )
            if example is None:
                if record.whole:
                    raise DataError(without_key(str(first_error(faults))))
                if not skip:
                    raise DataError(
                        f"{first_error(faults)}; repair it, or skip faulty rows with --on-error skip"
                    )
                skipped += 1
                continue
            file.write((json.dumps(render(example), ensure_ascii=False) + "\n").encode())
            written += 1
        if not written:
            raise DataError(f"{printable(str(path))} holds no {'usable row' if skipped else 'rows'}")
    return written, skipped
