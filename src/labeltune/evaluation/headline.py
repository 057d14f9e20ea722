"""The figures that choose a checkpoint, by the functions `labeltune evaluate` reports with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labeltune.evaluation.metrics import label_numbers, macro_f1_of
from labeltune.evaluation.spans import f1_of_counts, span_counts, spans
from labeltune.types import Example, Prediction

#: What a run's figures on its validation rows are called, wherever they are shown.
SELECTION = "validation (used for selection)"


def headline(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
    """`macro_f1` and `accuracy`, or `span_f1`, `precision` and `recall`, without intervals; rounded as `evaluate` does."""
    if examples and examples[0].entities is not None:
        counts = span_counts([spans(e.entities) for e in examples], [spans(p.entities) for p in predictions])
        hits, given, wanted = (int(n) for n in counts.sum(axis=0))
        return {
            "span_f1": round(f1_of_counts(counts), 6),
            "precision": round(hits / given, 6) if given else 0.0,
            "recall": round(hits / wanted, 6) if wanted else 0.0,
        }
    right, given_labels, count = label_numbers(
        [e.label or "" for e in examples], [p.label for p in predictions]
    )
    return {
        "macro_f1": round(macro_f1_of(right, given_labels, count), 6),
        "accuracy": round(float((right == given_labels).mean()), 6) if len(right) else 0.0,
    }


def shown_headline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value with interval) of the figures to show first."""
    names = ("accuracy", "macro_f1") if metrics["task"] == "classification" else ("span_f1",)
    found = []
    for name in names:
        m = metrics[name]
        found.append((name, f"{m['value']:.3f}  (95 % interval {m['low']:.3f} to {m['high']:.3f})"))
    return found
