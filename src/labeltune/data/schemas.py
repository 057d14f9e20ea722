"""Raw record -> Example, or every reason why not."""

from __future__ import annotations

import ast
import json
import unicodedata
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

from labeltune.config import ColumnsConfig, TaskName
from labeltune.data.sources import Record
from labeltune.errors import DataError, clipped
from labeltune.types import Entity, Example

Severity = Literal["error", "warning"]

#: Every kind of fault, and what it says. Errors make a row unusable; warnings are worth a look.
FAULT_KINDS: dict[str, tuple[Severity, str]] = {
    "encoding": ("error", "the file is not UTF-8"),
    "unparsable_line": ("error", "the line cannot be parsed"),
    "missing_field": ("error", "a column is missing"),
    "empty_field": ("error", "a column is empty"),
    "wrong_type": ("error", "a value has the wrong type"),
    "output_not_in_candidates": ("error", "the right label is not among the row's candidates"),
    "duplicate_candidate": ("error", "a candidate label stands twice in its row"),
    "unknown_label": ("error", "a label is not in the label set"),
    "span_mismatch": ("error", "text[start:end] is not the entity's text"),
    "entity_not_in_text": ("error", "the entity does not occur in the text"),
    "overlapping_entities": ("error", "two entities overlap"),
    "duplicate_entity": ("error", "the same span stands twice"),
    "shared_with_train": ("error", "the text also stands in the training rows"),
    "wrong_task": ("error", "the rows are those of the other task"),
    "one_label": ("error", "the training rows leave nothing to learn"),
    "conflicting_duplicate": ("warning", "the same text stands again with another answer"),
    "exact_duplicate": ("warning", "the same row stands again"),
}


_MESSAGE_LENGTH = 400
#: Characters of candidates that are written as one string; beyond it Python's own reader takes minutes and gigabytes.
_MAX_WRITTEN_LIST = 2**20


@dataclass(frozen=True)
class Fault:
    """One finding of the audit."""

    kind: str
    where: str
    message: str

    @property
    def severity(self) -> Severity:
        """`error` or `warning`, by kind."""
        return FAULT_KINDS[self.kind][0]

    def __post_init__(self) -> None:
        # A hundred thousand of them are kept, and a row may name ten thousand labels.
        object.__setattr__(self, "message", clipped(self.message, _MESSAGE_LENGTH))

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
    answers_required: bool = True,
) -> tuple[Example | None, list[Fault]]:
    """Read one record by its task's schema.

    Args:
        record: what stands in the file.
        number: the row's number (from 0), its id when it has none.
        labels: the label set, None to accept every label.
        answers_required: False for prediction, where `output` and `entities` may be missing.

    Returns:
        The example (None when any fault is an error) and all faults of the row.
    """
    if record.values is None:
        return None, [Fault(record.kind, record.where, record.problem)]
    faults: list[Fault] = []
    values = record.values

    def check(step: Any) -> Any:
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
    entities: tuple[Entity, ...] | None = None
    if task == "classification":
        candidates = check(lambda: _candidates(values, columns.category)) or ()
        label = check(lambda: _label(values, columns.output, answers_required))
        if label is not None and candidates and label not in candidates:
            faults.append(
                Fault(
                    "output_not_in_candidates",
                    record.where,
                    f"{columns.output} {label!r} is not in {list(candidates)}",
                )
            )
        if labels is not None and label is not None and not candidates and label not in labels:
            faults.append(
                Fault("unknown_label", record.where, f"{label!r} is not in data.labels {list(labels)}")
            )
    elif answers_required or values.get(columns.entities) is not None:
        found = check(lambda: _entity_dicts(values, columns.entities))
        if found is not None and text is not None:
            entities, problems = _entities(found, text, labels)
            faults += [Fault(kind, record.where, message) for kind, message in problems]
    if any(fault.severity == "error" for fault in faults):
        return None, faults
    return Example(example_id, text, candidates, label, entities, record.where), faults


def _text(values: dict[str, Any], column: str) -> str:
    text = _string(values, column)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise _Problem(
            "wrong_type", f"{column} holds half a surrogate pair at character {error.start}"
        ) from None
    return text


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


def _label(values: dict[str, Any], column: str, required: bool) -> str | None:
    if not required and values.get(column) in (None, ""):
        return None
    return _encodable(_string(values, column).strip(), column)


