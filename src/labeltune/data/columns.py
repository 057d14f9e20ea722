"""Which column of a file holds what: the configured names, else other names that people use, said once."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

from labeltune.config import ColumnsConfig, DataConfig, TaskName
from labeltune.data.containers import ALIASES, INSTRUCTION, WELL_KNOWN
from labeltune.data.formats import Reading
from labeltune.data.records import Record
from labeltune.data.schemas import DOCCANO, is_spans
from labeltune.data.sources import iter_records
from labeltune.io.progress import note

#: Rows that are looked at.
LOOKED_AT = 100
_DEFAULTS = ColumnsConfig()
#: Which column holds the right answer; the names are those of `ColumnsConfig`.
ANSWERS: dict[TaskName, str] = {"classification": "output", "multilabel": "labels", "ner": "entities"}


@dataclass(frozen=True)
class FileColumns:
    """How the columns of one file are read.

    Attributes:
        columns: their names in this file.
        integer_labels: all labels that were looked at are integers.
        numbered: the labels that integers stand for (0 is the first); `data.labels` when None.
        notes: what is not as the config says, to be told.
        problem: why no row of the file can be read.
    """

    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    integer_labels: bool = False
    notes: tuple[str, ...] = ()
    problem: Record | None = None
    numbered: tuple[str, ...] | None = None

    def records(self, records: Iterable[Record]) -> Iterator[Record]:
        """The records of the file, or the one that says why there are none."""
        return iter(records) if self.problem is None else iter((self.problem,))


class _Seen:
    """What the columns of some rows hold.

    Attributes:
        first: place of the first row that could be read, empty when there is none.
        names: column -> whether a value of it is not empty.
        spans: columns with a list of [start, end, type].
    """

    def __init__(self, records: Iterable[Record]) -> None:
        self.first = ""
        self.names: dict[str, bool] = {}
        self.spans: set[str] = set()
        for record in records:
            if record.values is None:
                continue
            self.first = self.first or record.where
            for name, value in record.values.items():
                self.names[name] = self.names.get(name, False) or value not in (None, "")
                if is_spans(value):
                    self.spans.add(name)


def reading_of(data: DataConfig, task: TaskName | None, answers: bool = True) -> Reading:
    """How the files of a config are read."""
    return Reading(task, data.format, data.annotations, data.columns, answers, data.labels)


def numbered(reading: Reading, columns: FileColumns) -> Reading:
    """The reading of a file whose integers stand for the labels of a run."""
    return reading if columns.numbered is None else replace(reading, labels=columns.numbered)


def first_values(path: Path, data: DataConfig) -> list[dict[str, Any]]:
    """The first rows of a file that can be read, for whatever task."""
    records = islice(iter_records(path, data.encoding, reading_of(data, None)), LOOKED_AT)
    return [record.values for record in records if record.values is not None]


def columns_of_file(
    path: Path, task: TaskName, data: DataConfig, answers_required: bool = True
) -> FileColumns:
    """Look at the first rows of a file; what is found is said once on standard error."""
    reading = replace(reading_of(data, task, answers_required), told=False)
    records = iter_records(path, data.encoding, reading)
    return columns_of_records(records, str(path), task, data.columns, answers_required)


def columns_of_records(
    records: Iterable[Record],
    path: str,
    task: TaskName,
    columns: ColumnsConfig,
    answers_required: bool = True,
) -> FileColumns:
    """The same of the records of a file, of which the first are looked at.

    Args:
        path: where it is, for messages.
    """
    seen: list[Record] = []
    for record in islice(records, LOOKED_AT):
        if record.whole:
            return FileColumns(columns, problem=record)
        seen.append(_outline(record))
    found = find_columns(seen, task, columns, answers_required)
    for line in found.notes:
        note(f"{path}: {line}")
    return found


def _outline(record: Record) -> Record:
    """A record whose long values are not kept."""
    values = record.values
    if values is None:
        return record
    short = {k: v[:100] if isinstance(v, str) else v for k, v in values.items()}
    return Record(record.where, short, ours=record.ours)


def find_columns(
    records: Iterable[Record],
    task: TaskName,
    columns: ColumnsConfig,
    answers_required: bool = True,
) -> FileColumns:
    """Decide by some rows.

    Args:
        answers_required: whether the answer's column has to be there.
    """
    wanted = ["text"]
    if answers_required:
        wanted.append(ANSWERS[task])
    records = list(records)
    if any(record.ours for record in records):
        columns = _DEFAULTS
    seen = _Seen(records)
    if not seen.first:
        return FileColumns(columns)
    notes: list[str] = []
    changes: dict[str, str] = {}
    missing: dict[str, list[str]] = {}
    for role in wanted:
        name = getattr(columns, role)
        if name in seen.names:
            continue
        taken = {getattr(columns, other) for other in type(columns).model_fields if other != role}
        found = _candidates(role, seen, taken) if name == getattr(_DEFAULTS, role) else []
        if len(found) != 1:
            missing[role] = found
            continue
        changes[role] = found[0]
        if found[0] not in WELL_KNOWN:
            notes.append(f"column {found[0]!r} is read as {name}")
    if missing:
        problem = Record(
            _header(seen.first), None, "missing_field", _missing(missing, columns, seen, task), whole=True
        )
        return FileColumns(columns, problem=problem)
    columns = columns.model_copy(update=changes)
    labels = (record.values.get(columns.output) for record in records if record.values is not None)
    types = {type(label) for label in labels if label is not None}
    return FileColumns(columns, types == {int}, tuple(notes))


def _header(first: str) -> str:
    """Where the names of the columns stand, by the place of the first row: in the first line of a table, else in every row."""
    path, _, place = first.rpartition(":")
    if place.isdecimal() and path.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        return f"{path}:1"
    return path or first


def _candidates(role: str, seen: _Seen, taken: set[str]) -> list[str]:
    """Columns that may be the one that is missing."""
    filled = [name for name, full in seen.names.items() if full and name not in taken]
    found = [name for name in filled if name.strip().casefold() in ALIASES[role]]
    if role == "text" and not found and INSTRUCTION in filled:
        return [INSTRUCTION]
    return found


def _missing(missing: dict[str, list[str]], columns: ColumnsConfig, seen: _Seen, task: TaskName) -> str:
    """What is missing, what there is, and how to go on.

    Args:
        missing: role -> the columns that may be meant, which are none or several.
    """
    called = {role: _called(role, columns) for role in missing}
    names = ", ".join(map(repr, called.values()))
    there = ", ".join(repr(other) for other in sorted(seen.names)[:20])
    problem = (
        f"no {'column' if len(missing) == 1 else 'columns'} {names}; the file has {there or 'no columns'}"
    )
    for role in missing:
        others = [alias for alias in ALIASES[role] if alias != called[role]]
        if getattr(columns, role) == getattr(_DEFAULTS, role) and others:
            problem += f"; {called[role]!r} may also be called {', '.join(map(repr, others))}"
    role = next(iter(missing))
    if len(missing) == 1 and role != "text":
        if seen.spans:
            return f"{problem}; {min(seen.spans)!r} holds [start, end, type], as doccano writes it: {DOCCANO}"
        if task == "multilabel":
            return f"{problem}; write a list of strings into it, [] for a text to which no label applies, or give --task classification"
        if task == "ner":
            return f"{problem}; write a list of objects into it, [] for a text without entities, or give --task classification"
    keys = {role: found[0] if found else "COLUMN" for role, found in missing.items()}
    hint = "say which one holds it" if len(missing) == 1 else "say which ones hold them"
    rename = f"rename that column to {names}" if len(missing) == 1 else "rename those columns"
    for found in filter(None, missing.values()):
        hint = f"{' and '.join(map(repr, found))} may both be meant, say which"
    if not any(missing.values()) and "output" in missing and seen.names.get("category"):
        keys |= {"output": "category", "category": "candidates"}
        hint = "if 'category' holds the right label"
    given = " ".join(shlex.quote(f"data.columns.{role}={name}") for role, name in keys.items())
    named = "COLUMN" not in keys.values()
    add = f"add {given} to the command{'' if named else ', where COLUMN is its name in the file'}"
    return f"{problem}; {hint}: {add}, or {rename}"


def _called(role: str, columns: ColumnsConfig) -> str:
    """What a reader of the README calls a column that has no other name in the config."""
    name: str = getattr(columns, role)
    return "label" if name == _DEFAULTS.output and role == "output" else name


def tells_task(values: dict[str, Any], columns: ColumnsConfig) -> bool:
    """Whether a row has a column that is read as an answer, so that its task need not be assumed."""
    names = {columns.output, columns.entities, *ALIASES["output"]}
    return guess_task(values, columns) != "classification" or any(
        name.strip().casefold() in names or name in names for name in values
    )


def guess_task(values: dict[str, Any], columns: ColumnsConfig = _DEFAULTS) -> TaskName:
    """What a row looks like: one with entities, with several labels, or with one."""
    if columns.entities in values or "entities" in values or any(map(is_spans, values.values())):
        return "ner"
    if columns.labels in values:
        return "multilabel"
    names = {columns.output, *ALIASES["labels"]}
    lists = [value for name, value in values.items() if name in names and isinstance(value, list)]
    several = any(all(isinstance(label, str) for label in value) for value in lists)
    return "multilabel" if several else "classification"
