"""Files -> Arrow data sets of checked examples, memory-mapped: texts stay on disk, whatever their number."""

from __future__ import annotations

import errno
import hashlib
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy
import pyarrow as pa
from numpy.typing import NDArray

from labeltune.config import DataConfig, HubConfig, TaskName
from labeltune.data.check import (
    ENOUGH_BYTES,
    Audit,
    add_duplicates,
    add_meeting_faults,
    audit_blocks,
    audit_file,
    can_be_cut,
    none_usable,
    nothing_to_learn,
    other_task,
    stop_on_errors,
)
from labeltune.data.columns import columns_of_file, reading_of
from labeltune.data.schemas import Fault
from labeltune.data.sources import resolve_data
from labeltune.errors import ConfigError, DataError, OutputError, first_line, printable
from labeltune.io.lock import OTHER_TEMPORARY, scratch_folder
from labeltune.io.outputs import writing
from labeltune.io.processes import worker_count
from labeltune.types import Example

if TYPE_CHECKING:
    from datasets import Dataset, Features
    from datasets.arrow_writer import ArrowWriter

#: Characters of texts that wait to be written, at most (and one text more).
_WAITING_CHARACTERS = 8_000_000
#: Hashes that are looked up at once.
_AT_ONCE = 65_536


@dataclass(frozen=True)
class Rows:
    """Checked rows of one file: an Arrow data set in the columns of `Example.to_row`, and what the check found."""

    dataset: Dataset
    audit: Audit

    def where(self, row: int) -> str:
        """`file:line` of a usable row."""
        return str(self.dataset[row]["source"])

    def answers(self) -> Dataset:
        """The rows without their texts."""
        wanted = ["candidates", "label", "shares", "labels", "entities", "source"]
        return self.dataset.select_columns(wanted)

    def without(self, rows: Sequence[int]) -> Rows:
        """All rows but these; the audit stays that of the whole file."""
        keep = numpy.ones(len(self.dataset), dtype=bool)
        keep[list(rows)] = False
        return self if keep.all() else Rows(self.dataset.select(numpy.flatnonzero(keep)), self.audit)

    def example(self, row: int) -> Example:
        """The example with this number."""
        return Example.from_row(self.dataset[row])

    def examples(self) -> list[Example]:
        """All of them, in order."""
        return [self.example(row) for row in range(len(self.dataset))]


@dataclass(frozen=True)
class Splits:
    """Training and validation rows, with what was left out on the way.

    Attributes:
        skipped_rows: rows left out because of their faults.
        skipped: kind of fault -> how often; a row may have several.
        train_texts: 64-bit hashes of the texts of `train`, in its order.
        fingerprints: `train` and `validation` -> SHA-256 of their texts and answers, in order.
    """

    train: Dataset
    validation: Dataset | None
    labels: tuple[str, ...]
    skipped_rows: int
    skipped: dict[str, int]
    train_texts: NDArray[numpy.uint64]
    fingerprints: dict[str, str]

    @property
    def held_out(self) -> int:
        """Number of validation rows."""
        return 0 if self.validation is None else len(self.validation)


def features() -> Features:
    """Arrow types of the columns of `Example.to_row`."""
    from datasets import Features, List, Value

    entity = {
        "text": Value("string"),
        "label": Value("string"),
        "start": Value("int64"),
        "end": Value("int64"),
    }
    return Features(
        {
            "id": Value("string"),
            "text": Value("string"),
            "candidates": List(Value("string")),
            "label": Value("string"),
            "entities": List(entity),
            "source": Value("string"),
            "labels": List(Value("string")),
            "shares": List({"label": Value("string"), "share": Value("float64")}),
        }
    )


