"""The one prompt builder: training, evaluation and serving all ask it for token ids."""

from __future__ import annotations

from labeltune.prompts.template import ChatTemplate, Encoded
from labeltune.prompts.truncation import encode_to_fit
from labeltune.tasks.base import Task
from labeltune.types import Example


class PromptBuilder:
    """Examples -> token ids within `prompt.max_length`.

    A classification prompt always leaves room for the longest candidate, so a row's prompt is the same in training
    and prediction, token for token, also when its text is shortened. A NER prompt is shortened for the row's own
    answer in training, and only for itself in prediction, where the answer is not known.
    """

    def __init__(self, task: Task, template: ChatTemplate) -> None:
        self.task = task
        self.template = template
        self._lengths: dict[str, int] = {}

    def prompt(self, example: Example) -> Encoded:
        """The prompt alone.

        Raises:
            PromptError: instruction and candidates alone do not fit.
        """
        return self._encode(example, None)

    def training(self, example: Example) -> Encoded:
        """Prompt, right answer and end of turn.

        Raises:
            DataError: the example has no right answer.
            PromptError: instruction, candidates and answer alone do not fit.
        """
        return self._encode(example, self.task.target(example))

    def reserve(self, example: Example) -> int:
        """Tokens of the longest possible answer with its end of turn; 0 when answers cannot be listed."""
        return max((self._answer_length(answer) for answer in self.task.possible_answers(example)), default=0)

    def _answer_length(self, answer: str) -> int:
        if answer not in self._lengths:
            alone = self.template.tokenizer(
                answer, add_special_tokens=False, split_special_tokens=True
            ).input_ids
            self._lengths[answer] = len(alone) + self.template.closing_length
        return self._lengths[answer]

    def _encode(self, example: Example, answer: str | None) -> Encoded:
        prompt = self.task.prompt
        return encode_to_fit(
            self.template,
            self.task.conversation(example),
            answer,
            prompt.max_length,
            prompt.truncation,
            where=example.source or f"row {example.id}",
            reserve=self.reserve(example),
        )
