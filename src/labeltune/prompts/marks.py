"""Answers that repeat the text with marks around its entities: `Mara left [Oslo|LOC]`, and `[[Oslo|LOC] Opera|ORG]` where they nest.

What is a mark somewhere in the answer stands with a backslash before it where it is text. So every text with entities that do not
cross has one answer, and every answer one text: places are read, never searched for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labeltune.errors import DataError
from labeltune.types import Entity

OPEN, SEPARATOR, CLOSE, ESCAPE = "[", "|", "]", "\\"
_MARKS = frozenset((OPEN, SEPARATOR, CLOSE, ESCAPE))


@dataclass(frozen=True)
class Mark:
    """Where an entity begins or ends.

    Attributes:
        at: place in the text, in characters.
        label: of the entity that ends here; None where one begins.
        start: where the entity begins.
    """

    at: int
    label: str | None
    start: int


@dataclass(frozen=True)
class Copy:
    """An answer as it was read.

    Attributes:
        text: the answer without its marks.
        spans: (start, end, label) of the entities in `text`, in characters, inner ones before those around them.
        well_formed: every mark has its counterpart, every entity a text and a label.
    """

    text: str
    spans: tuple[tuple[int, int, str], ...]
    well_formed: bool


def escape(text: str) -> str:
    """As it stands between marks."""
    return "".join(ESCAPE + character if character in _MARKS else character for character in text)


def closing(label: str) -> str:
    """The mark at the end of an entity."""
    return f"{SEPARATOR}{escape(label)}{CLOSE}"


def marks_of(entities: Sequence[Entity]) -> list[Mark]:
    """The marks of entities with places in their order; of two that begin alike the longer one is the outer one.

    Raises:
        DataError: two of them cross, or one has no place.
    """
    found: list[Mark] = []
    opened: list[tuple[int, int, Entity]] = []
    placed = []
    for entity in entities:
        if entity.start is None or entity.end is None:
            raise DataError(
                f"entity {entity.text!r} has no place in the text, so no marks can stand around it"
            )
        placed.append((entity.start, entity.end, entity))
    placed.sort(key=lambda each: (each[0], -each[1], each[2].label))
    for start, end, entity in placed:
        while opened and opened[-1][1] <= start:
            begin, at, outer = opened.pop()
            found.append(Mark(at, outer.label, begin))
        if opened and opened[-1][1] < end:
            begin, at, outer = opened[-1]
            raise DataError(
                f"{outer.text!r} at {begin}:{at} and {entity.text!r} at {start}:{end} cross: each holds a part of the other; "
                "marks can only nest"
            )
        found.append(Mark(start, None, start))
        opened.append((start, end, entity))
    found += [Mark(at, entity.label, start) for start, at, entity in reversed(opened)]
    return found


def write(text: str, entities: Sequence[Entity]) -> str:
    """The text with marks around these entities.

    Raises:
        DataError: two of them cross.
    """
    written, at = [], 0
    for mark in marks_of(entities):
        written += [escape(text[at : mark.at]), OPEN if mark.label is None else closing(mark.label)]
        at = mark.at
    return "".join([*written, escape(text[at:])])


def read(answer: str) -> Copy:
    """Text and entities of an answer, whatever it looks like; a mark without its counterpart is left out."""
    text: list[str] = []
    spans: list[tuple[int, int, str]] = []
    opened: list[int] = []
    well_formed, at = True, 0
    while at < len(answer):
        character = answer[at]
        at += 1
        if character == OPEN:
            opened.append(len(text))
        elif character == SEPARATOR and opened:
            label, at = _until_close(answer, at)
            start = opened.pop()
            if label and start < len(text):
                spans.append((start, len(text), label))
            else:
                well_formed = False
        elif character in (SEPARATOR, CLOSE):
            well_formed = False
            if character == CLOSE and opened:
                opened.pop()
            else:
                text.append(character)
        elif character == ESCAPE and answer[at : at + 1] in _MARKS:
            text.append(answer[at])
            at += 1
        else:
            well_formed = well_formed and character != ESCAPE
            text.append(character)
    return Copy("".join(text), tuple(spans), well_formed and not opened)


def _until_close(answer: str, at: int) -> tuple[str | None, int]:
    """(label, place behind its mark); None and the end of the answer where it has no end."""
    label: list[str] = []
    while at < len(answer):
        character = answer[at]
        if character == CLOSE:
            return "".join(label), at + 1
        if character == ESCAPE and answer[at + 1 : at + 2] in _MARKS:
            at += 1
        label.append(answer[at])
        at += 1
    return None, at


def places(copy: str, text: str) -> list[int | None]:
    """Where each character of a copy stands in the text: as far as both agree from the front, then from the back; blanks do not count.

    A copy of a shortened text agrees with it up to the gap and behind it; of one with an error, what lies between has no place.
    """
    mine = [at for at, character in enumerate(copy) if not character.isspace()]
    theirs = [at for at, character in enumerate(text) if not character.isspace()]
    shorter = min(len(mine), len(theirs))
    head = next((n for n in range(shorter) if copy[mine[n]] != text[theirs[n]]), shorter)
    left = shorter - head
    tail = next((n for n in range(left) if copy[mine[-1 - n]] != text[theirs[-1 - n]]), left)
    found: list[int | None] = [None] * len(copy)
    for number in range(head):
        found[mine[number]] = theirs[number]
    for number in range(1, tail + 1):
        found[mine[-number]] = theirs[-number]
    return found
