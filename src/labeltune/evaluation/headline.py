"""The figures that choose a checkpoint, by the functions `labeltune evaluate` reports with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labeltune.evaluation.metrics import label_numbers, macro_f1_of
from labeltune.evaluation.spans import f1_of_counts, precision_and_recall, span_counts, spans
from labeltune.types import Example, Prediction

#: What a run's figures on its validation rows are called, wherever they are shown.
SELECTION = "validation (used for selection)"
#: What figures are called as soon as one of their rows was trained on.
TRAINING = "training (seen by the model)"


def headline(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
    """`macro_f1` and `accuracy`, or `span_f1`, `precision` and `recall`, without intervals; rounded as `evaluate` does."""
    if examples and examples[0].entities is not None:
        counts = span_counts([spans(e.entities) for e in examples], [spans(p.entities) for p in predictions])
        hits, given, wanted = (int(n) for n in counts.sum(axis=0))
        return {
            "span_f1": round(f1_of_counts(counts), 6),
            **precision_and_recall(hits, given, wanted),
        }
    right, given_labels, count = label_numbers(
        [e.label or "" for e in examples], [p.label for p in predictions]
    )
    return {
        "macro_f1": round(macro_f1_of(right, given_labels, count), 6),
        "accuracy": round(float((right == given_labels).mean()), 6) if len(right) else 0.0,
    }


def rows_line(metrics: Mapping[str, Any]) -> str:
    """How many rows were measured, and what the run has seen of them before: "40 (36 of them trained on, 4 used for selection)"."""
    rows, trained, selected = metrics["rows"], metrics.get("training_rows"), metrics.get("selection_rows", 0)
    skipped = ", ".join(f"{kind} {n}" for kind, n in metrics.get("skipped", {}).items())
    end = f"; skipped: {skipped}" if skipped else ""
    parts = [f"{trained} of them trained on"] if trained else []
    if selected:
        parts.append(f"{selected} {'' if trained else 'of them '}used for selection")
    if parts:
        return f"{rows} ({', '.join(parts)}){end}"
    known = "none seen in training" if trained == 0 else "whether training saw them is not known"
    return f"{rows}, {metrics.get('rows_are', 'test')} ({known}){end}"


def worse_than_constant(metrics: Mapping[str, Any]) -> str | None:
    """A comment on an accuracy below that of always answering the most frequent label; None where there is none to make."""
    if metrics["task"] != "classification" or not metrics["labels"]:
        return None
    constant, accuracy = metrics["baselines"]["majority"]["value"], metrics["accuracy"]["value"]
    if accuracy >= constant:
        return None
    label = max(metrics["labels"], key=lambda name: metrics["labels"][name]["support"])
    return f"worse than always answering {label!r} ({constant:.3f})"


def shown_headline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value with interval) of the figures to show first."""
    names = ("accuracy", "macro_f1") if metrics["task"] == "classification" else ("span_f1",)
    found = []
    for name in names:
        m = metrics[name]
        found.append((name, f"{m['value']:.3f}  (95 % interval {m['low']:.3f} to {m['high']:.3f})"))
    return found
