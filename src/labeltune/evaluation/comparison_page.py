"""The HTML page of a comparison: differences, and the rows that changed sides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any

from labeltune.evaluation.words import FIGURES, rows_seen
from labeltune.pages import Html, both, cards, header, name, page, table
from labeltune.types import Entity, Example, Prediction

#: Changed rows shown of each kind; changed.jsonl holds all.
SHOWN = 500
LONGEST = 1000
#: How the model of a run is named when its adapter is switched off.
BARE = " without its adapter"
_NONE = Html("–")


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
    (a, a_zh), (b, b_zh) = names = _names(found)
    heads = [both(*each) for each in names]
    gained, lost = found["changed"]["gained"], found["changed"]["lost"]
    body = [
        _head(found, heads),
        f'<section id="differences">{_differences(found, heads)}</section>',
        f"<h2>{both('Rows', '样本')}</h2>",
        cards(
            [
                (both(f"Only {b} is right", f"仅{b_zh}正确"), f"{len(gained):,}", ""),
                (both(f"Only {a} is right", f"仅{a_zh}正确"), f"{len(lost):,}", ""),
                (both("Both are right", "两者都正确"), f"{found['both_right']:,}", ""),
                (both("Both are wrong", "两者都错误"), f"{found['both_wrong']:,}", ""),
            ]
        ),
    ]
    for title, numbers in (
        (both(f"Only {b} is right", f"仅{b_zh}正确"), gained),
        (both(f"Only {a} is right", f"仅{a_zh}正确"), lost),
    ):
        body.append(f"<h2>{title}</h2>")
        body.append(_changed(numbers, heads, examples, first, second))
    return page("labeltune: comparison", "\n".join(body), chinese="labeltune：对比")


def _head(found: Mapping[str, Any], heads: Sequence[Html]) -> str:
    lines = []
    for head, which in zip(heads, ("first", "second"), strict=True):
        model = str(found[which]).removesuffix(BARE)
        bare = both(BARE, "（不加适配器）") if model != found[which] else ""
        lines.append(f"{head}{both(': ', '：')}{name(model)}{bare}")
    rows = both(f"rows ({found['rows']:,}): ", f"样本（{found['rows']:,} 条）：")
    return header(
        both("Comparison", "对比"), "<br>".join([*lines, f"{rows}{name(found['data'])}", rows_seen(found)])
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


def _differences(found: Mapping[str, Any], heads: Sequence[Html]) -> str:
    rows = [
        (
            both(*FIGURES[figure]),
            f"{d['first']:.3f}",
            f"{d['second']:.3f}",
            f"{d['difference']['value']:+.3f}",
            f"{d['difference']['low']:+.3f} – {d['difference']['high']:+.3f}",
            p_value(d["p_value"]),
        )
        for figure, d in found["differences"].items()
    ]
    columns = [
        both("figure", "指标"),
        *heads,
        both("difference", "差值"),
        both("95% interval", "95% 置信区间"),
        both("p-value", "p 值"),
    ]
    return table(columns, rows, stacked=True)


def p_value(p: float) -> str:
    """Four digits; what is smaller is said to be smaller, not 0."""
    return "p < 0.0001" if p < 0.0001 else f"p = {p:.4f}"


def _changed(
    numbers: Sequence[int],
    heads: Sequence[Html],
    examples: Sequence[Example],
    first: Sequence[Prediction],
    second: Sequence[Prediction],
) -> str:
    if not numbers:
        return f"<p>{both('None.', '无。')}</p>"
    shown = [
        (
            name(examples[i].id),
            examples[i].text[:LONGEST] + ("…" if len(examples[i].text) > LONGEST else ""),
            _right(examples[i]),
            _answered(first[i]),
            _answered(second[i]),
        )
        for i in numbers[:SHOWN]
    ]
    columns = [both("id", "编号"), both("text", "文本"), both("right answer", "正确答案"), *heads]
    more = ""
    if len(numbers) > SHOWN:
        left = len(numbers) - SHOWN
        more = f"<p class='soft'>{both(f'{left:,} more in changed.jsonl', f'其余 {left:,} 条见 changed.jsonl')}</p>"
    return table(columns, shown, numbers_from=len(columns), stacked=True) + more


def _right(example: Example) -> Html:
    return name(example.label or "") if example.entities is None else _listed(example.entities)


def _answered(prediction: Prediction) -> Html:
    if prediction.entities is not None:
        return _listed(prediction.entities)
    if prediction.label is None:
        shown = Html(f"{both('not a label: ', '不在标签中：')}{name(prediction.answer[:80])}")
    else:
        shown = name(prediction.label)
    return shown if prediction.confidence is None else Html(f"{shown} {prediction.confidence:.2f}")


def _listed(entities: Sequence[Entity]) -> Html:
    return Html("<br>".join(f"{name(f'{e.text} ({e.label})')}" for e in entities)) if entities else _NONE
