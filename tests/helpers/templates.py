"""Small chat templates, each with one peculiarity of published ones."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest

from labeltune.prompts import template as template_module


def template(
    answer: str = "",
    generation: str = "",
    head: str = "",
    system: str = "m['content']",
    user: str = "m['content']",
) -> str:
    """ChatML, with something changed.

    Args:
        answer: in front of answers, as a Jinja expression.
        generation: behind the generation prompt, as a template.
        head: in front of everything, as a template.
        system, user: what becomes of a message, as Jinja expressions.
    """
    return (
        f"{head}{{% for m in messages %}}{{{{ '<|im_start|>' + m['role'] }}}}"
        f"{{% if m['role'] == 'assistant' %}}{{{{ {answer or repr('')} + m['content'] }}}}"
        f"{{% elif m['role'] == 'system' %}}{{{{ '\n' + {system} }}}}{{% else %}}{{{{ '\n' + {user} }}}}{{% endif %}}"
        "{{ '<|im_end|>\n' }}{% endfor %}"
        f"{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant' }}}}{generation}{{% endif %}}\n"
    )


_DATED = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"

#: Peculiarity -> (template, what prompts of a run end with, spaces that belong to its answers).
PECULIAR: dict[str, tuple[str, str, str]] = {
    "nothing (Qwen2)": (template("'\n'", "{{ '\n' }}"), "assistant\n", ""),
    "a channel in front of answers (gpt-oss)": (
        template("'<|channel|>final<|message|>'"),
        "assistant<|channel|>final<|message|>",
        "",
    ),
    "a newline behind an empty thinking block (GLM-4.5)": (
        template(
            r"'\n<think></think>\n'",
            r"{{ '\n<think></think>' if enable_thinking is defined and not enable_thinking else '' }}",
        ),
        "assistant\n<think></think>\n",
        "",
    ),
    "thinks unless it is told not to (Qwen3)": (
        template(
            r"'\n<think>\n\n</think>\n\n'",
            r"{{ '\n' }}{% if enable_thinking is defined and enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        ),
        "assistant\n<think>\n\n</think>\n\n",
        "",
    ),
    "always thinks, and writes an empty block (Qwen3-Thinking)": (
        template(r"'\n<think>\n\n</think>\n\n'", r"{{ '\n<think>\n' }}"),
        "assistant\n<think>\n\n</think>\n\n",
        "",
    ),
    "always thinks, and drops the block (DeepSeek-R1)": (
        template("", r"{{ '<think>\n' }}"),
        "assistant<think>\n\n</think>\n\n",
        "",
    ),
    "always thinks, in one line": (template("", "{{ '<think>' }}"), "assistant<think></think>", ""),
    "a blank line in the block (Nemotron)": (
        template(r"'\n<think>\n\n'", r"{{ '\n<think>\n\n' }}"),
        "assistant\n<think>\n\n</think>\n\n",
        "",
    ),
    "a space in front of answers (Mistral v0.2, Llama 2)": (template("' '"), "assistant", " "),
    "a date (Llama 3.2)": (
        template("'\n'", "{{ '\n' }}", head=_DATED + "{{ 'Today: ' + date_string + '\n' }}"),
        "assistant\n",
        "",
    ),
    "a date in a macro, and a channel (gpt-oss)": (
        template(
            "'<|channel|>final'",
            head="{%- macro about() -%}{{- 'Date: ' + strftime_now(\"%Y-%m-%d\") + ', %d' }}{%- endmacro -%}{{ about() }}",
        ),
        "assistant<|channel|>final",
        "",
    ),
    "an effort (gpt-oss)": (
        template(
            "'\n'",
            "{{ '\n' }}",
            head="{% if reasoning_effort is not defined %}{% set reasoning_effort = 'medium' %}{% endif %}"
            "{{ 'Reasoning: ' + reasoning_effort + '\n' }}",
        ),
        "assistant\n",
        "",
    ),
    "trims the system message (SmolLM3)": (
        template("'\n'", "{{ '\n' }}", system="m['content'].rstrip()"),
        "assistant\n",
        "",
    ),
    "trims the user's message (Gemma 3)": (
        template("'\n'", "{{ '\n' }}", user="m['content'] | trim"),
        "assistant\n",
        "",
    ),
    "strips newlines": (
        template("'\n'", "{{ '\n' }}", system="m['content'] | trim", user="m['content'].strip('\n')"),
        "assistant\n",
        "",
    ),
}

#: Takes what stands in a message as an instruction to itself.
READS_NO_THINK = template("'\n'", "{{ '\n' }}", system="m['content'].replace('/no_think', '')")
#: Neither is the other's beginning: where an answer begins cannot be known.
CONTRADICTS_ITSELF = template("'\nSays: '", "{{ '\nQuestion: ' }}")


def on_day(monkeypatch: pytest.MonkeyPatch, year: int) -> None:
    """Runs that begin now begin on 2 January of that year."""

    class Day(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Day:
            return cls(year, 1, 2)

    monkeypatch.setattr(template_module, "datetime", Day)
