"""The figures that are shown first and choose a checkpoint, of all rows and of parts of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy

from labeltune.errors import counted
from labeltune.evaluation.intervals import wilson
from labeltune.evaluation.metrics import label_numbers, macro_f1_of
from labeltune.evaluation.multilabel import (
    LabelTable,
    label_counts,
    micro_f1,
    multilabel_headline,
    over_rows,
)
from labeltune.evaluation.spans import (
    f1_of_counts,
    nesting_figures,
    precision_and_recall,
    span_counts,
    spans,
    strict_span_f1,
)
from labeltune.types import Example, Prediction

#: What a run's figures on its validation rows are called, wherever they are shown.
SELECTION = "validation (used for selection)"
#: And of training rows that models answered which were trained on the others.
OUT_OF_FOLD = "training, out of fold"
#: What figures are called as soon as one of their rows was trained on.
TRAINING = "training (seen by the model)"
#: The figures to show first, by task.
SHOWN_FIRST = {
    "classification": ("accuracy", "macro_f1"),
    "multilabel": ("micro_f1", "macro_f1", "subset_accuracy"),
    "ner": ("span_f1",),
}
#: What a linear model is called, by its kind.
FLOORS = {"linear": "logistic regression on character n-grams", "crf": "a conditional random field (CRF)"}
#: Parts that rows are cut into by length.
LENGTH_SLICES = 4
FREQUENCIES = ("rare", "middle", "frequent")


@dataclass(frozen=True)
class Evaluation:
    """Labelled rows, what a run answered to them, and all figures of both, as `labeltune evaluate` writes them."""

    metrics: Mapping[str, Any]
    examples: Sequence[Example]
    predictions: Sequence[Prediction]


def validation_figures(logged: Mapping[str, Any]) -> dict[str, float]:
    """Figures of a validation by name, from what Trainer logs of it (`eval_loss` ...), without its timings."""
    names = (name for name in logged if name.startswith("eval_"))
    kept = (name for name in names if not name.endswith(("runtime", "per_second")))
    return {name.removeprefix("eval_"): float(logged[name]) for name in kept}


def headline(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, float]:
    """`macro_f1` and `accuracy`, `micro_f1` and `macro_f1` of several labels a row, or `span_f1`, `precision` and `recall`, without
    intervals; rounded as `evaluate` does."""
    if examples and examples[0].labels is not None:
        return multilabel_headline(examples, predictions)
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
    if metrics.get("rows_are") == OUT_OF_FOLD:
        known = "each answered by a model that was not trained on it"
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


def floor_line(metrics: Mapping[str, Any]) -> str | None:
    """How the model stands to a linear one of the same training rows; None where there is none beside it."""
    found = metrics.get("floor")
    if found is None:
        return None
    name, rows, change = FLOORS[found["kind"]], counted(found["rows"], "training row"), found["difference"]
    figures = (
        f"{found['figure']} {found['first']:.3f} -> {found['second']:.3f}, {change['value']:+.3f} "
        f"(95 % interval {change['low']:+.3f} to {change['high']:+.3f})"
    )
    if change["low"] > 0:
        return f"clearly better than {name} on the same {rows}: {figures}"
    if change["high"] < 0:
        return f"clearly worse than {name} on the same {rows}: {figures}"
    return f"not clearly better than {name} on the same {rows}: {figures}"


def shown_headline(metrics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(name, value with interval) of the figures to show first."""
    found = []
    for name in SHOWN_FIRST[metrics["task"]]:
        m = metrics[name]
        shown = f"{m['value']:.3f}  (95 % interval {m['low']:.3f} to {m['high']:.3f})"
        if m["low"] == m["high"]:  # as a bootstrap of answers that are all right
            shown = f"{m['value']:.3f}  (no interval: on these rows all resamples come out the same)"
        found.append((name, shown))
    return found


def slices(examples: Sequence[Example], predictions: Sequence[Prediction]) -> dict[str, list[dict[str, Any]]]:
    """`by_length` and `by_label_frequency`: accuracy, micro-F1 of several labels a row, or strict span F1, each with its interval and rows.

    Lengths are characters, cut at the quartiles of these rows. Labels are ordered by how many of these rows (entities) have
    them and cut into thirds. Where entities lie inside entities, `by_nesting` has those by themselves, around others and inside others.
    """
    found = {
        "by_length": _by_length(examples, predictions),
        "by_label_frequency": _by_frequency(examples, predictions),
    }
    nested = nesting_figures([spans(e.entities) for e in examples], [spans(p.entities) for p in predictions])
    if nested:
        found["by_nesting"] = [
            {"slice": kind, "rows": part.pop("support"), **part} for kind, part in nested.items()
        ]
    return found


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
        found.append({"slice": name, "rows": len(rows), **figure_of_rows(examples, predictions, rows)})
    return found


def figure_of_rows(
    examples: Sequence[Example], predictions: Sequence[Prediction], rows: Iterable[int]
) -> dict[str, Any]:
    """Accuracy, micro-F1 or strict span F1 of some of the rows, with its interval, under its name."""
    mine = [examples[i] for i in rows]
    answers = [predictions[i] for i in rows]
    if mine[0].labels is not None:
        table = LabelTable.of(mine, answers)
        return {"micro_f1": over_rows(label_counts(table.right, table.given), micro_f1).to_dict()}
    if mine[0].entities is None:
        hits = sum(e.label == p.label for e, p in zip(mine, answers, strict=True))
        return {"accuracy": wilson(hits, len(mine)).to_dict()}
    return _span_f1([spans(e.entities) for e in mine], [spans(p.entities) for p in answers])


def _span_f1(truth: Sequence[set[Any]], given: Sequence[set[Any]]) -> dict[str, Any]:
    return {"span_f1": strict_span_f1(truth, given)["span_f1"]}


def _by_frequency(examples: Sequence[Example], predictions: Sequence[Prediction]) -> list[dict[str, Any]]:
    support = Counter(label for example in examples for label in example.right_names)
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
    """Accuracy of the rows with one of these labels; micro-F1 or strict span F1 of these labels or types alone."""
    if examples and examples[0].labels is not None:
        mine = [replace(e, labels=tuple(name for name in e.labels or () if name in labels)) for e in examples]
        answers = [
            replace(p, labels=tuple(name for name in p.labels or () if name in labels)) for p in predictions
        ]
        return figure_of_rows(mine, answers, range(len(mine)))
    if examples and examples[0].entities is None:
        chosen = [i for i, example in enumerate(examples) if (example.label or "") in labels]
        return figure_of_rows(examples, predictions, chosen)
    truth = [spans([e for e in example.entities or () if e.label in labels]) for example in examples]
    given = [spans([e for e in p.entities or () if e.label in labels]) for p in predictions]
    return _span_f1(truth, given)
