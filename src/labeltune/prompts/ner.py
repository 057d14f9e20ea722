"""A document -> its named entities, one JSON object a line, or the document again with marks around them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from labeltune.config import PromptConfig, TaskName
from labeltune.errors import DataError
from labeltune.prompts.descriptions import listed
from labeltune.prompts.marks import places, read, write
from labeltune.prompts.template import ELLIPSIS, Conversation, build_conversation
from labeltune.types import Entity, Example, Prediction

#: The parts of an answer's line around an entity's text and its label, both as they stand in JSON.
BEFORE_TEXT, BEFORE_LABEL, END = '{"entity_text": "', '", "entity_label": "', '"}'


def escaped(text: str) -> str:
    """As it stands in the answer's JSON, without the quotes around it."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


@dataclass(frozen=True)
class NerTask:
    """Named-entity recognition over a label set.

    Attributes:
        nested: entities may lie inside entities.
    """

    labels: tuple[str, ...]
    prompt: PromptConfig
    nested: bool = False
    name: TaskName = "ner"

    @property
    def marked(self) -> bool:
        """Whether answers are marks in the text."""
        return self.prompt.answer == "marks"

    def values(self, labels: Sequence[str]) -> dict[str, str]:
        """The label names, as `listed` writes them, and the sentence that there is no entity."""
        return {**listed(labels, self.prompt.descriptions), "no_entities": self.prompt.no_entities}

    def conversation(self, example: Example) -> Conversation:
        """The prompt, with the label names in it."""
        return build_conversation(self.prompt, example.text, self.values(self.labels))

    def target(self, example: Example) -> str:
        """JSON lines in order of appearance, or the text with marks; where there is no entity, the sentence that says so."""
        if example.entities is None:
            raise DataError(f"{example.where}: no entities; write [] for a text without any")
        if not example.entities:
            return self.prompt.no_entities
        if self.marked:
            try:
                return write(example.text, example.entities)
            except DataError as error:
                raise DataError(f"{example.where}: {error}") from None
        ordered = sorted(example.entities, key=lambda e: (e.start or 0, e.end or 0))
        return "\n".join(
            f"{BEFORE_TEXT}{escaped(e.text)}{BEFORE_LABEL}{escaped(e.label)}{END}" for e in ordered
        )

    def possible_answers(self, example: Example) -> tuple[str, ...]:
        """None that could be listed."""
        return ()

    def parse(self, example: Example, answer: str) -> Prediction:
        """Entities of all well-formed lines or marks; `parsed` is False when some are not, or have an unknown label."""
        if answer.strip() == self.prompt.no_entities:
            return Prediction(example.id, answer, entities=())
        if self.marked:
            return self._parse_marks(example, answer)
        found: list[tuple[str, str]] = []
        lines = [line for line in answer.split("\n") if line.strip()]
        parsed = bool(lines)
        for line in lines:
            pair = self._parse_line(line)
            if pair is None:
                parsed = False
            else:
                found.append(pair)
        return Prediction(example.id, answer, entities=locate(example.text, found), parsed=parsed)

    def _parse_marks(self, example: Example, answer: str) -> Prediction:
        """Entities where the copy around them agrees with the text; elsewhere they have no place."""
        copy = read(answer)
        found = places(copy.text, example.text)
        spans = [
            span for span in copy.spans if span[2] in self.labels and copy.text[span[0] : span[1]].strip()
        ]
        kept = spans if self.nested else [span for span in spans if not any(_holds(o, span) for o in spans)]
        entities = [_placed(example.text, copy.text[a:b], label, found[a:b]) for a, b, label in kept]
        parsed = (
            copy.well_formed and len(kept) == len(copy.spans) and all(e.start is not None for e in entities)
        )
        entities.sort(key=lambda e: (e.start or 0, e.end or 0))
        whole = all(
            at is not None or c.isspace() or c == ELLIPSIS for c, at in zip(copy.text, found, strict=True)
        )
        return Prediction(
            example.id, answer, entities=tuple(entities), parsed=parsed and whole and bool(found)
        )

    def pairs(self, answer: str) -> list[tuple[str, str]]:
        """(entity text, label) of an answer that is known to be right in form."""
        if answer in ("", self.prompt.no_entities):
            return []
        found = [self._parse_line(line) for line in answer.split("\n")]
        return [pair for pair in found if pair is not None]

    def _parse_line(self, line: str) -> tuple[str, str] | None:
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            return None
        if not isinstance(value, dict):
            return None
        text, label = value.get("entity_text"), value.get("entity_label")
        if not isinstance(text, str) or not text or label not in self.labels:
            return None
        return text, label


def _holds(outer: tuple[int, int, str], inner: tuple[int, int, str]) -> bool:
    """Whether an entity lies inside another one, of which it is no part itself."""
    return outer[0] <= inner[0] and inner[1] <= outer[1] and outer[:2] != inner[:2]


def _placed(text: str, copied: str, label: str, places: Sequence[int | None]) -> Entity:
    """An entity of a copy where the text has it: from its first to its last character that is no blank."""
    known = [at for at, c in zip(places, copied, strict=True) if at is not None and not c.isspace()]
    found = text[known[0] : known[-1] + 1] if known else ""
    if "".join(found.split()) != "".join(copied.split()):
        return Entity(copied, label)
    return Entity(found, label, known[0], known[-1] + 1)


def locate(
    text: str,
    found: list[tuple[str, str]],
    parts: Sequence[tuple[int, int]] = (),
    scores: Sequence[float | None] = (),
) -> tuple[Entity, ...]:
    """Give each (entity text, label) its place, by order of occurrence.

    Answers stand in order of appearance, so each text is looked for behind the entity before it; one that is not there
    takes its first place that no other entity overlaps, else its first place that it has not been given yet (an entity
    inside another one). An entity that is given more often than it occurs (`str.count`) has no place; its `start` and
    `end` are None.

    Args:
        parts: where to look, as (start, end) in characters; the whole text when empty.
        scores: one for each entity, to be kept with it.
    """
    parts = parts or ((0, len(text)),)
    taken: set[tuple[int, int]] = set()
    given: Counter[str] = Counter()
    cursor = 0
    entities = []
    for number, (entity_text, label) in enumerate(found):
        score = scores[number] if number < len(scores) else None
        size = len(entity_text)
        places = [at for part in parts for at in _places(text, entity_text, part)]
        free = [at for at in places if not any(at < end and begin < at + size for begin, end in taken)]
        left = [at for at in places if (at, at + size) not in taken]
        choices = [*(at for at in free if at >= cursor), *free, *left]
        given[entity_text] += 1
        if given[entity_text] > occurrences([text[start:end] for start, end in parts], entity_text):
            entities.append(Entity(entity_text, label, score=score))
            continue
        start = choices[0]
        cursor = start + size
        taken.add((start, cursor))
        entities.append(Entity(entity_text, label, start, cursor, score))
    return tuple(entities)


def occurrences(pieces: Sequence[str], part: str) -> int:
    """How often `part` stands in the pieces, as `str.count` counts: an entity may be given so often."""
    return sum(piece.count(part) for piece in pieces)


def _places(text: str, entity_text: str, part: tuple[int, int]) -> Iterator[int]:
    """Where it begins inside a part, overlapping ones included."""
    at = text.find(entity_text, *part)
    while at >= 0:
        yield at
        at = text.find(entity_text, at + 1, part[1])
