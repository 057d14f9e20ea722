"""Label Studio's JSON and JSON_MIN exports, also as tables, and its tasks.

Offsets count characters (code points) since 2023, and UTF-16 units, as browsers do, in what older versions wrote; the text of a region tells
which, its own or another one's of the file.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from itertools import chain, groupby, islice
from typing import Any

from labeltune.config import ColumnsConfig
from labeltune.data.containers import ALIASES, is_row
from labeltune.data.formats.base import (
    LeftOut,
    Reader,
    Reading,
    Unreadable,
    answer_of,
    entity,
    every,
    one_row,
)
from labeltune.data.offsets import in_characters, units
from labeltune.data.records import Record

_SPANS = ("labels", "hypertextlabels")
_LABELS = ("choices", "taxonomy")
_ANNOTATIONS = ("annotations", "completions")
#: Fields of a row of JSON_MIN beside the data and the controls.
_OWN = frozenset(["id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"])
_DEFAULTS = ColumnsConfig()
#: What joins the levels of a taxonomy.
LEVELS = "/"
#: Tasks that are looked at before the first is read.
_LOOKED_AT = 50


def _is_task(row: Mapping[str, Any]) -> bool:
    lists = [row[name] for name in (*_ANNOTATIONS, "predictions") if name in row]
    told = bool(lists) and all(isinstance(found, list) for found in lists)
    return isinstance(row.get("data"), dict) and (told or not (lists or is_row(dict(row))))


def _is_minimal(row: Mapping[str, Any]) -> bool:
    return "annotation_id" in row and "annotator" in row and not isinstance(row.get("data"), dict)


class _File:
    """What the tasks of a file have in common.

    Attributes:
        html: regions count the characters of HTML as it is shown, without its tags.
        utf16: offsets count UTF-16 units; None where no region tells.
        control: whose labels are read, where none is named: the first that is met.
    """

    def __init__(self, first: Iterable[Record]) -> None:
        self.html = False
        self.utf16: bool | None = None
        self.control: str | None = None
        found: set[bool | None] = set()
        for task in (record.values for record in first if record.values is not None):
            regions = list(_regions(task))
            html = [_counts_shown(region) for region in regions]
            self.html = self.html or any(html)
            with contextlib.suppress(Unreadable):
                _, text = _document(task.get("data") or {}, _DEFAULTS)
                found |= {_unit_of(region["value"], text) for region in regions}
        self.utf16 = _only(found)

    def text(self, task: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
        """The text, id and candidates of a task."""
        data = task["data"]
        _, text = _document(data, reading.columns)
        ids = [found for found in (data.get("id"), task.get("id")) if isinstance(found, int | str)]
        category = data.get("category") if isinstance(data.get("category"), list) else None
        return {
            "id": ids[0] if ids else None,
            "text": visible_text(text) if self.html else text,
            "category": category,
        }

    def answer(
        self, task: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
    ) -> dict[str, Any] | None:
        """What the annotation that counts says; None where there is none."""
        given: Any = next((task[name] for name in _ANNOTATIONS if task.get(name)), [])
        if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
            raise Unreadable("wrong_type", "annotations must be a list of objects")
        kept = [one for one in given if not (one.get("was_cancelled") or one.get("skipped"))]
        left_out["cancelled or skipped annotations"] += len(given) - len(kept)
        if not kept:
            left_out["tasks without an annotation"] += 1
            return None
        chosen = kept if reading.annotations == "agreed" else [_chosen(kept, reading.annotations == "first")]
        counted = LeftOut()
        answers = [self._said(_results(one), str(found["text"]), reading, counted) for one in chosen]
        if any(_comparable(answer) != _comparable(answers[0]) for answer in answers):
            left_out["tasks whose annotations disagree (data.annotations=agreed)"] += 1
            return None
        left_out.update(counted)
        if answers[0] is None:
            left_out["tasks whose annotation holds no label"] += 1
        return answers[0]

    def _said(
        self, results: Sequence[Mapping[str, Any]], text: str, reading: Reading, left_out: LeftOut
    ) -> dict[str, Any] | None:
        """What an annotation says; None where the task's kind of answer is not in it."""
        spans: list[Mapping[str, Any]] = []
        labels: dict[str, list[str]] = {}
        for result in results:
            kind, value = result.get("type"), result.get("value")
            if not isinstance(value, dict):
                left_out[_called(kind)] += 1
            elif kind in _SPANS:
                spans.append(result)
            elif kind in _LABELS and "start" not in value:
                labels.setdefault(str(result.get("from_name", kind)), []).extend(_labels(value, str(kind)))
            else:
                left_out["choices of single regions" if kind in _LABELS else _called(kind)] += 1
        if reading.task == "ner" or (reading.task is None and spans):
            left_out["choices"] += sum(map(len, labels.values()))
            return {"entities": list(self._entities(spans, text, reading, left_out))}
        left_out["labelled spans"] += len(spans)
        return self._label_answer(labels, reading, left_out)

    def _label_answer(
        self, labels: dict[str, list[str]], reading: Reading, left_out: LeftOut
    ) -> dict[str, Any] | None:
        role = "labels" if reading.task == "multilabel" else "output"
        named = getattr(reading.columns, role)
        if named != getattr(_DEFAULTS, role):
            left_out["choices of other controls"] += sum(
                len(v) for name, v in labels.items() if name != named
            )
            found = labels.get(named, [])
        else:
            self.control = self.control or next(iter(labels), None)
            others = sorted({self.control or "", *labels} - {""})
            if len(others) > 1:
                names = ", ".join(map(repr, others))
                raise Unreadable(
                    "wrong_type",
                    f"several controls hold labels: {names}; say which counts: data.columns.{role}=NAME",
                )
            found = next(iter(labels.values()), [])
        if not found and reading.task != "multilabel":
            return None
        return answer_of(found, reading.task, "choices")

    def _entities(
        self, spans: Sequence[Mapping[str, Any]], text: str, reading: Reading, left_out: LeftOut
    ) -> Iterator[dict[str, Any]]:
        wanted = reading.columns.entities
        told = _only({_unit_of(one["value"], text) for one in spans})
        utf16 = self.utf16 if told is None else told
        for number, one in enumerate(spans):
            if wanted not in (_DEFAULTS.entities, one.get("from_name")):
                left_out["spans of other controls"] += 1
                continue
            value = one["value"]
            names = value.get(str(one["type"])) or []
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise Unreadable("wrong_type", f"region {number}: {one['type']} must be a list of strings")
            if not names:
                left_out["regions without a label"] += 1
            start, end = _place(value, text, number, utf16)
            said = value.get("text")
            known = isinstance(said, str) and said and not _same(text[start:end], said)
            for name in names:
                yield entity(text, start, end, name, str(said) if known else None)


