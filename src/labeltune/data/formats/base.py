"""What a reader of another tool's rows is, and what several of them need."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from labeltune.config import ColumnsConfig, TaskName
from labeltune.config_values import Annotations, FormatName
from labeltune.data.labels import parse_candidates
from labeltune.data.records import Record
from labeltune.errors import DataError, clipped


@dataclass(frozen=True)
class Reading:
    """How the rows of a file are read.

    Attributes:
        task: what they are read for; None while that is guessed.
        format: name of a reader; `auto` finds it by the content, `rows` takes the rows as they are.
        annotations: which of several annotations of a task counts.
        columns: names of the columns in the rows that come out, and hints at the fields of a tool: `output`, `labels` or `entities`
            may name the control that is meant where there are several, `text` the field with the document.
        answers: rows without an annotation are left out; False for prediction.
        labels: the label set, None when it is not known.
    """

    task: TaskName | None = None
    format: FormatName = "auto"
    annotations: Annotations = "latest"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    answers: bool = True
    labels: tuple[str, ...] | None = None


#: While the task is guessed.
FOR_ANY_TASK = Reading()


class Unreadable(Exception):
    """Why a row of a known format cannot be read: the kind of fault and its message."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


#: What was left out -> how often.
LeftOut = Counter[str]
#: Rows of a tool -> our rows (`id`, `text`, `category`, `output`, `labels`, `entities`, by these names).
Read = Callable[[Iterable[Record], Reading, LeftOut], Iterator[Record]]
#: One row -> our row; None where it is left out.
ReadRow = Callable[[Mapping[str, Any], Reading, LeftOut], "dict[str, Any] | None"]


@dataclass(frozen=True)
class Reader:
    """A format.

    Attributes:
        name: as `data.format` calls it.
        title: the tool's own name, for messages.
        recognises: whether the first rows of a file look like it.
        read: its rows -> ours.
    """

    name: str
    title: str
    recognises: Callable[[Sequence[Mapping[str, Any]]], bool]
    read: Read


