"""Self-contained HTML pages in English and Chinese: one file, no network, light and dark; opened from disk in any browser."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from importlib import resources
from typing import Any

#: A page may load nothing, run only what stands in it, and send nothing anywhere.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


class Html(str):
    """Markup: what comes from outside has gone through `text` already."""


def text(value: object) -> str:
    """Any value as text that is safe inside HTML and its attributes; `Html` stays as it is."""
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def both(english: str, chinese: str) -> Html:
    """Words of the page in both of its languages; the page's button switches between them."""
    return Html(f'<span data-zh="{text(chinese)}">{text(english)}</span>')


def name(value: object) -> Html:
    """An id, a label or a path: broken after a slash, or inside a word that is longer than its line, and nowhere else."""
    parts = str(value).replace("/", "/\0").split("\0")
    shown = "".join(f'<span class="name">{text(part)}</span>' for part in parts if part)
    return Html(f'<span translate="no">{shown}</span>')


def page(
    title: str, body: str, *, chinese: str = "", style: str = "", script: str = "", data: Any = None
) -> str:
    """A whole page. It opens in the browser's language.

    Args:
        title: plain text; `chinese` is the same in Chinese, where it differs.
        body: HTML; what comes from outside must have gone through `text`.
        style: CSS after the common one.
        script: JavaScript run at the end, after pages.js, whose `language` it may use; finds `data` by
            `JSON.parse(document.getElementById("data").textContent)`.
        data: JSON-ready.
    """
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<title data-zh="{text(chinese or title)}">{text(title)}</title>',
        f"<style>{_read('pages.css')}{style}</style></head><body>",
        body,
    ]
    if data is not None:
        parts.append(f'<script type="application/json" id="data">{_embedded(data)}</script>')
    parts.append(f"<script>{_read('pages.js')}{script}\nlanguage.start();</script>")
    parts.append("</body></html>\n")
    return "\n".join(parts)


def header(title: Html, *below: str) -> str:
    """The top of a page: its title, the language button, and lines of small print."""
    lines = "".join(f'<p class="soft">{line}</p>' for line in below)
    return f'<header><button id="language" type="button">中文</button><h1>{title}</h1>{lines}</header>'


def paragraph(told: Html, kind: str = "") -> str:
    """A line of text; `kind` is a class: soft, good, bad."""
    return f'<p class="{kind}">{told}</p>' if kind else f"<p>{told}</p>"


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], numbers_from: int = 1, stacked: bool = False
) -> str:
    """A table; columns from number `numbers_from` on are set as numbers.

    Args:
        stacked: on a narrow window each row becomes a card, with its heads before the values; for tables that hold
            texts, or many figures a row.
    """

    def line(cells: Sequence[object], tag: str) -> str:
        found = []
        for at, cell in enumerate(cells):
            kind = ' class="number"' if at >= numbers_from else ""
            foreign = "" if tag == "th" or isinstance(cell, Html) else ' translate="no"'
            label = f'<small class="head">{text(head[at])}</small>' if stacked and tag == "td" else ""
            found.append(f"<{tag}{kind}>{label}<span{foreign}>{text(cell)}</span></{tag}>")
        return f"<tr>{''.join(found)}</tr>"

    body = "".join(line(row, "td") for row in rows)
    kind = "wide stacked" if stacked else "wide"
    return f'<div class="{kind}"><table><thead>{line(head, "th")}</thead><tbody>{body}</tbody></table></div>'


def cards(items: Sequence[tuple[str, str, str]], minor: bool = False) -> str:
    """Headline figures: (name, value, what stands below it); `minor` ones are smaller."""
    found = [
        f'<div class="card"><span>{text(name)}</span><strong>{text(value)}</strong><small>{text(below)}</small></div>'
        for name, value, below in items
    ]
    return f'<div class="cards{" minor" if minor else ""}">{"".join(found)}</div>'


def bars(counts: Sequence[tuple[object, int]]) -> str:
    """Lying bars, one a line; `counts` are (name, number)."""
    most = max([count for _, count in counts], default=0) or 1
    lines = [
        f"<span>{text(named)}</span><i>{_bar(count / most)}</i><span>{count:,}</span>"
        for named, count in counts
    ]
    return f'<div class="bars">{"".join(lines)}</div>'


def _bar(share: float) -> str:
    return f'<b style="width:{share:.1%}"></b>' if share else ""


def _read(file: str) -> str:
    return resources.files("labeltune").joinpath(file).read_text(encoding="utf-8")


def _embedded(data: Any) -> str:
    """JSON that cannot end the script element it stands in, whatever texts it holds."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace(
        "<", "\\u003c"
    )
