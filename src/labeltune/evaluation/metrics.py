"""Pure functions from right answers and predictions to numbers, with 95 % intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

import numpy

from labeltune.types import Entity, Example, Prediction

#: Resamples of every bootstrap interval.
BOOTSTRAP_RESAMPLES = 1000
_Z95 = 1.959963984540054
#: Stands for "not one of the labels" in label-wise counts.
_OFF_LIST = "\0off-list"


@dataclass(frozen=True)
class Measure:
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        """JSON-ready, rounded to six digits."""
        return {"value": round(self.value, 6), "low": round(self.low, 6), "high": round(self.high, 6)}

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def wilson(successes: float, total: int) -> Measure:
    """A share with Wilson's score interval (Wilson 1927, doi:10.1080/01621459.1927.10502953); usable at 0 and 1."""
    if total == 0:
        return Measure(float("nan"), float("nan"), float("nan"))
    share = successes / total
    centre = (share + _Z95**2 / (2 * total)) / (1 + _Z95**2 / total)
    half = _Z95 * sqrt(share * (1 - share) / total + _Z95**2 / (4 * total**2)) / (1 + _Z95**2 / total)
    return Measure(share, max(0.0, min(centre - half, share)), min(1.0, max(centre + half, share)))


def bootstrap(statistic: Callable[[Any], float], rows: int, seed: int = 0) -> Measure:
    """A statistic over rows with its percentile bootstrap interval (Efron 1979, doi:10.1214/aos/1176344552).

    Args:
        statistic: integer array of row numbers (with repetitions) -> the number.
        rows: how many rows there are.
    """
    if rows == 0:
        return Measure(float("nan"), float("nan"), float("nan"))
    generator = numpy.random.default_rng(seed)
    resampled = [statistic(generator.integers(0, rows, rows)) for _ in range(BOOTSTRAP_RESAMPLES)]
    low, high = numpy.percentile(resampled, [2.5, 97.5])
    return Measure(statistic(numpy.arange(rows)), float(low), float(high))


def macro_f1(truth: Sequence[str], predicted: Sequence[str | None]) -> float:
    """Mean F1 over the labels that occur in `truth` or `predicted`; an answer off the list (None) is a miss, no label."""
    return _macro_f1(*_label_numbers(truth, predicted))


def _label_numbers(truth: Sequence[str], predicted: Sequence[str | None]) -> tuple[Any, Any, int]:
    names = sorted(set(truth) | {p for p in predicted if p is not None})
    number = {name: index for index, name in enumerate(names)}
    right = numpy.array([number[t] for t in truth], dtype=numpy.int64)
    given = numpy.array([len(names) if p is None else number[p] for p in predicted], dtype=numpy.int64)
    return right, given, len(names)


def _macro_f1(right: Any, given: Any, labels: int) -> float:
    hits = numpy.bincount(right[right == given], minlength=labels + 1)[:labels]
    totals = (
        numpy.bincount(right, minlength=labels + 1)[:labels]
        + numpy.bincount(given, minlength=labels + 1)[:labels]
    )
    present = totals > 0
    return float(numpy.mean(2 * hits[present] / totals[present])) if present.any() else 0.0


def classification_metrics(
    examples: Sequence[Example], predictions: Sequence[Prediction], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """Accuracy, macro-F1, per-label figures, the share of unparsable answers, and what guessing would score.

    Args:
        labels: the label set, for rows without candidates of their own.
    """
    from sklearn.metrics import precision_recall_fscore_support

    truth = [example.label or "" for example in examples]
    predicted = [prediction.label for prediction in predictions]
    right, given, count = _label_numbers(truth, predicted)
    names = sorted(set(truth))
    filled = [p if p is not None else _OFF_LIST for p in predicted]
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, filled, labels=names, zero_division=0
    )
    return {
        "rows": len(examples),
        "accuracy": wilson(int((right == given).sum()), len(truth)).to_dict(),
        "macro_f1": bootstrap(lambda rows: _macro_f1(right[rows], given[rows], count), len(truth)).to_dict(),
        "unparsable": round(sum(not p.parsed for p in predictions) / max(len(predictions), 1), 6),
        "baselines": {
            "majority": majority_baseline(truth).to_dict(),
            "uniform_guess": uniform_baseline(examples, labels).to_dict(),
        },
        "labels": {
            name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
            for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
        },
    }


