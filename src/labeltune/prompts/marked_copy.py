"""The tokens of a text that is repeated with marks in it (`prompts.marks`): training writes them, decoding walks them.

A text is tokenized once, without marks, and cut into units: its tokens, several together where they share a character. A mark
between two units leaves both as they are. A unit with a mark inside is cut there, and each part is tokenized by itself, so a mark can
stand between any two characters, and every answer has exactly one sequence of tokens. A blank that begins a unit in
front of an opening mark goes with it: ` [` is one token, as ` Oslo` is.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from labeltune.errors import PromptError
from labeltune.prompts.marks import OPEN, Mark, closing, escape, marks_of
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Entity

#: Parts of units whose tokens are kept.
_KEPT_PARTS = 10_000
_BLANK = " "


@dataclass(frozen=True)
class Shown:
    """What a prompt shows of a document.

    Attributes:
        text: the text as it is shown.
        parts: (place in `text`, start, end) of each part of the document in it, in characters; what lies between them is an ellipsis.
    """

    text: str
    parts: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(document: str, text: str, kept: Sequence[tuple[int, int]]) -> Shown:
        """Of a document of which these parts (start, end) are shown."""
        parts = []
        for number, (start, end) in enumerate(kept):
            first = number == 0 and text.startswith(document[start:end])
            parts.append((0 if first else len(text) - (end - start), start, end))
        return Shown(text, tuple(parts))

    def inside(self, entities: Sequence[Entity]) -> list[Entity]:
        """The entities that lie in one of the parts, with their places in the shown text."""
        return [
            replace(entity, start=entity.start - start + at, end=entity.end - start + at)
            for entity in entities
            for at, start, end in self.parts
            if entity.start is not None and entity.end is not None
            if start <= entity.start and entity.end <= end
        ]

    def placed(self, entity: Entity, text: str) -> Entity:
        """An entity of the shown text with its place in the document."""
        assert entity.start is not None and entity.end is not None
        start = self.in_document(entity.start)
        end = start + entity.end - entity.start
        return replace(entity, text=text[start:end], start=start, end=end)

    def in_document(self, place: int) -> int:
        """A place of the shown text in the document; it lies in a part or at its end."""
        at, start, _ = next(part for part in reversed(self.parts) if part[0] <= place)
        return place - at + start


@dataclass(frozen=True)
class Unit:
    """Tokens of a text and the characters they stand for, from `start` to `end` (exclusive)."""

    start: int
    end: int
    ids: tuple[int, ...]


@dataclass(frozen=True)
class Units:
    """A text in units.

    Attributes:
        text: what is repeated, what the template puts in front of answers included.
        lead: characters that the template put there.
        units: one behind the other; they hold the whole text.
        closed: places of characters that no entity may hold, in order.
    """

    text: str
    lead: int
    units: tuple[Unit, ...]
    closed: tuple[int, ...]

    @cached_property
    def length(self) -> int:
        """Tokens without any mark."""
        return sum(len(unit.ids) for unit in self.units)

    def limit(self, place: int) -> int:
        """Where an entity that holds the character at this place must have ended."""
        number = bisect_left(self.closed, place)
        return self.closed[number] if number < len(self.closed) else len(self.text)


class MarkTokens:
    """The token ids of marks and of texts between them.

    Attributes:
        open, open_behind_blank: ids of the mark where an entity begins, and of a blank and that mark.
        closing: label -> ids of the mark where such an entity ends.
        none: ids of the sentence that there is no entity.

    Raises:
        PromptError: the tokenizer has no tokens for them, or the same ones for two.
    """

    def __init__(self, template: ChatTemplate, labels: Sequence[str], no_entities: str) -> None:
        self.template = template
        self._parts: dict[str, tuple[int, ...]] = {}
        self.open, self.open_behind_blank = (
            tuple(template.plain_ids(text)) for text in (OPEN, _BLANK + OPEN)
        )
        self.closing = {label: tuple(template.plain_ids(closing(label))) for label in labels}
        self.none = tuple(template.plain_ids(template.answer_lead + no_entities))
        known = [self.open, self.open_behind_blank, *self.closing.values()]
        unknown = template.tokenizer.unk_token_id
        if len(set(known)) < len(known) or any(not ids or unknown in ids for ids in known):
            raise PromptError(
                "the model's tokenizer cannot write the marks of prompt.answer=marks, or not tell two of them apart; set prompt.answer=json"
            )

    def units(self, shown: Shown) -> Units:
        """A shown text in units."""
        lead = len(self.template.answer_lead)
        text = self.template.answer_lead + shown.text
        string = "".join(map(escape, text))
        #: place in the string -> place in the text
        places, at = {0: 0}, 0
        for number, character in enumerate(text, start=1):
            at += len(escape(character))
            places[at] = number
        ids, offsets = self.template.plain_tokens(string)
        found: list[Unit] = []
        first = begin = end = 0
        for number, (_, stop) in enumerate(offsets, start=1):
            end = max(end, stop)
            last = number == len(ids)
            place = len(text) if last else places.get(end, 0)
            if last or (place > begin and offsets[number][0] >= end):
                found.append(Unit(begin, place, tuple(ids[first:number])))
                first, begin = number, place
        if begin < len(text):  # a tokenizer that has no token for it
            found.append(Unit(begin, len(text), ()))
        covered = {lead + at + n for at, start, stop in shown.parts for n in range(stop - start)}
        return Units(text, lead, tuple(found), tuple(n for n in range(len(text)) if n not in covered))

    def part(self, text: str) -> tuple[int, ...]:
        """Ids of a part of a unit."""
        found = self._parts.get(text)
        if found is None:
            if len(self._parts) >= _KEPT_PARTS:
                self._parts.clear()
            found = self._parts[text] = tuple(self.template.plain_ids(escape(text)))
        return found

    def between(self, units: Units, number: int, start: int, end: int) -> tuple[int, ...]:
        """Ids of the characters from `start` to `end` of a unit."""
        unit = units.units[number]
        return unit.ids if (start, end) == (unit.start, unit.end) else self.part(units.text[start:end])

    def goes_with_mark(self, units: Units, number: int, start: int, end: int) -> bool:
        """Whether this part of a unit, in front of an opening mark, is the blank that goes with it."""
        return units.text[start:end] == _BLANK and end < units.units[number].end

    def path(self, units: Units, marks: Sequence[Mark]) -> Iterator[tuple[tuple[int, ...], int | None]]:
        """The ids of a text with marks, piece by piece, each with the number of the mark that it belongs to; None for text.

        A part of a unit belongs to the mark that cuts it off: with its first token that mark is decided on.
        """
        at = 0
        starts = [unit.start for unit in units.units]
        for which, mark in enumerate(marks):
            yield from self._until(units, starts, at, mark.at, (which, mark.label is None))
            blank = self._blank_before(units, starts, at, mark)
            yield (
                self.closing[mark.label]
                if mark.label is not None
                else self.open_behind_blank
                if blank
                else self.open,
                which,
            )
            at = mark.at
        yield from self._until(units, starts, at, len(units.text), (None, False))

    def _blank_before(self, units: Units, starts: Sequence[int], at: int, mark: Mark) -> bool:
        if mark.label is not None or mark.at == at:
            return False
        number = bisect_right(starts, mark.at - 1) - 1
        return self.goes_with_mark(units, number, max(at, starts[number]), mark.at)

    def _until(
        self, units: Units, starts: Sequence[int], at: int, end: int, mark: tuple[int | None, bool]
    ) -> Iterator[tuple[tuple[int, ...], int | None]]:
        """The pieces of the text from `at` to `end`, where a mark stands (its number, whether it opens)."""
        number = bisect_right(starts, at) - 1
        while at < end:
            stop = min(units.units[number].end, end)
            cut = stop < units.units[number].end
            if not (cut and mark[1] and self.goes_with_mark(units, number, at, stop)):
                yield self.between(units, number, at, stop), mark[0] if cut else None
            at, number = stop, number + 1

    def answer(self, shown: Shown, entities: Sequence[Entity]) -> list[int]:
        """Ids of the right answer about a shown text, without the end of turn.

        Args:
            entities: with places in the document; what is not shown is left out.

        Raises:
            DataError: two entities cross.
        """
        inside = shown.inside(entities)
        if not inside:
            return list(self.none)
        units = self.units(shown)
        marks = [
            replace(mark, at=mark.at + units.lead, start=mark.start + units.lead) for mark in marks_of(inside)
        ]
        return [token for ids, _ in self.path(units, marks) for token in ids]

    def longest_plain(self, shown: Shown) -> int:
        """Tokens of an answer without any mark."""
        return max(self.units(shown).length, len(self.none))
