"""A document -> its named entities, one JSON object a line."""

from __future__ import annotations

import json
from dataclasses import dataclass

from labeltune.config import PromptConfig, TaskName
from labeltune.errors import DataError
from labeltune.prompts.template import Conversation
from labeltune.tasks.base import build_conversation
from labeltune.types import Entity, Example, Prediction


@dataclass(frozen=True)
class NerTask:
    """Flat named-entity recognition over a label set."""

    labels: tuple[str, ...]
    prompt: PromptConfig
    name: TaskName = "ner"

    def conversation(self, example: Example) -> Conversation:
        """The prompt, with the label names between semicolons."""
        listed = "; ".join(self.labels)
        values = {
            "labels": listed,
            "category": repr(list(self.labels)),
            "no_entities": self.prompt.no_entities,
        }
        return build_conversation(self.prompt, example.text, values)

    def target(self, example: Example) -> str:
        """JSON lines in order of appearance, or the sentence that there is none."""
        if example.entities is None:
            raise DataError(
                f"{example.source or 'row ' + example.id}: no entities; write [] for a text without any"
            )
        if not example.entities:
            return self.prompt.no_entities
        ordered = sorted(example.entities, key=lambda e: (e.start or 0, e.end or 0))
        return "\n".join(
            json.dumps({"entity_text": e.text, "entity_label": e.label}, ensure_ascii=False) for e in ordered
        )

    def possible_answers(self, example: Example) -> tuple[str, ...]:
        """None that could be listed."""
        return ()

    def parse(self, example: Example, answer: str) -> Prediction:
        """Entities of all well-formed lines; `parsed` is False when some line is not, or has an unknown label."""
        if answer.strip() == self.prompt.no_entities:
            return Prediction(example.id, answer, entities=())
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


def locate(text: str, found: list[tuple[str, str]]) -> tuple[Entity, ...]:
    """Give each (entity text, label) its place, by order of occurrence.

    Answers stand in order of appearance, so each text is looked for behind the entity before it; one that is not there
    takes its first occurrence that no earlier answer has taken. An entity that occurs less often than it is given has
    no place; its `start` and `end` are None.
    """
    taken: set[tuple[int, int]] = set()
    cursor = 0
    entities = []
    for entity_text, label in found:
        start = text.find(entity_text, cursor)
        if start < 0:
            start = _first_free(text, entity_text, taken)
        if start < 0:
            entities.append(Entity(entity_text, label))
            continue
        cursor = start + len(entity_text)
        taken.add((start, cursor))
        entities.append(Entity(entity_text, label, start, cursor))
    return tuple(entities)


def _first_free(text: str, entity_text: str, taken: set[tuple[int, int]]) -> int:
    start = text.find(entity_text)
    while start >= 0 and any(start < end and begin < start + len(entity_text) for begin, end in taken):
        start = text.find(entity_text, start + 1)
    return start
