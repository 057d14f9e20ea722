"""A document and its candidate labels -> one of them."""

from __future__ import annotations

from dataclasses import dataclass

from labeltune.config import PromptConfig, TaskName
from labeltune.errors import DataError
from labeltune.prompts.template import Conversation
from labeltune.tasks.base import build_conversation
from labeltune.types import Example, Prediction

_WRAPPERS = " \t\r\n'\"“”‘’「」[]()（）.,。，:：;；*`"


@dataclass(frozen=True)
class ClassificationTask:
    """Single-label classification; rows without candidates choose from the whole label set."""

    labels: tuple[str, ...]
    prompt: PromptConfig
    name: TaskName = "classification"

    def candidates(self, example: Example) -> tuple[str, ...]:
        """The labels this example chooses from.

        Raises:
            DataError: neither the row nor the task has any.
        """
        found = example.candidates or self.labels
        if not found:
            raise DataError(
                f"{example.source or 'row ' + example.id}: no candidate labels, and no label set is known"
            )
        return found

    def conversation(self, example: Example) -> Conversation:
        """The prompt, with the candidates written as Python writes a list of strings."""
        candidates = self.candidates(example)
        values = {"category": repr(list(candidates)), "labels": "; ".join(candidates)}
        return build_conversation(self.prompt, example.text, values)

    def target(self, example: Example) -> str:
        """The label itself."""
        if example.label is None:
            raise DataError(f"{example.source or 'row ' + example.id}: no label")
        return example.label

    def possible_answers(self, example: Example) -> tuple[str, ...]:
        """The candidates."""
        return self.candidates(example)

    def parse(self, example: Example, answer: str) -> Prediction:
        """The candidate that the answer is, letter case, quotes and closing punctuation aside; else None."""
        candidates = self.candidates(example)
        if answer in candidates:
            return Prediction(example.id, answer, label=answer)
        bare = answer.strip(_WRAPPERS).casefold()
        found = [label for label in candidates if label.strip(_WRAPPERS).casefold() == bare]
        if bare and len(found) == 1:
            return Prediction(example.id, answer, label=found[0])
        return Prediction(example.id, answer, parsed=False)