def majority_baseline(truth: Sequence[str]) -> Measure:
    """Accuracy of always answering the most frequent label of these very rows: the best a constant answer can do."""
    return wilson(Counter(truth).most_common(1)[0][1] if truth else 0, len(truth))


def uniform_baseline(examples: Sequence[Example], labels: Sequence[str] = ()) -> Measure:
    """Expected accuracy of choosing one of each row's candidates at random."""
    chances = [1 / max(len(example.candidates or labels), 1) for example in examples]
    return wilson(sum(chances), len(chances))


Span = tuple[int, int, str]


def spans(entities: Sequence[Entity] | None) -> set[Span | tuple[object]]:
    """(start, end, label) of each entity; one without a place is a span of its own that matches nothing."""
    found: set[Span | tuple[object]] = set()
    for entity in entities or ():
        if entity.start is None or entity.end is None:
            found.add((object(),))
        else:
            found.add((entity.start, entity.end, entity.label))
    return found


def ner_metrics(
    examples: Sequence[Example], predictions: Sequence[Prediction], dictionary: dict[str, str] | None = None
) -> dict[str, Any]:
    """Strict micro span F1 (place and label both right), by label, and the share of unparsable answers.

    Args:
        dictionary: entity text -> label of the training rows; adds what looking entities up in it would score.
    """
    truth = [spans(example.entities) for example in examples]
    predicted = [spans(prediction.entities) for prediction in predictions]
    result: dict[str, Any] = {
        "rows": len(examples),
        **strict_span_f1(truth, predicted),
        "unparsable": round(sum(not p.parsed for p in predictions) / max(len(predictions), 1), 6),
        "labels": _by_label(examples, predictions),
    }
    if dictionary is not None:
        looked_up = [spans(dictionary_entities(example.text, dictionary)) for example in examples]
        result["baselines"] = {"dictionary": strict_span_f1(truth, looked_up)["span_f1"]}
    return result


def strict_span_f1(truth: Sequence[set[Any]], predicted: Sequence[set[Any]]) -> dict[str, Any]:
    """Precision, recall and F1 over all spans of all rows, F1 with a bootstrap interval over rows."""
    counts = numpy.array(
        [(len(t & p), len(p), len(t)) for t, p in zip(truth, predicted, strict=True)], dtype=numpy.int64
    ).reshape(-1, 3)
    hits, given, wanted = (int(n) for n in counts.sum(axis=0))
    f1 = bootstrap(lambda rows: _f1(*(int(n) for n in counts[rows].sum(axis=0))), len(counts))
    return {
        "span_f1": f1.to_dict(),
        "precision": round(hits / given, 6) if given else 0.0,
        "recall": round(hits / wanted, 6) if wanted else 0.0,
    }


def _f1(hits: int, given: int, wanted: int) -> float:
    if given + wanted == 0:
        return 1.0
    return 2 * hits / (given + wanted)


def _by_label(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, dict[str, float]]:
    hits: Counter[str] = Counter()
    given: Counter[str] = Counter()
    wanted: Counter[str] = Counter()
    for example, prediction in zip(examples, predictions, strict=True):
        wanted.update(e.label for e in example.entities or ())
        given.update(e.label for e in prediction.entities or ())
        hits.update(str(span[-1]) for span in spans(example.entities) & spans(prediction.entities))
    return {
        label: {
            "precision": hits[label] / given[label] if given[label] else 0.0,
            "recall": hits[label] / wanted[label] if wanted[label] else 0.0,
            "f1": _f1(hits[label], given[label], wanted[label]),
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
