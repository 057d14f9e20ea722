"""Requests, responses and errors of the API; the OpenAPI document is made from the pydantic models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

#: HTTP status -> (`type` of the error, what it says).
KINDS: dict[int, str] = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "timeout_error",
    413: "too_large_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    429: "overloaded_error",
    500: "server_error",
    503: "server_error",
    504: "timeout_error",
}


class ApiError(Exception):
    """A request that gets no answer.

    Args:
        status: HTTP status.
        message: what is wrong and how to repair it; never holds the document.
        param: the field of the request, e.g. `text[3]`.
        retry_after: seconds until it is worth trying again.
        allow: methods that the address takes.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        retry_after: int | None = None,
        allow: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.retry_after = status, message, param, retry_after
        self.allow = tuple(allow)

    def headers(self) -> dict[str, str]:
        """Headers that belong to the status."""
        found = {} if self.retry_after is None else {"retry-after": str(self.retry_after)}
        if self.allow:
            found["allow"] = ", ".join(self.allow)
        return {**found, "www-authenticate": "Bearer"} if self.status == 401 else found

    def body(self) -> dict[str, Any]:
        """The response as JSON."""
        kind = KINDS.get(self.status, "invalid_request_error")
        return {
            "error": {"message": self.message, "type": kind, "param": self.param, "code": str(self.status)}
        }


def field_name(path: Sequence[str | int]) -> str:
    """`("messages", 0, "content")` -> `messages[0].content`; foreign names are shortened and always printable."""
    name = ""
    for part in path:
        if isinstance(part, int):
            name += f"[{part}]"
        else:
            plain = part[:60].encode("ascii", "backslashreplace").decode()
            plain = "".join(c if c.isprintable() else "?" for c in plain)
            name += f".{plain}" if name else plain
    return name or "body"


#: Documents without control characters, as a JSON schema pattern; the guard refuses the others.
CLEAN_PATTERN = r"^[^\x00-\x08\x0b\x0e-\x1f\x7f]*$"
_STRING = {"type": "string", "minLength": 1, "pattern": CLEAN_PATTERN}


def _listed(value: object) -> list[object]:
    if not isinstance(value, (str, list)):
        raise ValueError("send a string or a list of strings")
    return [value] if isinstance(value, str) else value


#: One text or several; always a list behind the validation.
Texts = Annotated[
    list[str],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_STRING, {"type": "array", "items": _STRING, "minItems": 1}]}),
    Field(min_length=1, description="a document, or a list of documents"),
]
Labels = Annotated[
    list[Annotated[str, WithJsonSchema(_STRING)]] | None,
    Field(min_length=1),
]


class _Request(BaseModel):
    """Strict about types and names, so that a typing error is not answered as something else."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    text: Texts
    model: str | None = Field(
        None, description="a run of this server; the first that can answer when left out"
    )


class ClassifyRequest(_Request):
    """Documents to be given one of the labels."""

    labels: Labels = Field(None, description="candidates; the run's own label set when left out")
    top_k: int | None = Field(None, ge=1, description="candidates of the ranking to show; all when left out")
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="below this probability the label is null; the ranking is kept"
    )


class ExtractRequest(_Request):
    """Documents whose entities are to be found."""

    labels: Labels = Field(None, description="types to return, of those the run knows; all when left out")
    top_k: int | None = Field(None, ge=1, description="return only the surest entities of a text, this many")
    min_confidence: float | None = Field(
        None, ge=0, le=1, description="leave out entities whose exp(score) is below this"
    )


class Candidate(BaseModel):
    """A label and its probability."""

    label: str
    probability: float


class Classified(BaseModel):
    """The answer to one document."""

    label: str | None = Field(description="null when its probability is below `min_confidence`")
    confidence: float
    ranking: list[Candidate]


class ClassifyResponse(BaseModel):
    """One result a document, in order."""

    model: str
    results: list[Classified]


class FoundEntity(BaseModel):
    """An entity at `text[start_idx:end_idx]`, in Unicode characters, end exclusive."""

    start_idx: int | None
    end_idx: int | None
    entity_text: str
    entity_label: str
    score: float | None = Field(
        None,
        description="mean log-probability of the tokens that chose it; of marks in the text, the sum over its marks",
    )


class Extracted(BaseModel):
    """The entities of one document, in order of appearance."""

    entities: list[FoundEntity]
    truncated: bool = Field(description="the answer reached its length limit; entities may be missing")


class ExtractResponse(BaseModel):
    """One result a document, in order."""

    model: str
    results: list[Extracted]


def _text_only(value: object) -> object:
    if value != "text":
        raise ValueError("only text parts are read")
    return value


class ContentPart(BaseModel):
    """A part of a message; only text is read."""

    type: Annotated[Literal["text"], BeforeValidator(_text_only)]
    text: str


def _parts(value: object) -> object:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[
        list[ContentPart] | None,
        BeforeValidator(_parts),
        WithJsonSchema(
            {
                "anyOf": [
                    {"type": "string"},
                    {"type": "array", "items": ContentPart.model_json_schema()},
                    {"type": "null"},
                ]
            }
        ),
    ] = Field(None, description="text, or parts of type `text`, which are joined")

    @property
    def text(self) -> str:
        """Its whole text."""
        return "".join(part.text for part in self.content or ())


class StreamOptions(BaseModel):
    """What a stream holds beside the answer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    include_usage: bool | None = Field(None, description="a last chunk with `usage` and no choices")
    include_obfuscation: bool | None = Field(
        None, description="no effect: the answer comes as one chunk, so no sizes of tokens can be seen"
    )


