"""The table of config keys in README.md and README.zh-CN.md, made from the config models."""

from __future__ import annotations

import json
from collections.abc import Iterator

from labeltune.config import (
    CLASSIFICATION_SYSTEM,
    CLASSIFICATION_USER,
    RunConfig,
    config_keys,
)

BEGIN = "<!-- config table: begin (made by python -m labeltune.config_table) -->"
END = "<!-- config table: end -->"
BY_TASK = "by task"
_BY_TASK = {CLASSIFICATION_SYSTEM, CLASSIFICATION_USER, "./output/Qwen2"}


def config_table() -> str:
    """GitHub Markdown, a row a key."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    for key, default, meaning in key_rows():
        shown = default if default in ("", BY_TASK) else f"`{default}`"
        lines.append(f"| `{key}` | {shown} | {meaning} |")
    return "\n".join(lines)


def key_rows() -> Iterator[tuple[str, str, str]]:
    """Every key with its default, empty for none, and its meaning."""
    for key, _, default, description in config_keys(RunConfig):
        yield key, _shown(default), description


def _shown(default: object) -> str:
    if default is None:
        return ""
    if isinstance(default, str):
        return BY_TASK if default in _BY_TASK else default
    return json.dumps(default, ensure_ascii=False)


def replace_table(text: str) -> str:
    """A page with its table made anew.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{config_table()}\n\n{END}{after}"


if __name__ == "__main__":
    import sys
    from pathlib import Path

    for name in sys.argv[1:]:
        page = Path(name)
        page.write_text(replace_table(page.read_text(encoding="utf-8")), encoding="utf-8")
