"""Extraction that cannot invent: every answer is well-formed, every label known, every entity a piece of the document.

A grammar per row says what may come next (llguidance, https://github.com/guidance-ai/llguidance); the model chooses among
it, greedily. Rows at different places decode side by side, and waiting rows take the places of finished ones. A runner
says how their tokens go through the model: several rows at once in segments, several rows in its own cache, or each row by itself.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import llguidance.hf
import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import fill_next_token_bitmask_par
from numpy.typing import NDArray

from labeltune.errors import ModelError
from labeltune.inference.runners import Runner
from labeltune.models.precision import sent
from labeltune.prompts.ner import BEFORE_LABEL, BEFORE_TEXT, END, escaped, occurrences
from labeltune.types import Entity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Extracted:
    """What was decoded for a document.

    Attributes:
        answer: the answer in the form that training uses, complete lines only.
        scores: for every line, the mean log-probability of the tokens that were chosen in it; tokens that the grammar left
            no choice about do not count.
        truncated: the answer was longer than the limit; the line that did not fit is left out.
    """

    answer: str
    scores: tuple[float, ...]
    truncated: bool


class Grammars:
    """Grammars of entity lines for one tokenizer and label set.

    Args:
        labels: entity types, at least one.
        no_entities: the answer for a text without any.
        vocabulary: size of the output layer.
        lead: in front of every answer, see `ChatTemplate`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        labels: Sequence[str],
        no_entities: str,
        vocabulary: int,
        lead: str = "",
    ) -> None:
        self.labels = tuple(labels)
        self.lead = lead
        self.no_entities = no_entities
        self.vocabulary = vocabulary
        self.tokenizer = llguidance.hf.from_tokenizer(tokenizer, n_vocab=vocabulary)
        self._executor = LLExecutor()

    def matcher(self, pieces: Sequence[str], exhausted: Sequence[str], first: bool) -> Any:
        """What may follow at the beginning of a line of the answer about a document.

        Args:
            pieces: the parts of the document that the prompt holds; an entity lies in one of them.
            exhausted: entity texts that have been given as often as they occur.
            first: at the very beginning the answer may also be that there is no entity.

        Raises:
            ModelError: llguidance refuses the grammar.
        """
        spans = [
            f"SPAN{i}: %regex {json.dumps({'substring_chunks': escape_units(piece)})}"
            for i, piece in enumerate(pieces)
            if piece
        ]
        starts = [*(["none"] if first or not spans else []), *(["line"] if spans else [])]
        lead = f"{_literal(self.lead)} " if first and self.lead else ""
        lines = [f"start: {lead}({' | '.join(starts)})"]
        if "none" in starts:
            lines.append(f"none: {_literal(self.no_entities)}")
        if spans:
            any_span = " | ".join(span.partition(":")[0] for span in spans)
            kept_out = "".join(f" & ~{_literal(escaped(given))}" for given in exhausted)
            lines += [
                f"line: {_literal(BEFORE_TEXT)} TEXT {_literal(BEFORE_LABEL)} LABEL {_literal(END)} /\\n?/",
                *spans,
                f"TEXT: ({any_span}) & /(?s:.+)/{kept_out}",
                f"LABEL: {' | '.join(_literal(escaped(label)) for label in self.labels)}",
            ]
        grammar = LLMatcher.grammar_from_lark("\n".join(lines))
        found = LLMatcher(self.tokenizer, grammar, log_level=0)
        if found.is_error():
            raise ModelError(f"the extraction grammar was refused: {found.get_error()}")
        return found

    def allowed(self, rows: Sequence[_Row], end_ids: Sequence[int]) -> NDArray[np.int32]:
        """The tokens that may come next in each row, one bit a token, shape [rows, words of 32 bits].

        Raises:
            ModelError: there is none.
        """
        bits = np.zeros((len(rows), -(-self.vocabulary // 32)), dtype=np.int32)
        fill_next_token_bitmask_par(self._executor, [(row.matcher, at) for at, row in enumerate(rows)], bits)
        octets = bits.view(np.uint8)
        octets[:, -(-self.vocabulary // 8) :] = 0
        if self.vocabulary % 8:
            octets[:, self.vocabulary // 8] &= (1 << self.vocabulary % 8) - 1
        # The end of turn is ours to allow: the grammar's own end is that of one line.
        for token in {*end_ids, self.tokenizer.eos_token}:
            if token < self.vocabulary:
                octets[:, token // 8] &= 255 - (1 << token % 8)
        end = end_ids[0]
        octets[[at for at, row in enumerate(rows) if _may_end(row)], end // 8] |= 1 << end % 8
        for row, own in zip(rows, bits, strict=True):
            if not own.any():
                raise ModelError(f"the extraction grammar allows no token: {row.matcher.get_error()}")
        return bits


def escape_units(text: str) -> list[str]:
    """The document as it stands in JSON, one character or one whole escape a unit, so that no cut falls into an escape."""
    return [escaped(character) for character in text]


def _literal(text: str) -> str:
    """A Lark string."""
    return json.dumps(text, ensure_ascii=True)


@dataclass
class _Row:
    """A document that is being decoded; `ids` and `chosen` belong to the line in progress, `left` counts tokens."""

    number: int
    pieces: tuple[str, ...]
    matcher: Any
    state: Any
    pending: list[int]
    left: int
    lines: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    given: Counter[str] = field(default_factory=Counter)
    ids: list[int] = field(default_factory=list)
    chosen: list[float] = field(default_factory=list)


def extract(
    runner: Runner,
    grammars: Grammars,
    end_ids: Sequence[int],
    prompts: Sequence[tuple[Sequence[int], tuple[str, ...]]],
    *,
    max_new_tokens: int,
    batch_size: int,
) -> list[Extracted]:
    """Answers in the order of the prompts.

    Args:
        end_ids: tokens that end a turn.
        prompts: token ids, and the parts of the document that they hold.
        max_new_tokens: longest answer in tokens, its end of turn not counted.
        batch_size: documents decoded side by side.
    """
    found: dict[int, Extracted] = {}
    waiting = sorted(range(len(prompts)), key=lambda i: len(prompts[i][0]), reverse=True)
    active: list[_Row] = []
    with runner.session([ids for ids, _ in prompts]) as session:
        while waiting or active:
            while waiting and len(active) < batch_size:
                number = waiting.pop(0)
                ids, pieces = prompts[number]
                state, pending = session.start(ids, max_new_tokens)
                matcher = grammars.matcher(pieces, (), first=True)
                active.append(_Row(number, pieces, matcher, state, pending, max_new_tokens))
            logits = session.advance([(row.state, row.pending) for row in active])
            # A device that is still computing them goes on meanwhile.
            tokens, scores = choose(logits, grammars.allowed(active, end_ids))
            still = []
            for row, token, score in zip(active, tokens, scores, strict=True):
                done = _step(row, token, score, grammars, end_ids)
                if done is None:
                    still.append(row)
                else:
                    found[row.number] = done
                    session.end(row.state)
            active = still
    return [found[i] for i in range(len(prompts))]


def choose(logits: torch.Tensor, allowed: NDArray[np.int32]) -> tuple[list[int], list[float]]:
    """The most probable of the allowed tokens of each row, and its log-probability among all tokens.

    Args:
        logits: shape [rows, vocabulary].
        allowed: as of `Grammars.allowed`.
    """
    words, values = sent(torch.from_numpy(allowed), logits.device), logits.float()
    bits = words[:, :, None] >> torch.arange(32, dtype=torch.int32, device=logits.device)
    hidden = (bits & 1 == 0).flatten(1)[:, : values.shape[1]]
    best = values.masked_fill(hidden, -math.inf).max(-1)
    scores = best.values - values.logsumexp(-1)
    # The only place of a step that waits for the device; fp32 holds every number up to 16 million.
    numbers, logs = torch.stack([best.indices.float(), scores]).tolist()
    return [int(number) for number in numbers], logs


def _step(
    row: _Row, token: int, score: float, grammars: Grammars, end_ids: Sequence[int]
) -> Extracted | None:
    """Take the chosen token and what the grammar then forces; the answer when it is complete."""
    if token == end_ids[0] and _may_end(row):
        _close_line(row, grammars)
        return _finish(row, truncated=False)
    if row.left <= 0:
        return _finish(row, truncated=True)
    row.chosen.append(score)
    row.pending = list(_with_forced(row, token))
    row.ids += row.pending
    row.left -= len(row.pending)
    if grammars.tokenizer.decode_bytes(row.ids).endswith(b"\n"):
        _close_line(row, grammars)
        exhausted = [text for text, count in row.given.items() if count >= occurrences(row.pieces, text)]
        if nothing_left(row.pieces, exhausted):
            return _finish(row, truncated=False)
        row.matcher = grammars.matcher(row.pieces, exhausted, first=False)
    return None


def _with_forced(row: _Row, token: int) -> Iterator[int]:
    if not row.matcher.consume_token(token):
        raise ModelError(f"the extraction grammar failed: {row.matcher.get_error()}")
    yield token
    forced = row.matcher.compute_ff_tokens()
    if forced and row.matcher.consume_tokens(forced):
        yield from forced


def _may_end(row: _Row) -> bool:
    """At the end of a line; behind the newline a further line must come."""
    return bool(row.ids) and bool(row.matcher.is_accepting())


def _close_line(row: _Row, grammars: Grammars) -> None:
    line = grammars.tokenizer.decode_str(row.ids).rstrip("\n")
    if not row.lines:
        line = line.removeprefix(grammars.lead)
    row.lines.append(line)
    row.scores.append(sum(row.chosen) / len(row.chosen) if row.chosen else 0.0)
    if line != grammars.no_entities:
        row.given[json.loads(line)["entity_text"]] += 1
    row.ids, row.chosen = [], []


def _finish(row: _Row, truncated: bool) -> Extracted:
    return Extracted("\n".join(row.lines), tuple(row.scores), truncated)


def nothing_left(pieces: Sequence[str], exhausted: Sequence[str]) -> bool:
    """Whether every part of a (very short) document has been given as often as it occurs."""
    if len(exhausted) < max(map(len, pieces), default=0):
        return False
    parts = {
        piece[start:end]
        for piece in pieces
        for start in range(len(piece))
        for end in range(start + 1, len(piece) + 1)
    }
    return parts <= set(exhausted)


def _score(entity: Entity) -> float:
    return -math.inf if entity.score is None else entity.score


def merge_entities(windows: Sequence[Sequence[Entity]]) -> tuple[Entity, ...]:
    """Entities of overlapping windows: the same place counts once, with the label and score of the surer window."""
    best: dict[tuple[int | None, int | None], Entity] = {}
    for entity in (entity for window in windows for entity in window):
        place = entity.start, entity.end
        held = best.get(place)
        if held is None or _score(entity) > _score(held):
            best[place] = entity
    return tuple(sorted(best.values(), key=lambda e: (e.start or 0, e.end or 0)))


def without_crossing(windows: Sequence[Sequence[Entity]], nested: bool) -> tuple[Entity, ...]:
    """Entities of overlapping windows, as of `merge_entities`, but for those that cross a surer one, or if not `nested` overlap it.

    A nested one may share its place with others of other labels.
    """
    if not nested:
        merged = merge_entities(windows)
    else:
        best: dict[tuple[int | None, int | None, str], Entity] = {}
        for entity in (entity for window in windows for entity in window):
            held = best.get((entity.start, entity.end, entity.label))
            if held is None or _score(entity) > _score(held):
                best[entity.start, entity.end, entity.label] = entity
        merged = tuple(best.values())
    kept: list[Entity] = []
    for entity in sorted(merged, key=_score, reverse=True):
        if not any(_in_the_way(entity, other, nested) for other in kept):
            kept.append(entity)
    return tuple(sorted(kept, key=lambda e: (e.start or 0, e.end or 0)))


def _in_the_way(entity: Entity, other: Entity, nested: bool) -> bool:
    a, b, c, d = entity.start or 0, entity.end or 0, other.start or 0, other.end or 0
    overlap = a < d and c < b
    return overlap and not (nested and ((a <= c and d <= b) or (c <= a and b <= d)))
