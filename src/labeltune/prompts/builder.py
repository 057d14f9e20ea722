"""The one prompt builder: training, evaluation and serving all ask it for token ids."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from operator import ne
from typing import TYPE_CHECKING, Literal

from labeltune.config import RunConfig
from labeltune.errors import PromptError
from labeltune.prompts import Task, make_task
from labeltune.prompts.marked_copy import MarkTokens, Shown
from labeltune.prompts.multilabel import MultilabelTask
from labeltune.prompts.ner import NerTask
from labeltune.prompts.template import ELLIPSIS, ChatTemplate, Conversation, Encoded
from labeltune.prompts.weights import AnswerWeights
from labeltune.types import Entity, Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Answers whose tokens are kept; a server is asked about labels without end.
KEPT_ANSWERS = 10_000
#: Lists of candidates whose longest answer is kept.
KEPT_RESERVES = 1_000


@dataclass(frozen=True)
class View:
    """A prompt, and which parts of the document it holds.

    Attributes:
        ids: token ids.
        parts: (start, end) in characters of the document, in order.
        text: the text as it is shown.
    """

    ids: list[int]
    parts: tuple[tuple[int, int], ...]
    text: str


@dataclass(frozen=True)
class TrainedAnswer:
    """What is trained behind a prompt.

    Attributes:
        ids: token ids behind the prompt.
        start: the first of them that is predicted; those before it are only read.
        weight: what the loss is multiplied by.
    """

    ids: list[int]
    start: int = 0
    weight: float = 1.0


@dataclass(frozen=True)
class Verdict:
    """A label and what is answered about it.

    Attributes:
        yes: token ids of the label and that it applies.
        no: of the label and that it does not.
        asked: the first place where the two differ; from there on they are decided.
    """

    name: str
    yes: tuple[int, ...]
    no: tuple[int, ...]
    asked: int

    def trained(self, applies: bool, weight: float) -> TrainedAnswer:
        """One of the two answers, as it is trained."""
        return TrainedAnswer(list(self.yes if applies else self.no), self.asked, weight)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Number of tokens that both begin with."""
    return next((at for at, differs in enumerate(map(ne, a, b)) if differs), min(len(a), len(b)))


