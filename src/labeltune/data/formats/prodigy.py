"""Prodigy's JSONL: spans with tokens, `label` or `accept` among `options`, and the annotator's `answer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from labeltune.data.formats.base import (
    LeftOut,
    Reader,
    Reading,
    Unreadable,
    answer_of,
    entity,
    every,
    integer,
    text_of,
)
from labeltune.data.records import Record

_ANSWERS = ("accept", "reject", "ignore")


def _recognised(rows: Sequence[Mapping[str, Any]]) -> bool:
    return every(
        rows, lambda row: row.get("answer") in _ANSWERS and isinstance(row.get("text"), str)
    ) or every(rows, lambda row: "_input_hash" in row and "_task_hash" in row)


def _read(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
    """Rows; questions about one text that stand together, each with one label, are joined where a row may have several."""
    for _, group in groupby(records, key=lambda record: _question_of(record, reading)):
        rows = list(group)
        for record in rows[:1] if len(rows) > 1 else rows:
            values = record.values
            if values is None:
                yield record
                continue
            try:
                found = _joined(rows, reading, left_out) if len(rows) > 1 else _row(values, reading, left_out)
            except Unreadable as problem:
                yield Record(record.where, None, problem.kind, str(problem))
            else:
                if found is not None:
                    yield Record(record.where, found)


def _question_of(record: Record, reading: Reading) -> str:
    """What the yes/no questions about a text have in common; other rows stand alone."""
    values = record.values or {}
    binary = isinstance(values.get("label"), str) and "spans" not in values and "options" not in values
    if reading.task != "multilabel" or not binary:
        return record.where
    return str(values.get("_input_hash", values.get("text")))


def _joined(rows: Sequence[Record], reading: Reading, left_out: LeftOut) -> dict[str, Any] | None:
    values = [record.values for record in rows if record.values is not None]
    told = [row for row in values if row.get("answer") in ("accept", "reject")]
    left_out["ignored rows"] += len(values) - len(told)
    if not told:
        return None
    labels = [str(row["label"]) for row in told if row.get("answer") == "accept"]
    return {"text": text_of(told[0], ("text",), reading), "labels": list(dict.fromkeys(labels))}


def _row(row: Mapping[str, Any], reading: Reading, left_out: LeftOut) -> dict[str, Any] | None:
    text, answer = text_of(row, ("text",), reading), row.get("answer", "accept")
    found: dict[str, Any] = {"text": text}
    if not reading.answers:
        return found
    if answer not in _ANSWERS:
        raise Unreadable("wrong_type", f"answer must be accept, reject or ignore, not {answer!r}")
    if isinstance(row.get("relations"), list):
        left_out["relations"] += len(row["relations"])
    binary = isinstance(row.get("label"), str) and "spans" not in row
    if answer == "reject" and binary and reading.task == "multilabel":
        return found | {"labels": []}
    if answer != "accept":
        left_out["rejected rows" if answer == "reject" else "ignored rows"] += 1
        return None
    spans = row.get("spans")
    if reading.task == "ner" or (reading.task is None and spans is not None):
        return found | {"entities": _spans(spans or [], row, text)}
    if spans:
        left_out["labelled spans"] += len(spans)
    labels = _labels(row)
    if not labels and reading.task != "multilabel":
        left_out["texts without a label"] += 1
        return None
    several = (
        "options" in row and reading.task is None and row.get("config", {}).get("choice_style") == "multiple"
    )
    return found | answer_of(labels, "multilabel" if several else reading.task)


def _labels(row: Mapping[str, Any]) -> list[str]:
    accepted = row.get("accept")
    if isinstance(accepted, list):
        options = row.get("options") or []
        names = {
            one["id"]: one.get("text", one["id"]) for one in options if isinstance(one, dict) and "id" in one
        }
        return [str(names.get(each, each)) for each in accepted]
    label = row.get("label")
    return [label] if isinstance(label, str) else []


def _spans(spans: object, row: Mapping[str, Any], text: str) -> list[dict[str, Any]]:
    if not isinstance(spans, list) or not all(isinstance(span, dict) for span in spans):
        raise Unreadable("wrong_type", "spans must be a list of objects")
    found = []
    for number, span in enumerate(spans):
        name = f"spans[{number}]"
        label = span.get("label")
        if not isinstance(label, str):
            raise Unreadable("wrong_type", f"{name}.label must be a string")
        start, end = span.get("start"), span.get("end")
        if start is None or end is None:
            start, end = _by_tokens(span, row, name)
        found.append(entity(text, integer(start, f"{name}.start"), integer(end, f"{name}.end"), label))
    return found


def _by_tokens(span: Mapping[str, Any], row: Mapping[str, Any], name: str) -> tuple[Any, Any]:
    """Where a span stands that names its tokens alone, the last one inclusive."""
    tokens = row.get("tokens") or []
    first, last = (integer(span.get(key), f"{name}.{key}") for key in ("token_start", "token_end"))
    if not 0 <= first <= last < len(tokens):
        raise Unreadable(
            "span_mismatch", f"{name}: there are {len(tokens)} tokens, and it says {first} to {last}"
        )
    return tokens[first].get("start"), tokens[last].get("end")


READERS = (Reader("prodigy", "Prodigy", _recognised, _read),)
