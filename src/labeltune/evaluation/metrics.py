"""How well labels were predicted: accuracy, F1, confidence, with 95 % intervals and what guessing would score; pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.evaluation.confidence import bin_numbers, expected_calibration_error
from labeltune.evaluation.intervals import Measure, bootstrap, mean_with_interval, wilson
from labeltune.types import Example, Prediction

#: Stands for "not one of the labels" in label-wise counts.
OFF_LIST = "\0off-list"
#: Top-k accuracies that are reported, where rows have that many candidates.
TOP = (2, 3, 5)
#: Smallest probability a logarithm is taken of; a right label may have one that a float cannot hold.
SMALLEST = 1e-300


def label_numbers(truth: Sequence[str], predicted: Sequence[str | None]) -> tuple[Any, Any, int]:
    """Labels as numbers: (right ones, predicted ones, how many labels there are); off the list is that last number."""
    names = sorted(set(truth) | {p for p in predicted if p is not None})
    number = {name: index for index, name in enumerate(names)}
    right = numpy.array([number[t] for t in truth], dtype=numpy.int64)
    given = numpy.array([len(names) if p is None else number[p] for p in predicted], dtype=numpy.int64)
    return right, given, len(names)


def _f1_by_label(
    right: NDArray[numpy.int64], given: NDArray[numpy.int64], labels: int
) -> tuple[NDArray[numpy.float64], NDArray[numpy.int64]]:
    """(F1, support) of each label, shape [labels]; F1 is NaN for one that does not occur."""
    hits = numpy.bincount(right[right == given], minlength=labels + 1)[:labels]
    support = numpy.bincount(right, minlength=labels + 1)[:labels]
    totals = support + numpy.bincount(given, minlength=labels + 1)[:labels]
    with numpy.errstate(invalid="ignore"):
        return numpy.where(totals > 0, 2 * hits / totals, numpy.nan), support


def macro_f1_of(right: NDArray[numpy.int64], given: NDArray[numpy.int64], labels: int) -> float:
    """Mean F1 over the labels that occur, as `label_numbers` gives them; an answer off the list is a miss, no label."""
    f1, _ = _f1_by_label(right, given, labels)
    return float(numpy.nanmean(f1)) if len(right) else 0.0


def _weighted_f1(right: NDArray[numpy.int64], given: NDArray[numpy.int64], labels: int) -> float:
    f1, support = _f1_by_label(right, given, labels)
    present = support > 0
    return float(numpy.average(f1[present], weights=support[present]))


def matthews(right: NDArray[numpy.int64], given: NDArray[numpy.int64], labels: int) -> float:
    """Matthews correlation coefficient for several labels (Gorodkin 2004, doi:10.1016/j.compbiolchem.2004.09.006); 0 where
    one side is constant. An answer off the list counts as a label of its own."""
    hits = float((right == given).sum())
    t = numpy.bincount(right, minlength=labels + 1).astype(numpy.float64)
    p = numpy.bincount(given, minlength=labels + 1).astype(numpy.float64)
    rows = float(len(right))
    below = (rows**2 - p @ p) * (rows**2 - t @ t)
    return float((hits * rows - t @ p) / numpy.sqrt(below)) if below > 0 else 0.0


def classification_metrics(
    examples: Sequence[Example], predictions: Sequence[Prediction], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything about labelled rows and their predictions, JSON-ready.

    `accuracy` has Wilson's interval, the others one by bootstrap over rows. `micro_f1` is that of the labels: off-list
    answers count as misses only. With probabilities there are also `top_k`, `confidence` (NLL, Brier score, ECE) and
    `reliability`.

    Args:
        labels: the label set, for rows without candidates of their own.
    """
    truth = [example.label or "" for example in examples]
    predicted = [prediction.label for prediction in predictions]
    right, given, count = label_numbers(truth, predicted)
    rows = len(truth)
    hits, answered = int((right == given).sum()), sum(p is not None for p in predicted)
    found: dict[str, Any] = {
        "rows": rows,
        "accuracy": wilson(hits, rows).to_dict(),
        "macro_f1": bootstrap(lambda i: macro_f1_of(right[i], given[i], count), rows).to_dict(),
        "weighted_f1": bootstrap(lambda i: _weighted_f1(right[i], given[i], count), rows).to_dict(),
        "micro_f1": round(2 * hits / (rows + answered), 6) if rows else 0.0,
        "mcc": bootstrap(lambda i: matthews(right[i], given[i], count), rows).to_dict(),
        "unparsable": round(sum(not p.parsed for p in predictions) / max(len(predictions), 1), 6),
        "baselines": {
            "majority": majority_baseline(truth).to_dict(),
            "uniform_guess": uniform_baseline(examples, labels).to_dict(),
        },
        "labels": label_figures(truth, predicted),
        "confusion": confusion(truth, predicted),
    }
    return {**found, **confidence_metrics(truth, predictions)}


