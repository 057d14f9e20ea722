"""A prompt -> a conversation -> token ids, exactly as the chat template and the tokenizer would have them.

The template itself is never parsed. It is rendered once with marker words in place of the messages, which shows the
strings it puts around them; a real conversation is then those strings with the messages between. The result is the
string that `apply_chat_template` gives, and the place of every message in it is known.

Special tokens (`<|im_end|>` ...) are structure only where the template put them. Inside a message they are data, and
are tokenized as ordinary text; for messages that hold none, the ids are those of `tokenizer(apply_chat_template(...))`.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from labeltune.config import PromptConfig
from labeltune.errors import PromptError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: For base models without a template of their own: messages one below the other, the answer ended by the eos token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}=>\n{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}=>\n{% endif %}"
)

#: Whether special tokens are split is a setting of the tokenizer, made before every call; threads must not come in between.
_TOKENIZING = threading.Lock()

_SYSTEM, _USER, _ANSWER = "LabeltuneSystemMark", "LabeltuneUserMark", "LabeltuneAnswerMark"


@dataclass(frozen=True)
class Conversation:
    """What the model is told: a system message (may be empty) and a user message around the document's text."""

    system: str
    before_text: str
    text: str
    after_text: str

    @property
    def user(self) -> str:
        """The whole user message."""
        return self.before_text + self.text + self.after_text

    def with_text(self, text: str) -> Conversation:
        """The same conversation about another text."""
        return Conversation(self.system, self.before_text, text, self.after_text)

    def messages(self) -> list[dict[str, str]]:
        """As `apply_chat_template` takes it, without the answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": self.user}]


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


@dataclass(frozen=True)
class Encoded:
    """Token ids of a conversation and where its parts stand; positions count tokens, ends are exclusive.

    Attributes:
        ids: shape [tokens].
        text_span: tokens that hold a part of the document's text.
        answer_span: the answer and its end of turn; empty, at the end of `ids`, for a prompt.
        text: the document's text as it was encoded: shortened, stripped where the template strips messages.
        offsets: characters of each token in the rendered string.
        text_chars: characters of `text` in the rendered string.
        excess: tokens that the whole document would have had beyond the budget; 0 when it was not shortened.
    """

    ids: list[int]
    text_span: tuple[int, int]
    answer_span: tuple[int, int]
    text: str
    offsets: list[tuple[int, int]]
    text_chars: tuple[int, int]
    excess: int = 0

    def labels(self) -> list[int]:
        """Training targets: the ids of the answer span, -100 elsewhere; by position, never by token id."""
        start, end = self.answer_span
        return [-100] * start + self.ids[start:end] + [-100] * (len(self.ids) - end)


@dataclass(frozen=True)
class _Frame:
    """The strings a template puts around the messages."""

    head: str
    between: str
    generation: str
    end: str


class ChatTemplate:
    """How one tokenizer renders conversations.

    Args:
        tokenizer: a fast tokenizer. A tokenizer without a chat template is given `PLAIN_TEMPLATE`.

    Raises:
        PromptError: the tokenizer has no offsets, or its template changes messages beyond stripping them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PromptError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; labeltune needs character offsets"
            )
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.tokenizer = tokenizer
        specials = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        specials |= {str(token) for token in tokenizer.all_special_tokens}
        self._frames: dict[bool, _Frame] = {}
        self._structures: dict[str, list[int]] = {}
        self._merges_system = False
        self._strips = False
        self._frames[False] = self._probe(False)
        try:
            self._frames[True] = self._probe(True)
        except PromptError:
            self._merges_system = True
        padded = self._render([{"role": "user", "content": f" \n{_USER}\n "}], generation=True)
        self._strips = f" \n{_USER}\n " not in padded
        if self._strips and padded != self._frames[False].head + _USER + self._frames[False].generation:
            raise PromptError(
                "the chat template changes messages beyond stripping them; give the model another template"
            )
        self._unflagged = self._unflagged_marks()
        longest_first = sorted(
            {token for token in specials if token} | self._unflagged, key=len, reverse=True
        )
        self._special = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.end_of_turn_ids, self._tail_ids = self._end_of_turn(self._frames[False].end)

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end of turn and the tokenizer's eos."""
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys([self.end_of_turn_ids[-1], *([] if eos is None else [eos])]))

    @property
    def closing_length(self) -> int:
        """Tokens the template puts behind an answer: its end of turn and what follows."""
        return len(self.end_of_turn_ids) + len(self._tail_ids)

    def _render(self, messages: list[dict[str, str]], generation: bool) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation, enable_thinking=False
                )
            )
        except Exception as error:
            raise PromptError(f"the model's chat template cannot render the conversation: {error}") from error

    def _probe(self, with_system: bool) -> _Frame:
        messages = [{"role": "system", "content": _SYSTEM}] if with_system else []
        messages.append({"role": "user", "content": _USER})
        prompt = self._render(messages, generation=True)
        full = self._render([*messages, {"role": "assistant", "content": _ANSWER}], generation=False)
        marks = [_SYSTEM, _USER] if with_system else [_USER]
        if any(prompt.count(mark) != 1 for mark in marks) or full.count(_ANSWER) != 1:
            raise PromptError("the chat template drops or repeats messages; give the model another template")
        head, rest = prompt.split(marks[0])
        between = ""
        if with_system:
            between, rest = rest.split(_USER)
        return _Frame(head, between, rest, full.split(_ANSWER)[1])

    def _unflagged_marks(self) -> set[str]:
        """Added tokens that the template puts around messages and the tokenizer does not call special, such as `</think>`;
        the tokenizer would find them in a document, too."""
        around = [part for f in self._frames.values() for part in (f.head, f.between, f.generation, f.end)]
        added = {str(t.content) for t in self.tokenizer.added_tokens_decoder.values() if not t.special}
        return {t for t in added if len(t.strip()) > 1 and any(t in part for part in around)}

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a text that is data: special tokens in it are split into ordinary ones."""
        return self._tokenize(text, [])[0]

    def _end_of_turn(self, end: str) -> tuple[list[int], list[int]]:
        """(ids that end the answer, ids the template puts after them)."""
        ids = self.tokenizer(end, add_special_tokens=False).input_ids if end else []
        specials = {self.tokenizer.convert_tokens_to_ids(t) for t in self.tokenizer.all_special_tokens}
        specials |= {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        for index, token in enumerate(ids):
            if token in specials:
                return ids[: index + 1], ids[index + 1 :]
        if self.tokenizer.eos_token_id is None:
            raise PromptError(
                "neither the chat template nor the tokenizer has an end of turn; set the tokenizer's eos_token"
            )
        return [*ids, self.tokenizer.eos_token_id], []

    def encode(self, conversation: Conversation, answer: str | None = None) -> Encoded:
        """Token ids of the conversation, followed by `answer` and its end of turn unless it is None.

        The ids begin with those of the same conversation without an answer. Where the tokenizer would merge the end
        of the prompt with the beginning of the answer, the answer is tokenized by itself.
        """
        prompt, structure, text_chars = self._prompt_string(conversation)
        ids, offsets = self._tokenize(prompt, structure)
        start = len(ids)
        if answer is None:
            answer_span = (start, start)
        else:
            end = self._frame(conversation).end
            whole = prompt + answer + end
            marks = [*structure, (len(prompt) + len(answer), len(whole))]
            closed_by_template = self.end_of_turn_ids + self._tail_ids == self._structure_ids(end)
            closing = [] if closed_by_template else self.end_of_turn_ids[-1:]
            full_ids, full_offsets = self._tokenize(whole, marks)
            if full_ids[:start] != ids:
                answer_ids, answer_offsets = self._tokenize(answer + end, [(len(answer), len(answer + end))])
                full_ids = ids + answer_ids
                full_offsets = offsets + [(a + len(prompt), b + len(prompt)) for a, b in answer_offsets]
            ids = full_ids + closing
            offsets = full_offsets + [(len(whole), len(whole))] * len(closing)
            answer_span = (start, len(ids) - len(self._tail_ids))
        return Encoded(
            ids,
            _overlap(offsets[:start], text_chars),
            answer_span,
            prompt[slice(*text_chars)],
            offsets,
            text_chars,
        )

    def _frame(self, conversation: Conversation) -> _Frame:
        return self._frames[bool(conversation.system) and not self._merges_system]

    def _structure_ids(self, text: str) -> list[int]:
        if text not in self._structures:
            found = self.tokenizer(text, add_special_tokens=False).input_ids if text else []
            self._structures[text] = list(found)
        return self._structures[text]

    def _prompt_string(
        self, conversation: Conversation
    ) -> tuple[str, list[tuple[int, int]], tuple[int, int]]:
        """(the rendered prompt, where it is the template's own, where it is the document's text), in characters."""
        frame = self._frame(conversation)
        system, before = conversation.system, conversation.before_text
        if system and self._merges_system:
            before = f"{system}\n\n{before}"
            system = ""
        user = before + conversation.text + conversation.after_text
        text_start = len(before)
        text_end = text_start + len(conversation.text)
        if self._strips:
            system = system.strip()
            shift = len(user) - len(user.lstrip())
            user = user.strip()
            text_start, text_end = (min(max(at - shift, 0), len(user)) for at in (text_start, text_end))
        user_at = len(frame.head)
        if system:
            user_at += len(system) + len(frame.between)
            rendered = frame.head + system + frame.between + user + frame.generation
            structure = [(0, len(frame.head)), (len(frame.head) + len(system), user_at)]
        else:
            rendered = frame.head + user + frame.generation
            structure = [(0, user_at)]
        structure.append((user_at + len(user), len(rendered)))
        return rendered, structure, (user_at + text_start, user_at + text_end)

    def _tokenize(
        self, string: str, structure: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Ids and character offsets; special tokens outside `structure` are split into ordinary ones."""
        with _TOKENIZING:
            return self._tokenize_alone(string, structure)

    def _tokenize_alone(
        self, string: str, structure: list[tuple[int, int]]
    ) -> tuple[list[int], list[tuple[int, int]]]:
        found = list(self._special.finditer(string)) if self._special else []
        trusted = [m for m in found if any(start <= m.start() and m.end() <= end for start, end in structure)]
        if len(trusted) == len(found):
            output = self.tokenizer(
                string, add_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            return list(output.input_ids), [tuple(pair) for pair in output.offset_mapping]
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []

        def add_data(start: int, end: int) -> None:
            if end > start:
                output = self.tokenizer(
                    string[start:end],
                    add_special_tokens=False,
                    return_offsets_mapping=True,
                    split_special_tokens=True,
                    verbose=False,
                )
                ids.extend(output.input_ids)
                offsets.extend((start + a, start + b) for a, b in output.offset_mapping)

        at = 0
        for match in found:
            if match in trusted:
                add_data(at, match.start())
                ids.append(self.tokenizer.convert_tokens_to_ids(match.group()))
                offsets.append(match.span())
                at = match.end()
            elif match.group() in self._unflagged:
                # The tokenizer splits what it calls special; this it would only miss in two halves.
                add_data(at, match.start() + 1)
                at = match.start() + 1
        add_data(at, len(string))
        return ids, offsets


def _overlap(offsets: list[tuple[int, int]], chars: tuple[int, int]) -> tuple[int, int]:
    """Tokens that share a character with the range; an empty span where they would stand when there is none."""
    inside = [i for i, (start, end) in enumerate(offsets) if start < chars[1] and end > chars[0]]
    if inside:
        return inside[0], inside[-1] + 1
    at = sum(1 for _, end in offsets if end <= chars[0])
    return at, at
