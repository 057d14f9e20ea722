"""Chat completions: the user message is a document, or the whole prompt of a run around one; the answer is the constrained one."""

from __future__ import annotations

import json
import math
import time
import uuid
from collections.abc import Iterator

from labeltune.data.labels import parse_candidates
from labeltune.errors import DataError
from labeltune.prompts.labels import label_fault
from labeltune.prompts.template import build_conversation
from labeltune.serve.batching import Answer
from labeltune.serve.models import Served
from labeltune.serve.schemas import (
    ApiError,
    ChatMessage,
    ChatRequest,
    ChatResponse,
    Choice,
    Logprobs,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from labeltune.types import Prediction

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
    """Document and candidates of a user message: what stands where the run's prompt has them, else all of it and none.

    Where labels are described, only the run's own list of them is known.
    """
    task = served.predictor.task
    values = task.values(served.labels)
    if task.name != "ner" and not task.prompt.descriptions:
        values["category"] = _MARK
    shape = build_conversation(task.prompt, "", values)
    marks = shape.user.count(_MARK)
    start, middle, end = shape.before_text, "", shape.after_text
    labels_last = _MARK in end
    whole = content, ()
    if marks > 1:
        return whole
    if labels_last:
        middle, end = end.split(_MARK)
    elif marks:
        start, middle = start.split(_MARK)
    if not content.startswith(start) or not content.endswith(end):
        return whole
    inner = content[len(start) : len(content) - len(end)]
    if not marks:
        return inner or content, ()
    if not middle:
        return whole
    text, found, listed = inner.rpartition(middle) if labels_last else inner.partition(middle)[::-1]
    try:
        labels = tuple(parse_candidates(listed)) if found and len(listed) <= 100_000 else ()
    except DataError:  # no list, so it is part of the document
        return whole
    if not text.strip() or not labels or label_fault(labels):
        return whole
    return text, labels


def check(request: ChatRequest, served: Served) -> None:
    """Refuse fields that do not go together, or not with this run.

    Raises:
        ApiError: with the field (422).
    """
    if request.stream_options is not None and not request.stream:
        raise ApiError(422, "stream_options: send it together with stream=true", "stream_options")
    if request.top_logprobs and not request.logprobs:
        raise ApiError(422, "top_logprobs: send it together with logprobs=true", "top_logprobs")
    if request.logprobs and served.task == "ner":
        raise ApiError(
            422, f"logprobs: {served.name} finds entities; /v1/extract gives their scores", "logprobs"
        )
    if request.logprobs and served.task == "multilabel":
        raise ApiError(
            422,
            f"logprobs: {served.name} decides every label by itself; /v1/classify gives their probabilities",
            "logprobs",
        )


def completion(served: Served, answer: Answer, request: ChatRequest) -> ChatResponse:
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
                logprobs=_logprobs(answer.prediction, request.top_logprobs or 0)
                if request.logprobs
                else None,
            )
        ],
        usage=Usage(prompt_tokens=prompt, completion_tokens=written, total_tokens=prompt + written),
    )


def _logprobs(prediction: Prediction, top: int) -> Logprobs:
    """The whole answer as one token with the label's probability, beside the first `top` labels of the ranking."""
    ranking = [(label, _log(probability)) for label, probability in prediction.ranking]
    ranked = [
        TopLogprob(token=label, logprob=logprob, bytes=list(label.encode()))
        for label, logprob in ranking[:top]
    ]
    said, logprob = prediction.answer, dict(ranking)[str(prediction.label)]
    return Logprobs(
        content=[TokenLogprob(token=said, logprob=logprob, bytes=list(said.encode()), top_logprobs=ranked)]
    )


def _log(probability: float) -> float:
    """JSON has no infinity; the protocol writes -9999 for what is very unlikely."""
    return max(math.log(probability), -9999.0) if probability > 0 else -9999.0


def chunks(whole: ChatResponse, *, usage: bool) -> Iterator[str]:
    """The same for a client that asked for a stream: one chunk with everything, one with `usage` if wanted, and the end."""
    (choice,) = whole.choices
    head = {**whole.model_dump(exclude={"choices", "usage"}), "object": "chat.completion.chunk"}
    told = choice.model_dump()
    told["delta"] = {"role": "assistant", "content": told.pop("message")["content"]}
    first = {**head, "choices": [told]}
    if usage:
        first["usage"] = None
    yield f"data: {json.dumps(first)}\n\n"
    if usage:
        last = {**head, "choices": [], "usage": whole.usage.model_dump()}
        yield f"data: {json.dumps(last)}\n\n"
    yield "data: [DONE]\n\n"