def each(read_row: ReadRow) -> Read:
    """A reader that takes rows one at a time."""

    def read(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
        for record in records:
            if record.values is None:
                yield record
                continue
            try:
                values = read_row(record.values, reading, left_out)
            except Unreadable as problem:
                yield Record(record.where, None, problem.kind, str(problem))
            else:
                if values is not None:
                    yield Record(record.where, values)

    return read


def every(rows: Sequence[Mapping[str, Any]], check: Callable[[Mapping[str, Any]], bool]) -> bool:
    """Whether there are rows and all of them are of a kind."""
    return bool(rows) and all(map(check, rows))


def entity(text: str, start: int, end: int, label: str, named: str | None = None) -> dict[str, Any]:
    """An entity of our rows.

    Args:
        text: the document.
        named: what the tool says stands there; the check compares it with the document.
    """
    found = text[start:end] if named is None else named
    return {"start_idx": start, "end_idx": end, "entity_text": found, "entity_label": label}


def answer_of(found: Sequence[str], task: TaskName | None, what: str = "labels") -> dict[str, Any]:
    """The labels of a row as its task has them; one alone is `output` while the task is not known.

    Raises:
        Unreadable: the task is classification, and there are several.
    """
    if task == "multilabel" or (task is None and len(found) != 1):
        return {"labels": list(dict.fromkeys(found))}
    if len(found) > 1:
        raise Unreadable(
            "wrong_type",
            f"it has {len(found)} {what} ({clipped(', '.join(found), 100)}); rows with several are those of task=multilabel",
        )
    return {"output": found[0]}


def text_of(values: Mapping[str, Any], names: Sequence[str], reading: Reading) -> str:
    """The document, under the configured name or one of `names`.

    Raises:
        Unreadable: it is not there, or no string.
    """
    for name in dict.fromkeys((reading.columns.text, *names)):
        if name in values:
            if not isinstance(values[name], str):
                raise Unreadable("wrong_type", f"{name} must be a string, not {type(values[name]).__name__}")
            return str(values[name])
    raise Unreadable("missing_field", f"no text: none of {', '.join(names)} is there (see data.columns.text)")


def integer(value: object, name: str) -> int:
    """An offset.

    Raises:
        Unreadable: it is none.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise Unreadable("wrong_type", f"{name} must be an integer, not {type(value).__name__}")
    return value


_CJK = re.compile("[\u2e80-\u303f\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\uff00-\uffef\U00020000-\U0003134f]")


def is_cjk(character: str) -> bool:
    """Whether it is a Chinese or Japanese character, or a sign of their width; no blank is written beside one."""
    return _CJK.match(character) is not None


def joined(words: Sequence[str]) -> tuple[str, list[tuple[int, int]]]:
    """Words as a text, and where each stands in it: a blank between two words, none beside a Chinese or Japanese character.

    >>> joined(["Mara", "left", "奥", "斯", "陆"])
    ('Mara left奥斯陆', [(0, 4), (5, 9), (9, 10), (10, 11), (11, 12)])
    """
    parts: list[str] = []
    places: list[tuple[int, int]] = []
    size, last = 0, ""
    for word in words:
        if last and word and not (is_cjk(word[0]) or is_cjk(last[-1])):
            parts.append(" ")
            size += 1
        places.append((size, size + len(word)))
        parts.append(word)
        size += len(word)
        last = word or last
    return "".join(parts), places


def named_entities(found: object, text: str) -> list[dict[str, Any]]:
    """Entities that are named without a place, `{"entity_text", "entity_label"}`, at their occurrences, in order of naming.

    Raises:
        Unreadable: one does not occur, or it is no such list.
    """
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise Unreadable("wrong_type", "the answer is no list of entities")
    entities: list[dict[str, Any]] = []
    behind: dict[tuple[str, str], int] = {}
    for number, raw in enumerate(found):
        name, label = raw.get("entity_text"), raw.get("entity_label")
        if not isinstance(name, str) or not isinstance(label, str) or not name:
            raise Unreadable("wrong_type", f"entities[{number}] needs a text and a label")
        at = text.find(name, behind.get((name, label), 0))
        if at < 0:
            known = (name, label) in behind
            raise Unreadable(
                "entity_not_in_text",
                f"entities[{number}]: {name!r} does not occur in the text{' once more' if known else ''}",
            )
        behind[name, label] = at + len(name)
        entities.append(entity(text, at, at + len(name), label))
    return entities


def json_lines(text: str) -> list[Any]:
    """The values of a JSON list, or of JSON lines.

    Raises:
        ValueError: it is neither.
    """
    if text.lstrip().startswith("["):
        found = json.loads(text)
        return found if isinstance(found, list) else [found]
    return [json.loads(line) for line in text.splitlines() if line.strip()]


_BRACKETED = re.compile(r"[\[【(（]([^\[\]【】()（）]*)[\]】)）]")
_BEHIND_COLON = re.compile(r"[:：]([^\n:：]*)$", re.MULTILINE)


def listed_in(prompt: str, answers: Sequence[str]) -> tuple[list[str], tuple[int, int]] | None:
    """Labels that a prompt lists, all `answers` among them, with the place of the list: in brackets, or behind a colon on a line."""
    for match in (*_BRACKETED.finditer(prompt), *_BEHIND_COLON.finditer(prompt)):
        written = match[1]
        try:
            found = parse_candidates(f"[{written}]" if "'" in written or '"' in written else written)
        except DataError:
            continue
        labels = [label.strip().rstrip("。.") for label in found]
        if (
            len(labels) > 1
            and len(set(labels)) == len(labels)
            and all(labels)
            and set(answers) <= set(labels)
        ):
            return labels, match.span() if match.re is _BRACKETED else match.span(1)
    return None