def load_rows(
    spec: str,
    task: TaskName,
    data: DataConfig | None = None,
    hub: HubConfig | None = None,
    *,
    max_rows: int | None = None,
    token_counts: Callable[[list[str]], list[int]] | None = None,
    folder: Path | None = None,
    numbered: tuple[str, ...] | None = None,
) -> Rows:
    """Read and check a file or hub data set; usable rows go to an Arrow file that is memory-mapped.

    Args:
        folder: where the Arrow file is kept; when None it has no name, and ends with the process.
        numbered: the labels that integers stand for (0 is the first); `data.labels` when None.

    Raises:
        DataError: the file does not exist or cannot be opened. Faults of rows are in the audit, not raised.
        OutputError: there is no room for the Arrow file.
    """
    path = resolve_data(spec, hub)
    kept = folder is not None
    folder = folder or scratch_folder()
    with writing(folder, OTHER_TEMPORARY):
        # A name of its own: rows loaded earlier are still mapped from theirs.
        handle, target = tempfile.mkstemp(dir=folder, prefix=f"{task}-", suffix=".arrow")
        os.close(handle)
    try:
        audit = _audit_into(
            target, path, task, data, token_counts=token_counts, max_rows=max_rows, numbered=numbered
        )
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OutputError(
                f"checked rows cannot be kept in {folder}: {error.strerror}; {OTHER_TEMPORARY}"
            ) from error
        raise DataError(f"data file {printable(str(path))} cannot be read: {first_line(error)}") from None
    if not audit.usable and (problem := other_task(path, task, data or DataConfig())) is not None:
        audit.faults.clear()
        audit.counts.clear()
        audit.add_fault(Fault("wrong_task", f"{printable(str(path))}:1", problem, whole=True))
    from datasets import Dataset

    if audit.usable:
        dataset = Dataset.from_file(target)
    else:
        dataset = Dataset.from_dict({k: [] for k in features()}, features=features())
    if not kept and sys.platform != "win32":
        # It stays mapped, and is gone with the process however that ends.
        Path(target).unlink()
    return Rows(dataset, audit)


def _audit_into(
    target: str,
    path: Path,
    task: TaskName,
    data: DataConfig | None,
    *,
    token_counts: Callable[[list[str]], list[int]] | None,
    max_rows: int | None,
    numbered: tuple[str, ...] | None,
) -> Audit:
    """Check a file, in several processes where that pays and gives the same; usable rows go to the Arrow file `target`."""
    schema = features()
    data = data or DataConfig()
    columns = replace(columns_of_file(path, task, data), numbered=numbered)
    workers = worker_count(data.workers, path.stat().st_size >= ENOUGH_BYTES)
    if workers > 1 and columns.problem is None and can_be_cut(path, data.encoding, reading_of(data, task)):
        arrow = schema.arrow_schema
        try:
            with pa.OSFile(target, "wb") as file, pa.ipc.new_stream(file, arrow) as stream:
                write = stream.write_table
                return audit_blocks(
                    path,
                    task,
                    data,
                    columns,
                    schema=arrow,
                    write_table=write,
                    workers=workers,
                    token_counts=token_counts,
                    max_rows=max_rows,
                )
        except (pa.ArrowException, OSError, UnicodeDecodeError):
            if path.suffix.lower() != ".parquet":
                raise
            # A damaged file: one process, below, says from which row on.
    from datasets.arrow_writer import ArrowWriter

    with ArrowWriter(path=target, features=schema, writer_batch_size=1000) as writer:
        audit = audit_file(
            path,
            task,
            data,
            token_counts=token_counts,
            write=_Writing(writer),
            max_rows=max_rows,
            columns=columns,
        )
        writer.finalize()
    return audit


class _Writing:
    """Hands examples to an Arrow writer, which keeps a thousand of them: fewer where texts are long."""

    def __init__(self, writer: ArrowWriter) -> None:
        self.writer, self.waiting = writer, 0

    def __call__(self, example: Example) -> None:
        self.writer.write(example.to_row())
        self.waiting += len(example.text)
        if self.waiting >= _WAITING_CHARACTERS:
            self.writer.write_examples_on_file()
            self.waiting = 0


