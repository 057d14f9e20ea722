"""Messages in Chinese: one catalogue of templates, applied where a finished English message leaves the program."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from functools import cache
from importlib import resources
from typing import Any, Literal, TextIO

import yaml

_PLACEHOLDER = re.compile(r"\{(\w+)\}")
#: Places of a template that take one kind of text: `{n}`, `{n2}` ... a number, `{word}` ... no blanks. All others take any.
_KINDS = {"n": r"-?[\d.,]*\d(?:e[-+]?\d+)?", "word": r"\S+?"}
#: Several words in quotes, such as the names of columns.
_QUOTED = re.compile(r"'[^']*'(?:(?:, | and )'[^']*')+")
_ANY = ".*?)"
_HAN = re.compile("[\u3400-\u9fff]")
_REST = "rest_"
#: Messages in messages, such as a reason inside an error, are followed this deep.
_DEPTH = 8
#: What stands in front of a message that is whole without it.
_BEGINNINGS = (
    "error",
    "Error: ",
    "warning: ",
    "note: ",
    "ok  ",
    "note  ",
    "LACK  ",
    "{where}: error: ",
    "{where}: warning: ",
)
#: Longer messages hold somebody's data, not our words.
_LONGEST = 20_000


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
    """A finished English message in Chinese."""
    found = _translated(message, _DEPTH)
    return message if found is None else found


@contextlib.contextmanager
def spoken(name: Literal["stdout", "stderr"]) -> Iterator[None]:
    """What is printed to this stream inside, or in a function that wears this, is in the user's language."""
    if language() == "en":
        yield
        return
    kept = getattr(sys, name)
    setattr(sys, name, _Spoken(kept))
    try:
        yield
    finally:
        setattr(sys, name, kept)


def verbatim(stream: TextIO) -> TextIO:
    """A stream that is spoken to, without the translation: for lines that hold somebody's words."""
    return stream._stream if isinstance(stream, _Spoken) else stream


class _Spoken:
    """A text stream that translates what is written to it, message by message, and is the stream beneath otherwise."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        # A single word is more likely somebody's label than a message.
        self._stream.write(chinese(text) if " " in text.strip() else text)
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _translated(message: str, depth: int) -> str | None:
    """None where no template fits. Values are translated only when they are messages, never when they are single words:
    those are names of files, labels and keys."""
    bare = message.strip()
    if (
        not bare
        or bare[0] in "{["
        or depth == 0
        or len(message) > _LONGEST
        or (depth < _DEPTH and " " not in bare)
    ):
        return None
    exact, found = _catalogue()
    if message in exact:
        return exact[message]
    if bare != message:
        inner = _translated(bare, depth)
        if inner is not None:
            return message.replace(bare, inner)
    for clue, pattern, target in found:
        match = pattern.fullmatch(message) if clue in message else None
        if match:
            given = {key: value for key, value in match.groupdict().items() if value is not None}
            values = {
                key: _translated(value, depth - 1) or _chinese_list(value) for key, value in given.items()
            }
            told = _filled(target, values)
            return f"{told}；{values[_REST]}" if _REST in values else told
    if "\n" in message:
        lines = message.split("\n")
        known = [_translated(line, depth) for line in lines]
        if any(known):
            return "\n".join(told or line for told, line in zip(known, lines, strict=True))
    elif "; " in message:
        first, _, rest = message.partition("; ")
        known = [_translated(piece, depth) for piece in (first, rest)]
        # A joint inside quotes is part of somebody's words.
        if any(known) and first.count("'") % 2 == 0:
            return f"{known[0] or first}；{known[1] or rest}".replace("？；", "？")
    elif ", " in message:
        known = [_translated(piece, depth - 1) for piece in message.split(", ")]
        if all(known):
            return "，".join(filter(None, known))
    return None


def _filled(target: str, values: dict[str, str]) -> str:
    """A template with its values; Chinese has no blank between two of its characters."""
    told = ""
    for at, part in enumerate(_PLACEHOLDER.split(target)):
        piece = values[part] if at % 2 else part
        if told[-1:] == " " and _HAN.match(told[-2:-1]) and _HAN.match(piece[:1]):
            told = told[:-1]
        elif piece[:1] == " " and _HAN.match(told[-1:]) and _HAN.match(piece[1:2]):
            piece = piece[1:]
        told += piece
    return told


def _chinese_list(value: str) -> str:
    """A list of quoted words with the comma that joins a list in Chinese; any other value as it is."""
    return re.sub("', '|' and '", "'、'", value) if _QUOTED.fullmatch(value) else value


def templates() -> dict[str, str]:
    """English template -> Chinese template; `{name}` stands for what is formatted in, see `_KINDS` for some names."""
    text = resources.files("labeltune").joinpath("messages.zh.yaml").read_text(encoding="utf-8")
    loaded: dict[str, str] = yaml.load(text, getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    return loaded


def _place(name: str) -> str:
    if name.rstrip("0123456789") in _KINDS:
        return f"(?P<{name}>{_KINDS[name.rstrip('0123456789')]})"
    return f"(?P<{name}>{_ANY}"


@cache
def _catalogue() -> tuple[dict[str, str], list[tuple[str, re.Pattern[str], str]]]:
    """Templates without placeholders, and the others as (longest literal part, pattern, Chinese): those of
    `_BEGINNINGS` first, then by literal text, most of it first."""
    exact, found = {}, []
    for english, target in templates().items():
        parts = _PLACEHOLDER.split(english)
        if len(parts) == 1:
            exact[english] = target
            continue
        # The parts take turns: literal text, name, literal text ... A value is part of a line, but for what an error says.
        pattern = "".join(_place(part) if at % 2 else re.escape(part) for at, part in enumerate(parts))
        if english.startswith("error") and not parts[-1]:
            pattern = f"{pattern.removesuffix(_ANY)}(?s:.*?))"
        elif not parts[-1] and not target.endswith(f"{{{parts[-2]}}}"):
            # What follows the value in Chinese is said before further sentences.
            pattern += f"(?:; (?P<{_REST}>.*))?"
        literal, lines = parts[::2], re.DOTALL if "\n" in english else 0
        order = (not english.startswith(_BEGINNINGS), -sum(map(len, literal)))
        found.append((order, max(literal, key=len), re.compile(pattern, lines), target))
    found.sort(key=lambda each: each[0])
    return exact, [each[1:] for each in found]
