"""Chat completions: the user message is a document, or the whole prompt of a run around one; the answer is the constrained one."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Iterator

from labeltune.data.schemas import parse_candidates
from labeltune.serve.batching import Answer
from labeltune.serve.faults import ApiError
from labeltune.serve.models import Served
from labeltune.serve.schemas import ChatMessage, ChatRequest, ChatResponse, Choice, Usage
from labeltune.tasks.base import build_conversation
from labeltune.tasks.classification import label_fault

_MARK = "\x00labels\x00"


def question(request: ChatRequest, served: Served) -> tuple[str, tuple[str, ...], str]:
    """(document, candidate labels - none for the run's own -, the field it stands in).

    System messages have no effect: a run is asked with the prompt it was trained with.

    Raises:
        ApiError: there is no user message.
    """
    numbers = [n for n, message in enumerate(request.messages) if message.role == "user"]
    if not numbers:
        raise ApiError(422, "messages holds no user message", "messages")
    content = request.messages[numbers[-1]].text
    return *read_prompt(content, served), f"messages[{numbers[-1]}].content"


def read_prompt(content: str, served: Served) -> tuple[str, tuple[str, ...]]:
    """Document and candidates of a user message: what stands where the run's prompt has them, else all of it and none."""
    task = served.predictor.task
    values = {"category": _MARK, "labels": "; ".join(served.labels), "no_entities": task.prompt.no_entities}
    if task.name == "ner":
        values["category"] = repr(list(served.labels))
    shape = build_conversation(task.prompt, "", values)
    whole = content, ()
    if shape.user.count(_MARK) == 0:
        before, after = shape.before_text, shape.after_text
        if not content.startswith(before) or not content.endswith(after) or not before + after:
            return whole
        return content[len(before) : len(content) - len(after)] or content, ()
    if shape.user.count(_MARK) > 1:
        return whole
    if _MARK in shape.after_text:
        middle, end = shape.after_text.split(_MARK)
        start = shape.before_text
        if not middle or not content.startswith(start) or not content.endswith(end):
            return whole
        text, found, listed = content[len(start) : len(content) - len(end)].rpartition(middle)
    else:
        start, middle = shape.before_text.split(_MARK)
        end = shape.after_text
        if not middle or not content.startswith(start) or not content.endswith(end):
            return whole
        listed, found, text = content[len(start) : len(content) - len(end)].partition(middle)
    labels = tuple(parse_candidates(listed)) if found and len(listed) <= 100_000 else ()
    if not text.strip() or not labels or label_fault(labels):
        return whole
    return text, labels


def completion(served: Served, answer: Answer) -> ChatResponse:
    """The answer as OpenAI writes it."""
    prompt, written = answer.prompt_tokens, answer.answer_tokens
    return ChatResponse(
        id=f"chatcmpl-{uuid.uuid4().hex}",
        created=int(time.time()),
        model=served.name,
        choices=[
            Choice(
                message=ChatMessage(content=answer.prediction.answer),
                finish_reason="length" if answer.prediction.truncated else "stop",
            )
        ],
        usage=Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written),
    )


def chunks(whole: ChatResponse) -> Iterator[str]:
    """The same for a client that asked for a stream: one chunk with everything, and the end."""
    (choice,) = whole.choices
    values = {
        **whole.model_dump(exclude={"choices", "usage"}),
        "object": "chat.completion.chunk",
        "choices": [
            {
                "index": 0,
                "delta": {"role": "assistant", "content": choice.message.content},
                "finish_reason": choice.finish_reason,
            }
        ],
    }
    yield f"data: {json.dumps(values)}\n\n"
    yield "data: [DONE]\n\n"