def _encodable(value: str, column: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise _Problem("wrong_type", f"{column} holds half a surrogate pair") from None
    return value


def parse_candidates(value: str) -> list[str]:
    """Candidates written as text: a JSON or Python list, or labels between commas (`,` `，` `、`).

    >>> parse_candidates("['Military', 'Space']")
    ['Military', 'Space']
    >>> parse_candidates("Military,Space")
    ['Military', 'Space']

    Raises:
        DataError: it stands in brackets and is no list of strings, or it is longer than any list of labels.
    """
    if len(value) > _MAX_WRITTEN_LIST:
        raise DataError(f"has more than {_MAX_WRITTEN_LIST} characters; write it as a list, not as a string")
    stripped = value.strip()
    if stripped.startswith("[") and stripped.endswith("]"):
        for reader in (json.loads, _python_value):
            try:
                parsed = reader(stripped)
            except (ValueError, SyntaxError, RecursionError, MemoryError):
                continue
            if isinstance(parsed, list) and all(isinstance(label, str) for label in parsed):
                return [label.strip() for label in parsed]
        raise DataError(
            f"stands in brackets but is no JSON or Python list of strings: {clipped(stripped, 100)!r}; write it "
            'as ["a", "b"], or between commas without brackets'
        )
    for separator in "，、":
        stripped = stripped.replace(separator, ",")
    return [label.strip() for label in stripped.split(",")]


def _python_value(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a backslash in a label is not ours to warn about
        return ast.literal_eval(text)


def _candidates(values: dict[str, Any], column: str) -> tuple[str, ...]:
    value = values.get(column)
    if value is None or value == "":
        return ()
    if isinstance(value, str):
        try:
            labels = parse_candidates(value)
        except DataError as error:
            raise _Problem("wrong_type", f"{column} {error}") from None
    elif isinstance(value, (list, tuple)) and all(isinstance(label, str) for label in value):
        labels = [label.strip() for label in value]
    else:
        raise _Problem("wrong_type", f"{column} must be a list of strings, or a string that lists them")
    if not labels:
        raise _Problem("empty_field", f"{column} is an empty list; leave the column out to use the label set")
    if not all(labels):
        raise _Problem("empty_field", f"{column} holds an empty label: {value!r}")
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise _Problem("duplicate_candidate", f"{column} holds {repeated[0]!r} more than once")
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
        raise _Problem("wrong_type", f"{column} must be a list of objects")
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
                pairs.append((text, code))
    except _Problem:
        return None
    return pairs


def _entities(
    found: list[dict[str, Any]], text: str, labels: Sequence[str] | None
) -> tuple[tuple[Entity, ...], list[tuple[str, str]]]:
    problems: list[tuple[str, str]] = []
    entities: list[Entity] = []
    for index, raw in enumerate(found):
        try:
            entities.append(_entity(raw, f"entities[{index}]", text, labels))
        except _Problem as problem:
            problems.append((problem.kind, str(problem)))
            if problem.kind == "span_mismatch" and raw["entity_text"] not in text:
                problems.append(
                    (
                        "entity_not_in_text",
                        f"entities[{index}]: {raw['entity_text']!r} does not occur in the text",
                    )
                )
    entities.sort(key=lambda e: (e.start or 0, e.end or 0))
    for left, right in pairwise(entities):
        if (left.start, left.end) == (right.start, right.end):
            problems.append(("duplicate_entity", f"{left.text!r} at {left.start}:{left.end} stands twice"))
        elif (right.start or 0) < (left.end or 0):
            problems.append(
                (
                    "overlapping_entities",
                    f"{left.text!r} at {left.start}:{left.end} and {right.text!r} at {right.start}:{right.end}",
                )
            )
    return tuple(entities), problems


def _entity(raw: dict[str, Any], name: str, text: str, labels: Sequence[str] | None) -> Entity:
    entity_text, code = _entity_strings(raw, name)
    start, end = (_offset(raw, key, name) for key in ("start_idx", "end_idx"))
    if start < 0 or text[start:end] != entity_text:
        found = text[max(start, 0) : max(end, 0)]
        raise _Problem("span_mismatch", f"{name}: text[{start}:{end}] is {found!r}, not {entity_text!r}")
    return Entity(entity_text, _entity_label(raw, code, name, labels), start, end)


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
    if labels is None or code in labels:
        return _encodable(code, f"{name}.entity_label")
    names = raw.get("entity_names")
    if isinstance(names, list):
        for candidate in names:
            if candidate in labels:
                return str(candidate)
    raise _Problem(
        "unknown_label",
        f"{name}: neither {code!r} nor its entity_names {names!r} is in data.labels {list(labels)}",
    )
