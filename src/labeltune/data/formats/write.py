"""Our rows -> files of other tools, and predictions as annotations to start from."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from labeltune.data.formats.base import is_cjk, joined
from labeltune.errors import DataError
from labeltune.types import Entity, Example

#: Names of the controls that tasks for Label Studio are written for; another project's own are named by its configuration.
LABELS_CONTROL, CHOICES_CONTROL, TEXT_OBJECT = "label", "category", "text"


def write_rows(examples: Iterable[Example]) -> Iterator[str]:
    """Rows of ours, a JSON object a line."""
    for example in examples:
        yield _line(row_of(example))


def row_of(example: Example) -> dict[str, Any]:
    """An example as it stands in a file of rows."""
    row: dict[str, Any] = {"id": example.id, "text": example.text}
    if example.candidates:
        row["category"] = list(example.candidates)
    if example.entities is not None:
        row |= _answer(example)
    elif example.labels is not None:
        row["labels"] = list(example.labels)
    elif example.label is not None:
        row["output"] = dict(example.shares) if example.shares else example.label
    return row


def write_label_studio(examples: Iterable[Example]) -> Iterator[str]:
    """Label Studio's JSON: tasks with an annotation each. Its offsets are characters, as of version 1.23."""
    yield from _array(_task(example) for example in examples)


def _task(example: Example) -> dict[str, Any]:
    _one_label(example)
    data: dict[str, Any] = {"id": example.id, "text": example.text}
    if example.candidates:
        data["category"] = list(example.candidates)
    return {"data": data, "annotations": [{"result": results(example.text, _answer(example))}]}


