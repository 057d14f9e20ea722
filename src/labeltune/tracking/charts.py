"""Charts of an evaluation for a tracker, made with `swanlab.echarts` (pyecharts)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy

from labeltune.evaluation.summary import Evaluation
from labeltune.types import Example, Prediction

#: Labels that get a precision-recall curve of their own, the most frequent ones.
CURVES = 10
#: Stands for answers off the list in the confusion matrix.
OFF_LIST = "(off the list)"


def charts(echarts: ModuleType, evaluation: Evaluation) -> dict[str, Any]:
    """Name -> chart: per-label figures; for labels a confusion matrix, precision-recall curves and a reliability diagram.

    Args:
        echarts: the module `swanlab.echarts`.
        evaluation: its `rows_are` heads every name.
    """
    metrics, examples, predictions = evaluation.metrics, evaluation.examples, evaluation.predictions
    found = {"per label": _bars(echarts, metrics["labels"], ("precision", "recall", "f1"))}
    if metrics["task"] == "classification":
        found["confusion matrix"] = _confusion(echarts, examples, predictions)
        if metrics.get("reliability"):
            found["reliability"] = _reliability(echarts, metrics["reliability"])
            found.update(_curves(echarts, examples, predictions))
    elif metrics["task"] == "multilabel":
        if metrics.get("reliability"):
            found["reliability"] = _reliability(echarts, metrics["reliability"])
            found.update(_curves(echarts, examples, predictions))
    else:
        found["errors"] = _bars(
            echarts, {k: {"entities": n} for k, n in metrics["errors"].items()}, ("entities",)
        )
    if metrics.get("learning_curve"):
        found["learning curve"] = _growth(echarts, metrics["learning_curve"])
    return {f"{metrics['rows_are']}/{name}": chart for name, chart in found.items()}


def texts(metrics: Mapping[str, Any]) -> dict[str, list[tuple[str, str]]]:
    """The same as lines of (caption, text), for dashboards without charts."""
    found = {
        "per label (text)": [
            (
                name,
                f"precision {f['precision']:.3f}, recall {f['recall']:.3f}, F1 {f['f1']:.3f}, {f['support']} rows",
            )
            for name, f in metrics["labels"].items()
        ]
    }
    if "confusion" in metrics:
        found["confusion matrix (text)"] = [
            (
                right,
                "predicted: " + ", ".join(f"{name or OFF_LIST} {count}" for name, count in counts.items()),
            )
            for right, counts in metrics["confusion"].items()
        ]
    if metrics.get("reliability"):
        found["reliability (text)"] = [
            (
                f"{b['from']:.1f} to {b['to']:.1f}",
                f"confidence {b['confidence']:.3f}, accuracy {b['accuracy']:.3f}, {b['rows']} rows",
            )
            for b in metrics["reliability"]
        ]
    return {f"{metrics['rows_are']}/{name}": lines for name, lines in found.items() if lines}


def _bars(echarts: ModuleType, figures: Mapping[str, Mapping[str, float]], names: Sequence[str]) -> Any:
    bar = echarts.Bar().add_xaxis(list(figures))
    for name in names:
        values = [round(float(figure[name]), 4) for figure in figures.values()]
        bar.add_yaxis(name, values, label_opts=echarts.options.LabelOpts(is_show=len(names) == 1))
    return bar


def _confusion(echarts: ModuleType, examples: Sequence[Example], predictions: Sequence[Prediction]) -> Any:
    """SwanLab's own chart, with its axes named after what they hold and rows without a right answer as 0.

    SwanLab 0.10 draws right labels along x but calls that axis Prediction, and divides by zero for a label that is only
    predicted; the chart is corrected where it says so.
    """
    truth = [example.label or "" for example in examples]
    given = [p.label if p.label is not None else OFF_LIST for p in predictions]
    names = sorted({*truth, *given})
    number = {name: i for i, name in enumerate(names)}
    right, answered = [number[t] for t in truth], [number[g] for g in given]
    with numpy.errstate(invalid="ignore"):
        chart = echarts.confusion_matrix(right, answered, names)
    counts = Counter(zip(truth, given, strict=True))
    support = Counter(truth)
    entries = chart.options["series"][0]["data"]
    right_is_x = all(
        abs(entry[2] - counts[entry[0], entry[1]] / support[entry[0]]) < 1e-9
        for entry in entries
        if support[entry[0]]
    )
    for entry in entries:
        entry[2] = round(float(entry[2]), 4) if entry[2] == entry[2] else 0.0
    x, y = ("Right label", "Prediction") if right_is_x else ("Prediction", "Right label")
    chart.options["xAxis"][0]["name"], chart.options["yAxis"][0]["name"] = x, y
    return chart


def _curves(
    echarts: ModuleType, examples: Sequence[Example], predictions: Sequence[Prediction]
) -> dict[str, Any]:
    """One curve a label against all others, from its probability in every row that offers it."""
    support = Counter(name for example in examples for name in example.right_names)
    found = {}
    for label, _ in support.most_common(CURVES):
        rows = [
            (int(label in e.right_names), dict(p.ranking)[label])
            for e, p in zip(examples, predictions, strict=True)
            if label in dict(p.ranking)
        ]
        right, chance = [r for r, _ in rows], [c for _, c in rows]
        found[f"precision-recall {label}"] = echarts.pr_curve(right, chance, title=True)
    return found


def _growth(echarts: ModuleType, curve: Mapping[str, Any]) -> Any:
    """The metric by training rows, with its intervals; the last point is foretold."""
    points, hidden = curve["points"], echarts.options.LabelOpts(is_show=False)
    line = echarts.Line().add_xaxis([str(point["rows"]) for point in points])
    for name, key in ((curve["metric"], "value"), ("95% from", "low"), ("to", "high")):
        dashed = echarts.options.LineStyleOpts(type_="solid" if key == "value" else "dashed")
        line.add_yaxis(name, [point[key] for point in points], label_opts=hidden, linestyle_opts=dashed)
    line.set_global_opts(
        xaxis_opts=echarts.options.AxisOpts(name="training rows"),
        yaxis_opts=echarts.options.AxisOpts(name=curve["metric"], is_scale=True),
    )
    return line


def _reliability(echarts: ModuleType, bins: Sequence[Mapping[str, float]]) -> Any:
    """Accuracy against confidence, with the diagonal of a calibrated model."""
    options = echarts.options
    line = echarts.Line()
    line.add_xaxis([0.0, *(each["confidence"] for each in bins), 1.0])
    hidden = options.LabelOpts(is_show=False)
    points = [None, *(each["accuracy"] for each in bins), None]
    line.add_yaxis("accuracy", points, label_opts=hidden, symbol_size=8, is_connect_nones=False)
    diagonal = [0.0, *(each["confidence"] for each in bins), 1.0]
    dashed = options.LineStyleOpts(type_="dashed")
    line.add_yaxis("calibrated", diagonal, label_opts=hidden, is_symbol_show=False, linestyle_opts=dashed)
    line.set_global_opts(
        xaxis_opts=options.AxisOpts(type_="value", name="confidence", min_=0, max_=1),
        yaxis_opts=options.AxisOpts(type_="value", name="accuracy", min_=0, max_=1),
    )
    return line
