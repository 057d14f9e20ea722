"""The HTML report of an evaluation: headline figures, confusion matrix, reliability, slices, and every row to look at."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from labeltune.evaluation.compare import right_row
from labeltune.evaluation.headline import worse_than_constant
from labeltune.evaluation.spans import ERRORS, match_entities
from labeltune.evaluation.words import BASELINES, ERROR_KINDS, FIGURES, FREQUENCY_SLICES, REPORT, rows_seen
from labeltune.messages import chinese
from labeltune.pages import Html, both, cards, header, name, page, paragraph, table
from labeltune.types import Entity, Example, Prediction

#: Characters of documents that a report holds at most, together; it has to open in seconds.
TEXT_BUDGET = 12_000_000
#: A text is shown to at least and at most this many characters.
SHORTEST, LONGEST = 200, 4000
#: Candidates of a ranking that are shown.
RANKING = 5

#: The figures shown first, and those below them.
_HEADLINES = {"classification": ("accuracy", "macro_f1"), "ner": ("span_f1", "precision", "recall")}
_MINOR = {
    "classification": ("weighted_f1", "mcc", "unparsable"),
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
        "errors": list(ERRORS) if task == "ner" else [],
        "words": {**REPORT, **ERROR_KINDS},
    }
    if task == "classification":
        sides = [[_labels, _baselines, _slices], [_confusion, _reliability]]
    else:
        sides = [[_labels, _errors], [_baselines, _slices]]
    columns = "".join(f"<div>{''.join(each(metrics) for each in side)}</div>" for side in sides)
    sections = [
        _head(metrics),
        _headline(metrics),
        f'<div class="columns">{columns}</div>',
        _browser(limit, task),
    ]
    files = resources.files("labeltune.evaluation")
    return page(
        f"labeltune: {metrics['data']}",
        "\n".join(sections),
        style=files.joinpath("report.css").read_text(encoding="utf-8"),
        script=files.joinpath("report.js").read_text(encoding="utf-8"),
        data=data,
    )


def _head(metrics: Mapping[str, Any]) -> str:
    rows, file = str(metrics.get("rows_are", "test")), str(metrics["data"])
    untuned = both("untuned model of ", "未微调的模型：") if metrics.get("base") else ""
    data = name(file) if chinese(file) == file else both(file, chinese(file))
    return header(
        both("Evaluation", "评测报告"),
        f"{untuned}{name(metrics['run'])} · {data} · {both('rows are: ', '数据：')}"
        f"<b id='rows-are'>{both(rows, chinese(rows))}</b>",
        rows_seen(metrics),
    )


def _interval(value: Any) -> tuple[str, str]:
    """(value, its interval) as they are shown."""
    if isinstance(value, Mapping):
        return f"{value['value']:.3f}", f"95% {value['low']:.3f} – {value['high']:.3f}"
    return f"{float(value):.3f}", ""


def _headline(metrics: Mapping[str, Any]) -> str:
    def figures(names: Sequence[str]) -> list[tuple[str, str, str]]:
        return [(both(*FIGURES[key]), *_interval(metrics[key])) for key in names if key in metrics]

    task = metrics["task"]
    minor = figures(_MINOR[task])
    for k, measure in metrics.get("top_k", {}).items():
        minor.append((both(f"Top-{k} accuracy", f"Top-{k} 准确率"), *_interval(measure)))
    first = [*figures(_HEADLINES[task]), (both("Rows", "样本数"), f"{metrics['rows']:,}", "")]
    return f'<section id="overview">{cards(first)}{cards(minor, minor=True)}</section>'


def _baselines(metrics: Mapping[str, Any]) -> str:
    rows = [
        (both(*BASELINES[which]), *_interval(measure))
        for which, measure in metrics.get("baselines", {}).items()
    ]
    if not rows:
        return ""
    worse = worse_than_constant(metrics)
    comment = paragraph(both(f"accuracy: {worse}", f"准确率：{chinese(worse)}"), "bad") if worse else ""
    head = [both("baseline", "基线"), both("value", "数值"), both("95% interval", "95% 置信区间")]
    return f"<h2>{both('Baselines (nothing is trained)', '基线（不训练）')}</h2>{comment}{table(head, _short(rows))}"


def _short(rows: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Rows of a table that end in an interval, whose heading says already what it is."""
    return [[*row[:-1], row[-1].removeprefix("95% ")] for row in rows]


def _labels(metrics: Mapping[str, Any]) -> str:
    rows = [
        (name(label), f"{f['precision']:.3f}", f"{f['recall']:.3f}", f"{f['f1']:.3f}", f"{f['support']:,}")
        for label, f in metrics["labels"].items()
    ]
    head = [
        both("label", "类别"),
        both("precision", "精确率"),
        both("recall", "召回率"),
        Html("F1"),
        both("support", "样本数"),
    ]
    return f"<section id='labels'><h2>{both('By label', '各类别')}</h2>{table(head, rows)}</section>"


def _confusion(metrics: Mapping[str, Any]) -> str:
    """Where report.js draws it."""
    return '<section id="confusion"></section>'


def _errors(metrics: Mapping[str, Any]) -> str:
    rows = [(both(*ERROR_KINDS[kind]), f"{count:,}") for kind, count in metrics["errors"].items()]
    head = [both("kind", "错误类型"), both("entities", "实体数")]
    return f"<section><h2>{both('Errors', '错误类型')}</h2>{table(head, rows)}</section>"


