"""What may come next in a text that is repeated with marks in it, token by token.

A state holds every way in which the tokens so far can go on: with the text, with a mark, or with a part of a unit behind which a mark must
come. They are left by their next token, so the tokens that may come next are the first ones of all of them. A state is never
without one: an entity is begun, and gone on with, only where it can still end.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, groupby
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


class Piece(NamedTuple):
    """One way to go on from a place.

    Attributes:
        ids: its tokens, or what is left of them.
        kind: text up to the end of its unit, a part of the unit, a blank and the opening mark, a mark, the end of the turn, or all of the answer
            that there is no entity.
        to: where it ends.
        label: of a closing mark.
    """

    ids: tuple[int, ...]
    kind: Literal["text", "part", "blank", "open", "close", "end", "none"]
    to: int
    label: str | None = None


class Pieces:
    """Ways to go on, the text's own first.

    Attributes:
        allowed: their first tokens, each once, in their order.
        by_first: the ways that begin with each.
    """

    def __init__(self, ways: Iterable[Piece]) -> None:
        self.by_first: dict[int, list[Piece]] = {}
        for way in ways:
            self.by_first.setdefault(way.ids[0], []).append(way)
        self.allowed = list(self.by_first)

    def __iter__(self) -> Iterator[Piece]:
        return chain.from_iterable(self.by_first.values())


class Branch(NamedTuple):
    """Ways that began at one place."""

    place: Place
    pieces: Pieces


#: All branches that agree with the tokens so far; usually one.
State = tuple[Branch, ...]


class MarkGrammar:
    """The answers about one shown text.

    Args:
        nested: entities may lie inside entities.
        end: token that ends the turn.
    """

    def __init__(self, tokens: MarkTokens, units: Units, nested: bool, end: int) -> None:
        self.tokens, self.units, self.nested, self.end = tokens, units, nested, end
        self._known: dict[tuple[object, ...], tuple[Pieces, list[Piece]]] = {}

    def start(self) -> State:
        """Before the first token."""
        return tuple(self._branches(Place(0, 0)))

    def allowed(self, state: State) -> list[int]:
        """Tokens that may come next, at least one; the text's own first."""
        if len(state) == 1:
            return state[0].pieces.allowed
        return list(dict.fromkeys(token for branch in state for token in branch.pieces.allowed))

    def after(self, state: State, token: int) -> State:
        """The state behind one of them; empty when the answer is complete, see `ended`."""
        found: list[Branch] = []
        for place, pieces in state:
            ways = pieces.by_first.get(token, [])
            if rest := [way._replace(ids=way.ids[1:]) for way in ways if len(way.ids) > 1]:
                found.append(Branch(place, Pieces(rest)))
            for way in ways:
                if len(way.ids) == 1:
                    found += self._behind(place, way)
        return tuple(found)

    def going_on(self, state: State) -> int | None:
        """The next token of the text alone; None where a mark must come, or the answer ends."""
        way = next(iter(state[0].pieces))
        return way.ids[0] if way.kind == "text" else None

    def ended(self, state: State, token: int) -> tuple[Place, bool] | None:
        """Where the answer is complete with this token, and whether it says that there is no entity; None if it is not."""
        for place, pieces in state:
            for way in pieces.by_first.get(token, []):
                if len(way.ids) == 1 and way.kind in ("end", "none"):
                    return place, way.kind == "none"
        return None

    def _behind(self, place: Place, way: Piece) -> Iterator[Branch]:
        at = way.to
        if way.kind == "text":
            yield from self._branches(Place(place.unit + 1, at, place.opened, place.marks))
        elif way.kind == "part":
            blank = self.tokens.goes_with_mark(self.units, place.unit, place.at, at)
            yield from self._branches(replace(place, at=at, must="close" if blank else "mark"))
        elif way.kind in ("open", "blank"):
            opened, marks = (*place.opened, at), (*place.marks, Mark(at, None, at))
            yield from self._branches(Place(place.unit, at, opened, marks))
        elif way.kind == "close":
            marks = (*place.marks, Mark(at, way.label, place.opened[-1]))
            yield from self._branches(Place(place.unit, at, place.opened[:-1], marks))

    def _branches(self, place: Place) -> Iterator[Branch]:
        """The ways from a place; those from a later one where the tokenizer has no token for what lies between."""
        closable = tuple(self._closable(place))
        # What may come does not follow from where the entities begin, as long as there are labels for all of them.
        deep = len(place.opened) >= len(self.tokens.closing) + (not self.nested)
        opened = place.opened if deep else bool(place.opened)
        key = place.unit, place.at, place.must, bool(place.marks), closable, opened
        if key not in self._known:
            ways = list(self._pieces(place, closable))
            self._known[key] = Pieces(way for way in ways if way.ids), [way for way in ways if not way.ids]
        pieces, without_tokens = self._known[key]
        if pieces.allowed:
            yield Branch(place, pieces)
        for way in without_tokens:
            yield from self._behind(place, way)

    def _pieces(self, place: Place, closable: Sequence[str]) -> Iterator[Piece]:
        text, free = self.units.text, place.must == "nothing"
        inside = place.unit < len(self.units.units)
        end = self.units.units[place.unit].end if inside else len(text)
        if inside and free and self._may_reach(place, end):
            yield Piece(self.tokens.between(self.units, place.unit, place.at, end), "text", end)
        first = place.at == 0 and not place.marks
        if first:
            yield Piece((*self.tokens.none, self.end), "none", 0)
        elif not inside and not place.opened:
            yield Piece((self.end,), "end", place.at)
        if place.must != "close" and self._may_open(place, place.at):
            yield Piece(self.tokens.open, "open", place.at)
        for label in closable:
            yield Piece(self.tokens.closing[label], "close", place.at, label)
        if inside and free:
            yield from self._parts(place, end)

    def _parts(self, place: Place, end: int) -> Iterator[Piece]:
        """Parts of the unit in front of a mark inside it."""
        for cut in range(place.at + 1, end):
            if not self._may_reach(place, cut):
                break
            opens = self._may_open(place, cut)
            blank = self.tokens.goes_with_mark(self.units, place.unit, place.at, cut)
            if blank and opens:
                yield Piece(self.tokens.open_behind_blank, "blank", cut)
            if place.opened or (opens and not blank):
                yield Piece(self.tokens.between(self.units, place.unit, place.at, cut), "part", cut)

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
