"""Raw record -> Example, or every reason why not."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, TypeVar

from labeltune.config import ColumnsConfig, TaskName
from labeltune.data.labels import like, meant, not_among, parse_candidates, parse_shares
from labeltune.data.offsets import stripped, why_elsewhere
from labeltune.data.records import Record
from labeltune.errors import DataError, clipped, printable
from labeltune.types import Entity, Example

Severity = Literal["error", "warning"]

#: Every kind of fault, and what it says. Errors make a row unusable; warnings are worth a look.
FAULT_KINDS: dict[str, tuple[Severity, str]] = {
    "encoding": (
        "error",
        "the file is not in its encoding, which is UTF-8 unless data.encoding says otherwise",
    ),
    "unparsable_line": ("error", "the line, or the file, cannot be parsed"),
    "no_rows": ("error", "the file holds no rows"),
    "missing_field": ("error", "a column is missing"),
    "empty_field": ("error", "a column is empty"),
    "wrong_type": ("error", "a value has the wrong type"),
    "output_not_in_candidates": ("error", "the right label is not among the row's candidates"),
    "duplicate_candidate": ("error", "a candidate label stands twice in its row"),
    "duplicate_label": ("error", "a right label stands twice in its row"),
    "soft_label": ("error", "a soft label holds no shares that sum to 1"),
    "unknown_label": ("error", "a label is not in the label set"),
    "span_mismatch": ("error", "text[start:end] is not the entity's text"),
    "entity_not_in_text": ("error", "the entity does not occur in the text"),
    "overlapping_entities": ("error", "two entities overlap"),
    "duplicate_entity": ("error", "the same span stands twice"),
    "too_long": ("error", "instruction, candidates and answer alone do not fit prompt.max_length"),
    "shared_with_train": ("error", "the text also stands in the training rows"),
    "wrong_task": ("error", "the rows are those of the other task"),
    "one_label": ("error", "the training rows leave nothing to learn"),
    "conflicting_duplicate": ("warning", "the same text stands again with another answer"),
    "exact_duplicate": ("warning", "the same row stands again"),
    "label_twins": ("warning", "labels differ only in case, width, blanks or characters that cannot be seen"),
    "misspelt_label": ("warning", "a rare label is one letter away from a usual one"),
    "integer_labels": ("warning", "labels are integers, read as text"),
    "entity_blanks": ("warning", "an entity or its type begins or ends with a blank"),
}
_MESSAGE_LENGTH = 400
_Value = TypeVar("_Value")
#: Faults of a row's entities that are explained.
_EXPLAINED = 20


@dataclass(frozen=True)
class Fault:
    """One finding of the audit."""

    kind: str
    where: str
    message: str
    #: It is one of the file, of which nothing can be read.
    whole: bool = False

    @property
    def severity(self) -> Severity:
        """`error` or `warning`, by kind."""
        return FAULT_KINDS[self.kind][0]

    def __post_init__(self) -> None:
        # A hundred thousand of them are kept, and a row may name ten thousand labels.
        object.__setattr__(self, "message", printable(clipped(self.message, _MESSAGE_LENGTH)))

    def __str__(self) -> str:
        return f"{self.where}: {self.severity}: {self.kind}: {self.message}"


class _Problem(Exception):
    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def parse_record(
    record: Record,
    number: int,
    task: TaskName,
    columns: ColumnsConfig,
    labels: Sequence[str] | None = None,
    *,
    answers_required: bool = True,
    integer_labels: bool = False,
    numbered: Sequence[str] | None = None,
    nested: bool = False,
) -> tuple[Example | None, list[Fault]]:
    """Read one record by its task's schema.

    Args:
        record: what stands in the file.
        number: the row's number (from 0), its id when it has none.
        labels: the label set, None to accept every label.
        answers_required: False for prediction, which does not look at `output`, `labels` and `entities`.
        integer_labels: all labels of the file are integers, and stand for themselves or for a number of `numbered`.
        numbered: labels by their number; `labels` when None.
        nested: entities may lie inside entities.

    Returns:
        The example (None when any fault is an error) and all faults of the row.
    """
    if record.values is None:
        return None, [Fault(record.kind, record.where, record.problem, record.whole)]
    faults: list[Fault] = []
    values = record.values

    def check(step: Callable[[], _Value]) -> _Value | None:
        try:
            return step()
        except _Problem as problem:
            faults.append(Fault(problem.kind, record.where, str(problem)))
            return None

    text = check(lambda: _text(values, columns.text))
    row_id = values.get(columns.id)
    example_id = check(lambda: _encodable(str(number if row_id in (None, "") else row_id), columns.id))
    candidates: tuple[str, ...] = ()
    label: str | None = None
    shares: tuple[tuple[str, float], ...] = ()
    entities: tuple[Entity, ...] | None = None
    several: tuple[str, ...] | None = None
    if task != "ner":
        candidates = check(lambda: _candidates(values, columns.category)) or ()
    if task == "multilabel" and answers_required:
        several = check(lambda: _labels(values, columns.labels))
        known = candidates or tuple(several or () if labels is None else labels)
        whose = columns.category if candidates else "data.labels"
        unknown = [each for each in several or () if each not in known]
        faults += [Fault("unknown_label", record.where, not_among(each, known, whose)) for each in unknown]
    elif task == "classification":
        if answers_required:
            answer = check(lambda: _answer(values, columns.output, numbered or labels, integer_labels))
            label, shares = answer or (None, ())
        for each in () if label is None else dict(shares) or (label,):
            if candidates and each not in candidates:
                message = f"{columns.output} {each!r} is not in {list(candidates)}{like(each, candidates)}"
                faults.append(Fault("output_not_in_candidates", record.where, message))
            if labels is not None and not candidates and each not in labels:
                faults.append(Fault("unknown_label", record.where, not_among(each, labels, "data.labels")))
    elif answers_required:
        found = check(lambda: _entity_dicts(values, columns.entities))
        if found is not None and text is not None:
            entities, problems = _entities(found, text, labels, nested)
            faults += [Fault(kind, record.where, message) for kind, message in problems]
    if example_id is None or text is None or any(fault.severity == "error" for fault in faults):
        return None, faults
    return Example(example_id, text, candidates, label, entities, record.where, shares, several), faults


def _text(values: dict[str, Any], column: str) -> str:
    return _encodable(_string(values, column), column)


def _string(values: dict[str, Any], column: str) -> str:
    if values.get(column) is None:
        if column in values:
            raise _Problem("empty_field", f"{column} is null")
        raise _Problem(
            "missing_field", f"no column {column!r}; the row has {sorted(values)} (see data.columns)"
        )
    value = values[column]
    if not isinstance(value, str):
        raise _Problem("wrong_type", f"{column} must be a string, not {type(value).__name__}")
    if not value.strip():
        raise _Problem("empty_field", f"{column} is empty")
    if is_blank(value):
        raise _Problem("empty_field", f"{column} holds only characters that cannot be seen")
    return value


def is_blank(text: str) -> bool:
    """Whether a text holds nothing but blanks, control and formatting characters (zero-width spaces, byte order marks)."""
    return not any(c.isalnum() for c in text[:32]) and all(
        c.isspace() or unicodedata.category(c) in ("Cc", "Cf") for c in text
    )


def _answer(
    values: dict[str, Any], column: str, names: Sequence[str] | None, integer_labels: bool
) -> tuple[str, tuple[tuple[str, float], ...]]:
    """(the most probable label, the shares of a soft label)."""
    try:
        shares = parse_shares(values.get(column))
    except DataError as error:
        raise _Problem("soft_label", f"{column} is no soft label: {error}") from None
    if not shares:
        return _label(values, column, names, integer_labels), ()
    for label, _ in shares:
        _encodable(label, column)
    return shares[0][0], shares if len(shares) > 1 else ()


def _label(values: dict[str, Any], column: str, names: Sequence[str] | None, integer_labels: bool) -> str:
    value = values.get(column)
    if integer_labels and isinstance(value, int) and not isinstance(value, bool):
        return _integer_label(value, column, names)
    if isinstance(value, int) and not isinstance(value, bool):
        raise _Problem(
            "wrong_type",
            f"{column} must be a string, not int; integers are read as labels where all rows have them",
        )
    if integer_labels and isinstance(value, str):
        raise _Problem(
            "wrong_type", f"{column} must be an integer, as in the rows before, not the string {value!r}"
        )
    if isinstance(value, (list, tuple)):
        hint = "rows with several labels are those of task=multilabel, whose column is called 'labels'"
        if is_spans(value):
            hint = f"this is a list of [start, end, type], as doccano writes it; {DOCCANO}"
        raise _Problem("wrong_type", f"{column} must be a string, not list; {hint}")
    return _encodable(_string(values, column).strip(), column)


#: What to do with doccano's entities.
DOCCANO = (
    'for entities (--task ner) write them into a column "entities" as '
    '{"start_idx": 0, "end_idx": 2, "entity_text": "...", "entity_label": "..."}'
)


def is_spans(value: object) -> bool:
    """Whether a value is a list of [start, end, type]."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(v, list) and len(v) == 3 and isinstance(v[2], str) for v in value)
    )


