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
from labeltune.errors import DataError, clipped, first_line


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
        labels: the label set, None when it is not known: what a prompt lists is taken for candidates where it is among them.
        told: it is said how a file is read and what is left out.
    """

    task: TaskName | None = None
    format: FormatName = "auto"
    annotations: Annotations = "latest"
    columns: ColumnsConfig = field(default_factory=ColumnsConfig)
    answers: bool = True
    labels: tuple[str, ...] | None = None
    told: bool = True

    @property
    def classes(self) -> tuple[str, ...] | None:
        """What numbers of classes may be called by a parquet file; None for anything: a label set that has none of it numbers them itself."""
        return () if self.format == "rows" else self.labels


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
#: One row -> its text, id and candidates, as in our rows.
ReadText = Callable[[Mapping[str, Any], Reading], dict[str, Any]]
#: One row, and what was read of it -> its answer, as in our rows; None where it has none, which is counted.
ReadAnswer = Callable[[Mapping[str, Any], dict[str, Any], Reading, LeftOut], "dict[str, Any] | None"]


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


def each(read_text: ReadText, read_answer: ReadAnswer) -> Read:
    """A reader that takes rows one at a time."""

    def read(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
        for record in records:
            found = one_row(record, read_text, read_answer, reading, left_out)
            if found is not None:
                yield found

    return read


#: What code that expects a format meets in a row of another one.
_OTHER_FORM = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def one_row(
    record: Record, read_text: ReadText, read_answer: ReadAnswer, reading: Reading, left_out: LeftOut
) -> Record | None:
    """A row of ours, or why it cannot be read; None where it has no answer, and needs one. Rows that are predicted need none, and faults of
    theirs do not matter."""
    if record.values is None:
        return record
    try:
        found = read_text(record.values, reading)
    except Unreadable as problem:
        return Record(record.where, None, problem.kind, str(problem))
    except _OTHER_FORM as error:
        return _no_row(record, error)
    try:
        answer = read_answer(record.values, found, reading, left_out if reading.answers else LeftOut())
    except Unreadable as problem:
        if reading.answers:
            return Record(record.where, None, problem.kind, str(problem))
        answer = None
    except _OTHER_FORM as error:
        if reading.answers:
            return _no_row(record, error)
        answer = None
    if answer is None:
        return None if reading.answers else Record(record.where, found)
    return Record(record.where, found | answer)


def _no_row(record: Record, error: Exception) -> Record:
    reason = first_line(error)
    return Record(
        record.where, None, "wrong_type", f"it is no row of this format ({reason}); data.format names another"
    )


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


def id_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row's own id, where it has one."""
    return {"id": row["id"]} if isinstance(row.get("id"), str | int) and row["id"] != "" else {}


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
    # A character a line: of Chinese, with the digits and letters in it.
    single = all(len(word) == 1 for word in words) and any(map(is_cjk, words))
    for word in words:
        if not single and last and word and not (is_cjk(word[0]) or is_cjk(last[-1])):
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
    """The values of a JSON list, or of JSON objects one behind the other, on lines of their own or not.

    >>> json_lines('{"a": 1}{"a": 2}\\n{"a": 3}')
    [{'a': 1}, {'a': 2}, {'a': 3}]

    Raises:
        ValueError: it is neither.
    """
    found: list[Any] = []
    at = 0
    while at < len(text):
        if text[at].isspace() or (found and text[at] == ","):
            at += 1
            continue
        value, at = json.JSONDecoder().raw_decode(text, at)
        found.append(value)
    return found[0] if len(found) == 1 and isinstance(found[0], list) else found


_BRACKETED = re.compile(r"[\[【(（]([^\[\]【】()（）]*)[\]】)）]")
_BEHIND_COLON = re.compile(r"[:：]([^\n:：]*)$", re.MULTILINE)
#: What announces a list of labels.
_ANNOUNCED = re.compile(
    r"(label|categor|class|option|choice|choose|candidate|topic|intent|one of|among|选项|选型|选择|类别|标签|候选|类型|分类|意图|之一)[^\n]{0,20}$",
    re.IGNORECASE,
)


def listed_in(
    prompt: str, answers: Sequence[str], known: Sequence[str] | None = None
) -> tuple[list[str], tuple[int, int]] | None:
    """Labels that a prompt lists, with the place of the list: in brackets, or behind a colon on a line, and announced as labels.

    Args:
        answers: must all be among them.
        known: the label set, which tells a list where there is no answer.
    """
    for match in (*_BRACKETED.finditer(prompt), *_BEHIND_COLON.finditer(prompt)):
        written = match[1]
        if not _ANNOUNCED.search(prompt[: match.start()]):
            continue
        try:
            found = parse_candidates(f"[{written}]" if "'" in written or '"' in written else written)
        except DataError:
            continue
        labels = [label.strip().rstrip("。.") for label in found]
        distinct = len(labels) > 1 and len(set(labels)) == len(labels) and all(labels)
        right = set(answers) <= set(labels) if answers else known is not None and set(labels) <= set(known)
        if distinct and right:
            return labels, match.span() if match.re is _BRACKETED else match.span(1)
    return None
