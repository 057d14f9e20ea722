"""The data report as one HTML page; every text of a file goes through `pages.text`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy

from labeltune import pages
from labeltune.data.audit import Audit
from labeltune.data.near_duplicates import MAX_CHARACTERS, NGRAM, THRESHOLD, NearDuplicate
from labeltune.data.schemas import FAULT_KINDS
from labeltune.data.suspects import MAX_CHARACTERS as JUDGED_CHARACTERS
from labeltune.data.suspects import MIN_TEXTS
from labeltune.evaluation.data_report import DataReport
from labeltune.training.token_figures import TokenFigures

#: Pairs, suspects and faults of a kind that the page lists; the counts are always whole.
MAX_SHOWN = 200
_FAULTS_SHOWN = 20
_LABELS_DRAWN = 12
_BINS = 12
_WIDE = 1100
_ALL_TEXT = 99
_STYLE = "td { vertical-align: top; } details { margin: .5rem 0; } summary { cursor: pointer; }"


def data_page(report: DataReport) -> str:
    """The whole page. It is valid UTF-8 whatever stands in paths and messages."""
    names = ", ".join(str(rows.audit.path) for rows in report.files)
    body = [
        "<h1>Data report</h1>",
        f'<p class="soft">{pages.text(names)}</p>',
        pages.cards(_headlines(report)),
        *(_file(rows.audit) for rows in report.files),
        _tokens(report),
        _near_duplicates(report),
        _suspects(report),
    ]
    html = pages.page(f"Data report: {report.files[0].audit.path.name}", "\n".join(body), style=_STYLE)
    return html.encode("utf-8", "backslashreplace").decode("utf-8")


def _headlines(report: DataReport) -> list[tuple[str, str, str]]:
    audits = [rows.audit for rows in report.files]
    total, usable = sum(a.rows for a in audits), sum(a.usable for a in audits)
    errors, warnings = sum(a.errors for a in audits), sum(a.warnings for a in audits)
    items = [
        ("rows", f"{total:,}", f"{usable:,} usable"),
        ("errors", f"{errors:,}", f"{warnings:,} warnings"),
        ("near-duplicates", f"{len(report.near.pairs):,}", f"{report.near.across:,} across files"),
    ]
    if report.suspects is not None:
        below = f"of {report.suspects.judged:,} judged"
        items.append(("rows to look at", f"{len(report.suspects.suspects):,}", below))
    if report.tokens is not None:
        figures = report.tokens
        below = f"of the rows, by max_length={figures.max_length}"
        items.append(("texts shortened", f"{figures.shortened_share:.1%}", below))
        items.append(("fewer tokens", f"{figures.speed_up:.2f}×", "by sharing the prefix"))
    return items


def _file(audit: Audit) -> str:
    parts = [
        f"<h2>{pages.text(audit.path.name)}</h2>",
        f"<p>{audit.rows:,} rows, {audit.usable:,} usable, {audit.errors:,} errors, {audit.warnings:,} warnings.</p>",
    ]
    if audit.task == "ner":
        parts.append(
            f"<p>{audit.without_entities:,} rows hold no entity; {audit.repeated_mentions:,} repeat a (text, label) pair.</p>"
        )
    if audit.counts:
        found = [
            (kind, FAULT_KINDS[kind][0], FAULT_KINDS[kind][1], f"{count:,}")
            for kind, count in audit.counts.most_common()
        ]
        parts.append(pages.table(("fault", "severity", "what it says", "rows"), found, numbers_from=3))
        parts.append(_fault_list(audit))
    parts.append(f"<h3>Text lengths in {pages.text(audit.length_unit)}</h3>")
    percentiles = ", ".join(f"{name} {value:,}" for name, value in audit.length_percentiles().items())
    parts.append(f'<p class="soft">{pages.text(percentiles or "no usable row")}</p>')
    if audit.lengths:
        parts.append(pages.histogram(_length_bins(audit), width=_WIDE))
    parts.append(f"<h3>{'Entities by type' if audit.task == 'ner' else 'Rows by label'}</h3>")
    common = audit.labels.most_common()
    if common:
        drawn = [(_short(label), count) for label, count in common[:_LABELS_DRAWN]]
        parts.append(pages.histogram(drawn, width=_WIDE))
    if len(common) > 1:
        total = sum(audit.labels.values())
        listed = [(label, f"{count:,}", f"{count / total:.1%}") for label, count in common]
        parts.append(
            f"<details><summary>all {len(common)} labels</summary>{pages.table(('label', 'number', 'share'), listed)}</details>"
        )
    return "\n".join(parts)


def _fault_list(audit: Audit) -> str:
    shown: dict[str, int] = {}
    listed = []
    for fault in audit.faults:
        shown[fault.kind] = shown.get(fault.kind, 0) + 1
        if shown[fault.kind] <= _FAULTS_SHOWN:
            listed.append((fault.where, fault.kind, fault.message[:300]))
    left_out = sum(audit.counts.values()) - len(listed)
    more = f"; {left_out:,} more by: labeltune data check --limit 0" if left_out else ""
    rows = pages.table(("where", "fault", "message"), listed, numbers_from=_ALL_TEXT)
    return f"<details><summary>{len(listed):,} faults{more}</summary>{rows}</details>"


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
        "<h2>Near-duplicates</h2>",
        f"<p>Different texts whose sets of {NGRAM}-character n-grams have a Jaccard similarity of {THRESHOLD} or more, "
        "case and blanks aside. For each row the most similar one before it in its file and in each file before. MinHash finds the "
        f"candidates, the n-grams of the first {MAX_CHARACTERS:,} characters decide, so no pair is here by chance.</p>",
    ]
    for rows, count in zip(report.files, near.compared, strict=True):
        if count < rows.audit.usable:
            parts.append(
                f'<p class="bad">Only the first {count:,} of {rows.audit.usable:,} usable rows of '
                f"{pages.text(rows.audit.path.name)} were compared.</p>"
            )
    inside = len(near.pairs) - near.across
    counted = f"{inside:,} pairs inside a file"
    if len(report.files) > 1:
        counted += f", {near.across:,} across files"
    parts.append(f"<p>{counted}.</p>")
    if report.split_pairs:
        parts.append(
            f'<p class="bad">{report.split_pairs:,} of the pairs would stand on both sides of the held-out split, so validation '
            "figures would flatter the model.</p>"
        )
    elif report.split_pairs == 0 and inside:
        parts.append('<p class="good">The held-out split parts none of them.</p>')
    if near.pairs:
        parts.append(_pair_table(near.pairs))
    return "\n".join(parts)


def _pair_table(pairs: Sequence[NearDuplicate]) -> str:
    listed = [
        (pair.where, pair.like, pair.text, pair.like_text, f"{pair.similarity:.2f}")
        for pair in pairs[:MAX_SHOWN]
    ]
    head = ("row", "is like", "its text", "the other text", "similarity")
    return pages.table(head, listed, numbers_from=4) + _more(len(pairs))


def _suspects(report: DataReport) -> str:
    found = report.suspects
    if found is None:
        return '<h2>Rows to look at</h2><p class="soft">Judged for classification only.</p>'
    parts = [
        "<h2>Rows to look at</h2>",
        f"<p>A linear model on {pages.text(found.features)} judged each row after learning from the others (out of fold, equal texts "
        f"together, first {JUDGED_CHARACTERS:,} characters), and confident learning (cleanlab) picked the labels that do not fit. "
        "It knows no more than the words: look before you change a label.</p>",
    ]
    if found.rare:
        named = ", ".join(f"{label} ({count})" for label, count in list(found.rare.items())[:20])
        parts.append(
            f'<p class="soft">Not judged, for want of {MIN_TEXTS} different texts: {pages.text(named)}'
            f"{' …' if len(found.rare) > 20 else ''}</p>"
        )
    usable = sum(rows.audit.usable for rows in report.files)
    if not found.judged:
        return "\n".join([*parts, "<p>Too few texts a label to judge any.</p>"])
    parts.append(
        f"<p>{len(found.suspects):,} of {found.judged:,} judged rows (of {usable:,} usable); on the whole the model gives the label "
        f"that stands there in {found.agreement:.1%}.</p>"
    )
    if found.agreement < 0.5:
        parts.append(
            '<p class="bad">That is little: these rows do not teach it enough, and most of its doubts will be wrong.</p>'
        )
    if found.suspects:
        listed = [
            (
                s.where,
                s.given,
                s.suggested,
                s.text,
                f"{s.given_probability:.2f}",
                f"{s.suggested_probability:.2f}",
            )
            for s in found.suspects[:MAX_SHOWN]
        ]
        head = ("row", "given label", "suggested label", "text", "p(given)", "p(suggested)")
        parts.append(pages.table(head, listed, numbers_from=4) + _more(len(found.suspects)))
    return "\n".join(parts)


def _tokens(report: DataReport) -> str:
    figures = report.tokens
    if figures is None:
        return f"<h2>Tokens</h2><p>{pages.text(report.no_tokens)}</p>"
    counted = f"{figures.rows:,} rows"
    if figures.rows < figures.of_rows:
        counted += f", evenly out of {figures.of_rows:,},"
    account: list[Any] = [
        ("prefix: what every row begins with", figures.prefix_tokens),
        ("text: the documents, as far as they are kept", figures.text_tokens),
        ("the rest of the prompt: candidates, template", figures.other_tokens),
        ("answer, with its end of turn", figures.answer_tokens),
        ("all", figures.tokens),
    ]
    lines = [(name, f"{n:,}", f"{n / figures.rows:.1f}", f"{n / figures.tokens:.1%}") for name, n in account]
    return "\n".join(
        [
            "<h2>Tokens</h2>",
            f"<p>{counted} of {pages.text(report.files[0].audit.path.name)}, as training would tokenize them; all begin with the same "
            f"{figures.prefix_length:,} tokens.</p>",
            pages.table(("part", "tokens", "a row", "share"), lines),
            "<h3>What sharing the prefix will save</h3>",
            _sharing(figures),
            "<h3>Shortening</h3>",
            _shortening(figures),
        ]
    )


def _sharing(figures: TokenFigures) -> str:
    names = {
        "shared_prefix": "shared_prefix: common beginnings once",
        "packed": "packed: end to end",
        "padded": "padded: to the longest of a pack",
    }
    lines = [
        (names[way], f"{n / figures.planned_rows:.1f}", f"{figures.computed['packed'] / n:.2f}×")
        for way, n in figures.computed.items()
    ]
    return (
        f"<p>Planned for {figures.planned_rows:,} rows, {figures.batch_size} a step, packs of at most {figures.max_tokens:,} tokens. "
        f"Sharing computes {figures.speed_up:.2f} times fewer tokens than single rows; a step gets faster by that at most.</p>"
        + pages.table(("training.packing", "tokens computed a row", "against packed"), lines)
    )


def _shortening(figures: TokenFigures) -> str:
    needed = ", ".join(f"{name} {value:,}" for name, value in figures.needed.items())
    told = (
        f"<p>{figures.shortened:,} texts ({figures.shortened_share:.1%}) do not fit prompt.max_length={figures.max_length}. "
        f"Tokens that whole rows need: {needed}.</p>"
    )
    if not figures.shortened:
        return told
    told += f"<p>{figures.cut_characters:,} characters are cut away in all"
    told += (
        f", and {figures.cut_entities:,} entities with them, which are still asked for.</p>"
        if figures.cut_entities
        else ".</p>"
    )
    bins = [(f"≤ {10 * (at + 1)} %", count) for at, count in enumerate(figures.cut_shares)]
    return f"{told}<p>Shortened rows by the share of their text that is cut:</p>{pages.histogram(bins, width=_WIDE)}"


def _more(count: int) -> str:
    if count <= MAX_SHOWN:
        return ""
    return f'<p class="soft">The first {MAX_SHOWN} of {count:,}; --json lists more.</p>'


def _short(label: str) -> str:
    """A label that fits under its bar; CJK characters are twice as wide."""
    room, kept = 14, ""
    for character in label:
        room -= 2 if ord(character) >= 0x2E80 else 1
        if room < 0:
            return f"{kept}…"
        kept += character
    return kept
