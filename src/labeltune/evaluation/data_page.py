"""The data report as one HTML page; every text of a file goes through `pages.text`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy

from labeltune.data.audit import Audit
from labeltune.data.near_duplicates import MAX_CHARACTERS, NGRAM, THRESHOLD, NearDuplicate
from labeltune.data.schemas import FAULT_KINDS
from labeltune.data.suspects import MAX_CHARACTERS as JUDGED_CHARACTERS
from labeltune.data.suspects import MIN_TEXTS
from labeltune.evaluation.data_report import DataReport
from labeltune.evaluation.token_section import token_section
from labeltune.messages import chinese
from labeltune.pages import Html, bars, both, cards, header, name, page, paragraph, table

#: Pairs, suspects and faults of a kind that the page lists; the counts are always whole.
MAX_SHOWN = 200
_FAULTS_SHOWN = 20
#: More pairs than this are folded up.
_PAIRS_OPEN = 20
_LABELS_DRAWN = 12
_BINS = 12
_ALL_TEXT = 99


def data_page(report: DataReport) -> str:
    """The whole page. It is valid UTF-8 whatever stands in paths and messages."""
    paths = [rows.audit.path for rows in report.files]
    body = [
        header(both("Data report", "数据报告"), " · ".join(map(name, paths))),
        *_headlines(report),
        *(_file(rows.audit) for rows in report.files),
        _suspects(report),
        _near_duplicates(report),
        token_section(report),
    ]
    html = page(f"Data report: {paths[0].name}", "\n".join(body), chinese=f"数据报告：{paths[0].name}")
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def _headlines(report: DataReport) -> list[str]:
    """Rows, errors, warnings and duplicates; below them what else was counted."""
    audits = [rows.audit for rows in report.files]
    total, usable = sum(a.rows for a in audits), sum(a.usable for a in audits)
    errors, warnings = sum(a.errors for a in audits), sum(a.warnings for a in audits)
    exact = sum(a.counts["exact_duplicate"] for a in audits)
    near = len(report.near.pairs)
    first = [
        (both("Rows", "行数"), f"{total:,}", both(f"{usable:,} usable", f"{usable:,} 行可用")),
        (both("Errors", "错误"), f"{errors:,}", both("such rows cannot be used", "这些行无法使用")),
        (both("Warnings", "警告"), f"{warnings:,}", both("worth a look", "建议检查")),
        (
            both("Duplicates", "重复"),
            f"{exact + near:,}",
            both(f"{exact:,} exact, {near:,} near", f"完全重复 {exact:,}，近似重复 {near:,}"),
        ),
    ]
    minor = []
    if report.suspects is not None:
        judged = report.suspects.judged
        below = both(f"of {judged:,} judged", f"共判断 {judged:,} 行")
        minor.append((both("Rows to look at", "待核对的行"), f"{len(report.suspects.suspects):,}", below))
    if report.tokens is not None:
        figures = report.tokens
        below = both(f"by max_length={figures.max_length}", f"因 max_length={figures.max_length}")
        minor.append((both("Texts shortened", "被截短的文本"), f"{figures.shortened_share:.1%}", below))
        below = both("as rows begin alike, and that is computed once", "各行开头相同的部分只计算一次")
        saved = 1 - 1 / figures.speed_up if figures.speed_up > 0 else 0.0
        minor.append((both("Tokens training need not compute", "训练可少算的 token"), f"{saved:.0%}", below))
    return [cards(first), cards(minor, minor=True)] if minor else [cards(first)]


def _file(audit: Audit) -> str:
    rows, usable, errors, warnings = audit.rows, audit.usable, audit.errors, audit.warnings
    parts = [
        f"<h2>{name(audit.path.name)}</h2>",
        paragraph(
            both(
                f"{rows:,} rows, {usable:,} usable, {errors:,} errors, {warnings:,} warnings.",
                f"共 {rows:,} 行，可用 {usable:,} 行，错误 {errors:,} 个，警告 {warnings:,} 个。",
            )
        ),
    ]
    if audit.task == "ner":
        empty, repeated = audit.without_entities, audit.repeated_mentions
        parts.append(
            paragraph(
                both(
                    f"{empty:,} rows hold no entity; {repeated:,} repeat a (text, label) pair.",
                    f"{empty:,} 行没有实体；{repeated:,} 行中同一（文本，类型）出现多次。",
                )
            )
        )
    if audit.counts:
        severities = {"error": both("error", "错误"), "warning": both("warning", "警告")}
        found = [
            (
                Html(f"{kind}<br><small>{_meaning(kind)}</small>"),
                severities[FAULT_KINDS[kind][0]],
                f"{count:,}",
            )
            for kind, count in audit.counts.most_common()
        ]
        head = (both("fault", "问题"), both("severity", "级别"), both("rows", "行数"))
        parts += [table(head, found, numbers_from=2), _fault_list(audit)]
    parts += ['<div class="columns">', _labels(audit), _lengths(audit), "</div>"]
    return "\n".join(parts)


def _meaning(kind: str) -> Html:
    told = FAULT_KINDS[kind][1]
    return both(told, chinese(told))


def _labels(audit: Audit) -> str:
    common = audit.labels.most_common()
    title = (
        both("Entities by type", "各类型的实体数")
        if audit.task == "ner"
        else both("Rows by label", "各类别的行数")
    )
    parts = [f"<section><h3>{title}</h3>"]
    if common:
        parts.append(bars([(name(label), count) for label, count in common[:_LABELS_DRAWN]]))
    if len(common) > 1:
        total = sum(audit.labels.values())
        listed = [(name(label), f"{count:,}", f"{count / total:.1%}") for label, count in common]
        head = (both("label", "类别"), both("number", "数量"), both("share", "占比"))
        told = both(f"all {len(common)} labels", f"全部 {len(common)} 个类别")
        parts.append(f"<details><summary>{told}</summary>{table(head, listed)}</details>")
    return "\n".join([*parts, "</section>"])


def _lengths(audit: Audit) -> str:
    units = {"characters": both("Text lengths in characters", "文本长度（字符）")}
    title = units.get(audit.length_unit, both("Text lengths in tokens", "文本长度（token）"))
    values = audit.length_percentiles()
    parts = [f"<section><h3>{title}</h3>"]
    if values:
        parts.append(paragraph(_percentiles(values), "soft"))
        parts.append(bars(_length_bins(audit)))
    else:
        parts.append(paragraph(both("No usable row.", "没有可用的行。"), "soft"))
    return "\n".join([*parts, "</section>"])


def _percentiles(values: dict[str, int]) -> Html:
    """p10 ... p99 and max in words."""
    english = ", ".join(f"{value:,} ({key})" for key, value in values.items())
    return both(
        f"half of the rows have at most {values['p50']:,}; percentiles: {english}",
        f"半数的行不超过 {values['p50']:,}；分位数：{english.replace('max', '最大')}",
    )


def _fault_list(audit: Audit) -> str:
    shown: dict[str, int] = {}
    listed = []
    for fault in audit.faults:
        shown[fault.kind] = shown.get(fault.kind, 0) + 1
        if shown[fault.kind] <= _FAULTS_SHOWN:
            message = fault.message[:300]
            told = message if chinese(message) == message else both(message, chinese(message))
            listed.append((name(fault.where), Html(fault.kind), told))
    left_out = sum(audit.counts.values()) - len(listed)
    more, more_zh = "", ""
    if left_out:
        more = f"; {left_out:,} more by: labeltune data check --limit 0"
        more_zh = f"；其余 {left_out:,} 个可用命令查看：labeltune data check --limit 0"
    head = (both("where", "位置"), both("fault", "问题"), both("message", "说明"))
    rows = table(head, listed, numbers_from=_ALL_TEXT, stacked=True)
    told = both(f"{len(listed):,} faults{more}", f"{len(listed):,} 个问题{more_zh}")
    return f"<details{' open' if audit.errors else ''}><summary>{told}</summary>{rows}</details>"


def _length_bins(audit: Audit) -> list[tuple[str, int]]:
    """Equal bins up to the 99th percentile, and one for what is longer."""
    lengths = numpy.frombuffer(audit.lengths, dtype=numpy.uint32)
    top = max(1, int(numpy.percentile(lengths, 99)))
    step = -(-(top + 1) // _BINS)
    edges = [*range(0, top + 1, step)]
    edges.append(edges[-1] + step)
    counts, _ = numpy.histogram(lengths, bins=[*edges, max(edges[-1], int(lengths.max())) + 1])
    names = [f"{a}–{b - 1}" if b - a > 1 else str(a) for a, b in pairwise(edges)]
    bins = list(zip([*names, f"≥ {edges[-1]}"], map(int, counts), strict=True))
    return bins if bins[-1][1] else bins[:-1]


def _near_duplicates(report: DataReport) -> str:
    near = report.near
    parts = [
        f"<h2>{both('Near-duplicates', '近似重复')}</h2>",
        paragraph(
            both(
                f"Different texts whose sets of {NGRAM}-character n-grams have a Jaccard similarity of {THRESHOLD} or more, "
                "case and blanks aside. For each row the most similar one before it in its file and in each file before. "
                f"MinHash finds the candidates, the n-grams of the first {MAX_CHARACTERS:,} characters decide, so no pair is here "
                "by chance.",
                f"文本不同，但 {NGRAM} 字符 n-gram 集合的 Jaccard 相似度达到 {THRESHOLD} 以上（忽略大小写和空白）。每行只列出本文件中"
                f"以及此前各文件中与它最相似的一行。先用 MinHash 找出候选，再按前 {MAX_CHARACTERS:,} 个字符的 n-gram 精确判断，"
                "因此不会有误报。",
            )
        ),
    ]
    for rows, count in zip(report.files, near.compared, strict=True):
        usable, file = rows.audit.usable, rows.audit.path.name
        if count < usable:
            parts.append(
                paragraph(
                    both(
                        f"Only the first {count:,} of {usable:,} usable rows of {file} were compared.",
                        f"{file} 的 {usable:,} 行可用数据中只比较了前 {count:,} 行。",
                    ),
                    "bad",
                )
            )
    inside = len(near.pairs) - near.across
    english, zh = f"{inside:,} pairs inside a file", f"文件内部 {inside:,} 对"
    if len(report.files) > 1:
        english, zh = f"{english}, {near.across:,} across files", f"{zh}，文件之间 {near.across:,} 对"
    parts.append(paragraph(both(f"{english}.", f"{zh}。")))
    if report.split_pairs:
        parts.append(
            paragraph(
                both(
                    f"{report.split_pairs:,} of the pairs would stand on both sides of the held-out split, so validation figures "
                    "would flatter the model.",
                    f"其中 {report.split_pairs:,} 对会分别落入训练集和验证集，使验证指标偏高。",
                ),
                "bad",
            )
        )
    elif report.split_pairs == 0 and inside:
        told = both("The held-out split parts none of them.", "划分验证集时没有拆开任何一对。")
        parts.append(paragraph(told, "good"))
    if near.pairs:
        parts.append(
            paragraph(
                both(
                    "What to do: of a pair inside a file keep the better row, and of a pair across files delete the one outside the "
                    "training file, where it would be measured on what was learnt. --json writes the list, under "
                    "report.near_duplicates.listed.",
                    "处理方法：同一文件中的一对只保留较好的一行；跨文件的一对请删除训练集之外的那一行，否则等于用学过的内容来评测。"
                    "加 --json 可输出该列表（report.near_duplicates.listed）。",
                )
            )
        )
        parts.append(_pair_table(near.pairs))
    return "\n".join(parts)


def _pair_table(pairs: Sequence[NearDuplicate]) -> str:
    listed = [
        (name(pair.where), name(pair.like), pair.text, pair.like_text, f"{pair.similarity:.2f}")
        for pair in pairs[:MAX_SHOWN]
    ]
    head = (
        both("row", "行"),
        both("is like", "相似行"),
        both("its text", "本行文本"),
        both("the other text", "相似行文本"),
        both("similarity", "相似度"),
    )
    told = both(f"{len(pairs):,} pairs", f"{len(pairs):,} 对")
    rows = table(head, listed, numbers_from=4, stacked=True) + _more(len(pairs))
    return f"<details{' open' if len(pairs) <= _PAIRS_OPEN else ''}><summary>{told}</summary>{rows}</details>"


def _suspects(report: DataReport) -> str:
    found = report.suspects
    title = f"<h2>{both('Rows to look at', '待核对的行')}</h2>"
    if found is None:
        return title + paragraph(both("Judged for classification only.", "仅对分类任务进行判断。"), "soft")
    parts = [
        title,
        paragraph(
            both(
                f"A linear model on {found.features} judged each row after learning from the others (out of fold, equal texts "
                f"together, first {JUDGED_CHARACTERS:,} characters), and confident learning (cleanlab) picked the labels that do "
                "not fit. The model sees only which words occur: look before you change a label.",
                f"用 {chinese(found.features)} 训练线性模型，对每一行用其余行训练后的模型判断（交叉验证，相同文本分在同一折，取前 "
                f"{JUDGED_CHARACTERS:,} 个字符），再由置信学习（cleanlab）挑出不相符的标签。该模型只看词语，修改标签前请人工确认。",
            )
        ),
    ]
    if found.rare:
        named = " · ".join(f"{name(label)} ({count})" for label, count in list(found.rare.items())[:20])
        told = both(
            f"Not judged, for want of {MIN_TEXTS} different texts:",
            f"未判断（不同文本少于 {MIN_TEXTS} 条）：",
        )
        parts.append(f'<p class="soft">{told} {named}{" …" if len(found.rare) > 20 else ""}</p>')
    usable = sum(rows.audit.usable for rows in report.files)
    if not found.judged:
        told = both("Too few texts a label to judge any.", "每个类别的文本太少，无法判断。")
        return "\n".join([*parts, paragraph(told)])
    suspects, judged = len(found.suspects), found.judged
    parts.append(
        paragraph(
            both(
                f"{suspects:,} of {judged:,} judged rows (of {usable:,} usable); on the whole the model gives the label that "
                f"stands there in {found.agreement:.1%}.",
                f"判断了 {judged:,} 行（可用 {usable:,} 行），其中 {suspects:,} 行可疑；模型判断与现有标签一致的比例为 "
                f"{found.agreement:.1%}。",
            )
        )
    )
    if found.agreement < 0.5:
        parts.append(
            paragraph(
                both(
                    "That is little: these rows do not teach it enough, and most of its doubts will be wrong.",
                    "该比例很低：这些数据不足以训练好该模型，它的多数怀疑可能是错的。",
                ),
                "bad",
            )
        )
    if found.suspects:
        listed = [
            (
                name(s.where),
                name(s.given),
                name(s.suggested),
                s.text,
                f"{s.given_probability:.2f}",
                f"{s.suggested_probability:.2f}",
            )
            for s in found.suspects[:MAX_SHOWN]
        ]
        head = (
            both("row", "行"),
            both("given label", "现有标签"),
            both("suggested label", "建议标签"),
            both("text", "文本"),
            both("p(given)", "p（现有）"),
            both("p(suggested)", "p（建议）"),
        )
        parts.append(table(head, listed, numbers_from=4, stacked=True) + _more(len(found.suspects)))
        parts.append(
            paragraph(
                both(
                    "What to do: read each row. Where the suggested label is right, change the label in the file, at the line that "
                    "stands before the row; where neither is, delete the row; leave it where the given label is right. Then "
                    "check again. --json writes the same list for a script, under report.suspects.listed.",
                    "处理方法：逐行阅读。如果建议标签正确，请在文件的对应行修改标签；如果两者都不对，请删除该行；如果现有标签正确，则保持不变。"
                    "然后重新检查。加 --json 可输出同一列表供脚本使用（report.suspects.listed）。",
                )
            )
        )
    return "\n".join(parts)


def _more(count: int) -> str:
    if count <= MAX_SHOWN:
        return ""
    return paragraph(
        both(
            f"The first {MAX_SHOWN} of {count:,}; --json lists more.",
            f"共 {count:,} 条，这里显示前 {MAX_SHOWN} 条；--json 列出更多。",
        ),
        "soft",
    )
