"""A document and its candidate labels -> one of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labeltune.config import PromptConfig, TaskName
from labeltune.errors import DataError
from labeltune.prompts.descriptions import listed
from labeltune.prompts.labels import candidates_of
from labeltune.prompts.template import Conversation, build_conversation
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
            DataError: neither the row nor the task has any; one is empty, or two cannot be told apart.
        """
        return candidates_of(example, self.labels)

    def values(self, labels: Sequence[str]) -> dict[str, str]:
        """The candidates, as `listed` writes them."""
        return listed(labels, self.prompt.descriptions)

    def conversation(self, example: Example) -> Conversation:
        """The prompt, with the candidates in it."""
        return build_conversation(self.prompt, example.text, self.values(self.candidates(example)))

    def target(self, example: Example) -> str:
        """The label itself."""
        if example.label is None:
            raise DataError(f"{example.where}: no label")
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
