"""Label Studio's JSON and JSON_MIN exports, and its tasks.

Offsets are those of a browser, UTF-16 units; a region that was made by a program may count characters, which is seen by its text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html.parser import HTMLParser
from itertools import groupby
from typing import Any

from labeltune.config import ColumnsConfig
from labeltune.data.containers import ALIASES
from labeltune.data.formats.base import LeftOut, Reader, Reading, Unreadable, answer_of, each, entity, every
from labeltune.data.offsets import in_characters, units
from labeltune.data.records import Record

_SPANS = ("labels", "hypertextlabels")
_LABELS = ("choices", "taxonomy")
#: Fields of a row of JSON_MIN beside the data and the controls.
_OWN = frozenset(["id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time"])
_DEFAULTS = ColumnsConfig()
#: What joins the levels of a taxonomy.
LEVELS = "/"


def _is_task(row: Mapping[str, Any]) -> bool:
    lists = [row.get(name) for name in ("annotations", "completions", "predictions") if name in row]
    return isinstance(row.get("data"), dict) and all(isinstance(found, list) for found in lists)


def _is_minimal(row: Mapping[str, Any]) -> bool:
    return "annotation_id" in row and "annotator" in row and not isinstance(row.get("data"), dict)


def _task(task: Mapping[str, Any], reading: Reading, left_out: LeftOut) -> dict[str, Any] | None:
    data = task["data"]
    ids = [found for found in (data.get("id"), task.get("id")) if isinstance(found, int | str)]
    row: dict[str, Any] = {"id": ids[0]} if ids else {}
    name, text = _document(data, reading.columns)
    if _is_hypertext(task):
        text = visible_text(text)
    row |= {
        "text": text,
        "category": data.get("category") if isinstance(data.get("category"), list) else None,
    }
    given = task.get("annotations", task.get("completions")) or []
    if not isinstance(given, list) or not all(isinstance(one, dict) for one in given):
        raise Unreadable("wrong_type", "annotations must be a list of objects")
    kept = [one for one in given if not (one.get("was_cancelled") or one.get("skipped"))]
    left_out["cancelled or skipped annotations"] += len(given) - len(kept)
    if not kept:
        if not reading.answers:
            return row
        left_out["tasks without an annotation"] += 1
        return None
    kept.sort(
        key=lambda one: (str(one.get("updated_at") or one.get("created_at") or ""), str(one.get("id") or ""))
    )
    chosen = kept if reading.annotations == "agreed" else [kept[0 if reading.annotations == "first" else -1]]
    counted = LeftOut()
    answers = [_answer(_results(one), name, text, data, reading, counted) for one in chosen]
    if any(_comparable(answer) != _comparable(answers[0]) for answer in answers):
        left_out["tasks whose annotations disagree (data.annotations=agreed)"] += 1
        return None
    left_out.update(counted)
    return _with_answer(row, answers[0], reading, left_out)


def _is_hypertext(task: Mapping[str, Any]) -> bool:
    """Whether regions count the characters of HTML as they are shown, without its tags."""
    annotations = task.get("annotations", task.get("completions"))
    given = [one for one in annotations if isinstance(one, dict)] if isinstance(annotations, list) else []
    results = [one["result"] for one in given if isinstance(one.get("result"), list)]
    return any(isinstance(r, dict) and r.get("type") == "hypertextlabels" for found in results for r in found)


def _with_answer(
    row: dict[str, Any], answer: dict[str, Any] | None, reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    if answer is not None:
        return row | answer
    if not reading.answers:
        return row
    left_out["tasks whose annotation holds no label"] += 1
    return None


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


def _answer(
    results: Sequence[Mapping[str, Any]],
    name: str,
    text: str,
    data: Mapping[str, Any],
    reading: Reading,
    left_out: LeftOut,
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
            labels.setdefault(str(result.get("from_name", kind)), []).extend(_chosen(value, str(kind)))
        else:
            left_out["choices of single regions" if kind in _LABELS else _called(kind)] += 1
    if reading.task == "ner" or (reading.task is None and spans):
        return {"entities": list(_entities(_of_control(spans, reading), text, left_out))}
    if spans:
        left_out["labelled spans"] += len(spans)
    if reading.task == "multilabel" and not labels and results == []:
        return {"labels": []}
    return _label_answer(labels, reading)


def _called(kind: object) -> str:
    return {"relation": "relations", "textarea": "texts that were typed in"}.get(
        str(kind), f"regions of type {kind}"
    )


def _chosen(value: Mapping[str, Any], kind: str) -> list[str]:
    found = value.get(kind) or []
    if kind == "taxonomy":
        found = [LEVELS.join(map(str, path)) if isinstance(path, list) else path for path in found]
    if not isinstance(found, list) or not all(isinstance(label, str) for label in found):
        raise Unreadable("wrong_type", f"{kind} must be a list of strings")
    return found


def _label_answer(labels: dict[str, list[str]], reading: Reading) -> dict[str, Any] | None:
    column = reading.columns.labels if reading.task == "multilabel" else reading.columns.output
    if len(labels) > 1 and column in labels:
        labels = {column: labels[column]}
    if len(labels) > 1:
        role = "labels" if reading.task == "multilabel" else "output"
        names = ", ".join(map(repr, sorted(labels)))
        raise Unreadable(
            "wrong_type", f"several controls hold labels: {names}; say which counts: data.columns.{role}=NAME"
        )
    if not labels:
        return None
    (found,) = labels.values()
    if not found and reading.task != "multilabel":
        return None
    return answer_of(found, reading.task, "choices")


def _of_control(spans: Sequence[Mapping[str, Any]], reading: Reading) -> Sequence[Mapping[str, Any]]:
    """The spans of the control that `data.columns.entities` names; of all where it names none."""
    wanted = reading.columns.entities
    mine = [one for one in spans if one.get("from_name") == wanted]
    return mine if mine and wanted != _DEFAULTS.entities else spans


def _entities(spans: Sequence[Mapping[str, Any]], text: str, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    for number, one in enumerate(spans):
        value = one["value"]
        names = value.get(str(one["type"])) or []
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Unreadable("wrong_type", f"region {number}: {one['type']} must be a list of strings")
        if not names:
            left_out["regions without a label"] += 1
        places = value.get("globalOffsets") or value
        start, end = _place(places, text, value.get("text"), number)
        said = value.get("text")
        for name in names:
            yield entity(text, start, end, name, said if isinstance(said, str) and said else None)


def _place(value: Mapping[str, Any], text: str, named: object, number: int) -> tuple[int, int]:
    """Where a region stands, in characters."""
    found = [value.get("start"), value.get("end")]
    if not all(isinstance(at, int) and not isinstance(at, bool) for at in found):
        raise Unreadable(
            "wrong_type",
            f"region {number}: start and end must be integers, not {found[0]!r} and {found[1]!r}",
        )
    start, end = (int(str(at)) for at in found)
    place = in_characters(text, start, end, 2)
    if isinstance(named, str) and text[slice(*place)] != named and text[start:end] == named:
        return start, end
    if place != (-1, -1):
        return place
    if end <= units(text, len(text)):
        raise Unreadable(
            "span_mismatch", f"region {number}: {start} or {end} lies inside a character (UTF-16 units)"
        )
    return start, end  # outside of the text, as the check says


class _Shown(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        """Text between tags."""
        self.parts.append(data)


def visible_text(html: str) -> str:
    """The text of HTML without its tags, as a browser counts it."""
    parser = _Shown()
    parser.feed(html)
    parser.close()
    return "".join(parser.parts)


def _read_minimal(records: Iterable[Record], reading: Reading, left_out: LeftOut) -> Iterator[Record]:
    """Rows of JSON_MIN, one an annotation; those of a task, which stand together, are read as its task in JSON."""
    for _, group in groupby(records, key=_task_of):
        rows = list(group)
        tasks: list[Record] = []
        for record in rows:
            try:
                tasks.append(
                    record
                    if record.values is None
                    else Record(record.where, _as_task(record.values, reading, left_out))
                )
            except Unreadable as problem:
                tasks.append(Record(record.where, None, problem.kind, str(problem)))
        good = [task for task in tasks if task.values is not None]
        if good and good[0].values is not None:
            annotations = [
                one for task in good if task.values is not None for one in task.values["annotations"]
            ]
            tasks = [t for t in tasks if t.values is None]
            tasks.append(Record(good[0].where, {**good[0].values, "annotations": annotations}))
        yield from each(_task)(tasks, reading, left_out)


def _task_of(record: Record) -> str:
    """What rows of a task have in common."""
    values = record.values or {}
    return str(values["id"]) if isinstance(values.get("id"), int) else record.where


def _as_task(row: Mapping[str, Any], reading: Reading, left_out: LeftOut) -> dict[str, Any]:
    data = {name: value for name, value in row.items() if name not in _OWN}
    strings = {name: value for name, value in data.items() if isinstance(value, str)}
    name = next((n for n in dict.fromkeys((reading.columns.text, *ALIASES["text"])) if n in strings), None)
    if name is None:
        raise Unreadable("missing_field", "which field is the text? Set data.columns.text=FIELD")
    results = [
        one
        for control, value in data.items()
        if control != name
        for one in _results_of(control, value, left_out)
    ]
    times = {key: row.get(key) for key in ("created_at", "updated_at")}
    annotation = {"id": row["annotation_id"], "result": results, **times}
    return {"id": row.get("id"), "data": {name: strings[name]}, "annotations": [annotation]}


def _results_of(control: str, value: object, left_out: LeftOut) -> Iterator[dict[str, Any]]:
    """What a control of JSON_MIN holds, as JSON has it: a label, labels, regions, or a field of the data."""
    if isinstance(value, str):
        yield {"type": "choices", "from_name": control, "value": {"choices": [value]}}
    elif isinstance(value, dict) and isinstance(value.get("choices"), list):
        yield {"type": "choices", "from_name": control, "value": value}
    elif isinstance(value, list) and value and all(isinstance(one, list) for one in value):
        yield {"type": "taxonomy", "from_name": control, "value": {"taxonomy": value}}
    elif isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
        for one in value:
            kind = next((kind for kind in _SPANS if isinstance(one.get(kind), list)), "")
            if kind:
                yield {"type": kind, "from_name": control, "value": one}
            elif isinstance(one.get("taxonomy"), list):
                yield {"type": "taxonomy", "from_name": control, "value": one}
            else:
                left_out[f"regions of {control!r}"] += 1


READERS = (
    Reader("label-studio", "Label Studio JSON", lambda rows: every(rows, _is_task), each(_task)),
    Reader("label-studio-min", "Label Studio JSON_MIN", lambda rows: every(rows, _is_minimal), _read_minimal),
)
