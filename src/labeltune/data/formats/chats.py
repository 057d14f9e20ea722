"""Rows of fine-tuning tools: ShareGPT's conversations and OpenAI's messages, of which the last answer is the label, and
alpaca's instruction, input and output where the prompt lists the labels."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from labeltune.data.formats.base import (
    LeftOut,
    Reader,
    Reading,
    Unreadable,
    answer_of,
    each,
    every,
    id_of,
    json_lines,
    listed_in,
    named_entities,
)
from labeltune.data.labels import parse_candidates
from labeltune.default_prompts import ENGLISH_PROMPTS, NER_USER, PROMPTS
from labeltune.errors import DataError

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
#: Answers of an extractor that found nothing, as our own prompts name them.
_NONE = frozenset(
    [
        "",
        "[]",
        "none",
        "None",
        "无",
        "没有找到任何实体",
        *(p.get("no_entities", "") for p in (*PROMPTS.values(), *ENGLISH_PROMPTS.values())),
    ]
)
#: What stands before a text, and between a text and its list of labels.
_BEFORE = re.compile(r"^\s*(?:文本|内容|标题|text|input)\s*[:：]\s*", re.IGNORECASE)
_BETWEEN = re.compile(r"[\s,，;；。.]*[^\s,，;；。.:：]{0,20}\s*[:：]\s*$")


def _turns(row: Mapping[str, Any]) -> list[tuple[str, str]]:
    """(role, what is said), by the names of either tool.

    Raises:
        Unreadable: a turn has another form.
    """
    turns = row.get("messages", row.get("conversations"))
    if not isinstance(turns, list) or not turns:
        raise Unreadable("wrong_type", "messages must be a list of turns")
    system = row.get("system")
    found = [("system", system)] if isinstance(system, str) and system else []
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict):
            raise Unreadable("wrong_type", f"messages[{number}] must be an object")
        role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in _ROLES:
            raise Unreadable(
                "wrong_type", f"messages[{number}]: the role {role!r} is none of {', '.join(_ROLES)}"
            )
        if isinstance(said, list) and all(
            isinstance(part, dict) for part in said
        ):  # parts of text, as the API takes them
            said = "".join(str(part.get("text", "")) for part in said)
        if not isinstance(said, str):
            raise Unreadable("wrong_type", f"messages[{number}]: what is said must be a string")
        found.append((_ROLES[str(role)], said))
    return found


def _is_chat(row: Mapping[str, Any]) -> bool:
    turns = row.get("messages", row.get("conversations"))
    return (
        isinstance(turns, list)
        and bool(turns)
        and all(
            (isinstance(turn, dict) and {"role", "content"} <= set(turn))
            or (isinstance(turn, dict) and {"from", "value"} <= set(turn))
            for turn in turns
        )
    )


def _asked(row: Mapping[str, Any]) -> tuple[str, str, str | None, int]:
    """(system, the question, its answer if there is one, how many questions)."""
    turns = _turns(row)
    answer = turns.pop()[1] if turns[-1][0] == "assistant" else None
    asked = [said for role, said in turns if role == "user"]
    system = "\n".join(said for role, said in turns if role == "system")
    answered = sum(role == "assistant" for role, _ in turns)
    return system, asked[-1] if asked else "", answer, max(len(asked), answered + 1)


def _chat_text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    system, user, answer, _ = _asked(row)
    return id_of(row) | _text(system, user, answer, reading)


def _chat(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    *_, answer, count = _asked(row)
    if count != 1:
        left_out["conversations of several turns"] += 1
        return None
    if answer is None:
        left_out["conversations without an answer"] += 1
        return None
    return _answer(answer, str(found["text"]), reading)


def _is_alpaca(row: Mapping[str, Any]) -> bool:
    return all(isinstance(row.get(name), str) for name in ("instruction", "output")) and isinstance(
        row.get("input", ""), str
    )


def _lists_labels(rows: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the prompts of alpaca rows list labels, or their answers are entities; otherwise they are rows of ours."""
    if not every(rows, _is_alpaca):
        return False
    prompts = [f"{row['instruction']}\n{row.get('input', '')}" for row in rows]
    listed = sum(
        listed_in(prompt, [row["output"].strip()]) is not None
        for prompt, row in zip(prompts, rows, strict=True)
    )
    return 2 * listed > len(rows) or any(_entities(row["output"]) for row in rows)


def _alpaca_text(row: Mapping[str, Any], reading: Reading) -> dict[str, Any]:
    instruction, given = str(row.get("instruction", "")), str(row.get("input") or "")
    answer = row.get("output") if isinstance(row.get("output"), str) else None
    system, user = (instruction, given) if given else ("", instruction)
    return id_of(row) | _text(system, user, answer, reading)


def _alpaca(
    row: Mapping[str, Any], found: dict[str, Any], reading: Reading, left_out: LeftOut
) -> dict[str, Any] | None:
    answer = row.get("output")
    if not isinstance(answer, str):
        left_out["conversations without an answer"] += 1
        return None
    return _answer(answer, str(found["text"]), reading)


def _text(system: str, user: str, answer: str | None, reading: Reading) -> dict[str, Any]:
    """Text and candidates of a question, by what was said to it where that is known."""
    entities = _entities(answer) if answer is not None else None
    if reading.task == "ner" or (reading.task is None and entities):
        return {
            "text": _BEFORE.sub("", user, count=1) if user.startswith(NER_USER.partition("{")[0]) else user
        }
    labels = _labels(answer, reading) if answer is not None else []
    if (listed := listed_in(user, labels, reading.labels)) is not None:
        return {"category": listed[0], "text": _without_list(user, listed[1])}
    if (listed := listed_in(system, labels, reading.labels)) is not None:
        return {"category": listed[0], "text": _BEFORE.sub("", user, count=1)}
    return {"text": user}


def _answer(answer: str, text: str, reading: Reading) -> dict[str, Any]:
    entities = _entities(answer)
    if reading.task == "ner" or (reading.task is None and entities):
        if entities is None:
            raise Unreadable(
                "wrong_type",
                'the answer is no list of entities, {"entity_text": ..., "entity_label": ...} each',
            )
        return {"entities": named_entities(entities, text)}
    return answer_of(_labels(answer, reading), reading.task or "classification")


def _labels(answer: str, reading: Reading) -> list[str]:
    """The label that was said, or the labels: a list, or between commas or line breaks."""
    if reading.task != "multilabel":
        return [answer.strip()]
    with contextlib.suppress(DataError):
        if answer.strip().startswith("["):
            return parse_candidates(answer)
    return [label.strip() for label in re.split(r"[\n,，、;；]", answer) if label.strip()]


def _without_list(user: str, place: tuple[int, int]) -> str:
    """The text of a question without the list of labels and the words that announce it."""
    before, behind = user[: place[0]], user[place[1] :]
    before = _BETWEEN.sub("", before)
    left = "\n".join(part for part in (before.strip(), behind.strip(" \n,，;；。.")) if part)
    return _BEFORE.sub("", left, count=1) or user


def _entities(answer: str) -> list[Any] | None:
    """The entities that an answer names; none where it says that there are none, None where it is something else."""
    if answer.strip() in _NONE:
        return []
    try:
        found = json_lines(answer)
    except (ValueError, RecursionError):
        return None
    good = found and all(
        isinstance(one, dict) and {"entity_text", "entity_label"} <= set(one) for one in found
    )
    return found if good else None


READERS = (
    Reader("messages", "messages", lambda rows: every(rows, _is_chat), each(_chat_text, _chat)),
    Reader("alpaca", "instruction, input, output", _lists_labels, each(_alpaca_text, _alpaca)),
)
