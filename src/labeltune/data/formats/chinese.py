"""Formats of Chinese benchmarks and tools: CLUENER (ends are inclusive), CLUE's classification, Baidu's UIE (a row a type)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

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
from labeltune.data.labels import parse_candidates
from labeltune.data.records import Record
from labeltune.errors import DataError


def _is_cluener(row: Mapping[str, Any]) -> bool:
    label = row.get("label")
    return (
        isinstance(row.get("text"), str)
        and isinstance(label, dict)
        and all(
            isinstance(names, dict) and all(isinstance(places, list) for places in names.values())
            for names in label.values()
        )
    )


def _read_cluener(row: Mapping[str, Any], reading: Reading, left_out: LeftOut) -> dict[str, Any] | None:
    text = text_of(row, ("text",), reading)
    found = {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}
    label = row.get("label")
    if label is None or not reading.answers:  # the benchmark's test file has none
        if not reading.answers:
            return found | {"text": text}
        left_out["texts without a label"] += 1
        return None
    if not isinstance(label, dict):
        raise Unreadable("wrong_type", "label must be an object: type, entity, places")
    entities = []
    for kind, names in label.items():
        if not isinstance(names, dict):
            raise Unreadable("wrong_type", f"label.{kind} must be an object: entity, places")
        for name, places in names.items():
            if not isinstance(places, list):
                raise Unreadable("wrong_type", f"label.{kind}.{name} must be a list of [first, last]")
            for place in places:
                if not isinstance(place, list) or len(place) != 2:
                    raise Unreadable("wrong_type", f"label.{kind}.{name} must be a list of [first, last]")
                first, last = (integer(at, f"label.{kind}.{name}") for at in place)
                entities.append(entity(text, first, last + 1, kind, name))
    return found | {"text": text, "entities": entities}


def _is_clue(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("sentence"), str) and isinstance(row.get("label_des"), str) and "label" in row


def _read_clue(row: Mapping[str, Any], reading: Reading, left_out: LeftOut) -> dict[str, Any]:
    found = {"id": row["id"]} if isinstance(row.get("id"), str | int) else {}
    found["text"] = text_of(row, ("sentence",), reading)
    label = row.get("label_des", row.get("label"))
    if not reading.answers:
        return found
    if not isinstance(label, str) or not label.strip():
        raise Unreadable("missing_field", "label_des must be a string")
    return found | answer_of([label], reading.task or "classification")


def _is_uie(row: Mapping[str, Any]) -> bool:
    return (
        isinstance(row.get("content"), str)
        and isinstance(row.get("result_list"), list)
        and isinstance(row.get("prompt"), str)
    )


#: A prompt that lists its choices: 情感倾向[正向,负向].
_CHOICES = re.compile(r"(.*)\[([^\[\]]+)\]", re.DOTALL)


class _Text:
    """What the rows of one text hold together."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.entities: list[dict[str, Any]] = []
        self.labels: list[str] = []
        self.candidates: list[str] = []
        #: Whether a row asked for entities, or for a choice.
        self.asked = [False, False]


def _read_uie(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
    """One row a text, in the order of their first rows: the file is read to its end first, as it is shuffled."""
    texts: dict[str, _Text] = {}
    for record in records:
        if record.values is None:
            yield record
            continue
        row = record.values
        try:
            content, prompt = text_of(row, ("content",), reading), row.get("prompt")
            mine = texts.setdefault(content, _Text(record.where))
            if not isinstance(prompt, str):
                raise Unreadable("missing_field", "prompt must be a string")
            _add(mine, content, prompt, row.get("result_list"), left_out)
        except Unreadable as problem:
            yield Record(record.where, None, problem.kind, str(problem))
    for content, mine in texts.items():
        try:
            values = _of_text(content, mine, reading)
        except Unreadable as problem:
            yield Record(mine.where, None, problem.kind, str(problem))
        else:
            yield Record(mine.where, values)


def _add(mine: _Text, content: str, prompt: str, results: object, left_out: LeftOut) -> None:
    if not isinstance(results, list) or not all(isinstance(one, dict) for one in results):
        raise Unreadable("wrong_type", "result_list must be a list of objects")
    subject = prompt.rpartition("的")[0]
    if subject and subject in content:  # 王建国的职务: what belongs to an entity of the text
        left_out["relations"] += len(results)
        return
    if choices := _CHOICES.fullmatch(prompt):
        try:
            mine.candidates += [
                label for label in parse_candidates(choices[2]) if label not in mine.candidates
            ]
        except DataError as error:
            raise Unreadable("wrong_type", f"prompt: {error}") from None
        mine.labels += [str(one.get("text")) for one in results]
        mine.asked[1] = True
        return
    mine.asked[0] = True
    for number, one in enumerate(results):
        start, end = (integer(one.get(key), f"result_list[{number}].{key}") for key in ("start", "end"))
        named = one.get("text")
        found = entity(content, start, end, prompt, named if isinstance(named, str) else None)
        if found not in mine.entities:
            mine.entities.append(found)


def _of_text(content: str, mine: _Text, reading: Reading) -> dict[str, Any]:
    row: dict[str, Any] = {"text": content}
    if not reading.answers:
        return row
    if reading.task == "ner" or (reading.task is None and mine.asked[0]):
        return row | {"entities": mine.entities}
    if not mine.labels and reading.task != "multilabel":
        raise Unreadable(
            "missing_field", "no row of this text has a label: a prompt such as 情感倾向[正向,负向]"
        )
    return (
        row
        | {"category": mine.candidates or None}
        | answer_of(list(dict.fromkeys(mine.labels)), reading.task)
    )


READERS = (
    Reader("cluener", "CLUENER", lambda rows: every(rows, _is_cluener), each(_read_cluener)),
    Reader("clue", "CLUE", lambda rows: every(rows, _is_clue), each(_read_clue)),
    Reader("uie", "UIE", lambda rows: every(rows, _is_uie), _read_uie),
)
