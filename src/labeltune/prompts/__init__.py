"""What both kinds of classification and entity extraction have of their own: prompt, target, parsing and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from labeltune.config import EntitiesKind, PromptConfig, TaskName
from labeltune.prompts.classification import ClassificationTask
from labeltune.prompts.multilabel import MultilabelTask
from labeltune.prompts.ner import NerTask
from labeltune.prompts.template import Conversation
from labeltune.types import Example, Prediction


class Task(Protocol):
    """One prompt builder, one target, one parser; used by training, evaluation and serving alike."""

    @property
    def name(self) -> TaskName:
        """`classification`, `multilabel` or `ner`."""

    @property
    def labels(self) -> tuple[str, ...]:
        """The label set."""

    @property
    def prompt(self) -> PromptConfig:
        """The prompt this task was made with."""

    def values(self, labels: Sequence[str]) -> dict[str, str]:
        """What the places of the prompt are filled with for these labels: place -> text."""

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


def make_task(
    name: TaskName, labels: Sequence[str], prompt: PromptConfig, entities: EntitiesKind = "flat"
) -> Task:
    """The task of this name for a label set.

    Args:
        entities: whether entities may lie inside entities.
    """
    if name == "classification":
        return ClassificationTask(tuple(labels), prompt)
    if name == "multilabel":
        return MultilabelTask(tuple(labels), prompt)
    return NerTask(tuple(labels), prompt, entities == "nested")
