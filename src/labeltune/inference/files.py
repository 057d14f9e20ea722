"""Prediction of files of any size: rows in, lines out (jsonl, csv), a chunk at a time; a killed run goes on where it stopped."""

from __future__ import annotations

import codecs
import csv
import io
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pyarrow

from labeltune.config import ColumnsConfig, DataConfig, TaskName
from labeltune.config_values import FormatName
from labeltune.data.blocks import TO_PREDICT, Block, block_records, cut_file
from labeltune.data.check import can_be_cut, first_error
from labeltune.data.columns import columns_of_file
from labeltune.data.formats import Reading
from labeltune.data.formats.write import PREDICTED
from labeltune.data.records import Record, without_key
from labeltune.data.schemas import parse_record
from labeltune.data.sources import iter_records
from labeltune.data.standard_input import input_records
from labeltune.errors import (
    ConfigError,
    DataError,
    Interrupted,
    OutputError,
    PromptError,
    counted,
    printable,
)
from labeltune.io.lock import alone_with
from labeltune.io.outputs import file_hash, link_target, remove_leftovers, write_json, writing
from labeltune.io.progress import note as say_once
from labeltune.io.progress import row_progress, tell
from labeltune.io.run_folder import naming_folder
from labeltune.types import Example, Prediction

if TYPE_CHECKING:
    from labeltune.inference.predictor import Predictor

#: Rows that are predicted together and committed together; memory does not grow with the file.
CHUNK_ROWS = 256
#: Columns of csv.
_LABEL = ("id", "label", "confidence", "ranking", "answer", "parsed")
_LABELS = ("id", "labels", "ranking", "answer", "parsed")
_ENTITIES = ("id", "entities", "answer", "parsed", "truncated")
#: What people call tables that are not written.
_OTHERS = (".tsv", ".xlsx", ".xls", ".parquet", ".arrow")


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


@dataclass(frozen=True)
class PredictOptions:
    """What the lines of an output follow from beside the rows and the run.

    Attributes:
        labels: candidates for rows that bring none.
        min_confidence: probability of the best candidate below which the label is null.
        top_k: candidates shown a row; all when None.
        threshold: probability from which on one of several labels is given; the run's own when None.
        to: an annotation tool whose tasks are written, with the predictions to start from (`PREDICTED`); our rows when None.
        with_text: rows hold their document.
        encoding: of a text file; the run's when None.
    """

    labels: tuple[str, ...] = ()
    min_confidence: float | None = None
    top_k: int | None = None
    with_text: bool = False
    encoding: str | None = None
    threshold: float | None = None
    to: str | None = None


_DEFAULTS = PredictOptions()


def read_rows(
    path: Path,
    predictor: Predictor,
    labels: Sequence[str] = (),
    encoding: str | None = None,
    *,
    option: str | None = "--encoding",
    block: Block | None = None,
) -> Iterator[Row]:
    """The rows of a file, each an example or the reason why not.

    Args:
        labels: for rows that bring no candidates.
        encoding: of a text file; the run's when None.
        option: what sets it, for messages; None when nothing does.
        block: the part of the file to read; all of it when None.

    Raises:
        DataError: nothing of the file can be read, or it has no column for the text.
    """
    encoding = encoding or predictor.encoding
    columns = text_columns(
        path, predictor.task.name, predictor.columns, encoding, option, predictor.format_name
    )
    reading = reading_for(predictor)
    if block is None:
        records = iter_records(path, encoding, reading)
    else:
        records = _records_of_block(path, block, encoding, reading)
    first = block.first if block is not None else 0
    return rows_of(records, predictor, labels, first=first, columns=columns, option=option)


