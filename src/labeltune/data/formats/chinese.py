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
    id_of,
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


def _sentence(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    return id_of(row) | {"text": text_of(row, ("text", "sentence"), reading)}


def _cluener(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    text, label = str(found["text"]), row.get("label")
    if label is None:  # the benchmark's test file has none
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
    return {"entities": entities}


#: What the label's name is called: in IFLYTEK, in TNEWS.
_DESCRIBED = ("label_des", "label_desc")


def _is_clue(row: Mapping[str, Any]) -> bool:
    named = any(isinstance(row.get(name), str) for name in _DESCRIBED)
    return isinstance(row.get("sentence"), str) and named and "label" in row


def _clue(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any]:
    label = next((row[name] for name in _DESCRIBED if name in row), row.get("label"))
    if not isinstance(label, str) or not label.strip():
        raise Unreadable("missing_field", "label_des must be a string")
    return answer_of([label], reading.task or "classification")


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
            if not isinstance(prompt, str):
                raise Unreadable("missing_field", "prompt must be a string")
            mine = texts.setdefault(content, _Text(record.where))
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
    row: dict[str, Any] = {"text": content, "category": mine.candidates or None}
    if reading.task == "ner" or (reading.task is None and mine.asked[0]):
        return row | {"entities": mine.entities}
    if mine.labels or (reading.task == "multilabel" and mine.asked[1]):
        return row | answer_of(list(dict.fromkeys(mine.labels)), reading.task)
    if reading.answers:
        raise Unreadable(
            "missing_field", "no row of this text has a label: a prompt such as 情感倾向[正向,负向]"
        )
    return row


READERS = (
    Reader("cluener", "CLUENER", lambda rows: every(rows, _is_cluener), each(_sentence, _cluener)),
    Reader("clue", "CLUE", lambda rows: every(rows, _is_clue), each(_sentence, _clue)),
    Reader("uie", "UIE", lambda rows: every(rows, _is_uie), _read_uie),
)
