"""Messages in Chinese: one catalogue of templates, applied where a finished English message leaves the program."""

from __future__ import annotations

import os
import re
from functools import cache
from importlib import resources

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
#: Messages in messages, such as a reason inside an error, are followed this deep.
_DEPTH = 4
#: Longer lines hold somebody's data, not our words.
_LONGEST = 4000


def language() -> str:
    """`zh` or `en`: LABELTUNE_LANG where it is set, otherwise the locale's, read as gettext reads it."""
    wanted = os.environ.get("LABELTUNE_LANG", "").lower()
    if wanted:
        return "zh" if wanted.startswith("zh") else "en"
    locale = next(filter(None, map(os.environ.get, ("LC_ALL", "LC_MESSAGES", "LANG"))), "")
    if locale.partition(".")[0] in ("C", "POSIX"):
        return "en"
    return "zh" if (os.environ.get("LANGUAGE") or locale).lower().startswith("zh") else "en"


def localize(message: str) -> str:
    """A finished message in the user's language; what the catalogue does not know stays as it is."""
    return chinese(message) if language() == "zh" else message


def chinese(message: str) -> str:
    """A finished English message in Chinese, line by line where the whole is not known."""
    found = _translated(message, _DEPTH)
    if found is None and "\n" in message:
        return "\n".join(_translated(line, _DEPTH) or line for line in message.split("\n"))
    return message if found is None else found


def _translated(message: str, depth: int) -> str | None:
    """None where no template fits."""
    bare = message.strip()
    if not bare or depth == 0 or len(message) > _LONGEST:
        return None
    if bare != message:
        inner = _translated(bare, depth)
        return None if inner is None else message.replace(bare, inner)
    exact, templates = _catalogue()
    if message in exact:
        return exact[message]
    for clue, pattern, target in templates:
        match = pattern.fullmatch(message) if clue in message else None
        if match:
            values = {key: _translated(value, depth - 1) or value for key, value in match.groupdict().items()}
            return _PLACEHOLDER.sub(lambda found: values[found[1]], target)  # noqa: B023
    for joint, joined in (("; ", "；"), (", ", "，")):
        if joint in message:
            pieces = message.split(joint)
            known = [_translated(piece, depth - 1) for piece in pieces]
            if all(known) or (joint == "; " and any(known)):
                return joined.join(told or piece for told, piece in zip(known, pieces, strict=True))
    return None


def templates() -> dict[str, str]:
    """English template -> Chinese template; `{name}` stands for what is formatted in."""
    import yaml

    text = resources.files("labeltune").joinpath("messages.zh.yaml").read_text(encoding="utf-8")
    loaded: dict[str, str] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


@cache
def _catalogue() -> tuple[dict[str, str], list[tuple[str, re.Pattern[str], str]]]:
    """Templates without placeholders, and the others as (longest literal part, pattern, Chinese), most literal text first."""
    exact, found = {}, []
    for english, target in templates().items():
        parts = _PLACEHOLDER.split(english)
        if len(parts) == 1:
            exact[english] = target
            continue
        # The parts take turns: literal text, name, literal text ...
        pattern = "".join(f"(?P<{part}>.*?)" if at % 2 else re.escape(part) for at, part in enumerate(parts))
        literal = parts[::2]
        found.append((sum(map(len, literal)), max(literal, key=len), re.compile(pattern, re.DOTALL), target))
    found.sort(key=lambda each: -each[0])
    return exact, [each[1:] for each in found]
