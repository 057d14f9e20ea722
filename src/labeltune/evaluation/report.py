"""The HTML report of an evaluation: headline figures, confusion matrix, reliability, slices, and every row to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from labeltune.evaluation.compare import right_row
from labeltune.evaluation.headline import SELECTION, TRAINING, rows_line, worse_than_constant
from labeltune.evaluation.spans import ERRORS, match_entities
from labeltune.pages import cards, page, table, text
from labeltune.types import Entity, Example, Prediction

#: Characters of documents that a report holds at most, together; it has to open in seconds.
TEXT_BUDGET = 12_000_000
#: A text is shown to at least and at most this many characters.
SHORTEST, LONGEST = 200, 4000
#: Candidates of a ranking that are shown.
RANKING = 5

#: English name of a figure -> (how it is headed, in Chinese).
_NAMES = {
    "accuracy": ("Accuracy", "准确率"),
    "macro_f1": ("Macro-F1", "宏平均 F1"),
    "weighted_f1": ("Weighted F1", "加权 F1"),
    "mcc": ("Matthews correlation", "马修斯相关系数"),
    "span_f1": ("Strict span F1", "实体严格 F1"),
    "partial_span_f1": ("Partial span F1", "实体部分匹配 F1"),
    "precision": ("Precision", "精确率"),
    "recall": ("Recall", "召回率"),
    "unparsable": ("Unparsable answers", "无法解析的回答"),
    "rows": ("Rows", "行数"),
    "exact_rows": ("Rows answered exactly", "完全正确的行"),
}
_HEADLINES = {
    "classification": ("accuracy", "macro_f1", "weighted_f1", "mcc", "unparsable"),
    "ner": ("span_f1", "precision", "recall", "partial_span_f1", "exact_rows", "unparsable"),
}


def both(english: str, chinese: str) -> str:
    """Text that the page's language button switches."""
    return f'<span data-zh="{text(chinese)}">{text(english)}</span>'


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
    }
    sections = [
        _head(metrics),
        _headline(metrics),
        _baselines(metrics),
        _labels(metrics),
        '<div id="confusion"></div>' if task == "classification" else _errors(metrics),
        _reliability(metrics),
        _slices(metrics),
        _browser(limit),
    ]
    script = resources.files("labeltune.evaluation").joinpath("report.js").read_text(encoding="utf-8")
    style = resources.files("labeltune.evaluation").joinpath("report.css").read_text(encoding="utf-8")
    title = f"labeltune: {metrics['data']}"
    return page(title, "\n".join(sections), style=style, script=script, data=data)


def _head(metrics: Mapping[str, Any]) -> str:
    rows = str(metrics.get("rows_are", "test"))
    chinese = {SELECTION: "验证集（已用于选择）", TRAINING: "训练集（模型见过）"}.get(rows, "测试集")
    warned = ' class="bad"' if metrics.get("training_rows") or metrics.get("selection_rows") else ""
    model = "untuned model of" if metrics.get("base") else ""
    return (
        '<header><button id="language" type="button">中文</button>'
        f"<h1>{both('Evaluation', '评测报告')}</h1><p class='soft'>{text(model)} {text(metrics['run'])} · "
        f"{text(metrics['data'])} · {both('rows are', '数据')}: <b id='rows-are'>{both(rows, chinese)}</b> · "
        f"<b id='seen'{warned}>{both('rows: ' + rows_line(metrics), rows_line_zh(metrics))}</b></p></header>"
    )


def rows_line_zh(metrics: Mapping[str, Any]) -> str:
    """`rows_line` in Chinese."""
    trained, selected = metrics.get("training_rows"), metrics.get("selection_rows", 0)
    parts = [f"其中 {trained} 条参与过训练"] if trained else []
    if selected:
        parts.append(f"{selected} 条用于挑选 checkpoint")
    if not parts:
        parts.append("训练时均未见过" if trained == 0 else "是否参与过训练未知")
    return f"共 {metrics['rows']} 条（{'，'.join(parts)}）"


def _interval(value: Any) -> tuple[str, str]:
    """(value, its interval) as they are shown."""
    if isinstance(value, Mapping):
        return f"{value['value']:.3f}", f"95 % {value['low']:.3f} – {value['high']:.3f}"
    return f"{float(value):.3f}", ""


