"""The headline figure on parts of the rows: short and long texts, rare and frequent labels; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy

from labeltune.errors import counted
from labeltune.evaluation.intervals import bootstrap, wilson
from labeltune.evaluation.spans import f1_of_counts, span_counts, spans
from labeltune.types import Example, Prediction

#: Parts that rows are cut into by length.
LENGTH_SLICES = 4
FREQUENCIES = ("rare", "middle", "frequent")


def slices(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, list[dict[str, Any]]]:
    """`by_length` and `by_label_frequency`: accuracy, or strict span F1 for entities, each with its interval and rows.

    Lengths are characters, cut at the quartiles of these rows. Labels are ordered by how many of these rows (entities) have
    them and cut into thirds.
    """
    return {
        "by_length": _by_length(examples, predictions),
        "by_label_frequency": _by_frequency(examples, predictions),
    }


def _by_length(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    lengths = numpy.array([len(example.text) for example in examples])
    if not len(lengths):
        return []
    edges = numpy.unique(
        numpy.percentile(lengths, numpy.linspace(0, 100, LENGTH_SLICES + 1)[1:-1]).astype(int)
    )
    part = numpy.searchsorted(edges, lengths)
    found = []
    for each in sorted(set(part.tolist())):
        rows = numpy.flatnonzero(part == each)
        least, most = lengths[rows].min(), lengths[rows].max()
        name = f"{least} to {most} characters" if least < most else counted(least, "character")
        found.append({"slice": name, "rows": len(rows), **_headline(examples, predictions, rows)})
    return found


def _headline(
    examples: Sequence[Example], predictions: Sequence[Prediction], rows: Iterable[int]
) -> dict[str, Any]:
    mine = [examples[i] for i in rows]
    answers = [predictions[i] for i in rows]
    if mine[0].entities is None:
        hits = sum(e.label == p.label for e, p in zip(mine, answers, strict=True))
        return {"accuracy": wilson(hits, len(mine)).to_dict()}
    counts = span_counts([spans(e.entities) for e in mine], [spans(p.entities) for p in answers])
    return {"span_f1": bootstrap(lambda i: f1_of_counts(counts[i]), len(counts)).to_dict()}


def _by_frequency(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    support = Counter(
        label
        for example in examples
        for label in (
            [example.label or ""] if example.entities is None else [e.label for e in example.entities]
        )
    )
    ordered = [label for label, _ in sorted(support.items(), key=lambda pair: (pair[1], pair[0]))]
    parts = [
        part.tolist() for part in numpy.array_split(numpy.array(ordered, dtype=object), len(FREQUENCIES))
    ]
    found = []
    for name, labels in zip(FREQUENCIES, parts, strict=True):
        if not labels:
            continue
        described = {"slice": name, "labels": labels, "rows": sum(support[label] for label in labels)}
        found.append({**described, **_of_labels(examples, predictions, set(labels))})
    return found


def _of_labels(
    examples: Sequence[Example], predictions: Sequence[Prediction], labels: set[str]
) -> dict[str, Any]:
    """Accuracy of the rows with one of these labels; for entities the strict span F1 of these types alone."""
    if examples and examples[0].entities is None:
        chosen = [i for i, example in enumerate(examples) if (example.label or "") in labels]
        return _headline(examples, predictions, chosen)
    truth = [spans([e for e in example.entities or () if e.label in labels]) for example in examples]
    given = [spans([e for e in p.entities or () if e.label in labels]) for p in predictions]
    counts = span_counts(truth, given)
    return {"span_f1": bootstrap(lambda i: f1_of_counts(counts[i]), len(counts)).to_dict()}
