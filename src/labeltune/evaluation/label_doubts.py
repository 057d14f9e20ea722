"""Rows whose answer a tuned model contradicts: the model's own loss of what stands there, and what it says instead."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from labeltune.data.label_issues import CLEARLY, SURE
from labeltune.data.near_duplicates import NearDuplicate, excerpt
from labeltune.types import Entity, Example, Prediction


@dataclass(frozen=True)
class Judged:
    """A row with what the model makes of it.

    Attributes:
        loss: -ln of the probability of the row's answer: of its label among the candidates, of every label's being there or not, or of all
            tokens of its entities' answer.
    """

    example: Example
    prediction: Prediction
    loss: float


@dataclass(frozen=True)
class Doubt:
    """A row whose answer the model contradicts surely.

    Attributes:
        where: `file:line`.
        given: what stands in the row, of what is contradicted.
        suggested: what the model says instead.
        sure: probability of that.
        loss: as of `Judged`.
        text: beginning of the text.
        against: `file:line` of a row with the same or nearly the same text and another answer; empty where there is none.
        row: number among the judged rows.
    """

    where: str
    given: str
    suggested: str
    sure: float
    loss: float
    text: str
    against: str
    row: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        found = asdict(self)
        del found["row"]
        return {**found, "sure": round(self.sure, 4), "loss": round(self.loss, 4)}


def find_doubts(judged: Sequence[Judged], pairs: Iterable[NearDuplicate] = ()) -> list[Doubt]:
    """The rows that are contradicted, those with the largest loss first.

    Args:
        pairs: near-duplicates, of which those with different answers stand against each other.
    """
    places = {each.example.source: each.example for each in judged}
    against: dict[str, str] = {}
    texts: dict[str, Example] = {}
    for each in judged:
        first = texts.setdefault(each.example.text, each.example)
        _note(against, first, each.example)
    for pair in pairs:
        one, other = places.get(pair.where), places.get(pair.like)
        if one is not None and other is not None:
            _note(against, one, other)
    found = []
    for number, each in enumerate(judged):
        told = _contradicted(each.example, each.prediction)
        if told is not None:
            given, suggested, sure = told
            where = each.example.source
            text = excerpt(each.example.text)
            found.append(
                Doubt(where, given, suggested, sure, each.loss, text, against.get(where, ""), number)
            )
    return sorted(found, key=lambda doubt: -doubt.loss)


def _note(against: dict[str, str], one: Example, other: Example) -> None:
    """Two rows of one text stand against each other where their answers differ."""
    if one.source != other.source and _answer(one) != _answer(other):
        against.setdefault(one.source, other.source)
        against.setdefault(other.source, one.source)


def _answer(example: Example) -> object:
    if example.entities is not None:
        return frozenset((e.start, e.end, e.label) for e in example.entities)
    return frozenset(example.labels) if example.labels is not None else example.label


def _contradicted(example: Example, found: Prediction) -> tuple[str, str, float] | None:
    """(what stands there, what the model says, how surely); None where it agrees, or is not sure."""
    if example.entities is not None:
        return _entities(example.entities, found)
    ranking = dict(found.ranking)
    if example.labels is not None:
        wrong = [label for label in example.labels if 1 - ranking.get(label, 1.0) >= SURE]
        missing = [label for label, p in found.ranking if label not in example.labels and p >= SURE]
        if not wrong and not missing:
            return None
        sure = max([*(1 - ranking[label] for label in wrong), *(ranking[label] for label in missing)])
        return _listed(wrong), _listed(missing), sure
    label, most = found.ranking[0]
    own = ranking.get(example.label or "", 0.0)
    if label == example.label or most < max(SURE, CLEARLY * own):
        return None
    return example.label or "", label, most


def _entities(right: Sequence[Entity], found: Prediction) -> tuple[str, str, float] | None:
    wanted = {(e.start, e.end, e.label): e for e in right}
    given = {(e.start, e.end, e.label): e for e in found.entities or ()}
    new = [e for place, e in given.items() if place not in wanted and math.exp(e.score or 0.0) >= SURE]
    gone = [e for place, e in wanted.items() if place not in given]
    if not new and (not gone or (found.certainty or 0.0) < SURE):
        return None
    sure = max((math.exp(e.score or 0.0) for e in new), default=found.certainty or 0.0)
    return _listed(map(_named, gone)), _listed(map(_named, new)), sure


def _named(entity: Entity) -> str:
    return f"{entity.text} ({entity.label})"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names) or "-"
