"""How well several labels a row were predicted: F1 of four kinds, subsets, probabilities, with 95 % intervals; pure functions.

Labels are columns: `right` and `given` are boolean arrays of shape [rows, labels]. A label that is no candidate of a row is neither.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.evaluation.confidence import expected_calibration_error
from labeltune.evaluation.intervals import (
    BOOTSTRAP_RESAMPLES,
    Measure,
    bootstrap,
    mean_with_interval,
    wilson,
)
from labeltune.evaluation.metrics import SMALLEST, reliability_bins
from labeltune.types import Example, Prediction

Flags = NDArray[numpy.bool_]
#: Thresholds of the curve of each label.
CURVE = tuple(round(0.05 * step, 2) for step in range(1, 20))


@dataclass(frozen=True)
class LabelTable:
    """Labelled rows and their predictions as arrays.

    Attributes:
        names: the labels, sorted.
        right, given: shape [rows, labels].
        probabilities: shape [rows, labels], NaN where a row does not offer a label; None without scores.
    """

    names: tuple[str, ...]
    right: Flags
    given: Flags
    probabilities: NDArray[numpy.float64] | None

    @staticmethod
    def of(
        examples: Sequence[Example], predictions: Sequence[Prediction], labels: Sequence[str] = ()
    ) -> LabelTable:
        """Of rows with right labels; `labels` are those of the task, also where no row has them."""
        truth = [example.labels or () for example in examples]
        found = [prediction.labels or () for prediction in predictions]
        offered = [[label for label, _ in prediction.ranking] for prediction in predictions]
        names = tuple(sorted({*labels, *(label for each in (*truth, *found, *offered) for label in each)}))
        place = {name: column for column, name in enumerate(names)}
        probabilities = None
        if predictions and all(prediction.ranking for prediction in predictions):
            probabilities = numpy.full((len(examples), len(names)), numpy.nan)
            for row, prediction in enumerate(predictions):
                for label, p in prediction.ranking:
                    probabilities[row, place[label]] = p
        return LabelTable(names, _flags(truth, place), _flags(found, place), probabilities)


def _flags(rows: Sequence[Sequence[str]], place: Mapping[str, int]) -> Flags:
    found = numpy.zeros((len(rows), len(place)), dtype=bool)
    for row, labels in enumerate(rows):
        found[row, [place[label] for label in labels]] = True
    return found


def label_counts(right: Flags, given: Flags) -> NDArray[numpy.float32]:
    """Hits, given and right labels of every row, shape [rows, 3 * labels]: sums over rows are all that F1 needs."""
    return numpy.concatenate([right & given, given, right], axis=1).astype(numpy.float32)


def f1_by_label(sums: NDArray[Any]) -> NDArray[numpy.float64]:
    """F1 of every label from sums of `label_counts`, shape [..., labels]; NaN for one that does not occur."""
    hits, given, right = numpy.split(numpy.asarray(sums, dtype=numpy.float64), 3, axis=-1)
    total = given + right
    with numpy.errstate(invalid="ignore", divide="ignore"):
        return numpy.where(total > 0, 2 * hits / total, numpy.nan)


def micro_f1(sums: NDArray[Any]) -> float:
    """F1 of all decisions together; 0 where nothing is right or given."""
    hits, given, right = (float(part.sum()) for part in numpy.split(numpy.asarray(sums), 3, axis=-1))
    return 2 * hits / (given + right) if given + right else 0.0


def macro_f1(sums: NDArray[Any]) -> float:
    """Mean F1 over the labels that are right or given somewhere."""
    each = f1_by_label(sums)
    return float(numpy.nanmean(each)) if not numpy.isnan(each).all() else 0.0


def weighted_f1(sums: NDArray[Any]) -> float:
    """Mean F1 over the labels that are right somewhere, weighted by how often."""
    right = numpy.split(numpy.asarray(sums), 3, axis=-1)[2]
    present = right > 0
    return float(numpy.average(f1_by_label(sums)[present], weights=right[present])) if present.any() else 0.0


def sample_f1(right: Flags, given: Flags) -> NDArray[numpy.float64]:
    """F1 of every row's own labels, shape [rows]; 1 where none is right and none is given."""
    total = right.sum(axis=1) + given.sum(axis=1)
    hits = (right & given).sum(axis=1)
    return numpy.where(total > 0, 2 * hits / numpy.maximum(total, 1), 1.0)


