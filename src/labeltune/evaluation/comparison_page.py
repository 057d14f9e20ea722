"""The HTML page of a comparison: differences, and the rows that changed sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from labeltune.evaluation.headline import rows_line
from labeltune.evaluation.pages import render
from labeltune.evaluation.words import FIGURES
from labeltune.types import Example, Prediction

#: Changed rows shown of each kind; changed.jsonl holds all.
SHOWN = 500
LONGEST = 1000
#: How the model of a run is named when its adapter is switched off.
BARE = " without its adapter"


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
        figures=FIGURES,
        p_value=p_value,
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
