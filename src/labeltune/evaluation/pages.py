"""Self-contained HTML pages in English and Chinese: one file, no network, light and dark; opened from disk in any browser.

The pages are the Jinja templates in `templates/`, which escape every value that is put in; `Markup` marks what is escaped
already. The tables at the end hold what pages call figures, kinds of error and parts of the rows, in both languages.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from labeltune.data.labels import by_count
from labeltune.messages import chinese

#: The figures of a JSON element are as compact as they can be, and in their own order.
_JSON = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}


@cache
def environment() -> Environment:
    """The templates, with `both`, `name`, `chinese`, `by_count` and the tables of words as globals, `fmt` (`format`) and `interval` as filters."""
    made = Environment(
        loader=PackageLoader("labeltune.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = _JSON
    made.globals |= {"both": both, "name": name, "chinese": chinese, "by_count": by_count}
    made.globals["log"] = math.log
    made.globals |= {"FIGURES": FIGURES, "BASELINES": BASELINES, "ERROR_KINDS": ERROR_KINDS}
    made.filters |= {"fmt": format, "interval": _interval}
    return made


def render(template: str, **values: Any) -> str:
    """A whole page from the template of this name."""
    return environment().get_template(template).render(values)


def both(english: str, translated: str, /, **values: Any) -> Markup:
    """Words of a page in both of its languages; the page's button switches between them.

    Args:
        values: fill the places of both texts (`{rows:,}`); without any, the texts stand as they are, braces included.
    """
    if values:
        english, translated = english.format(**values), translated.format(**values)
    return Markup('<span data-zh="{}">{}</span>').format(translated, english)


def name(value: object) -> Markup:
    """An id, a label or a path: broken after a slash, or inside a word that is longer than its line, and nowhere else."""
    parts = re.findall("[^/]*/|[^/]+", str(value))
    shown = Markup().join(Markup('<span class="name">{}</span>').format(part) for part in parts)
    return Markup('<span translate="no">{}</span>').format(shown)


def _interval(measure: Mapping[str, float]) -> str:
    """Nothing where all resamples were alike: that says nothing of other rows."""
    if measure["low"] == measure["high"]:
        return "–"
    return f"{measure['low']:.3f} – {measure['high']:.3f}"


#: Name in JSON -> (English, Chinese).
FIGURES: dict[str, tuple[str, str]] = {
    "accuracy": ("Accuracy", "准确率"),
    "macro_f1": ("Macro-F1", "宏平均 F1"),
    "weighted_f1": ("Weighted F1", "加权 F1"),
    "mcc": ("MCC (Matthews correlation)", "MCC（马修斯相关系数）"),
    "span_f1": ("Strict span F1", "实体严格 F1"),
    "partial_span_f1": ("Partial span F1", "实体部分匹配 F1"),
    "precision": ("Precision", "精确率"),
    "recall": ("Recall", "召回率"),
    "micro_f1": ("Micro-F1", "微平均 F1"),
    "sample_f1": ("Sample F1", "样本平均 F1"),
    "subset_accuracy": ("Subset accuracy", "标签集完全正确率"),
    "hamming_loss": ("Hamming loss", "汉明损失"),
    "map": ("Mean average precision", "平均精度均值（mAP）"),
    "unparsable": ("Unparsable answers", "无法解析的回答"),
    "exact_rows": ("Rows answered exactly", "完全正确的样本"),
}
BASELINES = {
    "majority": ("always the most frequent label", "始终回答最常见的类别"),
    "uniform_guess": ("guessing at random", "随机猜测"),
    "constant_set": ("always the same labels, the best such set", "始终给出同一组最优标签"),
    "dictionary": ("dictionary of the training entities", "训练集实体词典"),
    "linear": (
        "logistic regression on character n-grams of the training rows",
        "用训练样本的字符 n-gram 训练的逻辑回归",
    ),
    "crf": ("conditional random field (CRF) of the training rows", "用训练样本训练的条件随机场（CRF）"),
}
ERROR_KINDS = {
    "wrong_type": ("wrong type", "类型错误"),
    "wrong_boundary": ("wrong boundary", "边界错误"),
    "wrong_type_and_boundary": ("wrong type and boundary", "类型和边界都错误"),
    "missed": ("missed", "漏报"),
    "spurious": ("spurious", "多报"),
}
FREQUENCY_SLICES = {"rare": ("rare", "少见"), "middle": ("middle", "中等"), "frequent": ("frequent", "常见")}
NESTING_SLICES = {
    "flat": ("by itself", "非嵌套"),
    "outer": ("around others", "外层"),
    "inner": ("inside another", "内层"),
}
#: What report.js says.
REPORT = {
    "all": ("all rows", "全部样本"),
    "wrong": ("wrong rows", "预测错误的样本"),
    "right": ("right rows", "预测正确的样本"),
    "anyRight": ("any right label", "任意真实类别"),
    "anyGiven": ("any predicted label", "任意预测类别"),
    "anyType": ("any type", "任意类型"),
    "file": ("in file order", "按文件顺序"),
    "sure": ("surest first", "置信度从高到低"),
    "unsure": ("least sure first", "置信度从低到高"),
    "more": ("show more", "显示更多"),
    "rows": ("rows", "行"),
    "offList": ("(off the list)", "（不在候选中）"),
    "rightIs": ("right", "真实"),
    "answered": ("predicted", "预测"),
    "none": ("no entities", "无实体"),
    "noLabels": ("none", "无"),
    "anyLabel": ("any label", "任意标签"),
    "together": ("Labels that occur together", "标签共现"),
    "togetherHint": (
        "Rows with both labels, by right answers; on the diagonal all rows of a label. Choose a cell to list its rows.",
        "真实标签同时包含两个标签的样本数，对角线为该标签的样本数；点击单元格查看对应的样本。",
    ),
    "confusion": ("Confusion matrix", "混淆矩阵"),
    "hint": (
        "Rows are right labels, columns predicted ones; choose a cell to list its rows.",
        "行为真实类别，列为预测类别；点击单元格查看对应的样本。",
    ),
    "truncated": ("answer cut off", "回答被截断"),
    "search": ("search", "搜索"),
    "whichRows": ("which rows", "样本范围"),
    "rightLabel": ("right label", "真实类别"),
    "predictedLabel": ("predicted label", "预测类别"),
    "order": ("order", "排序"),
    "clear": ("clear filters", "清除筛选"),
}