def label_figures(truth: Sequence[str], predicted: Sequence[str | None]) -> dict[str, dict[str, float]]:
    """Precision, recall, F1 and support of every right label."""
    from sklearn.metrics import precision_recall_fscore_support

    names = sorted(set(truth))
    filled = [p if p is not None else OFF_LIST for p in predicted]
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, filled, labels=names, zero_division=0
    )
    return {
        name: {"precision": float(p), "recall": float(r), "f1": float(f), "support": int(s)}
        for name, p, r, f, s in zip(names, precision, recall, f1, support, strict=True)
    }


def confusion(truth: Sequence[str], predicted: Sequence[str | None]) -> dict[str, dict[str, int]]:
    """Right label -> predicted label -> rows; an answer off the list stands under the empty name."""
    counts: dict[str, Counter[str]] = {}
    for right, answer in zip(truth, predicted, strict=True):
        counts.setdefault(right, Counter())[answer or ""] += 1
    return {right: dict(counts[right].most_common()) for right in sorted(counts)}


def confidence_metrics(truth: Sequence[str], predictions: Sequence[Prediction]) -> dict[str, Any]:
    """Top-k accuracy, negative log-likelihood, Brier score, ECE and reliability bins; nothing without probabilities.

    The most probable label is the answer here, also where `min_confidence` withheld it.
    """
    if not predictions or not all(p.ranking for p in predictions):
        return {}
    places, chances, brier = [], [], []
    for right, prediction in zip(truth, predictions, strict=True):
        names = [name for name, _ in prediction.ranking]
        place = names.index(right) if right in names else len(names)
        chance = prediction.ranking[place][1] if place < len(names) else 0.0
        places.append(place)
        chances.append(max(chance, SMALLEST))
        squares = sum(p * p for _, p in prediction.ranking)
        brier.append(squares - 2 * chance + 1)
    tops = [p.ranking[0][1] for p in predictions]
    correct = [place == 0 for place in places]
    most = max(len(p.ranking) for p in predictions)
    return {
        "top_k": {
            str(k): wilson(sum(place < k for place in places), len(places)).to_dict() for k in TOP if k < most
        },
        "confidence": {
            "nll": mean_with_interval(-numpy.log(chances)).to_dict(),
            "brier": mean_with_interval(brier).to_dict(),
            "ece": round(expected_calibration_error(tops, correct), 6),
        },
        "reliability": reliability_bins(tops, correct),
    }


def reliability_bins(
    confidences: Sequence[float], correct: Sequence[bool], bins: int = 10
) -> list[dict[str, float]]:
    """For every bin of confidence that holds rows: `from`, `to`, `rows`, mean `confidence`, `accuracy`."""
    p, hit = numpy.asarray(confidences, dtype=numpy.float64), numpy.asarray(correct, dtype=numpy.float64)
    number = bin_numbers(p, bins)
    return [
        {
            "from": round(each / bins, 6),
            "to": round((each + 1) / bins, 6),
            "rows": int((number == each).sum()),
            "confidence": round(float(p[number == each].mean()), 6),
            "accuracy": round(float(hit[number == each].mean()), 6),
        }
        for each in range(bins)
        if (number == each).any()
    ]


def majority_baseline(truth: Sequence[str]) -> Measure:
    """Accuracy of always answering the most frequent label of these very rows: the best a constant answer can do."""
    return wilson(Counter(truth).most_common(1)[0][1] if truth else 0, len(truth))


def uniform_baseline(examples: Sequence[Example], labels: Sequence[str] = ()) -> Measure:
    """Expected accuracy of choosing one of each row's candidates at random."""
    chances = [1 / max(len(example.candidates or labels), 1) for example in examples]
    return wilson(sum(chances), len(chances))
