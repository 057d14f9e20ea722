"""Two models on the same rows: what differs, whether that is more than chance, and the page that shows it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import numpy
from numpy.typing import NDArray

from labeltune.evaluation.decisions import OBJECTIVES
from labeltune.evaluation.intervals import mcnemar, paired_bootstrap
from labeltune.evaluation.metrics import label_numbers, macro_f1_of
from labeltune.evaluation.multilabel import LabelTable, label_counts
from labeltune.evaluation.pages import render
from labeltune.evaluation.spans import f1_of_counts, span_counts, spans
from labeltune.evaluation.summary import floor_line, rows_line
from labeltune.types import Example, Prediction

#: Changed rows shown of each kind; changed.jsonl holds all.
SHOWN = 500
LONGEST = 1000
#: How the model of a run is named when its adapter is switched off.
BARE = " without its adapter"


def compare_predictions(
    examples: Sequence[Example], first: Sequence[Prediction], second: Sequence[Prediction]
) -> dict[str, Any]:
    """The second model minus the first on the same rows, JSON-ready.

    `differences` has for every figure (accuracy and macro-F1; of several labels a row micro-F1, macro-F1 and subset accuracy; strict span F1
    and the share of rows answered exactly)
    `first`, `second`, `difference` with its paired bootstrap interval, and `p_value`: McNemar's exact test for shares of
    rows, the paired bootstrap's otherwise. `changed` lists the numbers of the rows that only one of the two has right.
    """
    rights = [_right_rows(examples, predictions) for predictions in (first, second)]
    gained = numpy.flatnonzero(~rights[0] & rights[1]).tolist()
    lost = numpy.flatnonzero(rights[0] & ~rights[1]).tolist()

    def shares(rows: NDArray[numpy.intp]) -> tuple[float, float]:
        return float(rights[0][rows].mean()), float(rights[1][rows].mean())

    differences: dict[str, Any] = {}
    several = bool(examples) and examples[0].labels is not None
    one = not several and _is_classification(examples)
    name = "subset_accuracy" if several else "accuracy" if one else "exact_rows"
    differences[name] = _difference(shares, len(examples)) | {"p_value": mcnemar(len(lost), len(gained))}
    if several:
        found = {
            figure: _difference(_label_f1s(examples, first, second, OBJECTIVES[figure]), len(examples))
            for figure in OBJECTIVES
        }
        differences = found | differences
    elif one:
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
    """Whether a row is answered rightly: its label, or exactly its labels or entities."""
    if example.labels is not None:
        return set(example.labels) == set(prediction.labels or ())
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


def _label_f1s(
    examples: Sequence[Example],
    first: Sequence[Prediction],
    second: Sequence[Prediction],
    measure: Callable[[NDArray[Any]], float],
) -> Callable[[Any], tuple[float, float]]:
    names = {label for p in (*first, *second) for label in p.labels or ()}
    tables = [LabelTable.of(examples, predictions, sorted(names)) for predictions in (first, second)]
    counts = [label_counts(table.right, table.given) for table in tables]

    def statistic(rows: NDArray[numpy.intp]) -> tuple[float, float]:
        weights = numpy.bincount(rows, minlength=len(examples))
        return measure(weights @ counts[0]), measure(weights @ counts[1])

    return statistic


def _span_f1s(
    examples: Sequence[Example], first: Sequence[Prediction], second: Sequence[Prediction]
) -> Callable[[Any], tuple[float, float]]:
    truth = [spans(example.entities) for example in examples]
    counts = [span_counts(truth, [spans(p.entities) for p in predictions]) for predictions in (first, second)]

    def statistic(rows: NDArray[numpy.intp]) -> tuple[float, float]:
        return f1_of_counts(counts[0][rows]), f1_of_counts(counts[1][rows])

    return statistic


def point_apart(difference: Mapping[str, Any]) -> bool:
    """Whether only one of the 95 % interval and the p-value finds a difference, as close to the border they may."""
    change = difference["difference"]
    return bool((change["low"] > 0 or change["high"] < 0) != (difference["p_value"] < 0.05))


def comparison_page(
    found: Mapping[str, Any],
    examples: Sequence[Example],
    first: Sequence[Prediction],
    second: Sequence[Prediction],
) -> str:
    """One self-contained HTML file.

    Args:
        found: as `labeltune compare` writes it to `comparison.json`.
    """
    return render(
        "comparison.html.j2",
        found=found,
        examples=examples,
        first=first,
        second=second,
        names=_names(found),
        rows_line=f"rows: {rows_line(found)}",
        floor=floor_line(found),
        p_value=p_value,
        point_apart=point_apart,
        bare=BARE,
        most_shown=SHOWN,
        longest=LONGEST,
    )


def _names(found: Mapping[str, Any]) -> tuple[tuple[str, str], tuple[str, str]]:
    """What the two models are called, each in both languages: base and fine-tuned, or what tells their folders apart."""
    if found.get("base"):
        return ("base", "基座模型"), ("fine-tuned", "微调后")
    first, second = (list(PurePath(str(found[which])).parts) for which in ("first", "second"))
    while len(first) > 1 and len(second) > 1 and first[-1] == second[-1]:
        first.pop(), second.pop()
    if not first or not second or first[-1] == second[-1]:
        return ("first", "第一个"), ("second", "第二个")
    return tuple((f"“{part}”", f"“{part}”") for part in (first[-1], second[-1]))  # type: ignore[return-value]


def p_value(p: float) -> str:
    """Four digits; what is smaller is said to be smaller, not 0."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"
