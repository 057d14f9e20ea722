"""Prediction of files of any size: rows in, rows out, a chunk at a time; a killed run goes on where it stopped."""

from __future__ import annotations

import codecs
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import IO, Any

from labeltune.config import ColumnsConfig, DataConfig
from labeltune.data.audit import first_error
from labeltune.data.columns import columns_of_file
from labeltune.data.formats import find_format
from labeltune.data.records import Record, bounded_lines, without_key
from labeltune.data.schemas import parse_record
from labeltune.data.sources import iter_records
from labeltune.data.standard_input import input_records
from labeltune.errors import DataError, OutputError, PromptError, printable
from labeltune.folder_lock import alone_with
from labeltune.inference.predictor import Predictor
from labeltune.inference.row_files import csv_of, is_csv, unfinished_names
from labeltune.output_paths import link_target
from labeltune.progress import note
from labeltune.run_folder import file_hash, remove_leftovers, write_json, writing
from labeltune.types import Example, Prediction

#: Rows that are predicted together and committed together; memory does not grow with the file.
CHUNK_ROWS = 256


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be predicted: it keeps its place in the output."""

    id: str
    fault: str
    source: str

    def to_dict(self) -> dict[str, Any]:
        """As it stands in the output."""
        return {"id": self.id, "error": self.fault, "source": self.source}


Row = Example | BadRow


def read_rows(
    path: Path,
    predictor: Predictor,
    labels: Sequence[str] = (),
    encoding: str | None = None,
    option: str | None = "--encoding",
) -> Iterator[Row]:
    """The rows of a file, each an example or the reason why not.

    Args:
        labels: for rows that bring no candidates.
        encoding: of a text file; the run's when None.
        option: what sets it, for messages; None when nothing does.

    Raises:
        DataError: nothing of the file can be read, or it has no column for the text.
    """
    encoding = encoding or predictor.encoding
    data = DataConfig(columns=predictor.columns, encoding=encoding)
    columns = columns_of_file(path, predictor.task.name, data, answers_required=False)
    if columns.problem is not None:
        raise DataError(f"{columns.problem.where}: {without_key(columns.problem.problem, option)}")
    records = iter_records(path, encoding)
    return rows_of(records, predictor, labels, columns=columns.columns, option=option)


def read_stream(
    file: IO[bytes], predictor: Predictor, labels: Sequence[str] = (), encoding: str | None = None
) -> Iterator[Row]:
    """The rows of standard input: as a file's, and a line that is no JSON object is a document.

    Blank lines are no rows. A line that begins like a JSON object and is none is a row that cannot be predicted.
    """
    encoding = encoding or predictor.encoding
    records, columns = input_records(file, predictor.task.name, predictor.columns, encoding)
    return rows_of(records, predictor, labels, columns=columns)


def rows_of(
    records: Iterable[Record],
    predictor: Predictor,
    labels: Sequence[str] = (),
    first: int = 0,
    columns: ColumnsConfig | None = None,
    option: str | None = "--encoding",
) -> Iterator[Row]:
    """The rows of records, of which `first` is the number of the first one in its file.

    Args:
        columns: names of the columns in this file; the predictor's when None.
        option: what sets the encoding, for messages; None when nothing does.
    """
    task, columns = predictor.task, columns or predictor.columns
    labels_known = task.labels if task.name == "ner" else None
    for number, record in enumerate(records, start=first):
        example, faults = parse_record(
            record, number, task.name, columns, labels_known, answers_required=False
        )
        if example is None:
            own = (record.values or {}).get(columns.id)
            has_id = isinstance(own, str | int) and own != ""
            name = str(own).encode("utf-8", "replace").decode() if has_id else str(number)
            fault = first_error(faults)
            said = without_key(f"{fault.kind}: {fault.message}", option)
            yield BadRow(name, said, record.where)
        else:
            yield with_labels(example, labels)


def with_labels(example: Example, labels: Sequence[str]) -> Example:
    """The example with these candidates, unless it has its own."""
    return example if example.candidates or not labels else replace(example, candidates=tuple(labels))


def predict_rows(
    predictor: Predictor,
    rows: Iterable[Row],
    *,
    min_confidence: float | None = None,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[list[Prediction | BadRow]]:
    """Chunks of answers in the order of the rows.

    Every chunk starts from nothing, so that its answers do not depend on where a run began, to the last bit.
    """
    source = iter(rows)
    while chunk := list(islice(source, CHUNK_ROWS)):
        predictor.engine.forget()
        yield _predict_chunk(predictor, chunk, min_confidence, on_rows)


def predict_lines(
    predictor: Predictor,
    rows: Iterable[Row],
    *,
    min_confidence: float | None = None,
    top_k: int | None = None,
    with_text: bool = False,
    on_rows: Callable[[int], None] | None = None,
) -> Iterator[tuple[list[str], int]]:
    """The same as lines of the output, with the number of bad rows in each chunk; `with_text` puts the document behind."""
    kept: deque[Row] = deque()

    def seen() -> Iterator[Row]:
        for row in rows:
            kept.append(row)
            yield row

    for chunk in predict_rows(predictor, seen(), min_confidence=min_confidence, on_rows=on_rows):
        asked = [kept.popleft() for _ in chunk]
        texts = [row.text if with_text and isinstance(row, Example) else None for row in asked]
        lines = [to_line(row, top_k, text) for row, text in zip(chunk, texts, strict=True)]
        yield lines, sum(isinstance(row, BadRow) for row in chunk)


def _predict_chunk(
    predictor: Predictor,
    chunk: list[Row],
    min_confidence: float | None,
    on_rows: Callable[[int], None] | None,
) -> list[Prediction | BadRow]:
    good = [row for row in chunk if isinstance(row, Example)]
    if on_rows is not None and len(good) < len(chunk):
        on_rows(len(chunk) - len(good))
    try:
        found = iter(predictor.predict(good, min_confidence=min_confidence, on_batch=on_rows))
    except (DataError, PromptError):
        # Some row cannot be asked about; those that can are predicted without it.
        rows = [_askable(predictor, row) for row in chunk]
        if rows == chunk:
            raise
        return _predict_chunk(predictor, rows, min_confidence, on_rows)
    return [next(found) if isinstance(row, Example) else row for row in chunk]


def _askable(predictor: Predictor, row: Row) -> Row:
    if isinstance(row, BadRow):
        return row
    try:
        predictor.check(row)
    except (DataError, PromptError) as error:
        return BadRow(row.id, str(error), row.source)
    return row


def predict_file(
    predictor: Predictor,
    path: Path,
    output: Path,
    *,
    labels: Sequence[str] = (),
    resume: bool = False,
    min_confidence: float | None = None,
    top_k: int | None = None,
    with_text: bool = False,
    progress: Callable[[int], None] | None = None,
    encoding: str | None = None,
) -> int:
    """Predict a file into another, jsonl or (by its name) csv; `output` appears when it is whole.

    Until then answers stand in `.NAME.part` beside it, with a note of what they belong to. After a kill, `resume` keeps the
    whole chunks of it and goes on behind them; the result is that of an uninterrupted run.

    Args:
        encoding: of a text file; the run's when None.

    Returns:
        The number of rows that could not be predicted.

    Raises:
        OutputError: nothing to resume, the rest belongs to another input, run or setting, or another process writes it.
    """
    encoding = encoding or predictor.encoding
    with alone_with_output(output.resolve(), str(output)):
        rows = read_rows(path, predictor, labels, encoding)
        return _predict_into(
            predictor,
            path,
            rows,
            link_target(output),
            labels,
            resume,
            min_confidence,
            top_k,
            with_text,
            progress,
            codecs.lookup(encoding).name,
        )


def alone_with_output(output: Path, name: str) -> AbstractContextManager[None]:
    """Keep other predicts away from an output, a file or folder, while the context is open; a pipe or device has no owner."""
    if output.exists() and not (output.is_file() or output.is_dir()):
        return nullcontext()
    # Beside the output, where every process looks that could write it, whatever its temporary folder is.
    lock = output.with_name(f".{output.name}.lock")
    return alone_with(
        lock,
        f"another predict writes {printable(name)}",
        "wait for it, or choose another --output",
        tidy=True,
    )


def _predict_into(
    predictor: Predictor,
    path: Path,
    source: Iterator[Row],
    output: Path,
    labels: Sequence[str],
    resume: bool,
    min_confidence: float | None,
    top_k: int | None,
    with_text: bool,
    progress: Callable[[int], None] | None,
    encoding: str,
) -> int:
    part, note = (output.with_name(name) for name in unfinished_names(output.name))
    remove_leftovers(note.parent, note.name)
    mine = {
        "input": file_hash(path),
        "run": predictor.fingerprint(),
        "labels": list(labels),
        "min_confidence": min_confidence,
        "top_k": top_k,
        "with_text": with_text,
        "encoding": encoding,
    }
    done = bad = 0
    if resume:
        done, bad = _resumable(part, note, mine, output)
    else:
        with writing(output):
            part.unlink(missing_ok=True)
        write_json(note, mine)
    if progress is not None and done:
        progress(done)
    rows = islice(source, done, None)
    with writing(output, "what is done is kept, go on with --resume"):
        with part.open("ab") as file:
            for lines, faults in predict_lines(
                predictor,
                rows,
                min_confidence=min_confidence,
                top_k=top_k,
                with_text=with_text,
                on_rows=progress,
            ):
                bad += faults
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        if is_csv(output):
            table = output.with_name(f".{output.name}.part.csv")
            with part.open(encoding="utf-8") as done_lines, table.open("w", encoding="utf-8") as file:
                file.writelines(csv_of(done_lines))
                file.flush()
                os.fsync(file.fileno())
            table.replace(output)
            part.unlink()
        else:
            part.replace(output)
    note.unlink(missing_ok=True)
    return bad


def to_line(row: Prediction | BadRow, top_k: int | None = None, text: str | None = None) -> str:
    """A row of the output, with the document it answers when that is given."""
    values = row.to_dict(top_k) if isinstance(row, Prediction) else row.to_dict()
    if text is not None:
        values["text"] = text
    line = json.dumps(values, ensure_ascii=False) + "\n"
    return line.encode("utf-8", "backslashreplace").decode("utf-8")  # names of files may not be UTF-8


def _resumable(part: Path, note: Path, mine: dict[str, Any], output: Path) -> tuple[int, int]:
    """(rows, bad rows) in the whole chunks of an unfinished output; what is behind them is cut off."""
    if not note.exists():
        raise OutputError(f"nothing to resume: there is no unfinished {output}; start without --resume")
    try:
        theirs = dict(json.loads(note.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise OutputError(f"{note} cannot be read: {error}; start without --resume to begin again") from error
    theirs.setdefault("with_text", False)
    theirs.setdefault("encoding", "utf-8")
    if theirs != mine:
        differing = ", ".join(key for key in mine if theirs.get(key) != mine[key])
        raise OutputError(
            f"the unfinished {output} was made with another {differing}; start without --resume to begin again"
        )
    if not part.exists():
        return 0, 0
    lines = bad = keep = kept_bad = at = end = 0
    with part.open("r+b") as file:
        for line in file:
            values = _row(line)
            if values is None:
                break
            lines += 1
            at += len(line)
            bad += "error" in values
            if lines % CHUNK_ROWS == 0:
                keep, kept_bad, end = lines, bad, at
        file.truncate(end)
    return keep, kept_bad


def _row(line: bytes) -> dict[str, Any] | None:
    """A row of an unfinished output; None when it is torn or was damaged by a crash of the machine."""
    try:
        values = json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None
    return values if isinstance(values, dict) else None


def used_encoding(given: str | None, of_run: str, name: str) -> str:
    """The encoding that text is read in: the one that is given, else that of the run's data, which is said unless it is UTF-8."""
    if given is None and of_run != "utf-8" and not name.lower().endswith((".parquet", ".xlsx")):
        note(f"{name} is read as {of_run}, as the run's data was; --encoding names another")
    return given or of_run


def count_rows(path: Path, encoding: str = "utf-8") -> int | None:
    """Rows of a file where they are quickly counted (jsonl, parquet), for a progress bar."""
    if path.suffix.lower() not in (".jsonl", ".json", ".parquet"):
        return None
    with path.open("rb") as file:
        form = find_format(path.name, file, encoding)
        if form.kind == "parquet" and not form.problem:
            import pyarrow as pa
            import pyarrow.parquet as pq

            try:
                return int(pq.read_metadata(path).num_rows)
            except (pa.ArrowException, OSError):
                return None  # reading the rows says what is wrong
        if not form.plain:
            return None
        return sum(1 for line in bounded_lines(file) if line.strip())
