"""Why an entity does not stand at its offsets: ways in which people and tools count that are not ours."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator

#: Texts beyond it are not searched for reasons that need the whole text once more.
_LONGEST = 200_000


def why_elsewhere(text: str, start: int, end: int, entity: str) -> tuple[str, tuple[int, int] | None]:
    """Why `text[start:end]` is not `entity`.

    Returns:
        A sentence, empty when nothing is known; and where the entity stands, (start, end) in characters, end exclusive.
    """
    inside = 0 <= start < end <= len(text)
    if inside and text[start:end].strip() == entity.strip():
        place = stripped(text, start, end)
        return f"the two differ in blanks at their ends; without them it is {place[0]}:{place[1]}", place
    for reason, (a, b) in _guesses(text, start, end, entity) if entity in text else ():
        if 0 <= a < b <= len(text) and text[a:b] == entity:
            return f"{reason}; it stands at {a}:{b}", (a, b)
    for what, same in _SAMES if inside else ():
        if same(text[start:end]) == same(entity):
            return f"the two differ only in {what}", (start, end)
    return _nearest(text, start, end, entity)


def _fold_width(text: str) -> str:
    return unicodedata.normalize("NFKC", text)


_SAMES: tuple[tuple[str, Callable[[str], str]], ...] = (
    ("case", str.casefold),
    ("width or Unicode form (NFKC)", _fold_width),
    ("blanks", lambda text: "".join(text.split())),
)


def _guesses(text: str, start: int, end: int, entity: str) -> Iterator[tuple[str, tuple[int, int]]]:
    """Ways of counting that people and tools use: (what they do, the place in our way of counting)."""
    yield "the end is inclusive, and must be exclusive (one more)", (start, end + 1)
    yield "the offsets count from 1, and must count from 0", (start - 1, end - 1)
    yield "the offsets count from 1 with an inclusive end", (start - 1, end)
    if start >= 0 and len(text) <= _LONGEST:
        if end > start:
            yield (
                "the offsets count UTF-16 units, and must count characters",
                in_characters(text, start, end, 2),
            )
            yield (
                "the offsets count UTF-8 bytes, and must count characters",
                in_characters(text, start, end, 1),
            )
        if "\r\n" in text:
            yield (
                "a line break CRLF counts as one character, and is two",
                _mapped(text, start, end, r"\r\n", 1),
            )
            yield (
                "a line break CRLF is left out, and is two characters",
                _mapped(text, start, end, r"\r\n", 0),
            )
        elif "\n" in text:
            yield (
                "a line break counts as two characters (CRLF), and is one here",
                _mapped(text, start, end, r"\n", 2),
            )
        if "\n" in text:
            yield "line breaks do not count, and must", _mapped(text, start, end, r"\n", 0)
        if text[:1].isspace():
            blanks = len(text) - len(text.lstrip())
            yield (
                "the blanks at the beginning of the text do not count, and must",
                (start + blanks, end + blanks),
            )
        yield "several blanks count as one, and must each count", _mapped(text, start, end, r"\s+", 1)
        composed = unicodedata.normalize("NFC", text)
        if composed != text:
            yield (
                "the offsets count characters of another Unicode form (NFC)",
                _of_form(text, start, end, "NFC"),
            )
        elif unicodedata.normalize("NFD", text) != text:
            yield (
                "the offsets count characters of another Unicode form (NFD)",
                _of_form(text, start, end, "NFD"),
            )
    if text[max(start, 0) : max(start, 0) + len(entity)] == entity and start >= 0:
        yield f"the end is wrong: start + {len(entity)} characters", (start, start + len(entity))
    if start < end <= start + len(text) and text[max(0, end - len(entity)) : end] == entity:
        yield f"the start is wrong: end - {len(entity)} characters", (end - len(entity), end)


def in_characters(text: str, start: int, end: int, width: int) -> tuple[int, int]:
    """Offsets in UTF-16 units (`width` 2) or UTF-8 bytes (1) -> in characters; (-1, -1) where they cut one, or lie outside."""
    if start < 0 or end < start:
        return -1, -1
    raw = text.encode("utf-16-le" if width == 2 else "utf-8", "surrogatepass")
    name = "utf-16-le" if width == 2 else "utf-8"
    if width * end > len(raw):
        return -1, -1
    try:
        before = raw[: width * start].decode(name)
        inside = raw[width * start : width * end].decode(name)
    except UnicodeDecodeError:
        return -1, -1
    return len(before), len(before) + len(inside)


def units(text: str, place: int) -> int:
    """A place in characters -> in UTF-16 units."""
    return len(text[:place].encode("utf-16-le", "surrogatepass")) // 2


def _mapped(text: str, start: int, end: int, pattern: str, size: int) -> tuple[int, int]:
    """Offsets that count every match of a pattern as `size` characters -> in characters."""
    places: list[int] = []  # place in the text of every character that was counted
    at = 0
    for match in re.finditer(pattern, text):
        places += range(at, match.start())
        places += [match.start()] * size
        at = match.end()
    places += range(at, len(text))
    if not 0 <= start < end <= len(places):
        return -1, -1
    return places[start], places[end - 1] + 1


def _of_form(text: str, start: int, end: int, form: str) -> tuple[int, int]:
    """Offsets in a Unicode normal form -> in characters; each base character is normalized with its marks."""
    places: list[int] = []
    at = 0
    while at < len(text):
        stop = at + 1
        while stop < len(text) and unicodedata.combining(text[stop]):
            stop += 1
        size = len(unicodedata.normalize(form, text[at:stop]))  # type: ignore[arg-type]
        places += [at] * size
        at = stop
    places.append(len(text))
    if not 0 <= start < end < len(places):
        return -1, -1
    return places[start], places[end]


def stripped(text: str, start: int, end: int) -> tuple[int, int]:
    """The place without the blanks at its ends."""
    found = text[start:end]
    return start + len(found) - len(found.lstrip()), start + len(found.rstrip())


def _nearest(text: str, start: int, end: int, entity: str) -> tuple[str, tuple[int, int] | None]:
    before, behind = text.rfind(entity, 0, max(start, 0) + len(entity)), text.find(entity, max(start, 0))
    places = [at for at in (before, behind) if at >= 0]
    if not places:
        return "", None
    at = min(places, key=lambda place: abs(place - start))
    place = (at, at + len(entity))
    off = start - at
    if end - start == len(entity):
        much = f"{abs(off)} too {'large' if off > 0 else 'small'}"
        return f"both offsets are {much}: the nearest {entity!r} stands at {place[0]}:{place[1]}", place
    return f"the nearest {entity!r} stands at {place[0]}:{place[1]}", place
