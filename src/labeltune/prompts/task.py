"""The protocol both tasks follow."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

from labeltune.config import PromptConfig, TaskName
from labeltune.prompts.template import Conversation
from labeltune.types import Example, Prediction


class Task(Protocol):
    """One prompt builder, one target, one parser; used by training, evaluation and serving alike."""

    @property
    def name(self) -> TaskName:
        """`classification` or `ner`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set."""

    @property
    def prompt(self) -> PromptConfig:
        """The prompt this task was made with."""

    def conversation(self, example: Example) -> Conversation:
        """What the model is asked about this example."""

    def target(self, example: Example) -> str:
        """The right answer as the model should write it.

        Raises:
            DataError: the example has no right answer.
        """

    def possible_answers(self, example: Example) -> tuple[str, ...]:
        """Every right form of an answer when there are finitely many, else nothing."""

    def parse(self, example: Example, answer: str) -> Prediction:
        """Read an answer; never raises, whatever the model wrote."""


#: Between the text and what follows it in a prompt; dropped where that moves to the front.
_SEPARATORS = " \t\r\n,，;；、"
_PLACEHOLDER = re.compile(r"\{(text|category|labels|no_entities)\}")


def fill(pattern: str, values: Mapping[str, str]) -> str:
    """Replace `{name}` for the names in `values`; other braces are left alone, values are not looked into."""
    return _PLACEHOLDER.sub(lambda match: values.get(match.group(1), match.group()), pattern)


def build_conversation(prompt: PromptConfig, text: str, values: Mapping[str, str]) -> Conversation:
    """Fill a prompt; `text` is kept apart from what stands around it."""
    before, _, after = prompt.user.partition("{text}")
    if prompt.layout == "labels_first" and after.strip(_SEPARATORS):
        before, after = f"{after.strip(_SEPARATORS)}\n{before}", ""
    return Conversation(fill(prompt.system, values), fill(before, values), text, fill(after, values))
