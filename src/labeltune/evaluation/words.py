"""What the pages call figures, kinds of error and parts of the rows: English and Chinese."""

from __future__ import annotations

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
    "unparsable": ("Unparsable answers", "无法解析的回答"),
    "exact_rows": ("Rows answered exactly", "完全正确的样本"),
}
BASELINES = {
    "majority": ("always the most frequent label", "始终回答最常见的类别"),
    "uniform_guess": ("guessing at random", "随机猜测"),
    "dictionary": ("dictionary of the training entities", "训练集实体词典"),
}
ERROR_KINDS = {
    "wrong_type": ("wrong type", "类型错误"),
    "wrong_boundary": ("wrong boundary", "边界错误"),
    "wrong_type_and_boundary": ("wrong type and boundary", "类型和边界都错误"),
    "missed": ("missed", "漏报"),
    "spurious": ("spurious", "多报"),
}
FREQUENCY_SLICES = {"rare": ("rare", "少见"), "middle": ("middle", "中等"), "frequent": ("frequent", "常见")}
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