class PromptBuilder:
    """Examples -> token ids within `prompt.max_length`.

    A classification prompt always leaves room for the longest candidate, so a row's prompt is the same in training
    and prediction, token for token, also when its text is shortened. A NER prompt is shortened for the row's own
    answer in training, and only for itself in prediction, where the answer is not known. Where answers are marks in the
    text, both leave room for a copy of it.

    Attributes:
        marks: the tokens of marks, where answers are marks in the text.
        weights: what the answers of an example count for in training; nothing else depends on them.
    """

    def __init__(self, task: Task, template: ChatTemplate, weights: AnswerWeights | None = None) -> None:
        self.task = task
        self.template = template
        self.weights = weights or AnswerWeights()
        marked = isinstance(task, NerTask) and task.marked
        self.marks = MarkTokens(template, task.labels, task.prompt.no_entities) if marked else None
        self._lengths: dict[str, int] = {}
        self._reserves: dict[tuple[str, ...], int] = {}
        self._answers: dict[str, list[int]] = {}

    def prompt(self, example: Example) -> Encoded:
        """The prompt alone.

        Raises:
            PromptError: instruction and candidates alone do not fit.
        """
        return self._encode(example)

    def training(self, example: Example) -> Encoded:
        """Prompt, right answer and end of turn.

        Raises:
            DataError: the example has no right answer.
            PromptError: instruction, candidates and answer alone do not fit.
        """
        if isinstance(self.task, MultilabelTask):
            return self._encode(example, self.task.possible_answers(example)[0])
        if self.marks is None:
            return self._encode(example, self.task.target(example))
        self.task.target(example)  # for its errors
        return self._encode_marked(self.marks, example, example.entities)

    def cut_entities(self, example: Example, encoded: Encoded) -> int:
        """Entities of a row that are not in the text that its prompt shows."""
        entities = example.entities or ()
        if self.marks is None:
            return sum(entity.text not in encoded.text for entity in entities)
        return len(entities) - len(self._shown(example, encoded).inside(entities))

    def answers(self, example: Example, encoded: Encoded) -> list[TrainedAnswer]:
        """What is trained behind the prompt of an example: its answers with their end of turn, the right one first; or what is decided
        about each of its labels.

        Args:
            encoded: as `training` gives it.

        Raises:
            DataError: the example has no right answer.
        """
        if isinstance(self.task, MultilabelTask):
            return self._verdicts(self.task, example)
        shares = dict(example.shares) or {self.task.target(example): 1.0}
        weighed = self.weights.weighed(shares, self.task.possible_answers(example))
        (_, first), *others = weighed.items()
        right = TrainedAnswer(encoded.ids[slice(*encoded.answer_span)], weight=first)
        return [right, *(TrainedAnswer(self.answer_ids(a), weight=w) for a, w in others)]

    def _verdicts(self, task: MultilabelTask, example: Example) -> list[TrainedAnswer]:
        right = set(task.right_labels(example))
        applies = {label: label in right for label in task.candidates(example)}
        found = []
        for label, (weight, other) in self.weights.decided(example.text, applies).items():
            verdict = self.verdict(label)
            found.append(verdict.trained(applies[label], weight))
            if other:
                found.append(verdict.trained(not applies[label], other))
        return found

    def views(self, example: Example, long_text: Literal["truncate", "window"] = "truncate") -> list[View]:
        """The prompts that read a document: one, or with `window` as many overlapping ones as it takes.

        A window begins at three quarters of the one before it.

        Raises:
            PromptError: instruction and candidates leave no room for the text.
        """
        encoded = self.prompt(example)
        if long_text == "truncate" or encoded.text.strip() == example.text.strip():
            parts = kept_parts(example.text, encoded.text, self.task.prompt.truncation)
            return [View(encoded.ids, parts, encoded.text)]
        found, start = [], 0
        while True:
            encoded = self._encode(replace(example, text=example.text[start:]), side="head")
            begin = example.text.find(encoded.text, start)
            end = begin + len(encoded.text)
            found.append(View(encoded.ids, ((begin, end),), encoded.text))
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
        if not isinstance(self.task, NerTask):
            return self.without_text(example) + self.room(example)
        conversation = self.task.conversation(example).with_text("")
        encoded = self.template.encode(conversation, self.least_answer(example))
        return needed_tokens(encoded, self.reserve(example))

    def without_text(self, example: Example) -> int:
        """Tokens of a prompt with nothing of the text; they follow from its candidates alone."""
        return len(self.template.encode(self.task.conversation(example).with_text("")).ids)

    def room(self, example: Example) -> int:
        """Tokens behind the prompt of a row of labels: those of its right answer, or of a longer one that is possible.

        Raises:
            DataError: the example has no right answer.
        """
        behind = self.template.closing_length - len(self.template.end_of_turn_ids)
        right = len(self.answer_ids(self.least_answer(example))) + behind
        return max(self.reserve(example), right)

    def least_answer(self, example: Example) -> str:
        """The right answer of a row of whose text nothing is shown.

        Raises:
            DataError: the example has no right answer.
        """
        if isinstance(self.task, MultilabelTask):
            return self.task.possible_answers(example)[0]
        return self.task.target(example) if self.marks is None else self.task.prompt.no_entities

    def answer_ids(self, answer: str) -> list[int]:
        """Token ids of an answer with its end of turn, as training has them; they do not depend on what is asked."""
        if answer not in self._answers:
            # Behind a short prompt: that of ten thousand labels takes longer than all of their answers.
            conversation = Conversation("system" if self.task.prompt.system else "", "user", "", "")
            encoded = self.template.encode(conversation, answer)
            if len(self._answers) >= KEPT_ANSWERS:
                self._answers.clear()
            self._answers[answer] = encoded.ids[slice(*encoded.answer_span)]
        return self._answers[answer]

    def verdict(self, label: str) -> Verdict:
        """A label as it is decided behind a prompt; the same behind every one.

        Raises:
            PromptError: `prompt.positive` and `prompt.negative` begin alike to this tokenizer.
        """
        assert isinstance(self.task, MultilabelTask)
        yes, no = (
            self.answer_ids(answer)[: -len(self.template.end_of_turn_ids)]
            for answer in self.task.answers_about(label)
        )
        asked = common_prefix(yes, no)
        if asked == min(len(yes), len(no)):
            raise PromptError(
                f"prompt.positive={self.task.prompt.positive!r} and prompt.negative={self.task.prompt.negative!r} begin alike to this model; name other words"
            )
        return Verdict(label, tuple(yes), tuple(no), asked)

    def reserve(self, example: Example) -> int:
        """Tokens of the longest possible answer with its end of turn; 0 when answers cannot be listed."""
        if example.candidates not in self._reserves:
            answers = self.task.possible_answers(example)
            if len(self._reserves) >= KEPT_RESERVES:
                self._reserves.clear()
            self._reserves[example.candidates] = max(map(self._answer_length, answers), default=0)
        return self._reserves[example.candidates]

    def _answer_length(self, answer: str) -> int:
        if answer not in self._lengths:
            alone = self.template.plain_ids(self.template.answer_lead + answer)
            if len(self._lengths) >= KEPT_ANSWERS:
                self._lengths.clear()
            self._lengths[answer] = len(alone) + self.template.closing_length
        return self._lengths[answer]

    def _encode(self, example: Example, answer: str | None = None, side: Side | None = None) -> Encoded:
        prompt = self.task.prompt
        if self.marks is not None:
            return self._encode_marked(self.marks, example, None, side)
        return encode_to_fit(
            self.template,
            self.task.conversation(example),
            answer,
            prompt.max_length,
            side or prompt.truncation,
            where=example.where,
            reserve=self.reserve(example),
        )

    def _encode_marked(
        self,
        marks: MarkTokens,
        example: Example,
        entities: Sequence[Entity] | None,
        side: Side | None = None,
    ) -> Encoded:
        """A prompt whose answer repeats the text, with the answer unless `entities` is None; there is room for a copy in any case."""
        closing = self.template.closing_length

        def attempt(conversation: Conversation) -> tuple[Encoded, int]:
            prompt = self.template.encode(conversation)
            shown = self._shown(example, prompt, side)
            needed = len(prompt.ids) + marks.longest_plain(shown) + closing
            if entities is None:
                return prompt, needed
            answered = self.template.answered(prompt, marks.answer(shown, entities))
            return answered, max(needed, len(answered.ids))

        return shorten_to_fit(
            attempt,
            self.task.conversation(example),
            self.task.prompt.max_length,
            side or self.task.prompt.truncation,
            where=example.where,
            copied=True,
        )

    def _shown(self, example: Example, encoded: Encoded, side: Side | None = None) -> Shown:
        kept = kept_parts(example.text, encoded.text, side or self.task.prompt.truncation)
        return Shown.of(example.text, encoded.text, kept)


