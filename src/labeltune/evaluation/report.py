"""The HTML report of an evaluation: headline figures, confusion matrix, reliability, slices, and every row to look at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from labeltune.evaluation.compare import right_row
from labeltune.evaluation.pages import ERROR_KINDS, FREQUENCY_SLICES, NESTING_SLICES, REPORT, render
from labeltune.evaluation.spans import ERRORS, match_entities
from labeltune.evaluation.summary import SHOWN_FIRST, floor_line, rows_line, worse_than_constant
from labeltune.types import Entity, Example, Prediction

_Words = tuple[str, str]
#: Characters of documents that a report holds at most, together; it has to open in seconds.
TEXT_BUDGET = 12_000_000
#: A text is shown to at least and at most this many characters.
SHORTEST, LONGEST = 200, 4000
#: Candidates of a ranking that are shown.
RANKING = 5

#: The figures shown first, and those below them.
_HEADLINES = {
    "classification": ("accuracy", "macro_f1"),
    "multilabel": ("micro_f1", "macro_f1", "subset_accuracy"),
    "ner": ("span_f1", "precision", "recall"),
}
_MINOR = {
    "classification": ("weighted_f1", "mcc", "unparsable"),
    "multilabel": ("weighted_f1", "sample_f1", "hamming_loss", "map"),
    "ner": ("partial_span_f1", "exact_rows", "unparsable"),
}


def report_page(
    metrics: Mapping[str, Any], examples: Sequence[Example], predictions: Sequence[Prediction]
) -> str:
    """One self-contained HTML file.

    Args:
        metrics: as `labeltune evaluate` writes them.
        examples: the labelled rows, in the order of `predictions`.
    """
    task = str(metrics["task"])
    limit = max(SHORTEST, min(LONGEST, TEXT_BUDGET // max(len(examples), 1)))
    data = {
        "task": task,
        "rows": [_row(e, p, limit) for e, p in zip(examples, predictions, strict=True)],
        "confusion": metrics.get("confusion"),
        "together": metrics.get("together"),
        "errors": list(ERRORS) if task == "ner" else [],
        "words": {**REPORT, **ERROR_KINDS},
    }
    return render(
        "report.html.j2",
        metrics=metrics,
        rows_line=f"rows: {rows_line(metrics)}",
        worse=worse_than_constant(metrics),
        floor=floor_line(metrics),
        figure=SHOWN_FIRST[task][0],
        headlines=_HEADLINES[task],
        minor=_MINOR[task],
        slice_tables=_slice_tables(metrics),
        limit=limit,
        data=data,
    )


def _slice_tables(metrics: Mapping[str, Any]) -> list[tuple[_Words, _Words, list[tuple[_Words, Any]]]]:
    """(title, what its parts count, (name, figures) of each part): by length, and by frequency where frequencies differ."""
    parts = metrics.get("slices", {})
    rows = ("rows", "样本数")
    found: list[tuple[_Words, _Words, list[tuple[_Words, Any]]]] = []
    by_length = [(_length(part["slice"]), part) for part in parts.get("by_length") or []]
    if by_length:
        found.append((("By length of the text", "按文本长度"), rows, by_length))
    by_frequency = [(FREQUENCY_SLICES[part["slice"]], part) for part in parts.get("by_label_frequency") or []]
    if by_frequency and len({figures["support"] for figures in metrics["labels"].values()}) > 1:
        counted = ("entities", "实体数") if metrics["task"] == "ner" else rows
        found.append((("By frequency of the label", "按类别频次"), counted, by_frequency))
    by_nesting = [(NESTING_SLICES[part["slice"]], part) for part in parts.get("by_nesting") or []]
    if by_nesting:
        found.append((("Entities inside entities", "嵌套实体"), ("entities", "实体数"), by_nesting))
    return found


def _length(english: str) -> _Words:
    """`6 to 14 characters` in both languages."""
    return english, f"{' 至 '.join(re.findall('[0-9]+', english))} 个字符"


def _row(example: Example, prediction: Prediction, limit: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": example.id,
        "text": example.text[:limit],
        "cut": len(example.text) > limit,
        "ok": right_row(example, prediction),
        "source": example.source,
    }
    if example.labels is not None:
        row |= {"right": list(example.labels), "given": list(prediction.labels or ())}
        row["p"] = [[label, round(p, 4)] for label, p in prediction.ranking[:RANKING]]
        return row
    if example.entities is None:
        row |= {"right": example.label, "given": prediction.label, "answer": prediction.answer[:LONGEST]}
        if prediction.ranking:
            row["p"] = [[label, round(p, 4)] for label, p in prediction.ranking[:RANKING]]
        return row
    matched = match_entities(example.entities, prediction.entities or ())
    row["hits"] = [_entity(e) for e in matched.right]
    row["errors"] = [
        [kind, _entity(right), _entity(given)] for kind in ERRORS for right, given in matched.errors[kind]
    ]
    row["truncated"] = prediction.truncated
    if not prediction.parsed:
        row["answer"] = prediction.answer[:LONGEST]
    return row


def _entity(entity: Entity | None) -> list[Any] | None:
    return None if entity is None else [entity.start, entity.end, entity.label, entity.text]
