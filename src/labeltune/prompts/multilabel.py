"""A document and its candidate labels -> those that apply, each decided by itself behind the same prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from labeltune.config import PromptConfig, TaskName
from labeltune.errors import DataError
from labeltune.prompts.descriptions import listed
from labeltune.prompts.labels import candidates_of
from labeltune.prompts.template import Conversation, build_conversation
from labeltune.types import Example, Prediction

#: What may stand around the words of `prompt.positive` and `prompt.negative`.
_AROUND = " \t\r\n:：,，.。"


@dataclass(frozen=True)
class MultilabelTask:
    """Any number of labels a row. An answer is one label with what says whether it applies; there are two for every candidate."""

    labels: tuple[str, ...]
    prompt: PromptConfig
    name: TaskName = "multilabel"

    def candidates(self, example: Example) -> tuple[str, ...]:
        """The labels that are decided for this example.

        Raises:
            DataError: neither the row nor the task has any; one is empty, or two cannot be told apart.
        """
        return candidates_of(example, self.labels)

    def values(self, labels: Sequence[str]) -> dict[str, str]:
        """The candidates, as of classification, and the words for what applies and what does not."""
        words = {
            "positive": self.prompt.positive.strip(_AROUND),
            "negative": self.prompt.negative.strip(_AROUND),
        }
        return {**listed(labels, self.prompt.descriptions), **words}

    def conversation(self, example: Example) -> Conversation:
        """The prompt, which all labels of the example share."""
        return build_conversation(self.prompt, example.text, self.values(self.candidates(example)))

    def target(self, example: Example) -> str:
        """The labels that apply, one a line."""
        return "\n".join(self.right_labels(example))

    def right_labels(self, example: Example) -> tuple[str, ...]:
        """The labels that apply.

        Raises:
            DataError: they are not known.
        """
        if example.labels is None:
            raise DataError(f"{example.where}: no labels; write [] for a text to which none applies")
        return example.labels

    def answers_about(self, label: str) -> tuple[str, str]:
        """What is answered where the label applies, and where it does not."""
        return f"{label}{self.prompt.positive}", f"{label}{self.prompt.negative}"

    def possible_answers(self, example: Example) -> tuple[str, ...]:
        """Both about every candidate."""
        return tuple(answer for label in self.candidates(example) for answer in self.answers_about(label))

    def parse(self, example: Example, answer: str) -> Prediction:
        """The candidates that stand in lines of their own, as `target` writes them; other lines leave `parsed` False."""
        lines = [line.strip() for line in answer.splitlines() if line.strip()]
        candidates = self.candidates(example)
        given = tuple(label for label in candidates if label.strip() in lines)
        return Prediction(example.id, answer, labels=given, parsed=len(given) == len(set(lines)))
