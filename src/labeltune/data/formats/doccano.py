"""doccano's JSONL and CSV exports: `label` or `labels` with labels or [start, end, type], entities with relations, `cats`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labeltune.data.containers import ALIASES
from labeltune.data.formats.base import (
    LeftOut,
    Reader,
    Reading,
    Unreadable,
    answer_of,
    each,
    entity,
    every,
    integer,
    text_of,
)

#: What joins the labels of a row in CSV.
_JOINS = "#"
_COLUMNS = frozenset(["id", "text", "data", "label", "Comments", "category"])
_LISTS = ("label", "labels", "entities")


def _is_spans(value: object) -> bool:
    """A list of [start, end, type]."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, list) and len(one) == 3 and isinstance(one[2], str) for one in value)
    )


def _is_entities(value: object) -> bool:
    """A list of objects with doccano's names of offsets."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(one, dict) and "start_offset" in one and "end_offset" in one for one in value)
    )


def _recognised(rows: Sequence[Mapping[str, Any]]) -> bool:
    texts = every(rows, lambda row: any(name in row for name in ("text", "data")))
    spans = any(_is_spans(row.get(name)) or _is_entities(row.get(name)) for row in rows for name in _LISTS)
    own = any("Comments" in row or ("cats" in row and isinstance(row["cats"], list)) for row in rows)
    # A label with the sign that joins labels may be one label, as C#; doccano's exports have these columns and no others.
    alone = every(rows, lambda row: "id" in row and set(row) <= _COLUMNS)
    several = any(isinstance(row.get("label"), str) and _JOINS in row["label"] for row in rows)
    lists = every(
        rows,
        lambda row: (
            isinstance(row.get("label"), list) and all(isinstance(each, str) for each in row["label"])
        ),
    )
    return texts and (spans or own or (alone and (several or lists)))


def _row(row: Mapping[str, Any], reading: Reading, left_out: LeftOut) -> dict[str, Any] | None:
    text = text_of(row, (*ALIASES["text"], "data"), reading)
    found: dict[str, Any] = {"id": row["id"]} if row.get("id") not in (None, "") else {}
    found |= {
        "text": text,
        "category": row.get("category") if isinstance(row.get("category"), list) else None,
    }
    if isinstance(row.get("relations"), list):
        left_out["relations"] += len(row["relations"])
    found_lists: list[Any] = [
        row[name] for name in ("entities", "label", "labels") if row.get(name) not in (None, [])
    ]
    value: Any = found_lists[0] if found_lists else []
    placed = _is_spans(value) or _is_entities(value)
    cats = row.get("cats")
    if reading.task == "ner" or (reading.task is None and (placed or "entities" in row)):
        if cats:
            left_out["labels of texts"] += len(cats)
        return found | {"entities": _entities(value, text)}
    if placed and not cats:
        raise Unreadable(
            "wrong_type",
            "its label is a list of [start, end, type], as doccano has entities; rows with entities are those of task=ner",
        )
    if placed:
        left_out["labelled spans"] += len(value)
    labels = _labels(cats if cats is not None else [] if placed else value)
    if not labels and reading.task != "multilabel":
        if not reading.answers:
            return found
        left_out["texts without a label"] += 1
        return None
    return found | answer_of(labels, reading.task)


def _labels(value: object) -> list[str]:
    if isinstance(value, str):
        return [label for label in value.split(_JOINS) if label]
    if isinstance(value, list) and all(isinstance(label, str) for label in value):
        return value
    raise Unreadable("wrong_type", "label must be a list of strings")


def _entities(value: object, text: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise Unreadable("wrong_type", "label must be a list of [start, end, type]")
    found = []
    for number, one in enumerate(value):
        name = f"label[{number}]"
        if isinstance(one, dict):
            start, end, label = one.get("start_offset"), one.get("end_offset"), one.get("label")
        elif isinstance(one, list) and len(one) == 3:
            start, end, label = one
        else:
            raise Unreadable("wrong_type", f"{name} must be [start, end, type]")
        if not isinstance(label, str):
            raise Unreadable("wrong_type", f"{name}: the type must be a string")
        found.append(entity(text, integer(start, name), integer(end, name), label))
    return found


READERS = (Reader("doccano", "doccano", _recognised, each(_row)),)