def load_splits(task: TaskName, data: DataConfig, hub: HubConfig | None, seed: int) -> Splits:
    """The training and validation rows of a config, checked as `labeltune data check` does, together with its test rows.

    Rows with errors stop the run, or are left out with `data.on_error: skip`; a file of which no row can be used always
    stops it. Exact duplicates are kept in training,
    but a text never stands on both sides of the split.

    Raises:
        DataError: there are errors and `data.on_error` is `stop`, no usable row is left, or there is nothing to learn.
        ConfigError: more rows are held out than are left.
    """
    rows = load_rows(data.train, task, data, hub, max_rows=data.max_rows)
    add_duplicates(rows.audit, rows.where)
    audits = [rows.audit]
    other: Rows | None = None
    left_out: list[int] = []
    if data.validation is not None:
        other = load_rows(data.validation, task, data, hub)
        left_out = add_meeting_faults(rows, other, data)
        audits.append(other.audit)
    if data.test is not None:
        test = load_rows(data.test, task, data, hub)
        add_meeting_faults(rows, test, data)
        _stop_on_errors([*audits, test.audit], data)
    _stop_on_errors(audits, data)
    for audit in audits:
        if not audit.usable:
            raise DataError(none_usable(audit))
    if (nothing := nothing_to_learn(rows.audit)) is not None:
        raise DataError(f"{rows.audit.path}: {nothing}")
    skipped: Counter[str] = Counter()
    for audit in audits:
        skipped.update(audit.error_counts)
    skipped_rows = sum(audit.rows - audit.usable for audit in audits) + len(left_out)
    everything = numpy.ones(len(rows.dataset), dtype=bool)
    kept = _Part(rows, everything)
    held: _Part | None = None
    if other is not None:
        mask = numpy.ones(len(other.dataset), dtype=bool)
        mask[left_out] = False
        held = _Part(other, mask)
    elif data.validation_fraction > 0:
        mask = _held_out(rows, data.validation_fraction, seed)
        held, kept = _Part(rows, mask), _Part(rows, ~mask)
    if held is not None and not held.mask.any():
        held = None
    return Splits(
        kept.dataset(),
        held.dataset() if held is not None else None,
        rows.audit.label_set(data.labels),
        skipped_rows,
        dict(skipped),
        kept.texts(),
        {name: part.fingerprint() for name, part in (("train", kept), ("validation", held)) if part},
    )


def _held_out(rows: Rows, fraction: float, seed: int) -> NDArray[numpy.bool_]:
    """Which rows validate; shape [usable rows].

    Raises:
        ConfigError: they are more than are left to train on.
    """
    held_out = stratified_split(rows, fraction, seed)
    if 2 * len(held_out) > len(rows.dataset):
        raise ConfigError(
            f"data.validation_fraction={fraction:g} holds out {len(held_out)} of {len(rows.dataset)} rows, "
            "more than are left to train on; lower it, or give a file as data.validation"
        )
    mask = numpy.zeros(len(rows.dataset), dtype=bool)
    mask[held_out] = True
    return mask


@dataclass(frozen=True)
class _Part:
    """Some rows of a file; `mask` tells which, shape [usable rows]."""

    rows: Rows
    mask: NDArray[numpy.bool_]

    def dataset(self) -> Dataset:
        if self.mask.all():
            return self.rows.dataset
        return self.rows.dataset.select(numpy.flatnonzero(self.mask))

    def texts(self) -> NDArray[numpy.uint64]:
        return numpy.array(self.rows.audit.text_hashes, dtype=numpy.uint64)[self.mask]

    def fingerprint(self) -> str:
        answers = numpy.array(self.rows.audit.answer_hashes, dtype=numpy.uint64)[self.mask]
        both = numpy.stack([self.texts(), answers]).astype("<u8")
        return hashlib.sha256(both.tobytes()).hexdigest()


def _stop_on_errors(audits: list[Audit], data: DataConfig) -> None:
    fix = "Repair them, or leave faulty rows out with data.on_error=skip; `labeltune data check` lists all of them"
    stop_on_errors(audits, data.on_error == "skip", fix)


