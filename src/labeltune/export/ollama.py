"""For Ollama: the chat template as a Go template, a Modelfile, and its server.

The chat template is not parsed. It is rendered with marker words in place of the messages, which shows the strings around
them; the Go template puts the same strings around Ollama's messages. Both are then compared on conversations of several
shapes, and a template for which they differ is refused.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from labeltune.errors import ModelError, PromptError, clipped
from labeltune.export import llama_cpp
from labeltune.export.engines import Engine, Served, told
from labeltune.prompts.template import ChatTemplate
from labeltune.types import Example

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRAM, MODELFILE = "ollama", "Modelfile"
_MARKS = [f"LabeltuneMark{number}End" for number in range(6)]
#: Ollama's default context is larger; a run's own limit counts where it is larger still.
_SMALLEST_CONTEXT = 4096

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,79}"
_NAME = re.compile(rf"({_PART}/)?{_PART}(:{_PART})?")

Messages = list[dict[str, str]]


@dataclass(frozen=True)
class Turns:
    """The strings a chat template puts around messages.

    Attributes:
        head: in front of the first user message when there is no system message.
        system_head: in front of the system message.
        system_end: between system message and first user message.
        user_end: between a user message and the answer to it, in earlier turns.
        answer_end: between an answer and the next user message.
        generation: behind the last user message.
        strips: messages lose the white space around them, which Ollama keeps.
    """

    head: str
    system_head: str
    system_end: str
    user_end: str
    answer_end: str
    generation: str
    strips: bool = False

    def render(self, messages: Messages) -> str:
        """A conversation that ends with a user message, as the Go template renders it."""
        system = messages[0]["content"] if messages[0]["role"] == "system" else ""
        found = self.system_head + system + self.system_end if system else self.head
        turns = [message for message in messages if message["role"] != "system"]
        for number, message in enumerate(turns):
            last = number == len(turns) - 1
            if message["role"] == "user":
                found += message["content"] + (self.generation if last else self.user_end)
            else:
                found += message["content"] + ("" if last else self.answer_end)
        return found


def turns_of(template: ChatTemplate) -> Turns:
    """The strings a run's chat template puts around messages, found by rendering it.

    Raises:
        PromptError: the template depends on more than the order of the messages, so no Modelfile can say the same.
    """
    system, *marks = _MARKS
    roles = ("user", "assistant", "user", "assistant", "user")
    turns = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
    head, user_end, answer_end, *others, generation = _between(_render(template, turns), marks)
    if others != [user_end, answer_end]:
        raise _refused("it writes later turns otherwise than earlier ones")
    try:
        system_head, system_end, *_ = _between(
            _render(template, [{"role": "system", "content": system}, *turns]), _MARKS
        )
        folded = False
    except PromptError:
        # As in training: a template that knows no system message gets it in front of the user's.
        system_head, system_end, folded = head, "\n\n", True
    padded = f" \n{system}\n "
    strips = padded not in _render(template, [{"role": "user", "content": padded}])
    found = Turns(head, system_head, system_end, user_end, answer_end, generation, strips)
    _check(template, found, folded)
    return found


def _refused(reason: str) -> PromptError:
    return PromptError(
        f"the run's chat template cannot be written as an Ollama template: {reason}. Export with --merged without --ollama, "
        "and serve it with vLLM or transformers"
    )


def _render(template: ChatTemplate, messages: Messages) -> str:
    try:
        return template.render(messages)
    except PromptError as error:
        raise _refused(f"it cannot render a conversation of several turns ({error})") from error


def _between(rendered: str, marks: list[str]) -> list[str]:
    """The strings around the marks, one more than there are marks."""
    found = []
    for mark in marks:
        before, middle, rendered = rendered.partition(mark)
        if not middle or mark in rendered:
            raise _refused("it drops, repeats or reorders messages")
        found.append(before)
    return [*found, rendered]


def _check(template: ChatTemplate, turns: Turns, folded: bool) -> None:
    """Compare with the chat template on other conversations than those it was found with."""
    for system in ("", "Sort it. 分类"):
        for count in range(1, 5):
            talk = [{"role": "system", "content": system}] if system else []
            for number in range(count):
                talk.append({"role": "user", "content": f"Question {number}: {{x}} 文本"})
                if number < count - 1:
                    talk.append({"role": "assistant", "content": f"answer {number}"})
            real = talk
            if folded and system:
                real = [{"role": "user", "content": f"{system}\n\n{talk[1]['content']}"}, *talk[2:]]
            if _render(template, real) != turns.render(talk):
                raise _refused("it depends on more than the order of the messages")


def without_bos(turns: Turns, tokenizer: PreTrainedTokenizerBase) -> Turns:
    """The same without a leading bos token where the tokenizer adds one itself: Ollama would double it.

    Raises:
        PromptError: the tokenizer adds one, and the run was trained without.
    """
    bos, ids = tokenizer.bos_token_id, tokenizer("x").input_ids
    if bos is None or not ids or ids[0] != bos:
        return turns
    token = str(tokenizer.bos_token)
    if not (turns.head.startswith(token) and turns.system_head.startswith(token)):
        raise _refused(f"Ollama puts {token} in front of every prompt, and the run was trained without")
    heads = turns.head.removeprefix(token), turns.system_head.removeprefix(token)
    return Turns(*heads, turns.system_end, turns.user_end, turns.answer_end, turns.generation, turns.strips)


def _literal(text: str) -> str:
    """Text of a Go template: a brace is quoted, so that it neither opens an action nor joins one that follows."""
    return text.replace("{", '{{ "{" }}').replace("\r", '{{ "\\r" }}').replace('"""', '{{ "\\"\\"\\"" }}')


def go_template(turns: Turns) -> str:
    """Ollama's TEMPLATE (Go text/template over .System and .Messages, which Ollama fills in)."""
    system = f"{_literal(turns.system_head)}{{{{ .System }}}}{_literal(turns.system_end)}"
    last = "{{ if eq (len (slice $.Messages $i)) 1 }}"
    return (
        f"{{{{ if .System }}}}{system}{{{{ else }}}}{_literal(turns.head)}{{{{ end }}}}"
        '{{ range $i, $_ := .Messages }}{{ if eq .Role "user" }}{{ .Content }}'
        f"{last}{_literal(turns.generation)}{{{{ else }}}}{_literal(turns.user_end)}{{{{ end }}}}"
        '{{ else if eq .Role "assistant" }}{{ .Content }}'
        f"{last}{{{{ else }}}}{_literal(turns.answer_end)}{{{{ end }}}}{{{{ end }}}}{{{{ end }}}}"
    )


def modelfile(template: ChatTemplate, system: str, max_length: int) -> str:
    """The Modelfile of a run.

    Args:
        system: the run's system message; what Ollama uses when a request has none.
        max_length: tokens of prompt and answer in training.

    Raises:
        PromptError: the chat template cannot be expressed.
    """
    turns = without_bos(turns_of(template), template.tokenizer)
    names = [template.tokenizer.convert_ids_to_tokens(number) for number in template.stop_ids]
    lines = [f"FROM ./{llama_cpp.MODEL}", f"TEMPLATE {_quoted(go_template(turns))}"]
    if system:
        lines.append(f"SYSTEM {_quoted(template.system_text(system))}")
    lines += [f"PARAMETER stop {json.dumps(str(name), ensure_ascii=False)}" for name in names]
    # Ollama's own 1.1 makes the labels that a prompt lists less probable.
    lines += ["PARAMETER temperature 0", "PARAMETER repeat_penalty 1"]
    lines += [f"PARAMETER num_ctx {max(_SMALLEST_CONTEXT, max_length)}"]
    if turns.strips:
        lines.insert(
            0, "# Trained on messages without white space around them: strip yours, Ollama does not."
        )
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    if '"""' in text or text.endswith('"'):
        raise _refused('a Modelfile cannot hold a text with """ in it or " at its end')
    return f'"""{text}"""'


def model_name(called: str) -> str:
    """A name that Ollama takes: its own signs are kept, everything else becomes a hyphen.

    Names are letters, digits, `.`, `_` and `-`, 80 at most, with a namespace in front and a tag behind where they are given.
    """
    if _NAME.fullmatch(called):
        return called
    return re.sub(r"[^a-z0-9._-]+", "-", called.lower()).strip("-._")[:80].rstrip("-._") or "labeltune"


def create_command(folder: Path, called: str) -> str:
    """What adds an exported folder to Ollama."""
    return f"ollama create {model_name(called)} -f {shlex.quote(str(folder / MODELFILE))}"


def ask_command(called: str, user: str) -> str:
    """One question to it; `user` is the whole user message, since a Modelfile holds only what stands around that."""
    return f"ollama run {model_name(called)} {shlex.quote(user)}"


class OllamaServer(Engine):
    """Ollama, with a folder of models of its own; it bounds no answers, and tells neither probabilities nor tokens.

    Args:
        models: a folder for it; the Modelfile of the export is added to it.
    """

    name, health, tells, holds = "Ollama", "/api/version", False, False

    def __init__(self, served: Served, models: Path) -> None:
        super().__init__(served)
        self._models = models
        self._strips = turns_of(served.builder.template).strips

    def command(self, port: int) -> list[str]:
        """What starts it on this machine."""
        return [PROGRAM, "serve"]

    def environment(self, port: int) -> dict[str, str]:
        """Where it listens, and where it keeps its models."""
        return {"OLLAMA_HOST": f"127.0.0.1:{port}", "OLLAMA_MODELS": str(self._models)}

    def begin(self, port: int) -> None:
        """Add the export.

        Raises:
            ModelError: Ollama refuses it.
        """
        modelfile = str(self.served.folder / MODELFILE)
        done = subprocess.run(
            [PROGRAM, "create", model_name(self.served.name), "-f", modelfile],
            env={**os.environ, **self.environment(port)},
            capture_output=True,
            text=True,
            errors="replace",
        )
        if done.returncode:
            raise ModelError(
                f"Ollama does not take the Modelfile: {clipped((done.stderr or done.stdout).strip(), 500)}"
            )

    def prompt_told(self, url: str, prompt: list[int], adapter: bool) -> Any:
        """Nothing: it is given whole models alone."""
        raise NotImplementedError

    def written(self, url: str, row: Example) -> tuple[str, list[int] | int]:
        """The answer to the row's messages, and the number of tokens of their prompt."""
        messages = self.served.builder.task.conversation(row).messages()
        if self._strips:
            messages = [{**each, "content": each["content"].strip()} for each in messages]
        body = {"model": model_name(self.served.name), "messages": messages, "stream": False}
        options = {"temperature": 0, "num_predict": self.served.max_new_tokens}
        with told(f"{url}/api/chat", {**body, "options": options}) as answer:
            return str(answer["message"]["content"]), int(answer["prompt_eval_count"])
