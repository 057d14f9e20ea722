"""The check of a file: every fault of its rows, with its place, and those that only show where two files meet."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from labeltune.config import ColumnsConfig, DataConfig, TaskName
from labeltune.data.blocks import Block, cut_file, read_block
from labeltune.data.columns import ANSWERS, FileColumns, columns_of_file, first_values, numbered, reading_of
from labeltune.data.formats import FOR_ANY_TASK, Reading
from labeltune.data.formats.brat import is_brat
from labeltune.data.labels import by_count, misspelt, not_among, twins
from labeltune.data.records import Record
from labeltune.data.schemas import FAULT_KINDS, Fault, parse_record, readable_mentions
from labeltune.data.sources import find_form, iter_records
from labeltune.errors import DataError, counted, listed, printable
from labeltune.io.processes import mapped
from labeltune.types import Example

if TYPE_CHECKING:
    from labeltune.data.loading import Rows

#: Fault messages kept; beyond it they are counted only.
MAX_LISTED = 100_000
_BATCH = 1000
#: Characters of texts that wait to be counted, at most (and one text more).
_BATCH_CHARACTERS = 8_000_000
#: Rows, and bytes, of a block that is checked by another process.
_BLOCK_ROWS = 8192
_BLOCK_BYTES = 4 << 20
#: Smaller files are checked before other processes would have started.
ENOUGH_BYTES = 8 << 20


@dataclass
class Audit:
    """What one pass over a file found.

    Per usable row it holds 20 bytes: two 64-bit hashes and a 32-bit length.

    Attributes:
        rows: records in the file, usable or not.
        usable: rows that became examples.
        without_entities: readable NER rows with no entity.
        repeated_mentions: readable NER rows that name the same (text, label) pair more than once. Readable are rows
            whose text and pairs can be read, also where they are unusable, e.g. because a span does not match: what a
            file holds must not depend on which of its rows have other faults.
        without_candidates: usable classification rows that name no candidates; `first_without` is the place of the first.
        shared_labels: labels that have a share in a soft label.
        first_places: label -> where it stands first, as an answer or a candidate.
    """

    path: Path
    task: TaskName
    rows: int = 0
    usable: int = 0
    without_entities: int = 0
    repeated_mentions: int = 0
    faults: list[Fault] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    candidates: set[str] = field(default_factory=set)
    shared_labels: set[str] = field(default_factory=set)
    without_candidates: int = 0
    first_without: str = ""
    first_places: dict[str, str] = field(default_factory=dict)
    text_hashes: array[int] = field(default_factory=lambda: array("Q"))
    answer_hashes: array[int] = field(default_factory=lambda: array("Q"))
    lengths: array[int] = field(default_factory=lambda: array("I"))
    length_unit: str = "characters"

    def add_fault(self, fault: Fault) -> None:
        """Count a fault, and list it unless there are far too many."""
        self.counts[fault.kind] += 1
        if len(self.faults) < MAX_LISTED:
            self.faults.append(fault)

    def extend(self, other: Audit) -> None:
        """Take over what was found in the records that follow in the same file."""
        self.rows += other.rows
        self.usable += other.usable
        self.without_entities += other.without_entities
        self.repeated_mentions += other.repeated_mentions
        self.without_candidates += other.without_candidates
        self.first_without = self.first_without or other.first_without
        self.faults += other.faults[: MAX_LISTED - len(self.faults)]
        self.counts.update(other.counts)
        self.labels.update(other.labels)
        self.candidates |= other.candidates
        self.shared_labels |= other.shared_labels
        self.first_places = {**other.first_places, **self.first_places}
        self.text_hashes.extend(other.text_hashes)
        self.answer_hashes.extend(other.answer_hashes)
        self.lengths.extend(other.lengths)

    @property
    def unreadable(self) -> Fault | None:
        """Why nothing of the file can be used, where that is so whatever its rows are."""
        return next((fault for fault in self.faults if fault.whole), None)

    @property
    def error_counts(self) -> dict[str, int]:
        """Kind of fault -> how often, without warnings."""
        return {kind: count for kind, count in self.counts.items() if FAULT_KINDS[kind][0] == "error"}

    @property
    def errors(self) -> int:
        """Number of faults that are errors."""
        return sum(self.error_counts.values())

    @property
    def warnings(self) -> int:
        """Number of faults that are warnings."""
        return sum(self.counts.values()) - self.errors

    def first_faults(self, most: int) -> list[Fault]:
        """So many of each kind, in the file's order; all when 0."""
        seen: Counter[str] = Counter()
        found = []
        for fault in self.faults:
            seen[fault.kind] += 1
            if not most or seen[fault.kind] <= most:
                found.append(fault)
        return found

    @property
    def right_labels(self) -> set[str]:
        """The labels that are right somewhere, also by a share."""
        return {*self.labels, *self.shared_labels}

    def label_set(self, named: tuple[str, ...] | None = None) -> tuple[str, ...]:
        """The labels that a config names; else those of the file, sorted: right answers, and candidates where rows name them."""
        return named or tuple(sorted(self.right_labels | self.candidates))

    def length_percentiles(self) -> dict[str, int]:
        """Text lengths at p10, p50, p90, p99 and the maximum, in `length_unit`."""
        if not self.lengths:
            return {}
        lengths = numpy.frombuffer(self.lengths, dtype=numpy.uint32)
        values = {f"p{q}": int(numpy.percentile(lengths, q)) for q in (10, 50, 90, 99)}
        return {**values, "max": int(lengths.max())}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready summary, without the single faults."""
        return {
            "file": printable(str(self.path)),
            "rows": self.rows,
            "usable": self.usable,
            "errors": self.errors,
            "warnings": self.warnings,
            "faults": dict(self.counts.most_common()),
            "labels": by_count(self.labels),
            "rows_without_entities": self.without_entities if self.task == "ner" else None,
            "rows_with_repeated_mentions": self.repeated_mentions if self.task == "ner" else None,
            "length_unit": self.length_unit,
            "length": self.length_percentiles(),
        }


def audit_file(
    path: Path,
    task: TaskName,
    data: DataConfig | None = None,
    *,
    token_counts: Callable[[list[str]], list[int]] | None = None,
    write: Callable[[Example], None] | None = None,
    max_rows: int | None = None,
    columns: FileColumns | None = None,
) -> Audit:
    """Read a file once, checking every row.

    Args:
        token_counts: texts -> their lengths in tokens; characters are counted when None.
        write: called with every usable example, in order.
        max_rows: stop after this many records.
        columns: of this file; found by its first rows when None.
    """
    audit = Audit(path, task, length_unit="tokens" if token_counts else "characters")
    data = data or DataConfig()
    columns = columns or columns_of_file(path, task, data)
    found = iter_records(path, data.encoding, numbered(reading_of(data, task), columns))
    records = islice(columns.records(found), max_rows)
    add_records(audit, records, 0, data, columns, token_counts=token_counts, write=write)
    return finished(audit, data, columns)


def add_records(
    audit: Audit,
    records: Iterable[Record],
    first: int,
    data: DataConfig,
    columns: FileColumns,
    *,
    token_counts: Callable[[list[str]], list[int]] | None,
    write: Callable[[Example], None] | None,
) -> None:
    """Check records, the first of which has the number `first` in its file."""
    names, labels = columns.columns, data.labels
    pending: list[str] = []
    waiting = 0

    def flush() -> None:
        if not pending:
            return  # tokenizers take no empty list
        audit.lengths.extend(token_counts(pending) if token_counts else map(len, pending))
        pending.clear()

    for number, record in enumerate(records, start=first):
        audit.rows += not record.whole
        example, faults = parse_record(
            record,
            number,
            audit.task,
            names,
            labels,
            integer_labels=columns.integer_labels,
            numbered=columns.numbered,
            nested=data.entities == "nested",
        )
        for fault in faults:
            audit.add_fault(fault)
        if example is None:
            if audit.task == "ner":
                _count_mentions(audit, readable_mentions(record, names, labels))
            continue
        audit.usable += 1
        audit.text_hashes.append(text_hash(example.text))
        audit.answer_hashes.append(_answer_hash(example))
        _count_labels(audit, example, record.where)
        if audit.task != "ner" and not example.candidates:
            audit.without_candidates += 1
            audit.first_without = audit.first_without or record.where
        pending.append(example.text)
        waiting += len(example.text)
        if len(pending) >= _BATCH or waiting >= _BATCH_CHARACTERS:
            flush()
            waiting = 0
        if write is not None:
            write(example)
    flush()


def finished(audit: Audit, data: DataConfig, columns: FileColumns) -> Audit:
    """An audit of all records, with the faults that only the whole file shows."""
    labels, name = data.labels, printable(str(audit.path))
    if not audit.rows and not audit.faults:
        audit.add_fault(Fault("no_rows", f"{name}:1", "the file holds no rows", whole=True))
    if columns.integer_labels and audit.usable and labels is None and columns.numbered is None:
        examples = ", ".join(repr(label) for label in sorted(audit.labels)[:3])
        audit.add_fault(
            Fault(
                "integer_labels",
                f"{name}:1",
                f"{columns.columns.output} holds integers; they are read as labels {examples} ...; name them with "
                "data.labels=[first, second, ...], where 0 is the first",
            )
        )
    nouns = ("entity", "entities") if audit.task == "ner" else ("row", "rows")

    def amount(label: str) -> str:
        return counted(audit.labels[label], *nouns)

    for group in twins(audit.first_places):
        rare = min(group, key=lambda label: (audit.labels[label], label))
        listed = ", ".join(
            f"{label!r} ({amount(label)}, first in {_line(audit.first_places[label])})"
            for label in sorted(group, key=lambda label: -audit.labels[label])
        )
        message = f"these differ only in case, width, blanks or characters that cannot be seen: {listed}"
        audit.add_fault(Fault("label_twins", audit.first_places[rare], message))
    for rare, usual in misspelt(audit.labels):
        message = f"{rare!r} ({amount(rare)}) is nearly {usual!r} ({amount(usual)}); is it the same label?"
        audit.add_fault(Fault("misspelt_label", audit.first_places[rare], message))
    if 0 < audit.without_candidates < audit.usable and labels is None:
        audit.add_fault(
            Fault(
                "missing_field",
                audit.first_without,
                f"{audit.without_candidates} of {audit.usable} rows (this is the first) have no candidates in "
                f"{columns.columns.category!r} while others have; add them, or set data.labels",
            )
        )
    return audit


def _line(where: str) -> str:
    """The place in its file, without the file."""
    place = where.rpartition(":")[2]
    return place if place.startswith("row ") else f"line {place}"


def text_hash(text: str) -> int:
    """64-bit hash of a text; equal texts have equal hashes on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8"), digest_size=8).digest(), "little")


