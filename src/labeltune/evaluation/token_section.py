"""The data report's account of tokens."""

from __future__ import annotations

from typing import Any

from labeltune.evaluation.data_report import DataReport
from labeltune.messages import chinese
from labeltune.pages import Html, bars, both, paragraph, table
from labeltune.training.token_figures import TokenFigures


def token_section(report: DataReport) -> str:
    """The part of the page about tokens, or why they were not counted."""
    figures, title = report.tokens, f"<h2>{both('Tokens', 'Token 统计')}</h2>"
    if figures is None:
        return title + paragraph(both(report.no_tokens, chinese(report.no_tokens)))
    file = report.files[0].audit.path.name
    counted, counted_zh = f"{figures.rows:,} rows", f"{figures.rows:,} 行"
    if figures.rows < figures.of_rows:
        counted += f", evenly out of {figures.of_rows:,},"
        counted_zh += f"（从 {figures.of_rows:,} 行中均匀抽取）"
    account: list[Any] = [
        (both("prefix: what every row begins with", "前缀：每行相同的开头"), figures.prefix_tokens),
        (both("text: the documents, as far as they are kept", "文本：保留下来的正文"), figures.text_tokens),
        (
            both("the rest of the prompt: candidates, template", "提示词其余部分：候选标签、模板"),
            figures.other_tokens,
        ),
        (both("answer, with its end of turn", "回答（含结束符）"), figures.answer_tokens),
        (both("all", "合计"), figures.tokens),
    ]
    lines = [(part, f"{n:,}", f"{n / figures.rows:.1f}", f"{n / figures.tokens:.1%}") for part, n in account]
    head = (both("part", "部分"), both("tokens", "token 数"), both("per row", "每行"), both("share", "占比"))
    return "\n".join(
        [
            title,
            paragraph(
                both(
                    f"{counted} of {file}, as training would tokenize them; all begin with the same "
                    f"{figures.prefix_length:,} tokens.",
                    f"{file} 的 {counted_zh}，按训练时的方式分词；所有行以相同的 {figures.prefix_length:,} 个 token 开头。",
                )
            ),
            '<div class="columns">',
            f"<section>{table(head, lines)}</section>",
            f"<section><h3>{both('What computing the common beginning once saves', '共享前缀的收益')}</h3>{_sharing(figures)}</section>",
            f"<section><h3>{both('Shortening', '截短')}</h3>{_shortening(figures)}</section>",
            "</div>",
        ]
    )


def _sharing(figures: TokenFigures) -> str:
    names = {
        "shared_prefix": both("shared_prefix: common beginnings once", "shared_prefix：公共开头只算一次"),
        "packed": both("packed: end to end", "packed：首尾相接"),
        "padded": both("padded: to the longest of a pack", "padded：补齐到同包最长"),
    }
    lines = [
        (names[way], f"{n / figures.planned_rows:.1f}", f"{n / figures.computed['packed']:.0%}")
        for way, n in figures.computed.items()
    ]
    head = (
        Html("training.packing"),
        both("tokens computed per row", "每行计算的 token"),
        both("of packed", "相对 packed"),
    )
    told = both(
        f"Planned for {figures.planned_rows:,} rows, {figures.batch_size} a step, in packs of at most {figures.max_tokens:,} tokens. "
        f"Without sharing, training would compute {figures.speed_up:.2f} times as many tokens; a step gets faster by that at most.",
        f"按 {figures.planned_rows:,} 行、每步 {figures.batch_size} 行、每包最多 {figures.max_tokens:,} 个 token 规划。不共享前缀时，要计算的 "
        f"token 是现在的 {figures.speed_up:.2f} 倍；每步最多能快这么多。",
    )
    return paragraph(told) + table(head, lines)


def _shortening(figures: TokenFigures) -> str:
    needed = ", ".join(f"{value:,} ({key})" for key, value in figures.needed.items())
    count, share, limit = figures.shortened, figures.shortened_share, figures.max_length
    told = paragraph(
        both(
            f"{count:,} texts ({share:.1%}) do not fit prompt.max_length={limit}. Tokens that whole rows need: {needed}.",
            f"{count:,} 条文本（{share:.1%}）超出 prompt.max_length={limit}。整行所需的 token 数：{needed.replace('max', '最大')}。",
        )
    )
    if not count:
        return told
    cut = f"{figures.cut_characters:,} characters are cut away in all"
    cut_zh = f"共截去 {figures.cut_characters:,} 个字符"
    if figures.cut_entities:
        cut += f", and {figures.cut_entities:,} entities with them, which are still asked for"
        cut_zh += f"，其中有 {figures.cut_entities:,} 个实体，但答案中仍要求给出"
    bins = [(f"≤ {10 * (at + 1)}%", count) for at, count in enumerate(figures.cut_shares)]
    by = both("Shortened rows by the share of their text that is cut:", "按文本被截去的比例统计的行数：")
    return f"{told}{paragraph(both(f'{cut}.', f'{cut_zh}。'))}{paragraph(by)}{bars(bins)}"
