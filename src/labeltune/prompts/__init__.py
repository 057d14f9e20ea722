"""What classification and entity extraction have of their own: prompt, target, parsing and scoring."""

from __future__ import annotations

from collections.abc import Sequence

from labeltune.config import PromptConfig, TaskName
from labeltune.prompts.classification import ClassificationTask
from labeltune.prompts.ner import NerTask
from labeltune.prompts.task import Task


def make_task(name: TaskName, labels: Sequence[str], prompt: PromptConfig) -> Task:
    """The task of this name for a label set."""
    if name == "classification":
        return ClassificationTask(tuple(labels), prompt)
    return NerTask(tuple(labels), prompt)
