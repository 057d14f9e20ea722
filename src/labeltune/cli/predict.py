"""`labeltune predict`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from labeltune.types import Example


def predict(
    run: Annotated[str, typer.Argument(help="Run folder or checkpoint.")],
    file: Annotated[
        str | None, typer.Argument(help="jsonl, csv or parquet with a `text` column; - or nothing: stdin.")
    ] = None,
    text: Annotated[
        list[str] | None, typer.Option("--text", "-t", help="A document (may be repeated).")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Candidate labels, as a list or between commas.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="jsonl to write; standard output when missing.")
    ] = None,
) -> None:
    """Predict; one JSON line a row, with its id, in the order of the input. On stdin every line is a document."""
    from labeltune.cli.quiet import quiet_libraries
    from labeltune.data.loading import iter_examples
    from labeltune.data.schemas import parse_candidates
    from labeltune.data.sources import resolve_data
    from labeltune.errors import DataError

    labels = tuple(label for label in parse_candidates(category) if label) if category else ()
    rows: list[Example] | None = None
    path: Path | None = None
    if text:
        if file is not None:
            raise DataError("give --text or a file, not both")
        rows = [Example(str(i), t, labels) for i, t in enumerate(text)]
    elif file is None or file == "-":
        try:
            rows = [_stdin_row(i, line, labels) for i, line in enumerate(sys.stdin) if line.strip()]
        except UnicodeDecodeError as error:
            raise DataError(f"standard input is not UTF-8: {error}") from None
    else:
        path = resolve_data(file)
    for row in rows or ():
        if not row.text.strip():
            raise DataError(f"row {row.id}: the text is empty")
    quiet_libraries()
    from labeltune.inference.predictor import load_predictor
    from labeltune.progress import row_progress
    from labeltune.run_folder import write_text

    with load_predictor(run) as predictor:
        task = predictor.task
        if path is not None:
            known = task.labels if task.name == "ner" else None
            rows = list(iter_examples(path, task.name, predictor.columns, known))
        rows = [
            row if row.candidates or not labels else Example(row.id, row.text, labels) for row in rows or []
        ]
        with row_progress(len(rows), "predict", shown=len(rows) > predictor.generation.batch_size) as advance:
            predictions = predictor.predict(rows, on_batch=advance)
    lines = "".join(json.dumps(p.to_dict(), ensure_ascii=False) + "\n" for p in predictions)
    if output is None:
        sys.stdout.write(lines)
    else:
        write_text(output, lines)


def _stdin_row(number: int, line: str, labels: tuple[str, ...]) -> Example:
    """A JSON object with a `text` is a row; every other line is a document."""
    from labeltune.config import ColumnsConfig
    from labeltune.data.schemas import parse_record
    from labeltune.data.sources import Record
    from labeltune.errors import DataError

    stripped = line.strip()
    if stripped.startswith("{"):
        try:
            values = json.loads(stripped)
        except ValueError:
            values = None
        if isinstance(values, dict) and "text" in values:
            record = Record(f"stdin:{number + 1}", values)
            example, faults = parse_record(
                record, number, "classification", ColumnsConfig(), answers_required=False
            )
            if example is None:
                raise DataError(str(faults[0]))
            return example
    return Example(str(number), line.rstrip("\n"), labels, source=f"stdin:{number + 1}")
