"""doccano's JSONL and CSV exports: `label` or `labels` with labels or [start, end, type], entities with relations, `cats`."""

from __future__ import annotations

import re
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
    id_of,
    integer,
    text_of,
)

#: What joins the labels of a row in CSV. A label may hold the sign itself, at its end or beside a blank, as C# or C# and .NET.
_JOINS = re.compile(r"(?<=\S)#(?=[^\s#])")
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
    own = any({"id", "Comments", "label"} <= row.keys() for row in rows)
    slots = any(isinstance(row.get("cats"), list) and isinstance(row.get("entities"), list) for row in rows)
    # Older exports have these columns and no others; newer ones have Comments, and the columns of what was imported.
    alone = every(rows, lambda row: "id" in row and set(row) <= _COLUMNS)
    # Only where its parts stand alone elsewhere does the sign join labels.
    whole = {row["label"] for row in rows if isinstance(row.get("label"), str)}
    several = any(len(parts := _JOINS.split(label)) > 1 and set(parts) <= whole for label in whole)
    lists = every(
        rows,
        lambda row: (
            isinstance(row.get("label"), list) and all(isinstance(each, str) for each in row["label"])
        ),
    )
    return texts and (spans or own or slots or (alone and (several or lists)))


def _text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    category = row.get("category") if isinstance(row.get("category"), list) else None
    return id_of(row) | {"text": text_of(row, (*ALIASES["text"], "data"), reading), "category": category}


def _answer(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    if isinstance(row.get("relations"), list):
        left_out["relations"] += len(row["relations"])
    if not {*_LISTS, "cats"} & set(row):
        raise Unreadable("missing_field", "there is no label, labels, entities or cats")
    lists: list[Any] = [
        row[name] for name in ("entities", "label", "labels") if row.get(name) not in (None, [])
    ]
    value: Any = lists[0] if lists else []
    placed = _is_spans(value) or _is_entities(value)
    cats = row.get("cats")
    if reading.task == "ner" or (reading.task is None and (placed or "entities" in row)):
        if cats:
            left_out["labels of texts"] += len(cats)
        if not value and not reading.answers:
            return None  # nothing is marked, or nobody has looked at it yet
        return {"entities": _entities(value, str(found["text"]))}
    if placed and not cats:
        raise Unreadable(
            "wrong_type",
            "its label is a list of [start, end, type], as doccano has entities; rows with entities are those of task=ner",
        )
    if placed:
        left_out["labelled spans"] += len(value)
    labels = _labels(cats if cats is not None else [] if placed else value)
    if not labels and (reading.task != "multilabel" or not reading.answers):
        left_out["texts without a label"] += 1
        return None
    return answer_of(labels, reading.task)


def _labels(value: object) -> list[str]:
    if isinstance(value, str):
        return [label for label in _JOINS.split(value) if label]
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


READERS = (Reader("doccano", "doccano", _recognised, each(_text, _answer)),)
