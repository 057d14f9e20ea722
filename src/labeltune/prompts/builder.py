"""The one prompt builder: training, evaluation and serving all ask it for token ids."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from labeltune.errors import PromptError
from labeltune.prompts.task import Task
from labeltune.prompts.template import ChatTemplate, Encoded
from labeltune.prompts.truncation import ELLIPSIS, Side, encode_to_fit, needed_tokens
from labeltune.types import Example

#: Answers whose tokens are kept; a server is asked about labels without end.
KEPT_ANSWERS = 10_000


@dataclass(frozen=True)
class View:
    """A prompt, and which parts of the document it holds.

    Attributes:
        ids: token ids.
        parts: (start, end) in characters of the document, in order.
    """

    ids: list[int]
    parts: tuple[tuple[int, int], ...]


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
        self._answers: dict[str, list[int]] = {}

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

    def views(self, example: Example, long_text: Literal["truncate", "window"] = "truncate") -> list[View]:
        """The prompts that read a document: one, or with `window` as many overlapping ones as it takes.

        A window begins at three quarters of the one before it.

        Raises:
            PromptError: instruction and candidates leave no room for the text.
        """
        encoded = self.prompt(example)
        if long_text == "truncate" or encoded.text.strip() == example.text.strip():
            return [View(encoded.ids, kept_parts(example.text, encoded.text, self.task.prompt.truncation))]
        found, start = [], 0
        while True:
            encoded = self._encode(replace(example, text=example.text[start:]), None, side="head")
            begin = example.text.find(encoded.text, start)
            end = begin + len(encoded.text)
            found.append(View(encoded.ids, ((begin, end),)))
            if not example.text[end:].strip():
                return found
            if end <= start + 1:
                raise PromptError(
                    f"{example.where}: instruction and candidates leave no room for the text within "
                    f"prompt.max_length={self.task.prompt.max_length}; raise it"
                )
            start = max(start + 1, end - (end - start) // 4)

    def least(self, example: Example) -> int:
        """Tokens of instruction, candidates, right answer and template, with nothing of the text.

        Raises:
            DataError: the example has no right answer.
        """
        conversation = self.task.conversation(example).with_text("")
        encoded = self.template.encode(conversation, self.task.target(example))
        return needed_tokens(encoded, self.reserve(example))

    def answer_ids(self, example: Example, answer: str) -> list[int]:
        """Token ids of an answer with its end of turn, as training has them; they do not depend on the text."""
        if answer not in self._answers:
            conversation = self.task.conversation(example).with_text("")
            encoded = self.template.encode(conversation, answer)
            if len(self._answers) >= KEPT_ANSWERS:
                self._answers.clear()
            self._answers[answer] = encoded.ids[slice(*encoded.answer_span)]
        return self._answers[answer]

    def reserve(self, example: Example) -> int:
        """Tokens of the longest possible answer with its end of turn; 0 when answers cannot be listed."""
        return max((self._answer_length(answer) for answer in self.task.possible_answers(example)), default=0)

    def _answer_length(self, answer: str) -> int:
        if answer not in self._lengths:
            alone = self.template.plain_ids(answer)
            if len(self._lengths) >= KEPT_ANSWERS:
                self._lengths.clear()
            self._lengths[answer] = len(alone) + self.template.closing_length
        return self._lengths[answer]

    def _encode(self, example: Example, answer: str | None, side: Side | None = None) -> Encoded:
        prompt = self.task.prompt
        return encode_to_fit(
            self.template,
            self.task.conversation(example),
            answer,
            prompt.max_length,
            side or prompt.truncation,
            where=example.where,
            reserve=self.reserve(example),
        )


def kept_parts(text: str, kept: str, side: Side) -> tuple[tuple[int, int], ...]:
    """Where a shortened text stands in the document, as (start, end) in characters."""
    start = text.rfind(kept) if side == "tail" else text.find(kept)
    if start >= 0:
        return ((start, start + len(kept)),) if kept else ()
    for at, character in enumerate(kept):
        head, tail = kept[:at], kept[at + 1 :]
        begin = text.find(head)
        if character == ELLIPSIS and begin >= 0 and text.rstrip().endswith(tail.rstrip()):
            end = text.rfind(tail)
            parts = ((begin, begin + len(head)), (end, end + len(tail)))
            return tuple(part for part in parts if part[0] < part[1])
    raise AssertionError("a shortened text is not a part of its document")