def _answer_hash(example: Example) -> int:
    entities = None if example.entities is None else [(e.start, e.end, e.label) for e in example.entities]
    several = [] if example.labels is None else [sorted(example.labels)]
    shares = [example.shares] if example.shares else []
    return text_hash(json.dumps([example.label, entities, *several, *shares], ensure_ascii=False))


def _count_labels(audit: Audit, example: Example, where: str) -> None:
    if not audit.candidates.issuperset(example.candidates):
        audit.candidates.update(example.candidates)
        for label in example.candidates:
            audit.first_places.setdefault(label, where)
    names = example.right_names
    if example.entities is not None:
        _count_mentions(audit, [(entity.text, entity.label) for entity in example.entities])
    shared = dict(example.shares)
    audit.shared_labels.update(shared)
    for label in (*names, *shared):
        audit.first_places.setdefault(label, where)
    audit.labels.update(names)


def _count_mentions(audit: Audit, pairs: list[tuple[str, str]] | None) -> None:
    if pairs is None:
        return
    audit.without_entities += not pairs
    audit.repeated_mentions += len(set(pairs)) < len(pairs)


def add_duplicates(audit: Audit, where: Callable[[int], str]) -> NDArray[numpy.int64]:
    """Add the warnings about rows that stand again.

    Args:
        where: number of a usable row -> its `file:line`.

    Returns:
        Numbers of the usable rows that repeat an earlier row exactly.
    """
    texts = numpy.frombuffer(audit.text_hashes, dtype=numpy.uint64)
    order = numpy.argsort(texts, kind="stable")
    #: row -> (the first row with its text, whether it is the same row).
    again: dict[int, tuple[int, bool]] = {}
    for group in _equal_runs(texts, order):
        first = int(group[0])
        for row in map(int, group[1:]):
            again[row] = first, audit.answer_hashes[row] == audit.answer_hashes[first]
    for row in sorted(again):
        first, same = again[row]
        kind = "exact_duplicate" if same else "conflicting_duplicate"
        message = f"the same row as {where(first)}"
        if not same:
            message = f"the same text as {where(first)}, with another answer"
        audit.add_fault(Fault(kind, where(row), message))
    return numpy.array([row for row in sorted(again) if again[row][1]], dtype=numpy.int64)


