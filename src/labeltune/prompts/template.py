"""A prompt -> a conversation -> token ids, exactly as the chat template and the tokenizer would have them.

The template itself is never parsed. It is rendered once with marker words in place of the messages, which shows the
strings it puts around them; a real conversation is then those strings with the messages between. The result is the
string that `apply_chat_template` gives, and the place of every message in it is known.

Special tokens (`<|im_end|>` ...) are structure only where the template put them. Inside a message they are data, and
are tokenized as ordinary text; for messages that hold none, the ids are those of `tokenizer(apply_chat_template(...))`.

What a template renders can follow from more than the messages: from a date, and from what it is told beside them. And where
it ends a prompt is not always where its answers begin (gpt-oss names a channel first, GLM-4.5 breaks the line, DeepSeek-R1
opens a thinking block). A run begins by settling this: it adds to the template what is missing, so that the template
renders the run's prompts on any day and by itself, and saves it.
"""

from __future__ import annotations

import inspect
import json
import re
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING

from pydantic import JsonValue

from labeltune.config import PromptConfig
from labeltune.errors import PromptError, clipped

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from labeltune.io.run_folder import RunInfo

#: For base models without a template of their own: messages one below the other, the answer ended by the eos token.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}=>\n{{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\n\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}=>\n{% endif %}"
)

#: Whether special tokens are split is a setting of the tokenizer, made before every call; threads must not come in between.
_TOKENIZING = threading.Lock()

#: How templates open a thinking block, and how they close it.
_THINKING = {
    "<think>": "</think>",
    "<seed:think>": "</seed:think>",
    "<thought>": "</thought>",
    "[THINK]": "[/THINK]",
    "◁think▷": "◁/think▷",
    "<|START_THINKING|>": "<|END_THINKING|>",
}

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


#: Stands between the two halves of a text that `prompt.truncation=head_tail` keeps.
ELLIPSIS = "…"

#: Between the text and what follows it in a prompt; dropped where that moves to the front.
_SEPARATORS = " \t\r\n,，;；、"
_PLACEHOLDER = re.compile(r"\{(text|category|labels|no_entities|positive|negative)\}")


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


#: Characters that a template strips from one side of a message; None for all white space.
Stripped = str | None


@dataclass(frozen=True)
class _Frame:
    """The strings a template puts around the messages.

    Attributes:
        generation: behind the user message, where the model goes on.
        before_answer: behind the user message, where the template has an answer.
        end: behind the answer.
        system_strips, user_strips: what the message loses at its left and at its right.
    """

    head: str
    between: str
    generation: str
    before_answer: str
    end: str
    system_strips: tuple[Stripped, Stripped] = ("", "")
    user_strips: tuple[Stripped, Stripped] = ("", "")


