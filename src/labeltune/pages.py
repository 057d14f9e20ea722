"""Self-contained HTML pages: one file, no network, light and dark; opened from disk in any browser."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from typing import Any

#: A page may load nothing, run only what stands in it, and send nothing anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"

_STYLE = """
:root { color-scheme: light dark; --ink: #1c2430; --soft: #5b6675; --line: #d8dee6; --paper: #ffffff; --raised: #f5f7fa;
  --accent: #1f6feb; --good: #1a7f4b; --bad: #c0392b; --heat: 31, 111, 235; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf2; --soft: #9aa7b8; --line: #313b48; --paper: #12171e;
  --raised: #1b222c; --accent: #6cb0ff; --good: #5fce96; --bad: #ff8a7a; --heat: 108, 176, 255; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 76rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.55 system-ui, "Segoe UI", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
p { margin: .25rem 0 .75rem; } .soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; } th, td { padding: .25rem .6rem; border-bottom: 1px solid var(--line); text-align: left; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
.cards { display: flex; flex-wrap: wrap; gap: .75rem; }
.card { background: var(--raised); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; min-width: 9rem; }
.card b { display: block; font-size: 1.45rem; font-variant-numeric: tabular-nums; }
.card small { color: var(--soft); }
input, select, button { font: inherit; color: inherit; background: var(--raised); border: 1px solid var(--line);
  border-radius: .35rem; padding: .25rem .5rem; }
button { cursor: pointer; } :focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
pre, .text { white-space: pre-wrap; overflow-wrap: anywhere; }
svg text { fill: var(--ink); font: 11px system-ui, sans-serif; } svg .axis { stroke: var(--line); } svg .bar { fill: var(--accent); }
"""


def page(title: str, body: str, *, style: str = "", script: str = "", data: Any = None) -> str:
    """A whole page.

    Args:
        title: plain text.
        body: HTML; what comes from outside must have gone through `text`.
        style: CSS after the common one.
        script: JavaScript run at the end; finds `data` by `JSON.parse(document.getElementById("data").textContent)`.
        data: JSON-ready.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title>",
        f"<style>{_STYLE}{style}</style></head><body>",
        body,
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{_embedded(data)}</script>')
    if script:
        parts.append(f"<script>{script}</script>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def text(value: object) -> str:
    """Any value as text that is safe inside HTML and its attributes."""
    return html.escape(str(value), quote=True)


def table(head: Sequence[str], rows: Sequence[Sequence[object]], numbers_from: int = 1) -> str:
    """A table; columns from number `numbers_from` on are set as numbers."""

    def line(cells: Sequence[object], tag: str) -> str:
        found = []
        for at, cell in enumerate(cells):
            kind = ' class="number"' if at >= numbers_from else ""
            found.append(f"<{tag}{kind}>{text(cell)}</{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Headline figures: (name, value, what stands below it)."""
    found = [
        f'<div class="card">{text(name)}<b>{text(value)}</b><small>{text(below)}</small></div>'
        for name, value, below in items
    ]
    return f'<div class="cards">{"".join(found)}</div>'


def histogram(counts: Sequence[tuple[str, int]], width: int = 560, height: int = 150) -> str:
    """Upright bars with their names below; `counts` are (name, number)."""
    most = max([count for _, count in counts], default=0) or 1
    step = width / max(len(counts), 1)
    bars = []
    for at, (name, count) in enumerate(counts):
        tall = (height - 34) * count / most
        left, top = at * step, height - 20 - tall
        bars.append(
            f'<rect class="bar" x="{left + 1:.1f}" y="{top:.1f}" width="{max(step - 2, 1):.1f}" height="{tall:.1f}">'
            f"<title>{text(name)}: {count}</title></rect>"
            f'<text x="{left + step / 2:.1f}" y="{height - 6}" text-anchor="middle">{text(name)}</text>'
            f'<text x="{left + step / 2:.1f}" y="{top - 3:.1f}" text-anchor="middle">{count or ""}</text>'
        )
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" style="max-width:100%">'
        f'<line class="axis" x1="0" x2="{width}" y1="{height - 20}" y2="{height - 20}"/>{"".join(bars)}</svg>'
    )


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever texts it holds."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