def over_rows(counts: NDArray[numpy.float32], statistic: Callable[[NDArray[Any]], float]) -> Measure:
    """A statistic of sums over rows with its bootstrap interval.

    Args:
        counts: shape [rows, numbers].
        statistic: sums of shape [numbers] -> the number.
    """
    rows = len(counts)
    return bootstrap(lambda chosen: statistic(numpy.bincount(chosen, minlength=rows) @ counts), rows)


def multilabel_headline(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
    """`micro_f1` and `macro_f1` without intervals, rounded as `evaluate` does."""
    table = LabelTable.of(examples, predictions)
    sums = label_counts(table.right, table.given).sum(axis=0)
    return {"micro_f1": round(micro_f1(sums), 6), "macro_f1": round(macro_f1(sums), 6)}


def multilabel_metrics(
    examples: Sequence[Example], predictions: Sequence[Prediction], labels: Sequence[str] = ()
) -> dict[str, Any]:
    """Everything about rows with several labels and their predictions, JSON-ready.

    With probabilities there are also `map` (mean average precision over labels), `confidence` (NLL, Brier score and ECE of single
    decisions), `reliability`, and a threshold `curve` a label.

    Args:
        labels: the label set.
    """
    table = LabelTable.of(examples, predictions, labels)
    right, given, rows = table.right, table.given, len(examples)
    counts = label_counts(right, given)
    found: dict[str, Any] = {
        "rows": rows,
        "micro_f1": over_rows(counts, micro_f1).to_dict(),
        "macro_f1": over_rows(counts, macro_f1).to_dict(),
        "weighted_f1": over_rows(counts, weighted_f1).to_dict(),
        "sample_f1": mean_with_interval(sample_f1(right, given)).to_dict(),
        "subset_accuracy": wilson(int((right == given).all(axis=1).sum()), rows).to_dict(),
        "hamming_loss": mean_with_interval((right != given).mean(axis=1)).to_dict(),
        "unparsable": round(sum(not p.parsed for p in predictions) / max(rows, 1), 6),
        "labels_a_row": {
            "right": round(float(right.sum(axis=1).mean()), 6),
            "given": round(float(given.sum(axis=1).mean()), 6),
        },
        "baselines": {"constant_set": constant_baseline(right).to_dict()},
        "labels": _by_label(table, counts),
        "together": together(table.names, right),
    }
    return {**found, **_probability_figures(table)}


def _by_label(table: LabelTable, counts: NDArray[numpy.float32]) -> dict[str, dict[str, Any]]:
    """Precision, recall, F1 with its interval, support and threshold curve of every label that is right or given somewhere."""
    sums = counts.sum(axis=0)
    f1 = f1_by_label(sums)
    hits, given, right = numpy.split(sums, 3)
    generator, rows = numpy.random.default_rng(0), len(counts)
    draws = numpy.stack(
        [
            numpy.bincount(generator.integers(0, rows, rows), minlength=rows)
            for _ in range(BOOTSTRAP_RESAMPLES)
        ]
    )
    with numpy.errstate(all="ignore"):
        low, high = numpy.nanpercentile(
            numpy.nan_to_num(f1_by_label(draws.astype(numpy.float32) @ counts)), [2.5, 97.5], axis=0
        )
    found = {}
    for column, name in enumerate(table.names):
        if not right[column] + given[column]:
            continue
        interval = Measure(float(f1[column]), float(low[column]), float(high[column]))
        found[name] = {
            "precision": float(hits[column] / given[column]) if given[column] else 0.0,
            "recall": float(hits[column] / right[column]) if right[column] else 0.0,
            "f1": float(f1[column]),
            "f1_interval": interval.to_dict(),
            "support": int(right[column]),
            "given": int(given[column]),
            "curve": _curve(table, column),
        }
    return found


def _curve(table: LabelTable, column: int) -> list[list[float]]:
    """(threshold, F1) of a label; empty without probabilities."""
    if table.probabilities is None:
        return []
    p, right = table.probabilities[:, column], table.right[:, column]
    return [
        [
            at,
            round(
                float(
                    numpy.nan_to_num(
                        f1_by_label(label_counts(right[:, None], (p >= at)[:, None]).sum(axis=0))
                    )[0]
                ),
                4,
            ),
        ]
        for at in CURVE
    ]


def together(names: Sequence[str], right: Flags) -> dict[str, dict[str, int]]:
    """Label -> label -> rows for which both are right; on the diagonal those of the label itself."""
    counts = right.astype(numpy.int64).T @ right.astype(numpy.int64)
    return {
        name: {
            names[other]: int(counts[column, other]) for other in numpy.flatnonzero(counts[column]).tolist()
        }
        for column, name in enumerate(names)
        if counts[column, column]
    }


def constant_baseline(right: Flags) -> Measure:
    """Micro-F1 of giving every row the same labels: the most frequent ones of these very rows, as many as are best."""
    order = numpy.argsort(-right.sum(axis=0), kind="stable")
    best = Measure(0.0, 0.0, 0.0)
    if not len(right):
        return best
    most, chosen = -1.0, numpy.zeros(right.shape[1], dtype=bool)
    for column in order:
        chosen = chosen.copy()
        chosen[column] = True
        given = numpy.broadcast_to(chosen, right.shape)
        value = micro_f1(label_counts(right, given).sum(axis=0))
        if value <= most:
            break
        most, kept = value, given
    return over_rows(label_counts(right, kept), micro_f1)


def _probability_figures(table: LabelTable) -> dict[str, Any]:
    if table.probabilities is None:
        return {}
    asked = ~numpy.isnan(table.probabilities)
    p, right = table.probabilities[asked], table.right[asked]
    rows = numpy.nonzero(asked)[0]
    each = -numpy.log(numpy.maximum(numpy.where(right, p, 1 - p), SMALLEST))
    return {
        "map": mean_average_precision(table),
        "confidence": {
            "nll": _mean_by_row(each, rows).to_dict(),
            "brier": _mean_by_row((p - right) ** 2, rows).to_dict(),
            "ece": round(expected_calibration_error(p.tolist(), right.tolist()), 6),
        },
        "reliability": reliability_bins(p.tolist(), right.tolist()),
    }


def _mean_by_row(values: NDArray[numpy.float64], rows: NDArray[numpy.intp]) -> Measure:
    """The mean over decisions, its interval over rows: the decisions of a row are not independent."""
    sums = numpy.stack([numpy.bincount(rows, values), numpy.bincount(rows)], axis=1).astype(numpy.float64)
    return bootstrap(lambda chosen: float(sums[chosen, 0].sum() / sums[chosen, 1].sum()), len(sums))


def mean_average_precision(table: LabelTable) -> float:
    """Mean over the labels that are right somewhere of the average precision of their probabilities (area under the
    precision-recall curve as scikit-learn sums it)."""
    from sklearn.metrics import average_precision_score

    assert table.probabilities is not None
    found = []
    for column in numpy.flatnonzero(table.right.any(axis=0)):
        asked = ~numpy.isnan(table.probabilities[:, column])
        found.append(average_precision_score(table.right[asked, column], table.probabilities[asked, column]))
    return round(float(numpy.mean(found)), 6) if found else 0.0