def text_columns(
    path: Path,
    task: TaskName,
    columns: ColumnsConfig,
    encoding: str,
    option: str | None,
    format_name: FormatName = "auto",
) -> ColumnsConfig:
    """Under which names the columns of a file to predict are read.

    Args:
        columns: the run's own names.
        option: what sets the encoding, for messages; None when nothing does.

    Raises:
        DataError: nothing of the file can be read, or it has no column for the text.
    """
    data = DataConfig(columns=columns, encoding=encoding, format=format_name)
    found = columns_of_file(path, task, data, answers_required=False)
    if found.problem is not None:
        raise DataError(f"{found.problem.where}: {without_key(found.problem.problem, option)}")
    return found.columns


def reading_for(predictor: Predictor) -> Reading:
    """How files are read whose rows are predicted."""
    task = predictor.task
    return Reading(
        task.name, predictor.format_name, columns=predictor.columns, answers=False, labels=task.labels
    )


def _records_of_block(path: Path, block: Block, encoding: str, reading: Reading) -> Iterator[Record]:
    with path.open("rb") as file:
        yield from block_records(block, file, encoding, reading)


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
    *,
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


def predict_rows(predictor: Predictor, rows: Iterable[Row]) -> Iterator[tuple[Row, Prediction | BadRow]]:
    """Every row with its answer, in order.

    Every chunk of `CHUNK_ROWS` starts from nothing, so that its answers do not depend on where a run began, to the last bit.
    """
    source = iter(rows)
    while chunk := list(islice(source, CHUNK_ROWS)):
        yield from zip(chunk, _predict_chunk(predictor, chunk), strict=True)


def predict_lines(
    predictor: Predictor, rows: Iterable[Row], options: PredictOptions
) -> Iterator[tuple[str, bool]]:
    """The same as lines of the output, each with whether its row could be predicted."""
    for row, answer in predict_rows(predictor, rows):
        with_text = options.with_text or options.to is not None
        text = row.text if with_text and isinstance(row, Example) else None
        yield to_line(answer, options, text), isinstance(answer, Prediction)


def _predict_chunk(predictor: Predictor, chunk: list[Row]) -> Iterator[Prediction | BadRow]:
    found = predictor.stream([row for row in chunk if isinstance(row, Example)])
    for done, row in enumerate(chunk):
        try:
            answer = next(found) if isinstance(row, Example) else row
        except (DataError, PromptError):
            # Some row cannot be asked about; those that can are predicted without it.
            rest = [_askable(predictor, left) for left in chunk[done:]]
            if rest == chunk[done:]:
                raise
            yield from _predict_chunk(predictor, rest)
            return
        yield answer


def _askable(predictor: Predictor, row: Row) -> Row:
    fault = predictor.fault(row) if isinstance(row, Example) else None
    return row if fault is None else BadRow(row.id, str(fault), row.source)


def predict_file(
    predictor: Predictor,
    path: Path,
    output: Path,
    options: PredictOptions = _DEFAULTS,
    *,
    block: Block | None = None,
    resume: bool = False,
    progress: bool = False,
) -> int:
    """Predict a file into another, jsonl or (by its name) csv; `output` appears when it is whole.

    Until then answers stand in `.NAME.part` beside it. After a kill, `resume` goes on behind its whole chunks, to the same result.

    Args:
        block: the part of the file to predict (a shard); all of it when None.
        progress: show a bar, and say at the end what was written.

    Returns:
        The number of rows that could not be predicted.

    Raises:
        OutputError: nothing to resume, the rest belongs to another input, run or setting, or another process writes it.
    """
    started = time.monotonic()
    encoding = codecs.lookup(options.encoding or predictor.encoding).name
    target = link_target(output)
    part, note = (target.with_name(name) for name in unfinished_names(target.name))
    with alone_with_output(output.resolve(), str(output)):
        rows = read_rows(path, predictor, options.labels, encoding, block=block)
        remove_leftovers(note.parent, note.name)
        mine = {
            "input": file_hash(path),
            "shard": [block.first, block.rows] if block is not None else None,
            "run": predictor.fingerprint(),
            **asdict(options),
            "labels": list(options.labels),
            "encoding": encoding,
        }
        done, bad = _resumable(part, note, mine, target) if resume else _begin(part, note, mine, target)
        total = block.rows if block is not None else count_rows(path, encoding) if progress else None
        shown = progress and (total is None or total > predictor.decoded_rows)
        try:
            with writing(target, "what is done is kept, go on with --resume"):
                with row_progress(total, "predict", shown) as advance, part.open("ab") as file:
                    if done:
                        advance(done)
                    lines = predict_lines(predictor, islice(rows, done, None), options)
                    while chunk := list(_counting(islice(lines, CHUNK_ROWS), advance)):
                        done += len(chunk)
                        bad += sum(not answered for _, answered in chunk)
                        file.write("".join(line for line, _ in chunk).encode())
                        _to_disk(file)
                _put_in_place(part, target, options.to, predictor)
        except KeyboardInterrupt:
            raise Interrupted(f"stopped; {done:,} rows of the output are kept, go on with --resume") from None
        note.unlink(missing_ok=True)
    if progress:
        tell_written(str(output), done, bad, started)
    return bad