_INTEGER = re.compile(r"-?\d+")


def _integer_label(value: int, column: str, names: Sequence[str] | None) -> str:
    if names is None or str(value) in names or any(map(_INTEGER.fullmatch, names)):
        return str(value)  # where labels are integers themselves, an integer is no number of one
    if 0 <= value < len(names):
        return names[value]
    raise _Problem("unknown_label", f"{column} {value} is no number of data.labels, 0 to {len(names) - 1}")


def _encodable(value: str, column: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Problem(
            "wrong_type", f"{column} holds half a surrogate pair at character {error.start}"
        ) from None
    return value


def _candidates(values: dict[str, Any], column: str) -> tuple[str, ...]:
    value = values.get(column)
    if value is None or value == "":
        return ()
    labels = _label_list(value, column, "duplicate_candidate")
    if not labels:
        raise _Problem("empty_field", f"{column} is an empty list; leave the column out to use the label set")
    return labels


def _labels(values: dict[str, Any], column: str) -> tuple[str, ...]:
    """The right labels of a row, of which there may be none."""
    value = values.get(column)
    if value is None:
        kind, what = ("empty_field", "is null") if column in values else ("missing_field", "is missing")
        raise _Problem(kind, f"{column} {what}; write [] for a text to which no label applies")
    if isinstance(value, str) and not value.strip():
        return ()
    return _label_list(value, column, "duplicate_label")


def _label_list(value: object, column: str, repeated_kind: str) -> tuple[str, ...]:
    """Labels that stand in one cell, each once."""
    if isinstance(value, str):
        try:
            labels = parse_candidates(value)
        except DataError as error:
            raise _Problem("wrong_type", f"{column} {error}") from None
    elif isinstance(value, (list, tuple)) and all(isinstance(label, str) for label in value):
        labels = [label.strip() for label in value]
    else:
        raise _Problem("wrong_type", f"{column} must be a list of strings, or a string that lists them")
    if not all(labels):
        raise _Problem("empty_field", f"{column} holds an empty label: {value!r}")
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise _Problem(repeated_kind, f"{column} holds {repeated[0]!r} more than once")
    return tuple(_encodable(label, column) for label in labels)


def _entity_dicts(values: dict[str, Any], column: str) -> list[dict[str, Any]]:
    if values.get(column) is None:
        kind, what = ("empty_field", "is null") if column in values else ("missing_field", "is missing")
        raise _Problem(kind, f"{column} {what}; write [] for a text without entities")
    value = values[column]
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else []
        except (ValueError, RecursionError):
            raise _Problem("wrong_type", f"{column} must be a JSON list of entities") from None
    if not isinstance(value, list) or not all(isinstance(entity, dict) for entity in value):
        hint = f"; {DOCCANO}" if is_spans(value) else ""
        raise _Problem("wrong_type", f"{column} must be a list of objects{hint}")
    return value


def readable_mentions(
    record: Record, columns: ColumnsConfig, labels: Sequence[str] | None = None
) -> list[tuple[str, str]] | None:
    """The (text, label) pairs that a NER row names, whatever its offsets say.

    Offsets are not asked for, so a row whose spans are wrong can be read, and counted, like any other. A label has its
    configured name where it has one.

    Returns:
        A pair an entity, in the order of the row; None when the text, the list or one of its pairs cannot be read.
    """
    if record.values is None:
        return None
    pairs: list[tuple[str, str]] = []
    try:
        _text(record.values, columns.text)
        for index, raw in enumerate(_entity_dicts(record.values, columns.entities)):
            name = f"entities[{index}]"
            text, code = _entity_strings(raw, name)
            try:
                pairs.append((text, _entity_label(raw, code, name, labels)))
            except _Problem:
                pairs.append((text, code.strip()))
    except _Problem:
        return None
    return pairs


def _entities(
    found: list[dict[str, Any]], text: str, labels: Sequence[str] | None, nested: bool
) -> tuple[tuple[Entity, ...], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    entities: list[Entity] = []
    #: Where entities stand, with text and label, also those whose offsets are wrong but can be told.
    placed: list[tuple[int, int, str, str]] = []
    for index, raw in enumerate(found):
        name = f"entities[{index}]"
        try:
            entity, place, faults = _entity(raw, name, text, labels, len(problems) < _EXPLAINED)
        except _Problem as problem:
            problems.append((problem.kind, str(problem)))
            continue
        problems += faults
        if entity is not None:
            entities.append(entity)
        if place is not None:
            placed.append((*place, raw["entity_text"], raw["entity_label"].strip()))
    entities.sort(key=lambda e: (e.start or 0, e.end or 0))
    placed.sort()
    problems += _crossing(placed) if nested else _overlapping(placed)
    return tuple(entities), problems


def _overlapping(placed: Sequence[tuple[int, int, str, str]]) -> Iterator[tuple[str, str]]:
    """Faults of entities of which none may lie inside another."""
    for (start, end, left, label), (begin, stop, right, other) in pairwise(placed):
        if (start, end) == (begin, stop) and label == other:
            yield "duplicate_entity", f"{left!r} at {start}:{end} stands twice"
        elif (start, end) == (begin, stop):
            yield (
                "duplicate_entity",
                f"{left!r} at {start}:{end} stands twice, as {label!r} and as {other!r}; data.entities=nested keeps both",
            )
        elif begin < end and (start == begin or stop <= end):
            yield (
                "overlapping_entities",
                f"{left!r} at {start}:{end} and {right!r} at {begin}:{stop}: one lies inside the other; "
                "data.entities=nested keeps both",
            )
        elif begin < end:
            yield (
                "overlapping_entities",
                f"{left!r} at {start}:{end} and {right!r} at {begin}:{stop}",
            )


def _crossing(placed: Sequence[tuple[int, int, str, str]]) -> Iterator[tuple[str, str]]:
    """Faults of entities that may lie inside others."""
    around: list[tuple[int, int, str]] = []
    seen = set()
    for start, end, text, label in sorted(placed, key=lambda each: (each[0], -each[1])):
        if (start, end, label) in seen:
            yield "duplicate_entity", f"{text!r} at {start}:{end} stands twice as {label!r}"
        seen.add((start, end, label))
        while around and around[-1][1] <= start:
            around.pop()
        if around and around[-1][1] < end:
            begin, stop, outer = around[-1]
            yield (
                "overlapping_entities",
                f"{outer!r} at {begin}:{stop} and {text!r} at {start}:{end} cross: each holds a part of the other",
            )
        around.append((start, end, text))


def _entity(
    raw: dict[str, Any], name: str, text: str, labels: Sequence[str] | None, explained: bool
) -> tuple[Entity | None, tuple[int, int] | None, list[tuple[str, str]]]:
    """(the entity, where it stands, what is wrong with its place and, if it is to be `explained`, why)."""
    entity_text, code = _entity_strings(raw, name)
    start, end = (_offset(raw, key, name) for key in ("start_idx", "end_idx"))
    if 0 <= start < end <= len(text) and text[start:end] == entity_text:
        entity = Entity(entity_text, _entity_label(raw, code, name, labels), start, end)
        faults = []
        if entity_text != entity_text.strip():
            a, b = stripped(text, start, end)
            message = f"{name}: {entity_text!r} begins or ends with a blank; without it, it stands at {a}:{b}"
            faults.append(("entity_blanks", message))
        if code != code.strip():
            message = f"{name}: blanks around the type {code!r} are left out"
            faults.append(("entity_blanks", message))
        return entity, (start, end), faults
    reason, place = why_elsewhere(text, start, end, entity_text) if explained else ("", None)
    found = f"is {text[max(start, 0) : max(end, 0)]!r}, not {entity_text!r}"
    if not 0 <= start <= end <= len(text):
        found = f"is not in the text, which has {len(text)} characters: {entity_text!r} is expected"
    faults = [("span_mismatch", f"{name}: text[{start}:{end}] {found}{'; ' if reason else ''}{reason}")]
    if place is None and entity_text not in text:
        faults.append(("entity_not_in_text", f"{name}: {entity_text!r} does not occur in the text"))
    return None, place, faults


def _entity_strings(raw: dict[str, Any], name: str) -> tuple[str, str]:
    """(text, label) as they stand in the row."""
    entity_text, code = raw.get("entity_text"), raw.get("entity_label")
    for key, value in (("entity_text", entity_text), ("entity_label", code)):
        if value is None:
            raise _Problem("missing_field", f"{name}.{key} is missing")
        if not isinstance(value, str):
            raise _Problem("wrong_type", f"{name}.{key} must be a string, not {type(value).__name__}")
        if not value.strip():
            raise _Problem("empty_field", f"{name}.{key} is empty")
    assert isinstance(entity_text, str) and isinstance(code, str)
    return entity_text, code


def _offset(raw: dict[str, Any], key: str, name: str) -> int:
    value = raw.get(key)
    if value is None:
        raise _Problem("missing_field", f"{name}.{key} is missing")
    if not isinstance(value, int) or isinstance(value, bool):
        raise _Problem("wrong_type", f"{name}.{key} must be an integer, not {type(value).__name__}")
    return value


def _entity_label(raw: dict[str, Any], code: str, name: str, labels: Sequence[str] | None) -> str:
    """The configured name of an entity's type: its code, or the first of its `entity_names` in the label set."""
    code = code.strip()
    if labels is None or code in labels:
        return _encodable(code, f"{name}.entity_label")
    names = raw.get("entity_names")
    if isinstance(names, list):
        for candidate in names:
            if candidate in labels:
                return str(candidate)
    raise _Problem(
        "unknown_label",
        f"{name}: neither {code!r} nor its entity_names {names!r} is in data.labels{meant(code, tuple(labels))}",
    )