class ChatTemplate:
    """How one tokenizer renders conversations.

    Args:
        tokenizer: a fast tokenizer. A tokenizer without a chat template is given `PLAIN_TEMPLATE`; that of a base model is
            given its template as the run has settled it.
        prompt: whether to think, and what else the template is told.
        answer_lead: of a saved run, whose template is the tokenizer's and is used as it is; None for a base model.

    Attributes:
        options: what the template is told beside the messages, and looks at.
        answer_lead: spaces in front of an answer. Tokenizers make one token of a space and the word behind it, so these are
            the answer's, not the prompt's.
        special_tokens: what the model takes for its own in a text, longest first.

    Raises:
        PromptError: the tokenizer has no offsets, its template changes messages beyond stripping them, or it cannot be told
            where an answer begins.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: PromptConfig | None = None,
        answer_lead: str | None = None,
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise PromptError(
                f"{type(tokenizer).__name__} is not a fast tokenizer; labeltune needs character offsets"
            )
        if isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        if not tokenizer.chat_template:
            tokenizer.chat_template = PLAIN_TEMPLATE
        self.tokenizer = tokenizer
        prompt = prompt or PromptConfig()
        self.options = _options(tokenizer, prompt)
        self._structures: dict[str, list[int]] = {}
        self.answer_lead = self._settle(prompt) if answer_lead is None else answer_lead
        self._frames = self._probe_all()
        self._merges_system = True not in self._frames
        specials = {str(t.content) for t in tokenizer.added_tokens_decoder.values() if t.special}
        specials = {*specials, *map(str, tokenizer.all_special_tokens)} - {""}
        self._unflagged = self._unflagged_marks()
        self.special_tokens = sorted(specials | self._unflagged, key=len, reverse=True)
        marks = "|".join(map(re.escape, self.special_tokens))
        self._special = re.compile(marks) if marks else None
        self.end_of_turn_ids, self._tail_ids = self._end_of_turn(self._frames[False].end, specials)

    @classmethod
    def of_run(cls, info: RunInfo, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
        """The template that a run was trained with."""
        tokenizer.chat_template = info.chat_template
        return cls(tokenizer, info.prompt, info.answer_lead)

    @property
    def rendered(self) -> str:
        """Everything that the template puts around messages, and does to them: part of the keys of what prompts led to."""
        frames = {str(with_system): astuple(frame) for with_system, frame in self._frames.items()}
        return json.dumps([frames, self.answer_lead])

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end an answer: the template's end of turn and the tokenizer's eos."""
        eos = self.tokenizer.eos_token_id
        return list(dict.fromkeys([self.end_of_turn_ids[-1], *([] if eos is None else [eos])]))

    @property
    def closing_length(self) -> int:
        """Tokens the template puts behind an answer: its end of turn and what follows."""
        return len(self.end_of_turn_ids) + len(self._tail_ids)

    def render(self, messages: list[dict[str, str]], generation: bool = True) -> str:
        """What the template makes of messages.

        Raises:
            PromptError: it cannot render them.
        """
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=generation, **self.options
                )
            )
        except Exception as error:
            raise PromptError(f"the model's chat template cannot render the conversation: {error}") from error

    def _settle(self, prompt: PromptConfig) -> str:
        """Add to the tokenizer's template what its prompts follow from and what they lack; returns the answer's lead.

        Raises:
            PromptError: the template contradicts itself about where an answer begins.
        """
        template = self.tokenizer.chat_template = _with_settings(
            str(self.tokenizer.chat_template), self.options, datetime.now()
        )
        frames = self._probe_all()
        found = {_missing(frame, prompt.thinking == "template") for frame in frames.values()}
        if len(found) > 1:
            raise PromptError(
                "the chat template begins answers otherwise with a system message than without; give the model another template"
            )
        piece, lead = found.pop()
        if piece:
            added = f"{{{{ {piece!r} if add_generation_prompt else '' }}}}"
            self.tokenizer.chat_template = template.removesuffix("\n") + added
            wanted = {key: replace(f, generation=f.generation + piece) for key, f in frames.items()}
            if self._probe_all() != wanted:
                raise PromptError(
                    f"{piece!r} cannot be added to the prompts of the chat template; set prompt.thinking=template, or give the "
                    "model another template"
                )
        return lead

    def _probe_all(self) -> dict[bool, _Frame]:
        """The template's frames without and with a system message; without alone, where it takes no system message."""
        found = {False: self._probe(False)}
        with suppress(PromptError):
            found[True] = self._probe(True)
        return {with_system: self._with_strips(with_system, frame) for with_system, frame in found.items()}

    def _probe(self, with_system: bool) -> _Frame:
        messages = _marked(_SYSTEM if with_system else "", _USER)
        prompt = self.render(messages)
        full = self.render([*messages, {"role": "assistant", "content": _ANSWER}], generation=False)
        marks = [message["content"] for message in messages]
        in_order = prompt.find(marks[0]) <= prompt.find(_USER)
        if any(prompt.count(mark) != 1 for mark in marks) or not in_order or full.count(_ANSWER) != 1:
            raise PromptError("the chat template drops or repeats messages; give the model another template")
        head, rest = prompt.split(marks[0])
        between = ""
        if with_system:
            between, rest = rest.split(_USER)
        before, end = full.split(_ANSWER)
        return _Frame(head, between, rest, before.rpartition(_USER)[2], end)

    def _with_strips(self, with_system: bool, frame: _Frame) -> _Frame:
        """The frame with what messages lose, found by rendering messages with white space around them."""

        def becomes(system: str, user: str, left_system: str, left_user: str) -> bool:
            before = frame.head + left_system + frame.between if with_system else frame.head
            found = self.render(_marked(system if with_system else "", user))
            return found == before + left_user + frame.generation

        def stripped(mark: str, left: bool) -> Stripped:
            for blank, lost in ((" \n" if left else "\n ", None), ("\n", "\n")):
                text = blank + mark if left else mark + blank
                both = (text, _USER) if mark == _SYSTEM else (_SYSTEM, text)
                if not becomes(*both, *both):
                    return lost
            return ""

        of_system = (stripped(_SYSTEM, True), stripped(_SYSTEM, False)) if with_system else ("", "")
        of_user = stripped(_USER, True), stripped(_USER, False)
        for around in ("\n", " \n", "\n "):
            system, user = (f"{around}{mark}{around}" for mark in (_SYSTEM, _USER))
            if not becomes(system, user, _strip(system, of_system), _strip(user, of_user)):
                raise PromptError(
                    "the chat template changes messages beyond stripping them; give the model another template"
                )
        return replace(frame, system_strips=of_system, user_strips=of_user)

    def _unflagged_marks(self) -> set[str]:
        """Added tokens that the template puts around messages and the tokenizer does not call special, such as `</think>`;
        the tokenizer would find them in a document, too."""
        around = [part for f in self._frames.values() for part in (f.head, f.between, f.generation, f.end)]
        added = {str(t.content) for t in self.tokenizer.added_tokens_decoder.values() if not t.special}
        return {t for t in added if len(t.strip()) > 1 and any(t in part for part in around)}

    def plain_ids(self, text: str) -> list[int]:
        """Ids of a text that is data: special tokens in it are split into ordinary ones."""
        return self.plain_tokens(text)[0]

    def plain_tokens(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """The same, with the characters of every token."""
        return self._tokenize(text, [])

    def _end_of_turn(self, end: str, specials: set[str]) -> tuple[list[int], list[int]]:
        """(ids that end the answer, ids the template puts after them)."""
        ids = self._structure_ids(end)
        for index, token in enumerate(self.tokenizer.convert_ids_to_tokens(ids)):
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
            answer = self.answer_lead + answer
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

    def answered(self, prompt: Encoded, answer: list[int]) -> Encoded:
        """A prompt with an answer of these tokens behind it, and the end of turn."""
        ids = [*prompt.ids, *answer, *self.end_of_turn_ids, *self._tail_ids]
        end = prompt.offsets[-1][1] if prompt.offsets else 0
        return replace(
            prompt,
            ids=ids,
            answer_span=(len(prompt.ids), len(ids) - len(self._tail_ids)),
            offsets=prompt.offsets + [(end, end)] * (len(ids) - len(prompt.ids)),
        )

    def around(self, conversation: Conversation) -> tuple[str, str, tuple[Stripped, Stripped]]:
        """What stands before and behind the text of a conversation in its rendered prompt, and what the text loses at its sides."""
        rendered, _, (start, end) = self._prompt_string(conversation)
        left, right = self._frame(conversation).user_strips
        merged = bool(conversation.system) and self._merges_system
        strips = "" if conversation.before_text or merged else left, "" if conversation.after_text else right
        return rendered[:start], rendered[end:], strips

    def check(self, conversation: Conversation) -> None:
        """Whether the template renders this conversation as its frame says.

        Raises:
            PromptError: it looks into the messages, as templates do that read `/no_think` there.
        """
        messages = conversation.messages()
        if conversation.system and self._merges_system:
            messages = _marked("", f"{conversation.system}\n\n{conversation.user}")
        wanted, found = self._prompt_string(conversation)[0], self.render(messages)
        if found != wanted:
            at = next(
                (at for at, (a, b) in enumerate(zip(wanted, found, strict=False)) if a != b), len(wanted)
            )
            raise PromptError(
                f"the chat template rewrites what prompt.system and prompt.user say: {wanted[at : at + 20]!r} becomes "
                f"{found[at : at + 20]!r}; take out what it looks for there (such as /no_think), and set prompt.thinking or "
                "prompt.template_kwargs instead"
            )

    def system_text(self, system: str) -> str:
        """A system message as the template writes it."""
        if self._merges_system:
            return system.lstrip(self._frames[False].user_strips[0])
        return _strip(system, self._frames[True].system_strips)

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
        with_system = frame is not self._frames[False]
        if system and not with_system:
            before = f"{system}\n\n{before}"
        user = before + conversation.text + conversation.after_text
        text_start = len(before)
        text_end = text_start + len(conversation.text)
        shift = len(user) - len(user.lstrip(frame.user_strips[0]))
        user = _strip(user, frame.user_strips)
        text_start, text_end = (min(max(at - shift, 0), len(user)) for at in (text_start, text_end))
        rendered, structure = frame.head, [(0, len(frame.head))]
        if with_system:
            rendered += self.system_text(system)
            structure.append((len(rendered), len(rendered) + len(frame.between)))
            rendered += frame.between
        user_at = len(rendered)
        rendered += user + frame.generation
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


def _marked(system: str, user: str) -> list[dict[str, str]]:
    return Conversation(system, user, "", "").messages()


def _strip(text: str, sides: tuple[Stripped, Stripped]) -> str:
    return text.lstrip(sides[0]).rstrip(sides[1])


def _options(tokenizer: PreTrainedTokenizerBase, prompt: PromptConfig) -> dict[str, JsonValue]:
    """What the template is told beside the messages, of the names that it knows.

    Raises:
        PromptError: the config names one that the template does not look at, or that is no value of its own.
    """
    template = str(tokenizer.chat_template)
    known = {name for name in re.findall(r"\b[^\W\d]\w*\b", template) if name.isidentifier()}
    taken = {"messages", *inspect.signature(tokenizer.apply_chat_template).parameters}
    for name in prompt.template_kwargs:
        if name in taken:
            raise PromptError(f"prompt.template_kwargs.{name} cannot be set; every prompt has its own")
        if name not in known:
            raise PromptError(
                f"prompt.template_kwargs.{name}: the model's chat template looks at no such name; take it out"
            )
    default: dict[str, JsonValue] = {} if prompt.thinking == "template" else {"enable_thinking": False}
    return {name: value for name, value in (default | prompt.template_kwargs).items() if name in known}


def _with_settings(template: str, options: Mapping[str, JsonValue], now: datetime) -> str:
    """The template with the day of `now` for every day, and with the options for who renders it without any."""
    settings = []
    if "strftime_now" in template and "macro strftime_now" not in template:
        parts = dict.fromkeys(re.findall(r"(?<!\{)%-?[a-zA-Z]", f"{template}{options}"))
        day = "".join(f" | replace({part!r}, {now.strftime(part)!r})" for part in parts)
        settings.append(f"{{% macro strftime_now(format) %}}{{{{ format{day} }}}}{{% endmacro %}}")
    for name, value in options.items():
        settings.append(f"{{% if {name} is not defined %}}{{% set {name} = {value!r} %}}{{% endif %}}")
    missing = [setting for setting in settings if setting not in template]
    # What ends in a block would take a newline from the template's beginning.
    return "".join([*missing, "{{ '' }}", template]) if missing else template


def _missing(frame: _Frame, as_it_is: bool) -> tuple[str, str]:
    """(what prompts lack before an answer can begin, spaces that belong to the answer).

    Args:
        as_it_is: the template's own prompts are wanted, whatever they end in.

    Raises:
        PromptError: the template begins answers otherwise than its prompts end.
    """
    prompt, answered = frame.generation, frame.before_answer
    piece = answered.removeprefix(prompt) if answered.startswith(prompt) else ""
    if as_it_is:
        return "", piece if not piece.strip(" ") else ""
    lead = piece[len(piece.rstrip(" ")) :]
    piece = piece.removesuffix(lead) if lead else piece
    closing = _closing(prompt + piece)
    if not closing and not answered.startswith(prompt) and not prompt.startswith(answered):
        raise PromptError(
            f"the chat template ends prompts with {clipped(prompt, 80)!r} and begins answers with {clipped(answered, 80)!r}, so the "
            "model would be trained on what it is never asked; set prompt.thinking=template to train on the former, or give the model "
            "another template"
        )
    return piece + closing, lead


def _closing(prompt: str) -> str:
    """What ends a thinking block that a prompt leaves open, with as many blank lines as where a model has thought nothing."""
    for begin, end in _THINKING.items():
        _, opened, inside = prompt.rpartition(begin)
        if opened and end not in inside:
            return "\n\n".removeprefix(inside) + end + "\n\n" if inside.startswith("\n") else end
    return ""


def _overlap(offsets: list[tuple[int, int]], chars: tuple[int, int]) -> tuple[int, int]:
    """Tokens that share a character with the range; an empty span where they would stand when there is none."""
    inside = [i for i, (start, end) in enumerate(offsets) if start < chars[1] and end > chars[0]]
    if inside:
        return inside[0], inside[-1] + 1
    at = sum(1 for _, end in offsets if end <= chars[0])
    return at, at
