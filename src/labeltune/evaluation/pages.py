"""Self-contained HTML pages in English and Chinese: one file, no network, light and dark; opened from disk in any browser.

The pages are the Jinja templates in `templates/`, which escape every value that is put in; `Markup` is what is escaped already.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from labeltune.messages import chinese

#: The figures of a JSON element are as compact as they can be, and in their own order.
_JSON = {"ensure_ascii": False, "allow_nan": False, "separators": (",", ":")}


@cache
def environment() -> Environment:
    """The templates, with `both`, `name` and `chinese` as functions, `fmt` (Python's `format`) and `interval` as filters."""
    made = Environment(
        loader=PackageLoader("labeltune.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.policies["json.dumps_kwargs"] = _JSON
    made.globals |= {"both": both, "name": name, "chinese": chinese}
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
    return f"{measure['low']:.3f} – {measure['high']:.3f}"
