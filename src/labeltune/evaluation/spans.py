"""How well entities were found: strict and partial F1, by type, and what kind of errors were made; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.evaluation.intervals import bootstrap
from labeltune.types import Entity, Example, Prediction

#: (start, end, label), or (something unique, label) for an entity without a place.
Span = tuple[int, int, str] | tuple[object, str]
#: What can be wrong with an entity. The first two are one model entity and one right one that do not agree.
ERRORS = ("wrong_type", "wrong_boundary", "wrong_type_and_boundary", "missed", "spurious")


@dataclass(frozen=True)
class Matched:
    """The entities of one row, each right one beside what was predicted for it.

    Attributes:
        right: found with place and type.
        errors: kind of error -> (right entity or None, predicted entity or None) for each.
    """

    right: tuple[Entity, ...]
    errors: dict[str, tuple[tuple[Entity | None, Entity | None], ...]]


def spans(entities: Sequence[Entity] | None) -> set[Span]:
    """(start, end, label) of each entity; one without a place is a span of its own that matches nothing."""
    found: set[Span] = set()
    for entity in entities or ():
        if entity.start is None or entity.end is None:
            found.add((object(), entity.label))
        else:
            found.add((entity.start, entity.end, entity.label))
    return found


#: Where an entity stands among others: by itself, around others, or inside another one (and perhaps around others, too).
NESTING = ("flat", "outer", "inner")


def by_nesting(found: set[Span]) -> dict[str, set[Span]]:
    """The spans of a row by `NESTING`; of spans with equal places neither is inside the other, and one without a place is flat."""
    parts: dict[str, set[Span]] = {kind: set() for kind in NESTING}
    placed = [span[:2] for span in found if len(span) == 3]
    for span in found:
        inside = around = False
        for other in placed if len(span) == 3 else ():
            if other != span[:2]:
                inside = inside or _holds(other, span)
                around = around or _holds(span, other)
        parts["inner" if inside else "outer" if around else "flat"].add(span)
    return parts


def _holds(outer: Sequence[Any], inner: Sequence[Any]) -> bool:
    return bool(outer[0] <= inner[0] and inner[1] <= outer[1])


def nesting_figures(truth: Sequence[set[Span]], predicted: Sequence[set[Span]]) -> dict[str, dict[str, Any]]:
    """Strict span F1, precision, recall and right entities by `NESTING`; empty where no entity lies inside another.

    What is predicted right counts where the right entity stands, what is wrong where it stands among the row's predictions.
    """
    wanted = [by_nesting(spans) for spans in truth]
    given = [by_nesting(spans) for spans in predicted]
    if not any(row["inner"] for row in (*wanted, *given)):
        return {}
    figures = {}
    for kind in NESTING:
        mine = [row[kind] for row in wanted]
        others = [
            (row[kind] - right) | (spans & part)
            for row, right, spans, part in zip(given, truth, predicted, mine, strict=True)
        ]
        figures[kind] = {**strict_span_f1(mine, others), "support": sum(map(len, mine))}
    return figures


def match_entities(truth: Sequence[Entity], predicted: Sequence[Entity]) -> Matched:
    """Pair right and predicted entities one to one: equal ones first, then equal places, then overlapping places in order
    of appearance. What is left over was missed or is spurious: predicted where nothing is."""
    wanted, given = _distinct(truth), _distinct(predicted)
    errors: dict[str, list[tuple[Entity | None, Entity | None]]] = {kind: [] for kind in ERRORS}
    right = [e for e in wanted if e in given]
    wanted, given = [e for e in wanted if e not in right], [e for e in given if e not in right]

    def pair(agree: Callable[[Entity, Entity], bool]) -> None:
        for mine in list(wanted):
            other = next((e for e in given if agree(mine, e)), None)
            if other is not None:
                wanted.remove(mine)
                given.remove(other)
                boundary = (mine.start, mine.end) != (other.start, other.end)
                kind = (
                    "wrong_type"
                    if not boundary
                    else "wrong_boundary"
                    if mine.label == other.label
                    else "wrong_type_and_boundary"
                )
                errors[kind].append((mine, other))

    pair(lambda a, b: (a.start, a.end) == (b.start, b.end) and a.start is not None)
    pair(_overlap)
    errors["missed"] = [(e, None) for e in wanted]
    errors["spurious"] = [(None, e) for e in given]
    return Matched(tuple(right), {kind: tuple(found) for kind, found in errors.items()})


def _distinct(entities: Sequence[Entity]) -> list[Entity]:
    """In order of place; the same place and label counts once, as in `spans`."""
    placed = {(e.start, e.end, e.label): e for e in reversed(entities) if e.start is not None}
    lost = [e for e in entities if e.start is None]
    return [*sorted(placed.values(), key=lambda e: (e.start or 0, e.end or 0, e.label)), *lost]


def _overlap(a: Entity, b: Entity) -> bool:
    if a.start is None or a.end is None or b.start is None or b.end is None:
        return False
    return a.start < b.end and b.start < a.end


def ner_metrics(
    examples: Sequence[Example], predictions: Sequence[Prediction], dictionary: dict[str, str] | None = None
) -> dict[str, Any]:
    """Strict and partial micro span F1, macro-F1 over types, figures by type, errors by kind, unparsable answers.

    Strict: place and label both right. Partial: the type is not looked at, an overlap counts one half (MUC-5; as in
    nervaluate).

    Args:
        dictionary: entity text -> label of the training rows; adds what looking entities up in it would score.
    """
    truth = [spans(example.entities) for example in examples]
    predicted = [spans(prediction.entities) for prediction in predictions]
    matched = [
        match_entities(example.entities or (), prediction.entities or ())
        for example, prediction in zip(examples, predictions, strict=True)
    ]
    by_label = figures_by_label(truth, predicted)
    result: dict[str, Any] = {
        "rows": len(examples),
        **strict_span_f1(truth, predicted),
        "partial_span_f1": partial_span_f1(matched).to_dict(),
        "macro_f1": round(_mean([figures["f1"] for figures in by_label.values()]), 6),
        "exact_rows": round(_mean([t == p for t, p in zip(truth, predicted, strict=True)]), 6),
        "errors": {kind: sum(len(m.errors[kind]) for m in matched) for kind in ERRORS},
        "unparsable": round(sum(not p.parsed for p in predictions) / max(len(predictions), 1), 6),
        "truncated": sum(p.truncated for p in predictions),
        "labels": by_label,
    }
    if dictionary is not None:
        looked_up = [spans(dictionary_entities(example.text, dictionary)) for example in examples]
        result["baselines"] = {"dictionary": strict_span_f1(truth, looked_up)["span_f1"]}
    return result


def _mean(values: Sequence[float]) -> float:
    return float(numpy.mean(values)) if len(values) else 1.0


def span_counts(truth: Sequence[set[Any]], predicted: Sequence[set[Any]]) -> Any:
    """(right, predicted, wanted) of every row, an integer array of shape [rows, 3]."""
    return numpy.array(
        [(len(t & p), len(p), len(t)) for t, p in zip(truth, predicted, strict=True)], dtype=numpy.int64
    ).reshape(-1, 3)


def f1_of_counts(counts: NDArray[numpy.int64]) -> float:
    """Micro F1 of summed counts; 1 where there is nothing to find and nothing was found."""
    hits, given, wanted = (float(n) for n in counts.sum(axis=0))
    return f1(hits, given, wanted)


def f1(hits: float, given: float, wanted: float) -> float:
    """F1 of counts; 1 where there is nothing to find and nothing was found."""
    return 1.0 if given + wanted == 0 else 2 * hits / (given + wanted)


def strict_span_f1(truth: Sequence[set[Any]], predicted: Sequence[set[Any]]) -> dict[str, Any]:
    """Precision, recall and F1 over all spans of all rows, F1 with a bootstrap interval over rows."""
    counts = span_counts(truth, predicted)
    hits, given, wanted = (int(n) for n in counts.sum(axis=0))
    return {
        "span_f1": bootstrap(lambda rows: f1_of_counts(counts[rows]), len(counts)).to_dict(),
        **precision_and_recall(hits, given, wanted),
    }


def precision_and_recall(hits: int, given: int, wanted: int) -> dict[str, float]:
    """Both of counts, rounded; 1 where there is nothing to find and nothing was found, as for F1."""
    nothing = float(given + wanted == 0)
    return {
        "precision": round(hits / given, 6) if given else nothing,
        "recall": round(hits / wanted, 6) if wanted else nothing,
    }


def partial_span_f1(matched: Sequence[Matched]) -> Any:
    """F1 in which an equal place counts 1 and an overlap 1/2, whatever the type; with a bootstrap interval."""
    counts = []
    for row in matched:
        same = len(row.right) + len(row.errors["wrong_type"])
        near = len(row.errors["wrong_boundary"]) + len(row.errors["wrong_type_and_boundary"])
        both = same + near
        counts.append((same + near / 2, both + len(row.errors["spurious"]), both + len(row.errors["missed"])))
    table = numpy.array(counts, dtype=numpy.float64).reshape(-1, 3)
    return bootstrap(lambda rows: f1_of_counts(table[rows]), len(table))


def figures_by_label(truth: Sequence[set[Any]], predicted: Sequence[set[Any]]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of every type that is right or predicted somewhere, strictly."""
    hits: Counter[str] = Counter()
    given: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for t, p in zip(truth, predicted, strict=True):
        wanted.update(span[-1] for span in t)
        given.update(span[-1] for span in p)
        hits.update(span[-1] for span in t & p)
    return {
        label: {
            "precision": hits[label] / given[label] if given[label] else 0.0,
            "recall": hits[label] / wanted[label] if wanted[label] else 0.0,
            "f1": f1(hits[label], given[label], wanted[label]),
            "support": wanted[label],
        }
        for label in sorted(set(wanted) | set(given))
    }


def entity_dictionary(examples: Sequence[Example]) -> dict[str, str]:
    """Every entity text of some rows with its most frequent label."""
    counts: dict[str, Counter[str]] = {}
    for example in examples:
        for entity in example.entities or ():
            counts.setdefault(entity.text, Counter())[entity.label] += 1
    return {text: labels.most_common(1)[0][0] for text, labels in counts.items()}


def dictionary_entities(text: str, dictionary: dict[str, str]) -> tuple[Entity, ...]:
    """Longest-first look-up of known entity texts, without overlaps: the simplest extractor there is."""
    taken = [False] * len(text)
    found = []
    for known in sorted(dictionary, key=lambda name: (-len(name), name)):
        start = text.find(known)
        while start >= 0:
            end = start + len(known)
            if not any(taken[start:end]):
                taken[start:end] = [True] * len(known)
                found.append(Entity(known, dictionary[known], start, end))
            start = text.find(known, start + 1)
    return tuple(sorted(found, key=lambda entity: entity.start or 0))