def _headline(metrics: Mapping[str, Any]) -> str:
    items = [("Rows", str(metrics["rows"]), "")]
    for name in _HEADLINES[metrics["task"]]:
        if name in metrics:
            items.append((_NAMES[name][0], *_interval(metrics[name])))
    for k, measure in metrics.get("top_k", {}).items():
        items.append((f"Top-{k} accuracy", *_interval(measure)))
    shown = cards(items)
    for english, chinese in _NAMES.values():
        shown = shown.replace(f">{text(english)}<b>", f">{both(english, chinese)}<b>")
    return f'<section id="overview">{shown}</section>'


def _baselines(metrics: Mapping[str, Any]) -> str:
    found = metrics.get("baselines", {})
    if not found:
        return ""
    rows = [(name.replace("_", " "), *_interval(measure)) for name, measure in found.items()]
    worse = worse_than_constant(metrics)
    comment = ""
    if worse is not None:
        chinese = f"准确率低于始终回答最常见标签（{found['majority']['value']:.3f}）"
        comment = f'<p class="bad">{both(f"accuracy: {worse}", chinese)}</p>'
    return f"<h2>{both('Without learning', '不学习的基线')}</h2>{comment}" + table(
        ["baseline", "value", ""], rows
    )


def _labels(metrics: Mapping[str, Any]) -> str:
    rows = [
        (name, f"{f['precision']:.3f}", f"{f['recall']:.3f}", f"{f['f1']:.3f}", f["support"])
        for name, f in metrics["labels"].items()
    ]
    head = ["label", "precision", "recall", "F1", "support"]
    return f"<section id='labels'><h2>{both('By label', '各类别')}</h2>{table(head, rows)}</section>"


def _errors(metrics: Mapping[str, Any]) -> str:
    rows = [(kind.replace("_", " "), count) for kind, count in metrics["errors"].items()]
    return f"<h2>{both('Errors', '错误类型')}</h2>" + table(["kind", "entities"], rows)


def _reliability(metrics: Mapping[str, Any]) -> str:
    bins = metrics.get("reliability")
    if not bins:
        return ""
    figures = metrics["confidence"]
    shown = cards(
        [
            ("ECE", f"{figures['ece']:.3f}", "15 bins"),
            ("Brier", *_interval(figures["brier"])),
            ("NLL", *_interval(figures["nll"])),
        ]
    )
    return (
        f"<h2>{both('How far confidence can be believed', '置信度是否可信')}</h2>{shown}"
        f'<figure id="reliability">{reliability_diagram(bins)}</figure>'
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
        told = f"confidence {each['confidence']:.3f}, accuracy {each['accuracy']:.3f}, {each['rows']} rows"
        marks.append(
            f'<circle class="point" cx="{x(each["confidence"])}" cy="{y(each["accuracy"])}" r="{radius:.1f}">'
            f"<title>{told}</title></circle>"
        )
    marks.append(f'<text x="{x(0.5)}" y="{size - 4}" text-anchor="middle">confidence</text>')
    marks.append(f'<text x="{edge}" y="10">accuracy</text>')
    return f'<svg viewBox="0 0 {size} {size}" width="{size}" role="img">{"".join(marks)}</svg>'


def _slices(metrics: Mapping[str, Any]) -> str:
    found = []
    titles = {
        "by_length": both("By length of the text", "按文本长度"),
        "by_label_frequency": both("By frequency of the label", "按类别频次"),
    }
    for key, title in titles.items():
        parts = metrics.get("slices", {}).get(key) or []
        if not parts:
            continue
        name = next(k for k in ("accuracy", "span_f1") if k in parts[0])
        rows = [(part["slice"], part["rows"], *_interval(part[name])) for part in parts]
        found.append(f"<h2>{title}</h2>" + table(["slice", "rows", _NAMES[name][0], ""], rows))
    return "".join(found)


def _browser(limit: int) -> str:
    return (
        f'<h2 id="rows">{both("Rows", "逐行查看")}</h2>'
        '<form id="filters" onsubmit="return false"><input id="search" type="search" placeholder="search / 搜索" '
        'aria-label="search"> <select id="state" aria-label="which rows"></select> '
        '<select id="right" aria-label="right label"></select> <select id="given" aria-label="predicted label"></select> '
        '<select id="order" aria-label="order"></select> <button id="clear" type="button">×</button></form>'
        '<p class="soft"><span id="count" aria-live="polite"></span> '
        f'<span class="soft">· texts are shown up to {limit} characters; predictions.jsonl holds all of them</span></p>'
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