def tell_written(output: str, rows: int, bad: int, started: float) -> None:
    """Say what was written, and in how many seconds since `started` on the monotonic clock."""
    took = time.monotonic() - started
    tell(f"predictions: {printable(output)} ({counted(rows, 'row')}, {counted(bad, 'error')}, {took:.0f} s)")


def _begin(part: Path, note: Path, mine: dict[str, Any], output: Path) -> tuple[int, int]:
    """Start an output from nothing: no row of it is done."""
    with writing(output):
        part.unlink(missing_ok=True)
    write_json(note, mine)
    return 0, 0


def _counting(
    lines: Iterable[tuple[str, bool]], advance: Callable[[int], None]
) -> Iterator[tuple[str, bool]]:
    for line in lines:
        advance(1)
        yield line


def _to_disk(file: IO[Any]) -> None:
    file.flush()
    os.fsync(file.fileno())


def _put_in_place(part: Path, output: Path, to: str | None, predictor: Predictor) -> None:
    """The finished lines become the output, as they are, as csv, or as a tool's tasks."""
    if to is None and not is_csv(output):
        part.replace(output)
        return
    written = output.with_name(f".{output.name}.part.{to or 'csv'}")
    with part.open(encoding="utf-8") as lines, written.open("w", encoding="utf-8") as file:
        if to is not None:
            file.writelines(tasks_of(lines, to, version_of(predictor)))
        else:
            faulty = any('"error"' in line and "error" in json.loads(line) for line in lines)
            lines.seek(0)
            file.writelines(csv_of(lines, faulty))
        _to_disk(file)
    written.replace(output)
    part.unlink()


def version_of(predictor: Predictor, name: str = "") -> str:
    """The version of a model as annotation tools show it: a name, the run's where none is given, and what its answers follow from."""
    weights = predictor.weights
    run = name or ("model" if weights is None else naming_folder(weights.parent).name)
    return f"{run}-{predictor.fingerprint()[:8]}"


def tasks_of(lines: Iterable[str], to: str, version: str) -> Iterator[str]:
    """Lines of predicted rows (JSON) as tasks of an annotation tool; a row that could not be predicted has none, and is counted."""
    left_out = 0

    def answered() -> Iterator[dict[str, Any]]:
        nonlocal left_out
        for row in map(json.loads, lines):
            left_out += "error" in row
            if "error" not in row:
                yield row

    yield from PREDICTED[to](answered(), version)
    if left_out:
        tell(f"{counted(left_out, 'row')} could not be predicted, and got no task")


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


def to_line(row: Prediction | BadRow, options: PredictOptions = _DEFAULTS, text: str | None = None) -> str:
    """A row of the output, with the document it answers when that is given."""
    if isinstance(row, Prediction):
        values = row.to_dict(options.top_k, options.min_confidence, options.threshold)
    else:
        values = row.to_dict()
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
    check_same(theirs, mine, str(output))
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


