"""What may come next in a text that is repeated with marks in it, token by token.

A state holds every way in which the tokens so far can go on: with the text, with a mark, or with a part of a unit behind which a mark must
come. They are left by their next token, so the tokens that may come next are the first ones of all of them. A state is never
without one: an entity is begun, and gone on with, only where it can still end.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal, NamedTuple

from labeltune.prompts.marked_copy import MarkTokens, Units
from labeltune.prompts.marks import Mark


@dataclass(frozen=True)
class Place:
    """Between two pieces of an answer.

    Attributes:
        unit: the unit whose characters come next.
        at: the next character.
        opened: where the entities that have not ended begin, outer ones first.
        marks: all marks so far.
        must: what has to follow: a mark, or one that closes.
    """

    unit: int
    at: int
    opened: tuple[int, ...] = ()
    marks: tuple[Mark, ...] = ()
    must: Literal["nothing", "mark", "close"] = "nothing"


class Way(NamedTuple):
    """One way to go on.

    Attributes:
        ids: tokens that are left of its piece.
        place: where the piece began.
        kind: what the piece is: text up to the end of its unit, a part of the unit, a mark, the end of the turn, or all of the answer
            that there is no entity.
        to: where the piece ends.
        label: of a closing mark.
    """

    ids: tuple[int, ...]
    place: Place
    kind: Literal["text", "part", "blank", "open", "close", "end", "none"]
    to: int
    label: str | None = None


#: All ways that agree with the tokens so far, the text's own first.
State = tuple[Way, ...]


class MarkGrammar:
    """The answers about one shown text.

    Args:
        nested: entities may lie inside entities.
        end: token that ends the turn.
    """

    def __init__(self, tokens: MarkTokens, units: Units, nested: bool, end: int) -> None:
        self.tokens, self.units, self.nested, self.end = tokens, units, nested, end
        self._cuts: dict[tuple[int, int], list[tuple[tuple[int, ...], int, bool]]] = {}

    def start(self) -> State:
        """Before the first token."""
        return tuple(self._ways(Place(0, 0)))

    def allowed(self, state: State) -> list[int]:
        """Tokens that may come next, at least one; the text's own first."""
        return list(dict.fromkeys(way.ids[0] for way in state))

    def after(self, state: State, token: int) -> State:
        """The state behind one of them; empty when the answer is complete, see `marks`."""
        return tuple(
            further
            for way in state
            if way.ids[0] == token
            for further in ([way._replace(ids=way.ids[1:])] if len(way.ids) > 1 else self._behind(way))
        )

    def going_on(self, state: State) -> int | None:
        """The next token of the text alone; None where a mark must come, or the answer ends."""
        return state[0].ids[0] if state[0].kind == "text" else None

    def ended(self, state: State, token: int) -> Way | None:
        """The way that is complete with this token, if the answer is."""
        return next((w for w in state if w.ids == (token,) and w.kind in ("end", "none")), None)

    def _behind(self, way: Way) -> Iterator[Way]:
        place, at = way.place, way.to
        if way.kind == "text":
            yield from self._ways(replace(place, unit=place.unit + 1, at=at))
        elif way.kind == "part":
            blank = self.tokens.goes_with_mark(self.units, place.unit, place.at, at)
            yield from self._ways(replace(place, at=at, must="close" if blank else "mark"))
        elif way.kind in ("open", "blank"):
            opened, marks = (*place.opened, at), (*place.marks, Mark(at, None, at))
            yield from self._ways(Place(place.unit, at, opened, marks))
        elif way.kind == "close":
            marks = (*place.marks, Mark(at, way.label, place.opened[-1]))
            yield from self._ways(Place(place.unit, at, place.opened[:-1], marks))

    def _ways(self, place: Place) -> Iterator[Way]:
        for way in self._pieces(place):
            if way.ids:
                yield way
            else:  # characters that the tokenizer has no token for
                yield from self._behind(way)

    def _pieces(self, place: Place) -> Iterator[Way]:
        text, free = self.units.text, place.must == "nothing"
        inside = place.unit < len(self.units.units)
        end = self.units.units[place.unit].end if inside else len(text)
        if inside and free and self._may_reach(place, end):
            yield Way(self.tokens.between(self.units, place.unit, place.at, end), place, "text", end)
        first = place.at == 0 and not place.marks
        if first:
            yield Way((*self.tokens.none, self.end), place, "none", 0)
        elif not inside and not place.opened:
            yield Way((self.end,), place, "end", place.at)
        if place.must != "close" and self._may_open(place, place.at):
            yield Way(self.tokens.open, place, "open", place.at)
        for label in self._closable(place):
            yield Way(self.tokens.closing[label], place, "close", place.at, label)
        if inside and free:
            yield from self._parts(place)

    def _parts(self, place: Place) -> Iterator[Way]:
        """Parts of the unit in front of a mark inside it."""
        for ids, cut, blank in self._cut(place.unit, place.at):
            if not self._may_reach(place, cut):
                break
            opens = self._may_open(place, cut)
            if blank and opens:
                yield Way(self.tokens.open_behind_blank, place, "blank", cut)
            if place.opened or (opens and not blank):
                yield Way(ids, place, "part", cut)

    def _cut(self, unit: int, at: int) -> list[tuple[tuple[int, ...], int, bool]]:
        """(ids of the part, where it ends, whether it is a blank that goes with an opening mark) for each cut of a unit."""
        if (unit, at) not in self._cuts:
            self._cuts[unit, at] = [
                (
                    self.tokens.between(self.units, unit, at, cut),
                    cut,
                    self.tokens.goes_with_mark(self.units, unit, at, cut),
                )
                for cut in range(at + 1, self.units.units[unit].end)
            ]
        return self._cuts[unit, at]

    def _closable(self, place: Place) -> Iterator[str]:
        """Labels that the innermost entity may end with here: no span has the same one twice."""
        if not place.opened or place.opened[-1] >= place.at:
            return
        used = set()
        for mark in reversed(place.marks):
            if mark.at != place.at:
                break
            if mark.label is not None and mark.start == place.opened[-1]:
                used.add(mark.label)
        yield from (label for label in self.tokens.closing if label not in used)

    def _may_open(self, place: Place, at: int) -> bool:
        if place.opened and not self.nested:
            return False
        limit = self.units.limit(at)
        return limit > at and self._can_end((*place.opened, at), at + 1, limit)

    def _may_reach(self, place: Place, at: int) -> bool:
        if not place.opened:
            return True
        limit = self.units.limit(place.at)
        return at <= limit and self._can_end(place.opened, at, limit)

    def _can_end(self, opened: tuple[int, ...], at: int, limit: int) -> bool:
        """Whether all entities can end from `at` to `limit`, inner ones first, where those that begin alike need different labels or places."""
        labels = len(self.tokens.closing)
        if len(opened) > labels:
            for start, group in groupby(reversed(opened)):
                at = max(at, start + 1) + (len(list(group)) - 1) // labels
        return at <= limit