def _equal_runs(values: NDArray[numpy.uint64], order: NDArray[numpy.intp]) -> Iterator[NDArray[numpy.intp]]:
    if len(order) < 2:
        return
    ordered = values[order]
    starts = numpy.flatnonzero(numpy.concatenate(([True], ordered[1:] != ordered[:-1])))
    ends = numpy.concatenate((starts[1:], [len(ordered)]))
    for start, end in zip(starts, ends, strict=True):
        if end - start > 1:
            yield order[start:end]


def add_shared(train: Audit, other: Audit, where: Callable[[int], str]) -> list[int]:
    """Add to `other` an error for each of its rows whose text stands in `train`; returns their numbers."""
    mask = numpy.isin(
        numpy.frombuffer(other.text_hashes, dtype=numpy.uint64),
        numpy.frombuffer(train.text_hashes, dtype=numpy.uint64),
    )
    rows = [int(row) for row in numpy.flatnonzero(mask)]
    for row in rows:
        other.add_fault(
            Fault("shared_with_train", where(row), f"this text also stands in {printable(str(train.path))}")
        )
    return rows


def first_error(faults: Sequence[Fault]) -> Fault:
    """The first fault that makes a row unusable; there is one."""
    return next(fault for fault in faults if fault.severity == "error")


def stop_on_errors(audits: Sequence[Audit], skip: bool, fix: str) -> None:
    """Say what is wrong with rows.

    Args:
        skip: only faults of whole files count: nothing is left of such a file.
        fix: what to do where rows have faults.

    Raises:
        DataError: there are errors.
    """
    faults = [f for audit in audits for f in audit.faults if f.severity == "error" and (f.whole or not skip)]
    errors = len(faults) if skip else sum(audit.errors for audit in audits)
    if not errors:
        return
    # What is wrong with a whole file says itself what to do, and no row of it can be left out.
    then = "" if all(fault.whole for fault in faults) else f"\n{fix}"
    raise DataError(
        f"the data holds {errors} {'error' if errors == 1 else 'errors'}:\n  {listed(faults, errors)}{then}"
    )