def check_same(theirs: Mapping[str, Any], mine: Mapping[str, Any], output: str) -> None:
    """Raise OutputError where an unfinished output belongs to another input, run or setting than this one.

    Args:
        theirs: what stands beside the output; older versions wrote fewer keys.
    """
    theirs = {"with_text": False, "encoding": "utf-8", "shard": None, "columns": {}, **theirs}
    differing = ", ".join(key for key in mine if theirs.get(key) != mine[key])
    if differing:
        raise OutputError(
            f"the unfinished {output} was made with another {differing}; start without --resume to begin again"
        )


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
        say_once(f"{name} is read as {of_run}, as the run's data was; --encoding names another")
    return given or of_run


def count_rows(path: Path, encoding: str = "utf-8") -> int | None:
    """Rows of a file where they are quickly counted (jsonl, parquet), for a progress bar."""
    if not can_be_cut(path, encoding, TO_PREDICT):
        return None
    try:
        with path.open("rb") as file:
            return sum(block.rows for block in cut_file(path.name, file, sys.maxsize, encoding=encoding))
    except (pyarrow.ArrowException, OSError):
        return None  # reading the rows says what is wrong


def unfinished_names(name: str) -> tuple[str, str]:
    """Files beside an output of this name, until it is whole: its rows, and the note of what they belong to."""
    return f".{name}.part", f".{name}.part.json"


def parse_shard(text: str) -> tuple[int, int]:
    """`3/16` -> (3, 16).

    Raises:
        ConfigError: it is not of this form, or there is no such shard.
    """
    found = re.fullmatch(r"(\d{1,5})/(\d{1,5})", text)
    if found is None or not 1 <= int(found[1]) <= int(found[2]):
        raise ConfigError(f"--shard={text} must be NUMBER/COUNT, from 1/COUNT to COUNT/COUNT, as in 3/16")
    return int(found[1]), int(found[2])


def shard_output(output: Path, number: int, count: int) -> Path:
    """Where a shard of a file goes: `out.jsonl` -> `out-00003-of-00016.jsonl`; names sort in the order of the rows."""
    return output.with_name(f"{output.stem}-{number:05d}-of-{count:05d}{output.suffix}")


def is_csv(output: Path) -> bool:
    """Whether predictions go there as csv.

    Raises:
        ConfigError: the name promises another kind of table.
    """
    suffix = output.suffix.lower()
    if suffix in _OTHERS:
        raise ConfigError(f"predictions are written as jsonl or csv, not {suffix}; name the output so")
    return suffix == ".csv"


def csv_of(lines: Iterable[str], faulty: bool = True) -> Iterator[str]:
    """Lines of predicted rows (JSON) as lines of csv, with a header and the byte order mark that spreadsheets look for.

    The columns are those of `Prediction.to_dict`, then `error` and `source` of rows that could not be predicted, then `text`
    where the first row that was predicted has it. `ranking`, `labels` and `entities` are JSON, true and false are written so.

    Args:
        faulty: a row may be one that could not be predicted; otherwise its two columns are left out.
    """
    source = iter(lines)
    first: list[str] = []
    answers: tuple[str, ...] = _LABEL
    with_text = False
    for line in source:
        first.append(line)
        row = json.loads(line)
        if "error" not in row:
            answers = _ENTITIES if "entities" in row else _LABELS if "labels" in row else _LABEL
            with_text = "text" in row
            break
    columns = [*answers, *(["error", "source"] if faulty else []), *(["text"] if with_text else [])]
    held = io.StringIO()
    writer = csv.writer(held, lineterminator="\n")
    yield "\ufeff"
    writer.writerow(columns)
    for line in chain(first, source):
        row = json.loads(line)
        writer.writerow([_cell(row.get(column)) for column in columns])
        yield held.getvalue()
        held.seek(0)
        held.truncate()
    yield held.getvalue()


def _cell(value: object) -> object:
    if value is None:
        return ""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list | bool) else value
