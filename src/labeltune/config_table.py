"""The table of config keys in docs/config.md and docs/zh/config.md, made from the config models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from typing import Literal

import yaml

from labeltune.config import RunConfig, config_keys
from labeltune.default_prompts import CLASSIFICATION_SYSTEM, CLASSIFICATION_USER

Language = Literal["en", "zh"]
#: The page of each language, from the root of the repository.
PAGES: dict[Language, str] = {"en": "docs/config.md", "zh": "docs/zh/config.md"}
BEGIN = "<!-- config table: begin (made by python -m labeltune.config_table) -->"
END = "<!-- config table: end -->"
_HEADS = {"en": ("key", "default", "meaning"), "zh": ("配置项", "默认值", "含义")}
_BY_TASK = {"en": "by task", "zh": "随任务而定"}
_DEFAULTS_BY_TASK = {CLASSIFICATION_SYSTEM, CLASSIFICATION_USER, "./output/Qwen2"}


def config_table(language: Language) -> str:
    """GitHub Markdown, a row a key."""
    lines = [f"| {' | '.join(_HEADS[language])} |", "|---|---|---|"]
    for key, default, meaning in key_rows(language):
        shown = default if default in ("", _BY_TASK[language]) else f"`{default}`"
        lines.append(f"| `{key}` | {shown} | {meaning} |")
    return "\n".join(lines)


def key_rows(language: Language = "en") -> Iterator[tuple[str, str, str]]:
    """Every key with its default, empty for none, and its meaning."""
    meanings = chinese_meanings() if language == "zh" else {}
    for key, _, default, description in config_keys(RunConfig):
        yield key, _shown(default, language), meanings.get(key, description)


def chinese_meanings() -> dict[str, str]:
    """Key -> its meaning in Chinese."""
    text = resources.files("labeltune").joinpath("config_keys.zh.yaml").read_text(encoding="utf-8")
    loaded: dict[str, str] = yaml.safe_load(text)
    return loaded


def _shown(default: object, language: Language) -> str:
    if default is None:
        return ""
    if isinstance(default, str):
        return _BY_TASK[language] if default in _DEFAULTS_BY_TASK else default
    return json.dumps(default, ensure_ascii=False)


def replace_table(text: str, language: Language) -> str:
    """A page with its table made anew.

    Raises:
        ValueError: the page has no place for it.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the page lacks {BEGIN!r} or {END!r}")
    return f"{before}{BEGIN}\n\n{config_table(language)}\n\n{END}{after}"


if __name__ == "__main__":
    from pathlib import Path

    for spoken, name in PAGES.items():
        page = Path(name)
        page.write_text(replace_table(page.read_text(encoding="utf-8"), spoken), encoding="utf-8")