def results(
    text: str, answer: Mapping[str, Any], controls: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """What an annotation or a prediction of Label Studio holds.

    Args:
        answer: `entities` as in our rows, perhaps with `score`, or `labels`, perhaps with one `score`.
        controls: names for `labels`, `choices` and `text`.
    """
    names = {"labels": LABELS_CONTROL, "choices": CHOICES_CONTROL, "text": TEXT_OBJECT, **(controls or {})}
    found: list[dict[str, Any]] = []
    if "entities" in answer:
        for number, each in enumerate(answer["entities"]):
            value = {
                "start": each["start_idx"],
                "end": each["end_idx"],
                "text": each["entity_text"],
                "labels": [each["entity_label"]],
            }
            score = {"score": each["score"]} if each.get("score") is not None else {}
            about = {
                "id": f"e{number}",
                "from_name": names["labels"],
                "to_name": names["text"],
                "type": "labels",
            }
            found.append({**about, "value": value, **score})
        return found
    if answer["labels"]:
        about = {"id": "c0", "from_name": names["choices"], "to_name": names["text"], "type": "choices"}
        score = {"score": answer["score"]} if answer.get("score") is not None else {}
        found.append({**about, "value": {"choices": list(answer["labels"])}, **score})
    return found


def write_doccano(examples: Iterable[Example]) -> Iterator[str]:
    """doccano's JSONL: `label` is [start, end, type] for entities, a list of labels otherwise."""
    for example in examples:
        _one_label(example)
        answer = _answer(example)
        label = _triples(answer["entities"]) if "entities" in answer else answer["labels"]
        category = {"category": list(example.candidates)} if example.candidates else {}
        yield _line({"id": example.id, "text": example.text, **category, "label": label})


def write_cluener(examples: Iterable[Example]) -> Iterator[str]:
    """CLUENER's JSONL: the places of each entity by type and text, ends inclusive."""
    for example in examples:
        label: dict[str, dict[str, list[list[int]]]] = {}
        for entity in _entities(example, "CLUENER"):
            assert entity.start is not None and entity.end is not None
            places = label.setdefault(entity.label, {}).setdefault(entity.text, [])
            places.append([entity.start, entity.end - 1])
        yield _line({"id": example.id, "text": example.text, "label": label})


_CUT = re.compile(r"\S+")


def write_conll(examples: Iterable[Example]) -> Iterator[str]:
    """Words and BIO tags, between tabs; a comment has the text where the words alone do not give it.

    Raises:
        DataError: entities lie inside others, or begin or end with a blank, which tags of words cannot say.
    """
    for example in examples:
        entities = sorted(_entities(example, "CoNLL"), key=lambda e: (e.start or 0, e.end or 0))
        words, tags = _tagged(example, entities)
        text = example.text
        if joined(words)[0] != text or any(word.startswith("-DOCSTART-") for word in words):
            plain = not re.search(r"[\r\n]", text)
            yield f"# text = {text}\n" if plain else f"# text_json = {json.dumps(text, ensure_ascii=False)}\n"
        yield from (f"{word}\t{tag}\n" for word, tag in zip(words, tags, strict=True))
        yield "\n"


def _tagged(example: Example, entities: Sequence[Entity]) -> tuple[list[str], list[str]]:
    text = example.text
    borders = set()
    for entity in entities:
        assert entity.start is not None and entity.end is not None
        if text[entity.start].isspace() or text[entity.end - 1].isspace():
            raise DataError(
                f"{example.source}: {entity.text!r} begins or ends with a blank, which CoNLL cannot hold"
            )
        if re.search(r"[\t\r\n]", entity.label):
            raise DataError(
                f"{example.source}: the type {entity.label!r} holds a tab or a line break, which CoNLL cannot hold"
            )
        borders |= {entity.start, entity.end}
    for first, second in pairwise(entities):
        if (second.start or 0) < (first.end or 0):
            raise DataError(
                f"{example.source}: {first.text!r} and {second.text!r} overlap, which CoNLL cannot hold; write label-studio or doccano"
            )
    words, tags = [], []
    at = 0
    for match in _CUT.finditer(text):
        start = match.start()
        for place in range(match.start() + 1, match.end() + 1):
            cut = place in borders or place == match.end() or is_cjk(text[place - 1]) or is_cjk(text[place])
            if not cut:
                continue
            while at < len(entities) and (entities[at].end or 0) <= start:
                at += 1
            inside = at < len(entities) and (entities[at].start or 0) <= start
            begins = inside and entities[at].start == start
            words.append(text[start:place])
            tags.append(f"{'B' if begins else 'I'}-{entities[at].label}" if inside else "O")
            start = place
    return words, tags


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _array(rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """A JSON array, a row a line."""
    before = "[\n"
    for row in rows:
        yield before + json.dumps(row, ensure_ascii=False)
        before = ",\n"
    yield "[]\n" if before == "[\n" else "\n]\n"


def _answer(example: Example) -> dict[str, Any]:
    if example.entities is not None:
        return {"entities": [replace(entity, score=None).to_dict() for entity in example.entities]}
    if example.labels is not None:
        return {"labels": list(example.labels)}
    return {"labels": [example.label] if example.label is not None else []}


def _triples(entities: Iterable[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """(start, end, type) of entities as in our rows."""
    return [(e["start_idx"], e["end_idx"], e["entity_label"]) for e in entities]


def _one_label(example: Example) -> None:
    if example.shares:
        raise DataError(f"{example.source}: a soft label is no choice of an annotator; write --to rows")


def _entities(example: Example, what: str) -> Sequence[Entity]:
    if example.entities is None:
        raise DataError(f"{example.source}: {what} is for entities; these are rows of labels")
    return example.entities


#: What `labeltune data convert --to` writes.
WRITERS: dict[str, Callable[[Iterable[Example]], Iterator[str]]] = {
    "rows": write_rows,
    "label-studio": write_label_studio,
    "doccano": write_doccano,
    "conll": write_conll,
    "cluener": write_cluener,
}


def predicted_label_studio(
    rows: Iterable[Mapping[str, Any]], version: str, controls: Mapping[str, str] | None = None
) -> Iterator[str]:
    """Tasks with a prediction each, which Label Studio shows to annotators."""
    yield from _array(
        {
            "data": {"id": row["id"], "text": row["text"]},
            "predictions": [prediction_of(row, version, controls)],
        }
        for row in rows
    )


def prediction_of(
    row: Mapping[str, Any], version: str, controls: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """A prediction of Label Studio.

    Args:
        row: as of `Prediction.to_dict`, with `text`.
        version: of the model.
    """
    return {
        "model_version": version,
        "score": score_of(row),
        "result": results(str(row["text"]), _given(row), controls),
    }


def score_of(row: Mapping[str, Any]) -> float:
    """How sure a prediction is, from 0 to 1: of its label; of the least sure of several labels or entities."""
    if "entities" in row:
        return min(
            (probability(e["score"]) for e in row["entities"] if e.get("score") is not None), default=1.0
        )
    if "labels" in row:
        return min(
            (max(each["probability"], 1 - each["probability"]) for each in row["ranking"]), default=1.0
        )
    return float(row.get("confidence") or 0.0)


def probability(score: float) -> float:
    """An entity's log-probability as a probability, with six digits."""
    return round(math.exp(min(score, 0.0)), 6)


def _given(row: Mapping[str, Any]) -> dict[str, Any]:
    """What a row of predictions says, as `results` takes it."""
    if "entities" in row:
        placed = [e for e in row["entities"] if e["start_idx"] is not None]
        return {
            "entities": [
                {**e, "score": None if e.get("score") is None else probability(e["score"])} for e in placed
            ]
        }
    if "labels" in row:
        return {"labels": row["labels"], "score": score_of(row)}
    return {"labels": [row["label"]] if row["label"] is not None else [], "score": row.get("confidence")}


def predicted_doccano(rows: Iterable[Mapping[str, Any]], version: str) -> Iterator[str]:
    """doccano's JSONL, as it imports labelled texts; score and version go into the row's metadata."""
    for row in rows:
        given = _given(row)
        label = _triples(given["entities"]) if "entities" in given else given["labels"]
        yield _line(
            {
                "id": row["id"],
                "text": row["text"],
                "label": label,
                "score": score_of(row),
                "model_version": version,
            }
        )


def predicted_prodigy(rows: Iterable[Mapping[str, Any]], version: str) -> Iterator[str]:
    """Prodigy's tasks: spans, or the options that are accepted already."""
    for row in rows:
        given = _given(row)
        task: dict[str, Any] = {"text": row["text"]}
        if "entities" in given:
            task["spans"] = [
                {"start": start, "end": end, "label": label, "score": e["score"]}
                for e, (start, end, label) in zip(given["entities"], _triples(given["entities"]), strict=True)
            ]
        else:
            names = sorted({each["label"] for each in row.get("ranking", ())} | set(given["labels"]))
            task |= {"options": [{"id": name, "text": name} for name in names], "accept": given["labels"]}
        yield _line({**task, "meta": {"id": row["id"], "score": score_of(row), "model_version": version}})


#: What `labeltune predict --to` writes.
PREDICTED: dict[str, Callable[[Iterable[Mapping[str, Any]], str], Iterator[str]]] = {
    "label-studio": predicted_label_studio,
    "doccano": predicted_doccano,
    "prodigy": predicted_prodigy,
}
