"""Entities as marks in a text that the model repeats: greedy decoding under the grammar, many tokens a pass.

Nearly every token is forced or the text's own next one. So the text is read ahead as if no more mark came; the first place
where something else is likelier is where greedy decoding would have left the text. What was read behind it is dropped, and
the mark is placed. The result is that of token by token, in as many passes as there are marks and stretches of text between them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from labeltune.inference.mark_grammar import MarkGrammar, Place, State
from labeltune.inference.runners import Reading, Runner
from labeltune.prompts.marked_copy import MarkTokens, Shown
from labeltune.prompts.marks import Mark
from labeltune.types import Entity


@dataclass(frozen=True)
class Question:
    """A prompt and what it shows of its document."""

    ids: Sequence[int]
    shown: Shown


@dataclass(frozen=True)
class Marked:
    """What was decoded for a prompt.

    Attributes:
        entities: with places in the shown text, in their order; `score` is the log-probability of all tokens that the entity's marks
            have and the grammar left a choice about.
        none: the answer is the sentence that there is no entity.
        truncated: the marks were more than the limit; what had not ended is left out.
        begins: place in the shown text -> probability that an entity begins there, of every place where decoding could begin one
            at once and did look.
        passes: how often the model was asked.
    """

    entities: tuple[Entity, ...]
    none: bool
    truncated: bool
    begins: dict[int, float]
    passes: int

    @property
    def certainty(self) -> float:
        """Probability of the least sure entity, or that none begins where one nearly did."""
        begun = {entity.start for entity in self.entities}
        nearly = [1 - p for place, p in self.begins.items() if place not in begun]
        return min([*nearly, *(math.exp(e.score) for e in self.entities if e.score is not None)], default=1.0)


@dataclass
class _Decision:
    """A place where the grammar leaves a choice: behind which token of what is fed, among which tokens, in which state."""

    at: int
    tokens: list[int]
    state: State


@dataclass
class _Row:
    """An answer in progress; `pending` has been decided on and not been fed, `left` counts tokens, `full` says that more were wanted."""

    number: int
    grammar: MarkGrammar
    shown: Shown
    held: Any
    pending: list[int]
    state: State
    left: int
    written: list[tuple[int, float | None]] = field(default_factory=list)
    begins: dict[int, float] = field(default_factory=dict)
    passes: int = 0
    fed: list[int] = field(default_factory=list)
    decisions: list[_Decision] = field(default_factory=list)
    last: tuple[Place, bool] | None = None
    full: bool = False


def extract_marked(
    runner: Runner,
    tokens: MarkTokens,
    questions: Sequence[Question],
    *,
    nested: bool,
    end: int,
    max_new_tokens: int,
    batch_size: int,
) -> list[Marked]:
    """Answers in the order of the questions.

    Args:
        nested: entities may lie inside entities.
        end: token that ends a turn.
        max_new_tokens: most tokens of marks; the text's own do not count.
        batch_size: documents decoded side by side.
    """
    found: dict[int, Marked] = {}
    waiting = sorted(range(len(questions)), key=lambda i: len(questions[i].ids), reverse=True)
    active: list[_Row] = []
    grammars = {
        number: MarkGrammar(tokens, tokens.units(question.shown), nested, end)
        for number, question in enumerate(questions)
    }
    room = max((grammar.units.length for grammar in grammars.values()), default=0) + max_new_tokens
    with runner.session([question.ids for question in questions]) as session:
        while waiting or active:
            while waiting and len(active) < batch_size:
                number = waiting.pop(0)
                grammar = grammars[number]
                held, pending = session.start(questions[number].ids, room + len(tokens.none))
                left = max(grammar.units.length, len(tokens.none)) + max_new_tokens
                shown = questions[number].shown
                row = _Row(number, grammar, shown, held, pending, grammar.start(), left)
                _read_ahead(row, runner.lookahead)
                active.append(row)
            readings = [
                Reading(row.held, row.fed, len(row.pending), [(d.at, d.tokens) for d in row.decisions])
                for row in active
            ]
            for row, logs in zip(active, session.read(readings), strict=True):
                session.drop(row.held, _decide(row, logs))
                _read_ahead(row, runner.lookahead)
                if row.last is not None or row.full:
                    found[row.number] = _finish(row)
                    session.end(row.held)
            active = [row for row in active if row.number not in found]
    return [found[i] for i in range(len(questions))]


def _read_ahead(row: _Row, lookahead: int) -> None:
    """What is fed next: what has been decided on, and behind it what the grammar forces and the text's own tokens.

    Where the grammar forces all the rest, the answer is complete and nothing is fed.
    """
    row.fed, row.decisions = list(row.pending), []
    state = row.state
    while not (row.full or row.last):
        tokens = row.grammar.allowed(state)
        token: int | None = tokens[0]
        if len(tokens) > 1:
            row.decisions.append(_Decision(len(row.fed) - 1, tokens, state))
            token = row.grammar.going_on(state) if len(row.decisions) <= lookahead else None
        if token is None:
            return
        if row.grammar.ended(state, token) is not None:
            if not row.decisions:
                _take(row, len(row.pending), len(row.fed))
                _write(row, token, None)
            return
        row.fed.append(token)
        state = row.grammar.after(state, token)


def _decide(row: _Row, logs: Sequence[Sequence[float]]) -> int:
    """Take the most probable token of each decision, up to the first that is not the one that was fed behind it.

    Returns:
        How many of the tokens that were fed are not part of the answer.
    """
    row.passes += 1
    taken = len(row.pending)
    for decision, values in zip(row.decisions, logs, strict=True):
        _take(row, taken, decision.at + 1)
        taken = decision.at + 1
        for place, probability in _beginnings(row, decision, values):
            row.begins[place] = max(probability, row.begins.get(place, 0.0))
        best = max(range(len(values)), key=values.__getitem__)
        token = decision.tokens[best]
        _write(row, token, values[best])
        if row.fed[taken : taken + 1] != [token]:
            row.pending = [token]
            return len(row.fed) - taken
        taken += 1
    # What is left is forced, and the end of the turn behind it.
    _take(row, taken, len(row.fed))
    _write(row, row.grammar.allowed(row.state)[0], None)
    return 0


def _take(row: _Row, start: int, end: int) -> None:
    """Forced tokens of what was fed."""
    for token in row.fed[start:end]:
        _write(row, token, None)


def _write(row: _Row, token: int, log: float | None) -> None:
    """One token more of the answer, with its log-probability if there was a choice; nothing once the answer is full."""
    last = None if row.full else row.grammar.ended(row.state, token)
    if last is not None:
        row.last = last
    elif row.left <= 0:
        row.full = True
    else:
        row.written.append((token, log))
        row.left -= 1
        row.state = row.grammar.after(row.state, token)


def _beginnings(row: _Row, decision: _Decision, logs: Sequence[float]) -> Iterator[tuple[int, float]]:
    """(place in the shown text, probability) of the entities that may begin with the next token."""
    known = dict(zip(decision.tokens, logs, strict=True))
    tokens = row.grammar.tokens
    for way in chain.from_iterable(branch.pieces for branch in decision.state):
        if way.kind in ("open", "blank") and way.ids in (tokens.open, tokens.open_behind_blank):
            yield way.to - row.grammar.units.lead, math.exp(known[way.ids[0]])


def _finish(row: _Row) -> Marked:
    """The answer; of one that is too long, the entities that have ended."""
    place, none = row.last or (row.state[0].place, False)
    return Marked(_entities(row, place.marks), none, row.last is None, row.begins, row.passes)


def _entities(row: _Row, marks: Sequence[Mark]) -> tuple[Entity, ...]:
    """The entities of the marks, each with the sum of its decisions' log-probabilities."""
    units, text = row.grammar.units, row.shown.text
    sums = [0.0] * len(marks)
    logs = iter(log for _, log in row.written)
    for ids, owner in row.grammar.tokens.path(units, marks):
        for _, log in zip(ids, logs, strict=False):
            if owner is not None and log is not None:
                sums[owner] += log
    found, opened = [], []
    for number, mark in enumerate(marks):
        if mark.label is None:
            opened.append(number)
        else:
            start, end = mark.start - units.lead, mark.at - units.lead
            found.append(Entity(text[start:end], mark.label, start, end, sums[opened.pop()] + sums[number]))
    return tuple(sorted(found, key=lambda entity: (entity.start or 0, entity.end or 0)))
