"""Faults that no file has by itself: they show where two files meet, or a file and a run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.config import DataConfig, TaskName
from labeltune.data.audit import Audit, add_shared
from labeltune.data.labels import not_among
from labeltune.data.schemas import Fault
from labeltune.data.sources import iter_records

if TYPE_CHECKING:
    from labeltune.data.loading import Rows

#: Records that tell which task a file without a usable row is for.
_LOOKED_AT = 100


def add_meeting_faults(train: Rows, other: Rows, data: DataConfig) -> list[int]:
    """Add to the audit of validation or test rows the faults that only show beside the training rows: texts that stand there
    too, and labels that do not. Returns the numbers of the rows that have one, sorted."""
    found = set(add_shared(train.audit, other.audit, other.where))
    known = data.labels or train.audit.label_set()
    whose = "data.labels" if data.labels is not None else "the labels of the training rows"
    if train.audit.usable:
        found |= set(add_unknown_labels(other.audit, other.answers(), known, whose))
    return sorted(found)


def nothing_to_learn(audit: Audit) -> str | None:
    """Why training rows teach nothing: all have the same label, or none has an entity. None when they do, or there are none."""
    if not audit.usable:
        return None
    if audit.task == "classification" and len(audit.labels) == 1:
        (label,) = audit.labels
        return f"the training rows hold 1 label, {label!r}: there is nothing to tell apart; add rows of other labels"
    if audit.task == "ner" and not audit.labels:
        return "the training rows hold no entity: there is nothing to find; add rows with entities"
    return None


def other_task(path: Path, task: TaskName, data: DataConfig) -> str | None:
    """Whether the rows of a file that has no usable one are those of the other task, by their columns; in words, or None."""
    mine, theirs = data.columns.output, data.columns.entities
    other = "ner"
    if task == "ner":
        mine, theirs, other = theirs, mine, "classification"
    first = islice(iter_records(path, data.encoding), _LOOKED_AT)
    records = [record.values for record in first if record.values is not None]
    if not records or any(mine in values for values in records) or not all(theirs in v for v in records):
        return None
    return f"these are rows for task={other} (column {theirs!r}); task={task} reads a column {mine!r}"


def add_unknown_labels(
    audit: Audit, rows: Iterable[Mapping[str, Any]], known: Sequence[str], whose: str
) -> list[int]:
    """Add an error for each answer that is not in the label set; returns the numbers of the rows that have one.

    A classification row that brings its own candidates is answered with one of these, so its label may be any of them.

    Args:
        rows: the usable rows in order, with the columns `candidates`, `label`, `entities` and `source` of `Example.to_row`.
        known: the label set.
        whose: where it comes from, for the message: "the labels of the training rows".
    """
    names = set(known)
    if names.issuperset(audit.labels):
        return []
    found = []
    for number, row in enumerate(rows):
        if row["entities"] is not None:
            unknown = {entity["label"]: None for entity in row["entities"] if entity["label"] not in names}
        else:
            unknown = {} if row["candidates"] or row["label"] in names else {row["label"]: None}
        for label in unknown:
            audit.add_fault(Fault("unknown_label", row["source"], not_among(label, known, whose)))
        if unknown:
            found.append(number)
    return found