def none_usable(audit: Audit) -> str:
    """Why a file cannot be used where nothing is left of it."""
    name = printable(str(audit.path))
    return f"{name} holds no usable row; see: labeltune data check {name} --task {audit.task}"


@dataclass(frozen=True)
class _Check:
    """What a process does with a block: (what it found, usable rows as an Arrow stream)."""

    path: Path
    task: TaskName
    data: DataConfig
    columns: FileColumns
    token_counts: Callable[[list[str]], list[int]] | None
    schema: pa.Schema

    def __call__(self, block: Block) -> tuple[Audit, bytes]:
        audit = Audit(self.path, self.task, length_unit="tokens" if self.token_counts else "characters")
        rows: list[dict[str, Any]] = []
        with self.path.open("rb") as file:
            reading = numbered(reading_of(self.data, self.task), self.columns)
            records = islice(read_block(block, file, reading=reading), block.rows)
            add_records(
                audit,
                records,
                block.first,
                self.data,
                self.columns,
                token_counts=self.token_counts,
                write=lambda e: rows.append(e.to_row()),
            )
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.schema) as writer:
            writer.write_table(pa.Table.from_pylist(rows, schema=self.schema))
        return audit, sink.getvalue().to_pybytes()


def can_be_cut(path: Path, encoding: str, reading: Reading = FOR_ANY_TASK) -> bool:
    """Whether blocks of this file can be read by themselves; a csv field may hold line breaks, so those cannot."""
    if is_brat(path):
        return False
    with path.open("rb") as file:
        form = find_form(path.name, file, encoding, reading)
    return form.plain or form.readable_parquet