def evenly(count: int, most: int) -> list[int]:
    """Numbers of at most `most` of `count` rows, spread evenly; all of them when they are no more."""
    most = min(most, count)
    return [at * count // most for at in range(most)]


def stratum(row: Mapping[str, Any]) -> str:
    """What a row is counted under when rows are drawn in proportion: its label, or the set of its labels or entity types.

    Args:
        row: with the columns `label`, `labels` and `entities` of `Example.to_row`.
    """
    entities = row["entities"]
    if row["labels"] is not None:
        return "+".join(sorted(row["labels"]))
    if entities is None:
        return row["label"] or ""
    return "+".join(sorted({entity["label"] for entity in entities}))


def stratified_split(rows: Rows, fraction: float, seed: int) -> NDArray[numpy.intp]:
    """Numbers of the rows to hold out, sorted: about `fraction` of every stratum, equal texts on one side.

    A stratum is a label (classification) or the set of a row's entity types (NER). A stratum of one text stays in
    training. Of rows with several labels about `fraction` of every label's are held out.
    """
    hashes = numpy.frombuffer(rows.audit.text_hashes, dtype=numpy.uint64)
    if rows.audit.task == "multilabel":
        texts, firsts = numpy.unique(hashes, return_index=True)
        held = iterative_split(_label_flags(rows)[firsts], fraction, seed)
        return _places(hashes, texts[held])
    codes, names = _strata(rows)
    order = numpy.argsort(codes, kind="stable")
    ends = numpy.cumsum(numpy.bincount(codes, minlength=len(names)))
    generator = numpy.random.default_rng(seed)
    taken = []
    carry = 0.0
    for name in sorted(names):
        code = names[name]
        inside = hashes[order[ends[code - 1] if code else 0 : ends[code]]]
        texts, firsts = numpy.unique(inside, return_index=True)
        if len(texts) == 1:
            continue
        want = fraction * len(texts) + carry
        count = min(round(want), len(texts) - 1)
        carry = min(want - count, 0.5)
        chosen = generator.permutation(len(texts))[:count]
        taken.append(texts[numpy.argsort(firsts)[chosen]])
    if not taken:
        return numpy.zeros(0, dtype=numpy.intp)
    return _places(hashes, numpy.sort(numpy.concatenate(taken)))


def iterative_split(labels: NDArray[numpy.bool_], fraction: float, seed: int) -> NDArray[numpy.intp]:
    """Numbers of the rows to hold out, sorted, by iterative stratification (Sechidis, Tsoumakas and Vlahavas 2011,
    doi:10.1007/978-3-642-23808-6_10): the label with the fewest rows left comes first, and each of them goes to the side that still
    wants most of that label.

    Args:
        labels: which labels each row has, shape [rows, labels].
    """
    generator = numpy.random.default_rng(seed)
    shares = numpy.array([1 - fraction, fraction])
    wanted, rows_wanted = numpy.outer(shares, labels.sum(axis=0)), shares * len(labels)
    side = numpy.full(len(labels), -1)

    def put(row: int, column: int | None) -> None:
        of_label = rows_wanted if column is None else wanted[:, column]
        most = numpy.flatnonzero(of_label >= of_label.max() - 1e-9)
        most = most[rows_wanted[most] >= rows_wanted[most].max() - 1e-9]
        chosen = int(most[0] if len(most) == 1 else generator.choice(most))
        side[row] = chosen
        wanted[chosen] -= labels[row]
        rows_wanted[chosen] -= 1

    while True:
        left = labels[side < 0].sum(axis=0)
        if not left.any():
            break
        column = int(numpy.where(left > 0, left, len(labels) + 1).argmin())
        for row in generator.permutation(numpy.flatnonzero(labels[:, column] & (side < 0))):
            put(int(row), column)
    for row in generator.permutation(numpy.flatnonzero(side < 0)):
        put(int(row), None)
    return numpy.flatnonzero(side == 1)


def _label_flags(rows: Rows) -> NDArray[numpy.bool_]:
    """Which labels each row has, shape [rows, labels], labels in the order of their names."""
    place = {label: column for column, label in enumerate(sorted(rows.audit.labels))}
    found = numpy.zeros((len(rows.dataset), len(place)), dtype=bool)
    for number, labels in enumerate(rows.dataset["labels"]):
        found[number, [place[label] for label in labels]] = True
    return found


def _places(values: NDArray[numpy.uint64], wanted: NDArray[numpy.uint64]) -> NDArray[numpy.intp]:
    """Where `values` are among `wanted`, which is sorted; `numpy.isin` would sort them all, in 50 bytes each."""
    found = numpy.zeros(len(values), dtype=bool)
    for at in range(0, len(values) if len(wanted) else 0, _AT_ONCE):
        part = values[at : at + _AT_ONCE]
        places = numpy.searchsorted(wanted, part)
        found[at : at + _AT_ONCE] = wanted[numpy.minimum(places, len(wanted) - 1)] == part
    return numpy.flatnonzero(found)


def _strata(rows: Rows) -> tuple[NDArray[numpy.int32], dict[str, int]]:
    """The stratum of every row as a number, shape [rows], int32; and the numbers by name."""
    names: dict[str, int] = {}
    codes = numpy.zeros(len(rows.dataset), dtype=numpy.int32)
    at = 0
    for batch in (
        rows.dataset.select_columns(["label", "labels", "entities"])
        .with_format("arrow")
        .iter(batch_size=1000)
    ):
        for row in batch.to_pylist():
            codes[at] = names.setdefault(stratum(row), len(names))
            at += 1
    return codes, names
