"""The HTML page of a comparison: differences, and the rows that changed sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from labeltune.evaluation.headline import rows_line
from labeltune.pages import cards, page, table, text
from labeltune.types import Example, Prediction

#: Changed rows shown of each kind; changed.jsonl holds all.
SHOWN = 500
LONGEST = 1000


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
    rows = [
        (
            name,
            f"{d['first']:.3f}",
            f"{d['second']:.3f}",
            f"{d['difference']['value']:+.3f}",
            f"{d['difference']['low']:+.3f} – {d['difference']['high']:+.3f}",
            f"{d['p_value']:.4f}",
        )
        for name, d in found["differences"].items()
    ]
    warned = ' class="bad"' if found.get("training_rows") or found.get("selection_rows") else ""
    gained, lost = found["changed"]["gained"], found["changed"]["lost"]
    body = [
        "<h1>Comparison / 对比</h1>",
        f"<p class='soft'>first: {text(found['first'])}<br>second: {text(found['second'])}<br>rows: {text(found['data'])}"
        f"<br><b id='seen'{warned}>rows: {text(rows_line(found))}</b></p>",
        table(["figure", "first", "second", "difference", "95 %", "p"], rows),
        "<h2>Rows / 行</h2>",
        cards(
            [
                ("only the second is right", str(len(gained)), ""),
                ("only the first is right", str(len(lost)), ""),
                ("both right", str(found["both_right"]), ""),
                ("both wrong", str(found["both_wrong"]), ""),
            ]
        ),
    ]
    for title, numbers in (
        ("Only the second is right / 仅第二个正确", gained),
        ("Only the first is right / 仅第一个正确", lost),
    ):
        body.append(f"<h2>{title}</h2>")
        shown = [
            (
                examples[i].id,
                examples[i].text[:LONGEST] + ("…" if len(examples[i].text) > LONGEST else ""),
                _right(examples[i]),
                _answered(first[i]),
                _answered(second[i]),
            )
            for i in numbers[:SHOWN]
        ]
        body.append(
            table(["id", "text", "right", "first", "second"], shown, numbers_from=5)
            if shown
            else "<p>none / 无</p>"
        )
        if len(numbers) > SHOWN:
            body.append(f"<p class='soft'>{len(numbers) - SHOWN} more in changed.jsonl</p>")
    return page(
        "labeltune: comparison", "\n".join(body), style="td { vertical-align: top; overflow-wrap: anywhere; }"
    )


def _right(example: Example) -> str:
    if example.entities is None:
        return example.label or ""
    return ", ".join(f"{e.text} ({e.label})" for e in example.entities) or "–"


def _answered(prediction: Prediction) -> str:
    if prediction.entities is None:
        label = (
            prediction.label if prediction.label is not None else f"off the list: {prediction.answer[:80]}"
        )
        return f"{label} {prediction.confidence:.2f}" if prediction.confidence is not None else label
    return ", ".join(f"{e.text} ({e.label})" for e in prediction.entities) or "–"