def builder_for_base(
    config: RunConfig, labels: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> PromptBuilder:
    """The builder of a run that begins now: it settles the template of its base model's tokenizer, see `ChatTemplate`.

    Raises:
        PromptError: the template cannot be used with this model or these prompts.
    """
    task = make_task(config.task, labels, config.prompt, config.data.entities)
    template = ChatTemplate(tokenizer, config.prompt)
    template.check(task.conversation(Example("0", "text", ("first", "second"))))
    return PromptBuilder(task, template)


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


Side = Literal["head", "tail", "head_tail"]


def encode_to_fit(
    template: ChatTemplate,
    conversation: Conversation,
    answer: str | None,
    max_length: int,
    side: Side = "head",
    *,
    where: str = "",
    reserve: int = 0,
) -> Encoded:
    """Encode, shortening `conversation.text` as little as needed for at most `max_length` tokens in all.

    Every attempt tokenizes the whole conversation again, because cutting a text may change how its ends merge with
    their neighbours.

    Args:
        side: which part of the text stays.
        where: `file:line` for the error message.
        reserve: tokens kept free behind the prompt for any answer, so that the prompt is the same with and without one.

    Raises:
        PromptError: instruction, candidates and answer alone exceed `max_length`; the message says by how many tokens.
    """

    def attempt(conversation: Conversation) -> tuple[Encoded, int]:
        encoded = template.encode(conversation, answer)
        return encoded, needed_tokens(encoded, reserve)

    return shorten_to_fit(attempt, conversation, max_length, side, where=where)


def shorten_to_fit(
    attempt: Callable[[Conversation], tuple[Encoded, int]],
    conversation: Conversation,
    max_length: int,
    side: Side,
    *,
    where: str = "",
    copied: bool = False,
) -> Encoded:
    """As `encode_to_fit`, whatever follows the prompt.

    Args:
        attempt: encodes a conversation, and says how many tokens it needs.
        copied: what follows gets shorter with the text, so as many tokens less as there are too many would be too few.
    """
    encoded, needed = attempt(conversation)
    excess = needed - max_length
    if excess <= 0:
        return encoded
    text, (begin, end) = encoded.text, encoded.text_chars
    spans = [
        (max(a, begin) - begin, min(b, end) - begin) for a, b in encoded.offsets[slice(*encoded.text_span)]
    ]
    whole, keep, limit = excess, len(spans), len(spans)
    while excess > 0:
        if keep == 0:
            raise PromptError(
                f"{where + ': ' if where else ''}instruction, candidates and answer alone need {max_length + excess} tokens, "
                f"{excess} more than prompt.max_length={max_length}; raise prompt.max_length or shorten prompt and labels"
            )
        limit, keep = keep, max(keep - excess, 0)
        encoded, needed = attempt(conversation.with_text(_shorten(text, spans, keep, side)))
        excess = needed - max_length
    while copied and limit - keep > 1:
        middle = (keep + limit) // 2
        longer, needed = attempt(conversation.with_text(_shorten(text, spans, middle, side)))
        if needed <= max_length:
            encoded, keep = longer, middle
        else:
            limit = middle
    return replace(encoded, excess=whole)


def needed_tokens(encoded: Encoded, reserve: int) -> int:
    """Tokens of a conversation, with room for any answer (`reserve`) behind its prompt."""
    return max(len(encoded.ids), encoded.answer_span[0] + reserve)


def _shorten(text: str, spans: list[tuple[int, int]], keep: int, side: Side) -> str:
    """The characters of `keep` tokens; `spans` are the tokens' characters."""
    if keep == 0:
        return ""
    if side == "head":
        return text[: spans[keep - 1][1]]
    if side == "tail":
        return text[spans[len(spans) - keep][0] :]
    head = (keep + 1) // 2
    tail = keep - head
    end = spans[len(spans) - tail][0] if tail else len(text)
    head_end = spans[head - 1][1]
    return text[:head_end] + ELLIPSIS + text[max(end, head_end) :]