def audit_blocks(
    path: Path,
    task: TaskName,
    data: DataConfig,
    columns: FileColumns,
    *,
    schema: pa.Schema,
    write_table: Callable[[pa.Table], None],
    workers: int,
    token_counts: Callable[[list[str]], list[int]] | None = None,
    max_rows: int | None = None,
) -> Audit:
    """`audit_file` by several processes.

    Args:
        schema: Arrow schema of the columns of `Example.to_row`.
        write_table: called with tables of the usable rows, in order.

    Raises:
        pyarrow.ArrowException: a parquet file is damaged; `audit_file` says where.
    """
    audit = Audit(path, task, length_unit="tokens" if token_counts else "characters")
    check = _Check(path, task, data, columns, token_counts, schema)
    with closing(mapped(check, _blocks(path, max_rows), workers)) as found:
        for part, rows in found:
            audit.extend(part)
            write_table(pa.ipc.open_stream(rows).read_all())
    return finished(audit, data, columns)


def _blocks(path: Path, max_rows: int | None) -> Iterator[Block]:
    with path.open("rb") as file:
        for block in cut_file(printable(str(path)), file, _BLOCK_ROWS, most_bytes=_BLOCK_BYTES):
            if max_rows is not None and block.first + block.rows >= max_rows:
                if block.first < max_rows:
                    yield replace(block, rows=max_rows - block.first)
                return
            yield block


def add_meeting_faults(train: Rows, other: Rows, data: DataConfig) -> list[int]:
    """Add to the audit of validation or test rows the faults that only show beside the training rows: texts that stand there
    too, and labels that do not. Returns the numbers of the rows that have one, sorted."""
    found = set(add_shared(train.audit, other.audit, other.where))
    known = train.audit.label_set(data.labels)
    whose = "data.labels" if data.labels is not None else "the labels of the training rows"
    if train.audit.usable:
        found |= set(add_unknown_labels(other.audit, other.answers(), known, whose))
    return sorted(found)


def nothing_to_learn(audit: Audit) -> str | None:
    """Why training rows teach nothing: all have the same label, or none has an entity. None when they do, or there are none."""
    if not audit.usable:
        return None
    if audit.task == "classification" and len(audit.right_labels) == 1:
        (label,) = audit.right_labels
        return f"the training rows hold 1 label, {label!r}: there is nothing to tell apart; add rows of other labels"
    if audit.task == "multilabel" and not audit.labels:
        return "no label applies to any of the training rows: there is nothing to tell apart; add rows with labels"
    if audit.task == "ner" and not audit.labels:
        return "the training rows hold no entity: there is nothing to find; add rows with entities"
    return None


def other_task(path: Path, task: TaskName, data: DataConfig) -> str | None:
    """Whether the rows of a file that has no usable one are those of the other task, by their columns; in words, or None."""
    rows, names = first_values(path, data), data.columns
    if any(ANSWERS[each] in row for each in ANSWERS for row in rows):
        names = ColumnsConfig()  # an annotation tool's rows, under the usual names
    read = {each: str(getattr(names, role)) for each, role in ANSWERS.items()}
    mine = read.pop(task)
    if not rows or any(mine in row for row in rows):
        return None
    for other, theirs in read.items():
        if all(theirs in row for row in rows):
            return f"these are rows for task={other} (column {theirs!r}); task={task} reads a column {mine!r}"
    return None


def add_unknown_labels(
    audit: Audit, rows: Iterable[Mapping[str, Any]], known: Sequence[str], whose: str
) -> list[int]:
    """Add an error for each answer that is not in the label set; returns the numbers of the rows that have one.

    A classification row that brings its own candidates is answered with one of these, so its label may be any of them.

    Args:
        rows: the usable rows in order, with the columns `candidates`, `label`, `shares`, `labels`, `entities` and `source` of
            `Example.to_row`.
        known: the label set.
        whose: where it comes from, for the message: "the labels of the training rows".
    """
    names = set(known)
    if names.issuperset(audit.right_labels):
        return []
    found = []
    for number, row in enumerate(rows):
        if row["labels"] is not None:
            unknown = {label: None for label in row["labels"] if label not in names and not row["candidates"]}
        elif row["entities"] is not None:
            unknown = {entity["label"]: None for entity in row["entities"] if entity["label"] not in names}
        else:
            right = [] if row["candidates"] else [row["label"], *(each["label"] for each in row["shares"])]
            unknown = {label: None for label in right if label not in names}
        for label in unknown:
            audit.add_fault(Fault("unknown_label", row["source"], not_among(label, known, whose)))
        if unknown:
            found.append(number)
    return found
