"""Prodigy's JSONL: spans with tokens, `label` or `accept` among `options`, and the annotator's `answer`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from labeltune.data.formats.base import (
    LeftOut,
    ReadAnswer,
    Reader,
    Reading,
    Unreadable,
    answer_of,
    entity,
    every,
    integer,
    one_row,
    text_of,
)
from labeltune.data.records import Record

_ANSWERS = ("accept", "reject", "ignore")


def _recognised(rows: Sequence[Mapping[str, Any]]) -> bool:
    return every(
        rows, lambda row: row.get("answer") in _ANSWERS and isinstance(row.get("text"), str)
    ) or every(rows, lambda row: "_input_hash" in row and "_task_hash" in row)


def _read(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
    """Rows; questions about one text, each with one label, are joined where a row may have several, and come behind all other rows."""
    questions: dict[str, list[Record]] = {}
    for record in records:
        about = _question_of(record, reading)
        if about is not None:
            questions.setdefault(about, []).append(record)
        elif (found := one_row(record, _text, _answer, reading, left_out)) is not None:
            yield found
    for rows in questions.values():
        if (found := one_row(rows[0], _text, _joined(rows), reading, left_out)) is not None:
            yield found


def _text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    return {"text": text_of(row, ("text",), reading)}


def _question_of(record: Record, reading: Reading) -> str | None:
    """What the yes/no questions about a text have in common; None for other rows, and where a row has one label."""
    values = record.values or {}
    binary = isinstance(values.get("label"), str) and "spans" not in values and "options" not in values
    if reading.task != "multilabel" or not binary:
        return None
    return str(values.get("_input_hash", values.get("text")))


def _joined(rows: Sequence[Record]) -> ReadAnswer:
    """The answer of the questions about one text."""

    def answer(
        _: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
    ) -> dict[str, Any] | None:
        values = [record.values for record in rows if record.values is not None]
        told = [row for row in values if row.get("answer") in ("accept", "reject")]
        left_out["ignored rows"] += len(values) - len(told)
        if not told:
            return None
        labels = [str(row["label"]) for row in told if row["answer"] == "accept"]
        return {"labels": list(dict.fromkeys(labels))}

    return answer


def _answer(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    answer = row.get("answer", "accept" if "_input_hash" in row else None)
    if answer is None:
        raise Unreadable("missing_field", "there is no answer: accept, reject or ignore")
    if answer not in _ANSWERS:
        raise Unreadable("wrong_type", f"answer must be accept, reject or ignore, not {answer!r}")
    if isinstance(row.get("relations"), list):
        left_out["relations"] += len(row["relations"])
    binary = isinstance(row.get("label"), str) and "spans" not in row
    if answer == "reject" and binary and reading.task == "multilabel":
        return {"labels": []}
    if answer != "accept":
        left_out["rejected rows" if answer == "reject" else "ignored rows"] += 1
        return None
    spans = row.get("spans")
    if reading.task == "ner" or (reading.task is None and spans is not None):
        return {"entities": _spans(spans or [], row, str(found["text"]))}
    if spans:
        left_out["labelled spans"] += len(spans)
    labels = _labels(row)
    if not labels and reading.task != "multilabel":
        left_out["texts without a label"] += 1
        return None
    config = row.get("config")
    multiple = isinstance(config, dict) and config.get("choice_style") == "multiple"
    return answer_of(labels, "multilabel" if multiple and reading.task is None else reading.task)


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
