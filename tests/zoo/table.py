"""docs/models.md and its Chinese twin from the results of `make zoo`.

`python -m zoo.table FOLDER`, in tests/, takes the families' results of a folder into docs/zoo-results.json and writes both pages.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any, Literal

DOCS = Path(__file__).resolve().parents[2] / "docs"
RESULTS = DOCS / "zoo-results.json"
PAGES: dict[Language, Path] = {"en": DOCS / "models.md", "zh": DOCS / "zh" / "models.md"}
Language = Literal["en", "zh"]
MARK = "<!-- the table of the zoo: make zoo -->"

#: What commands call a way -> what the table calls it.
WAYS: dict[str, dict[Language, str]] = {
    "shared_prefix": {"en": "shared by attention", "zh": "注意力共享"},
    "shared_cache": {"en": "shared by cache", "zh": "缓存共享"},
    "packed": {"en": "packed", "zh": "拼接"},
    "padded": {"en": "padded", "zh": "填充"},
    "segments": {"en": "shared by attention", "zh": "注意力共享"},
    "cache": {"en": "shared by cache", "zh": "缓存共享"},
    "side_by_side": {"en": "rows side by side", "zh": "整行并排"},
    "one_by_one": {"en": "one by one", "zh": "逐条"},
}
#: The words of "its layers see", in Chinese; what is missing here is a name.
CHINESE = {
    "full": "全注意力",
    "shared full": "共享的全注意力",
    "windows": "滑动窗口",
    "chunks": "分块注意力",
    "experts": "混合专家",
    "latent": "潜在注意力（MLA）",
    "latent (2,048 tokens at most)": "潜在注意力（MLA，至多看 2048 个 token）",
    "delta attention": "Kimi Delta 注意力",
    "gated delta rule": "Gated DeltaNet",
    "lightning attention": "Lightning 注意力",
    "linear recurrence": "线性循环",
    "short convolutions": "短卷积",
    "logits scaled": "logits 缩放",
    "logits capped": "logits 截顶（softcap）",
    "positions by bias": "位置用偏置表示",
    "positions learned": "位置为可学习向量",
    "heads of two sizes": "两种头维度",
    "sinks": "注意力 sink",
    " and ": "、",
    " beside ": " 并联 ",
    ", ": "，",
}
#: Brackets, and what joins words.
BRACKETS: dict[Language, tuple[str, str, str]] = {"en": (" (", ")", ", "), "zh": ("（", "）", "，")}
TASKS: dict[str, dict[Language, str]] = {
    "classification": {"en": "labels", "zh": "分类"},
    "ner": {"en": "entities", "zh": "实体"},
}
HEADS: dict[Language, str] = {
    "en": "| family | its layers see | training | prediction | largest difference of a label's score, fp32 / bf16 (plain bf16) | notes |",
    "zh": "| 模型 | 注意力类型 | 训练 | 预测 | 标签得分的最大偏差，fp32 / bf16（bf16 逐条计算） | 备注 |",
}


def write(results: list[dict[str, Any]]) -> None:
    """Put the table into both pages."""
    for language, page in PAGES.items():
        page.write_text(with_table(page.read_text(encoding="utf-8"), results, language), encoding="utf-8")


def with_table(page: str, results: list[dict[str, Any]], language: Language) -> str:
    """A page with the table behind its mark."""
    return page[: page.index(MARK)] + MARK + "\n\n" + table(results, language)


def table(results: list[dict[str, Any]], language: Language) -> str:
    """What was run, and one line a family."""
    cases = [f"{case['task']} {case['format']}" for result in results for case in result["cases"]]
    counts = ", ".join(f"{case}: {cases.count(case)}" for case in sorted(set(cases)))
    said = {
        "en": f"{len(results)} families; this table comes from runs of {counts}.",
        "zh": f"共 {len(results)} 类模型；本表来自：{counts}。",
    }[language]
    lines = [said, "", HEADS[language], "|---|---|---|---|---|---|"]
    lines += [_line(result, language) for result in sorted(results, key=lambda result: result["family"])]
    return "\n".join(lines) + "\n"


def _line(result: dict[str, Any], language: Language) -> str:
    cases = result["cases"]
    name, attends = f"`{result['family']}`", result["attends"]
    if language == "zh":
        attends = "".join(CHINESE.get(part, part) for part in re.split(r"(, | and | beside )", attends))
    if result["unavailable"]:
        note = {"en": "transformers cannot run it on a CPU", "zh": "transformers 无法在 CPU 上运行"}[language]
        return f"| {name} | {attends} | - | - | - | {note}: {_cell(result['unavailable'])} |"
    ways = [_ways(cases, key, language) for key in ("training", "predicting")]
    scores = {
        case["format"]: case for case in cases if case["task"] == "classification" and case["predicting"]
    }
    errors = ["-"] * 2
    if "fp32" in scores:
        errors[0] = f"{scores['fp32']['score_error']:.0e}"
    if "bf16" in scores:
        errors[1] = f"{scores['bf16']['score_error']:.2f} ({scores['bf16']['plain_score_error']:.2f})"
    refused = {"en": "refused", "zh": "拒绝"}[language]
    notes = []
    for words in dict.fromkeys(case["refused"] for case in cases if case["refused"]):
        which = _named([case for case in cases if case["refused"] == words], cases, language)
        left, right, _ = BRACKETS[language]
        notes.append(f"{refused}{left}{which}{right}: {words}")
    return f"| {name} | {attends} | {' | '.join(ways)} | {' / '.join(errors)} | {_cell('; '.join(notes))} |"


def _ways(cases: list[dict[str, Any]], key: str, language: Language) -> str:
    """The way of all cases, or each way with its cases."""
    ran = [case for case in cases if case[key]]
    ways = dict.fromkeys(case[key] for case in ran)
    if len(ways) == 1:
        return WAYS[ran[0][key]][language]
    which = {way: _named([case for case in ran if case[key] == way], ran, language) for way in ways}
    left, right, then = BRACKETS[language]
    return then.join(f"{WAYS[way][language]}{left}{names}{right}" for way, names in which.items()) or "-"


def _named(some: list[dict[str, Any]], all_cases: list[dict[str, Any]], language: Language) -> str:
    """Some of the cases: a task without its formats where all of them are meant."""
    names = []
    for task, words in TASKS.items():
        formats, every = ([case["format"] for case in of if case["task"] == task] for of in (some, all_cases))
        if formats:
            names.append(words[language] + ("" if formats == every else f" {'/'.join(formats)}"))
    return BRACKETS[language][2].join(names)


def _cell(text: str) -> str:
    return " ".join(text.replace("|", "\\|").split())


def main() -> None:
    """Take the results of a folder, and write the pages."""
    known = (
        {each["family"]: each for each in json.loads(RESULTS.read_text("utf-8"))} if RESULTS.is_file() else {}
    )
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        result = json.loads(path.read_text("utf-8"))
        for case in result["cases"]:
            if case["crashed"]:
                sys.exit(f"{path} holds a crash: mend it first")
            # What follows from the model's own layers, and texts with paths of this machine.
            for key in ("adapted", "crashed", "files_missing"):
                del case[key]
        # A family's cases may come from several runs.
        before = known.get(result["family"], {"cases": []})["cases"]
        cases = {(case["task"], case["format"]): case for case in [*before, *result["cases"]]}
        known[result["family"]] = {**result, "cases": [cases[key] for key in sorted(cases)]}
    results = [known[name] for name in sorted(known)]
    lines = ",\n".join(json.dumps(result, ensure_ascii=False) for result in results)
    RESULTS.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    write(results)


if __name__ == "__main__":
    main()
