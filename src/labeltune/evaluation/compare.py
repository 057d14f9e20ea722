"""Two models on the same rows: what differs, and whether that is more than chance; pure functions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.evaluation.intervals import mcnemar, paired_bootstrap
from labeltune.evaluation.metrics import label_numbers, macro_f1_of
from labeltune.evaluation.spans import f1_of_counts, span_counts, spans
from labeltune.types import Example, Prediction


def compare_predictions(
    examples: Sequence[Example], first: Sequence[Prediction], second: Sequence[Prediction]
) -> dict[str, Any]:
    """The second model minus the first on the same rows, JSON-ready.

    `differences` has for every figure (accuracy and macro-F1, or strict span F1 and the share of rows answered exactly)
    `first`, `second`, `difference` with its paired bootstrap interval, and `p_value`: McNemar's exact test for shares of
    rows, the paired bootstrap's otherwise. `changed` lists the numbers of the rows that only one of the two has right.
    """
    rights = [_right_rows(examples, predictions) for predictions in (first, second)]
    gained = numpy.flatnonzero(~rights[0] & rights[1]).tolist()
    lost = numpy.flatnonzero(rights[0] & ~rights[1]).tolist()

    def shares(rows: NDArray[numpy.intp]) -> tuple[float, float]:
        return float(rights[0][rows].mean()), float(rights[1][rows].mean())

    differences: dict[str, Any] = {}
    name = "accuracy" if _is_classification(examples) else "exact_rows"
    differences[name] = _difference(shares, len(examples)) | {"p_value": mcnemar(len(lost), len(gained))}
    if _is_classification(examples):
        differences["macro_f1"] = _difference(_macro_f1s(examples, first, second), len(examples))
    else:
        differences = {
            "span_f1": _difference(_span_f1s(examples, first, second), len(examples)),
            **differences,
        }
    return {
        "rows": len(examples),
        "differences": differences,
        "changed": {"gained": gained, "lost": lost},
        "both_right": int((rights[0] & rights[1]).sum()),
        "both_wrong": int((~rights[0] & ~rights[1]).sum()),
    }


def right_row(example: Example, prediction: Prediction) -> bool:
    """Whether a row is answered rightly: its label, or exactly its entities."""
    if example.entities is None:
        return example.label == prediction.label
    return spans(example.entities) == spans(prediction.entities)


def _right_rows(examples: Sequence[Example], predictions: Sequence[Prediction]) -> Any:
    return numpy.array([right_row(e, p) for e, p in zip(examples, predictions, strict=True)], dtype=bool)


def _is_classification(examples: Sequence[Example]) -> bool:
    return not examples or examples[0].entities is None


def _difference(statistic: Callable[[Any], tuple[float, float]], rows: int) -> dict[str, Any]:
    measure, p = paired_bootstrap(statistic, rows)
    first, second = statistic(numpy.arange(rows)) if rows else (float("nan"), float("nan"))
    return {
        "first": round(first, 6),
        "second": round(second, 6),
        "difference": measure.to_dict(),
        "p_value": round(p, 6),
    }


def _macro_f1s(
    examples: Sequence[Example], first: Sequence[Prediction], second: Sequence[Prediction]
) -> Callable[[Any], tuple[float, float]]:
    truth = [example.label or "" for example in examples]
    numbers = [label_numbers(truth, [p.label for p in predictions]) for predictions in (first, second)]

    def statistic(rows: NDArray[numpy.intp]) -> tuple[float, float]:
        a, b = (macro_f1_of(right[rows], given[rows], count) for right, given, count in numbers)
        return a, b

    return statistic


def _span_f1s(
    examples: Sequence[Example], first: Sequence[Prediction], second: Sequence[Prediction]
) -> Callable[[Any], tuple[float, float]]:
    truth = [spans(example.entities) for example in examples]
    counts = [span_counts(truth, [spans(p.entities) for p in predictions]) for predictions in (first, second)]

    def statistic(rows: NDArray[numpy.intp]) -> tuple[float, float]:
        return f1_of_counts(counts[0][rows]), f1_of_counts(counts[1][rows])

    return statistic