def _only(*values: Any, because: str) -> Any:
    """A field that may hold these values alone, as any other would ask for something that is not done here."""
    return Field(None, description=because, json_schema_extra={"enum": [None, *values]})


def _no_effect(because: str) -> Any:
    """A field that is accepted, as it cannot change the answer."""
    return Field(None, description=f"no effect: {because}")


_SAMPLING = "nothing is sampled"
_KEPT = "nothing is kept"
_THINKING = "nothing is thought aloud"


class ChatRequest(BaseModel):
    """What OpenAI's clients send. A field is honoured, or accepted because it cannot change the answer, or refused by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    messages: list[Message] = Field(
        min_length=1, description="the last user message is the document, or the run's whole prompt around it"
    )
    model: str | None = Field(
        None, description="a run of this server; the first when left out, and the only one whatever is said"
    )
    stream: bool | None = Field(None, description="the whole answer comes as one chunk")
    stream_options: StreamOptions | None = Field(None, description="only together with `stream`")
    logprobs: bool | None = Field(
        None,
        description="a classifier's answer counts as one token, the whole label, with its exact probability",
    )
    top_logprobs: int | None = Field(
        None, ge=0, le=20, description="so many labels of the ranking; only together with `logprobs`"
    )
    stop: (
        Annotated[str, Field(min_length=1)]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(max_length=4)]
        | None
    ) = Field(None, description="the answer is cut before the first of these")
    max_completion_tokens: int | None = Field(
        None, ge=1, description="a longer answer is cut, with the finish reason `length`"
    )
    max_tokens: int | None = Field(None, ge=1, description="the older name of `max_completion_tokens`")

    n: Any = _only(1, because="there is one answer")
    response_format: Any = _only(
        {"type": "text"}, because="the answer is a label, or JSON lines of entities, and follows no schema"
    )
    tools: Any = _only([], because="no tool is called")
    tool_choice: Any = _only("none", because="no tool is called")
    functions: Any = _only([], because="no function is called")
    function_call: Any = _only("none", because="no function is called")
    web_search_options: Any = _only(because="nothing is looked up")
    moderation: Any = _only(because="nothing is moderated")
    modalities: Any = _only(["text"], because="the answer is text")
    audio: Any = _only(because="the answer is text")
    logit_bias: Any = _only({}, because="labels are compared by their exact probabilities")
    frequency_penalty: Any = _only(0, because="labels are compared by their exact probabilities")
    presence_penalty: Any = _only(0, because="labels are compared by their exact probabilities")
    repetition_penalty: Any = _only(1, because="labels are compared by their exact probabilities")

    temperature: Any = _no_effect(_SAMPLING)
    top_p: Any = _no_effect(_SAMPLING)
    top_k: Any = _no_effect(_SAMPLING)
    min_p: Any = _no_effect(_SAMPLING)
    seed: Any = _no_effect(_SAMPLING)
    prediction: Any = _no_effect("it is a help for speed")
    parallel_tool_calls: Any = _no_effect("no tool is called")
    reasoning_effort: Any = _no_effect(_THINKING)
    enable_thinking: Any = _no_effect(_THINKING)
    chat_template_kwargs: Any = _no_effect("the prompt is the run's own")
    verbosity: Any = _no_effect("the form of the answer is the run's own")
    store: Any = _no_effect(_KEPT)
    metadata: Any = _no_effect(_KEPT)
    user: Any = _no_effect(_KEPT)
    safety_identifier: Any = _no_effect(_KEPT)
    prompt_cache_key: Any = _no_effect(_KEPT)
    prompt_cache_options: Any = _no_effect(_KEPT)
    prompt_cache_retention: Any = _no_effect(_KEPT)
    service_tier: Any = _no_effect("there is one kind of service")

    @field_validator("*", mode="before")
    @classmethod
    def _allowed(cls, value: object, info: ValidationInfo) -> object:
        field = cls.model_fields[info.field_name or ""]
        extra = field.json_schema_extra
        allowed: Any = extra["enum"] if isinstance(extra, dict) and "enum" in extra else [value]
        if value not in allowed:
            others = " or ".join(json.dumps(each) for each in allowed if each is not None)
            raise ValueError(f"{field.description}; leave it out{f' or send {others}' if others else ''}")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Where the answer is cut."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatMessage(BaseModel):
    """The answer: a label, or JSON lines of entities."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class TopLogprob(BaseModel):
    """A label as a token."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """The answer as one token."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """The answer's one token."""

    content: list[TokenLogprob]
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: Logprobs | None = None


class Usage(BaseModel):
    """Tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ChatResponse(BaseModel):
    """A chat completion as OpenAI writes it."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(description="seconds since 1970")
    model: str
    choices: list[Choice]
    usage: Usage


class ModelCard(BaseModel):
    """A run of this server."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "labeltune"
    task: Literal["classification", "ner"]
    labels: list[str]


class ModelList(BaseModel):
    """All runs of this server."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Fault(BaseModel):
    """What is wrong with a request."""

    message: str
    type: str
    param: str | None = Field(description="the field, e.g. `text[3]`")
    code: str


class FaultResponse(BaseModel):
    """The body of every response that is no answer."""

    error: Fault


class Health(BaseModel):
    """The state of the server."""

    status: Literal["ok"] = "ok"