def _reliability(metrics: Mapping[str, Any]) -> str:
    bins = metrics.get("reliability")
    if not bins:
        return ""
    figures = metrics["confidence"]
    shown = cards(
        [
            (Html("ECE"), f"{figures['ece']:.3f}", both("15 bins", "15 个区间")),
            (Html("Brier"), *_interval(figures["brier"])),
            (Html("NLL"), *_interval(figures["nll"])),
        ],
        minor=True,
    )
    return (
        f"<section><h2>{both('How far confidence can be believed', '置信度是否可信')}</h2>{shown}"
        f'<figure id="reliability">{reliability_diagram(bins)}</figure></section>'
    )


def reliability_diagram(bins: Sequence[Mapping[str, float]], size: int = 320) -> str:
    """Accuracy against confidence as SVG; a calibrated model's points lie on the diagonal. Points grow with their rows."""
    edge, inner = 36, size - 52
    most = max(each["rows"] for each in bins)

    def x(value: float) -> float:
        return round(edge + inner * value, 1)

    def y(value: float) -> float:
        return round(size - edge - inner * value, 1)

    marks = []
    for tick in (0, 0.25, 0.5, 0.75, 1):
        marks.append(f'<line class="axis" x1="{x(0)}" x2="{x(1)}" y1="{y(tick)}" y2="{y(tick)}"/>')
        marks.append(f'<text x="{x(tick)}" y="{size - 18}" text-anchor="middle">{tick:g}</text>')
        marks.append(f'<text x="{edge - 6}" y="{y(tick) + 4}" text-anchor="end">{tick:g}</text>')
    marks.append(f'<line class="diagonal" x1="{x(0)}" y1="{y(0)}" x2="{x(1)}" y2="{y(1)}"/>')
    for each in bins:
        radius = 3 + 9 * (each["rows"] / most) ** 0.5
        sure, right = f"{each['confidence']:.3f}", f"{each['accuracy']:.3f}"
        told = f"confidence {sure}, accuracy {right}, {each['rows']} rows"
        told_zh = f"置信度 {sure}，准确率 {right}，{each['rows']} 条样本"
        marks.append(
            f'<circle class="point" cx="{x(each["confidence"])}" cy="{y(each["accuracy"])}" r="{radius:.1f}">'
            f'<title data-zh="{told_zh}">{told}</title></circle>'
        )
    marks.append(f'<text x="{x(0.5)}" y="{size - 4}" text-anchor="middle" data-zh="置信度">confidence</text>')
    marks.append(f'<text x="{edge}" y="10" data-zh="准确率">accuracy</text>')
    return f'<svg viewBox="0 0 {size} {size}" width="{size}" role="img">{"".join(marks)}</svg>'


def _slices(metrics: Mapping[str, Any]) -> str:
    parts = metrics.get("slices", {})
    found = []
    by_length = [(_length(part["slice"]), part) for part in parts.get("by_length") or []]
    if by_length:
        found.append(_slice_table(both("By length of the text", "按文本长度"), by_length))
    supports = {figures["support"] for figures in metrics["labels"].values()}
    by_frequency = [
        (both(*FREQUENCY_SLICES[part["slice"]]), part) for part in parts.get("by_label_frequency") or []
    ]
    if by_frequency and len(supports) > 1:
        found.append(_slice_table(both("By frequency of the label", "按类别频次"), by_frequency))
    return "".join(found)


def _length(english: str) -> Html:
    """`6 to 14 characters` in both languages."""
    return both(english, f"{' 至 '.join(re.findall('[0-9]+', english))} 个字符")


def _slice_table(title: Html, parts: Sequence[tuple[Html, Mapping[str, Any]]]) -> str:
    figure = next(k for k in ("accuracy", "span_f1") if k in parts[0][1])
    rows = [(shown, f"{part['rows']:,}", *_interval(part[figure])) for shown, part in parts]
    counted = (
        both("entities", "实体数")
        if "labels" in parts[0][1] and figure == "span_f1"
        else both("rows", "样本数")
    )
    head = [both("slice", "分组"), counted, both(*FIGURES[figure]), both("95% interval", "95% 置信区间")]
    return f"<h2>{title}</h2>{table(head, _short(rows))}"


def _browser(limit: int, task: str) -> str:
    shown = both(
        f"texts are shown up to {limit:,} characters; predictions.jsonl holds all of them",
        f"文本最多显示 {limit:,} 个字符，完整内容见 predictions.jsonl",
    )
    legend = ""
    if task == "ner":
        kinds = (
            ("right", both("labelled and predicted", "标注与预测一致")),
            ("missing", both("labelled only", "仅标注")),
            ("wrong", both("predicted only", "仅预测")),
        )
        legend = "".join(f'<span class="chip {kind}">{told}</span> ' for kind, told in kinds)
        legend = f'<p id="legend">{legend}</p>'
    return (
        f'<h2 id="rows">{both("Rows", "样本明细")}</h2>'
        '<form id="filters" onsubmit="return false"><input id="search" type="search"> <select id="state"></select> '
        '<select id="right"></select> <select id="given"></select> <select id="order"></select> '
        '<button id="clear" type="button">×</button></form>'
        f'<p class="soft"><span id="count" aria-live="polite"></span> · {shown}</p>{legend}'
        '<div id="list"></div><p><button id="more" type="button">+</button></p>'
    )


def _row(example: Example, prediction: Prediction, limit: int) -> dict[str, Any]:
    row: dict[str, Any] = {
        "id": example.id,
        "text": example.text[:limit],
        "cut": len(example.text) > limit,
        "ok": right_row(example, prediction),
        "source": example.source,
    }
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