def _only(found: set[bool | None]) -> bool | None:
    """What all that tell anything tell; None where they differ, or none does."""
    told = found - {None}
    return next(iter(told)) if len(told) == 1 else None


def _place(value: Mapping[str, Any], text: str, number: int, utf16: bool | None) -> tuple[int, int]:
    """Where a region stands, in characters.

    Args:
        utf16: what the other regions count; None where that is not known: then what neither begins nor ends inside a word.
    """
    start, end = _offsets(value)
    if start is None or end is None:
        raise Unreadable(
            "wrong_type", f"region {number}: start and end must be integers, not {start!r} and {end!r}"
        )
    told = _unit_of(value, text)
    utf16 = told if told is not None else utf16
    other = in_characters(text, start, end, 2)
    if utf16 is None:
        utf16 = other != (-1, -1) and _is_clean(text, *other) and not _is_clean(text, start, end)
    if not utf16:
        return start, end
    if other == (-1, -1) and end <= units(text, len(text)):
        raise Unreadable(
            "span_mismatch", f"region {number}: {start} or {end} lies inside a character (UTF-16 units)"
        )
    return (start, end) if other == (-1, -1) else other


def _regions(task: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The labelled regions of a task's annotations, whatever else is wrong with them."""
    for name in _ANNOTATIONS:
        given = task.get(name)
        for one in given if isinstance(given, list) else []:
            results = one.get("result") if isinstance(one, dict) else None
            for result in results if isinstance(results, list) else []:
                if (
                    isinstance(result, dict)
                    and result.get("type") in _SPANS
                    and isinstance(result.get("value"), dict)
                ):
                    yield result


def _counts_shown(region: Mapping[str, Any]) -> bool:
    value = region["value"]
    return (
        region["type"] == "hypertextlabels" or "globalOffsets" in value or isinstance(value.get("start"), str)
    )


def _offsets(value: Mapping[str, Any]) -> tuple[int | None, int | None]:
    found = value.get("globalOffsets")
    places = found if isinstance(found, dict) else value
    start, end = (places.get(name) for name in ("start", "end"))
    good = all(isinstance(at, int) and not isinstance(at, bool) for at in (start, end))
    return (start, end) if good else (None, None)


def _unit_of(value: Mapping[str, Any], text: str) -> bool | None:
    """Whether a region counts UTF-16 units, by its own text; None where that tells nothing."""
    (start, end), said = _offsets(value), value.get("text")
    if start is None or end is None or not isinstance(said, str) or not said:
        return None
    characters, other = _same(text[start:end], said), in_characters(text, start, end, 2)
    wide = other != (-1, -1) and _same(text[slice(*other)], said)
    return None if characters == wide else wide


def _same(found: str, said: str) -> bool:
    """Whether a region's text is this one; line breaks may be written as a backslash and an n."""
    return said in (found, found.replace("\r\n", "\\n").replace("\n", "\\n").replace("\r", "\\n"))


def _is_clean(text: str, start: int, end: int) -> bool:
    """Whether a place neither begins nor ends with a blank or inside a word of letters."""
    if not 0 <= start < end <= len(text) or text[start:end] != text[start:end].strip():
        return False
    borders = ((start - 1, start), (end - 1, end))
    return not any(
        a >= 0
        and b < len(text)
        and text[a].isascii()
        and text[a].isalnum()
        and text[b].isascii()
        and text[b].isalnum()
        for a, b in borders
    )


def _chosen(kept: Sequence[Mapping[str, Any]], first: bool) -> Mapping[str, Any]:
    """The annotation that was made first, or changed last; of equal times the first, or the last, of the list."""

    def when(one: Mapping[str, Any]) -> str:
        created, updated = (str(one.get(name) or "") for name in ("created_at", "updated_at"))
        return created if first else updated or created

    ordered = sorted(kept, key=when)
    return ordered[0 if first else -1]


def _comparable(answer: dict[str, Any] | None) -> str:
    """An answer as text, whatever the order of what it holds."""
    parts = {
        name: sorted(map(str, each)) if isinstance(each, list) else each
        for name, each in (answer or {}).items()
    }
    return json.dumps(parts, sort_keys=True)


def _results(annotation: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    found = annotation.get("result") or []
    if not isinstance(found, list) or not all(isinstance(one, dict) for one in found):
        raise Unreadable("wrong_type", "an annotation's result must be a list of objects")
    return found


def _document(data: Mapping[str, Any], columns: ColumnsConfig) -> tuple[str, str]:
    """(the field of a task's data that holds the text, the text)."""
    for name in dict.fromkeys((columns.text, *ALIASES["text"])):
        if isinstance(data.get(name), str):
            return name, data[name]
    strings = [name for name, value in data.items() if isinstance(value, str)]
    if len(strings) == 1:
        return strings[0], data[strings[0]]
    there = ", ".join(map(repr, sorted(data))) or "nothing"
    raise Unreadable(
        "missing_field", f"which field of data is the text? It has {there}; set data.columns.text=FIELD"
    )


def _called(kind: object) -> str:
    return {"relation": "relations", "textarea": "texts that were typed in"}.get(
        str(kind), f"regions of type {kind}"
    )


def _labels(value: Mapping[str, Any], kind: str) -> list[str]:
    found = value.get(kind) or []
    if kind == "taxonomy":
        found = [LEVELS.join(map(str, path)) if isinstance(path, list) else path for path in found]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise Unreadable("wrong_type", f"{kind} must be a list of strings")
    return found


class _Shown(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        """A line break counts as a character."""
        if tag == "br":
            self.parts.append("\n")


def visible_text(html: str) -> str:
    """The text of HTML without its tags, as Label Studio counts it."""
    parser = _Shown()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def _read(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
    """Tasks of JSON."""
    source = iter(records)
    first = list(islice(source, _LOOKED_AT))
    file = _File(first)
    for record in chain(first, source):
        found = one_row(record, file.text, file.answer, reading, left_out)
        if found is not None:
            yield found


def _read_minimal(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
    """Rows of JSON_MIN, one an annotation; those of a task, which stand together, are read as its task in JSON."""
    source = iter(records)
    first = list(islice(source, _LOOKED_AT))
    controls = _string_controls(first, reading)
    yield from _read(_tasks(chain(first, source), controls, reading, left_out), reading, left_out)


def _string_controls(first: Sequence[Record], reading: Reading) -> frozenset[str]:
    """The columns whose strings are labels: the named one, else the only one that may be."""
    named = {reading.columns.output, reading.columns.labels} - {_DEFAULTS.output, _DEFAULTS.labels}
    if named:
        return frozenset(named)
    strings: dict[str, None] = {}
    for values in (record.values for record in first if record.values is not None):
        data = {name: value for name, value in values.items() if name not in _OWN}
        with contextlib.suppress(Unreadable):
            text = _text_column(data, reading)
            strings |= {
                n: None for n, v in data.items() if isinstance(v, str) and v and n != text and not _as_json(v)
            }
    return frozenset(strings)


def _text_column(data: Mapping[str, Any], reading: Reading) -> str:
    names = dict.fromkeys((reading.columns.text, *ALIASES["text"]))
    name = next((name for name in names if isinstance(data.get(name), str)), None)
    if name is None:
        raise Unreadable("missing_field", "which field is the text? Set data.columns.text=FIELD")
    return name


def _as_json(value: str) -> Any:
    """A cell of a table that holds JSON; None of another one."""
    if value[:1] not in ("[", "{"):
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return None


def _tasks(
    records: Iterable[Record], controls: frozenset[str], reading: Reading, left_out: LeftOut
) -> Iterator[Record]:
    for _, group in groupby(records, key=_task_of):
        tasks: list[Record] = []
        for record in group:
            try:
                if record.values is None:
                    yield record
                else:
                    tasks.append(Record(record.where, _as_task(record.values, controls, reading, left_out)))
            except Unreadable as problem:
                yield Record(record.where, None, problem.kind, str(problem))
        if tasks:
            first = tasks[0].values or {}
            annotations = [one for task in tasks for one in (task.values or {})["annotations"]]
            yield Record(tasks[0].where, {**first, "annotations": annotations})


def _task_of(record: Record) -> str:
    """What rows of a task have in common."""
    values = record.values or {}
    return str(values["id"]) if isinstance(values.get("id"), int | str) else record.where


def _as_task(
    row: Mapping[str, Any], controls: frozenset[str], reading: Reading, left_out: LeftOut
) -> dict[str, Any]:
    if "annotation_id" not in row:
        raise Unreadable("missing_field", "there is no annotation_id, as JSON_MIN has it")
    data = {name: value for name, value in row.items() if name not in _OWN}
    name = _text_column(data, reading)
    others = ((control, value) for control, value in data.items() if control != name)
    results = [one for control, value in others for one in _results_of(control, value, controls, left_out)]
    times = {key: row.get(key) for key in ("created_at", "updated_at")}
    annotation = {"id": row.get("annotation_id"), "result": results, **times}
    return {"id": row.get("id"), "data": {name: data[name]}, "annotations": [annotation]}


def _results_of(
    control: str, value: object, controls: frozenset[str], left_out: LeftOut
) -> Iterator[dict[str, Any]]:
    """What a column of JSON_MIN holds, as JSON has it: labels or regions of a control; a field of the data holds neither."""
    if isinstance(value, str):
        told = _as_json(value)
        if told is None:
            if value and control in controls:
                yield {"type": "choices", "from_name": control, "value": {"choices": [value]}}
            return
        value = told
    if isinstance(value, dict) and isinstance(value.get("choices"), list):
        yield {"type": "choices", "from_name": control, "value": value}
    elif isinstance(value, dict) and isinstance(value.get("text"), list):
        left_out["texts that were typed in"] += 1
    elif isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        yield {"type": "taxonomy", "from_name": control, "value": {"taxonomy": value}}
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for one in value:
            kind = next((kind for kind in (*_SPANS, "taxonomy") if isinstance(one.get(kind), list)), "")
            if kind:
                yield {"type": kind, "from_name": control, "value": one}
            else:
                left_out[f"regions of {control!r}"] += 1


READERS = (
    Reader("label-studio", "Label Studio JSON", lambda rows: every(rows, _is_task), _read),
    Reader("label-studio-min", "Label Studio JSON_MIN", lambda rows: every(rows, _is_minimal), _read_minimal),
)
