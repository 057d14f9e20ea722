"""Requests and responses of the API, as pydantic models; the OpenAPI document is made from them."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, WithJsonSchema

from labeltune.serve.body import CLEAN_PATTERN

_STRING = {"type": "string", "minLength": 1, "pattern": CLEAN_PATTERN}


def _listed(value: Any) -> Any:
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
    score: float | None = Field(None, description="mean log-probability of the tokens that chose it")


class Extracted(BaseModel):
    """The entities of one document, in order of appearance."""

    entities: list[FoundEntity]
    truncated: bool = Field(description="the answer reached its length limit; entities may be missing")


class ExtractResponse(BaseModel):
    """One result a document, in order."""

    model: str
    results: list[Extracted]


class ContentPart(BaseModel):
    """A part of a message; only text is read."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart]

    @property
    def text(self) -> str:
        """Its whole text."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(BaseModel):
    """What OpenAI's clients send; sampling parameters have no effect, as nothing is sampled."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    messages: list[Message] = Field(
        min_length=1, description="the last user message is the document, or the run's whole prompt around it"
    )
    model: str | None = Field(None, description="a run of this server; the first when left out")
    stream: bool | None = Field(None, description="the whole answer comes as one chunk")
    n: Literal[1] | None = Field(None, description="there is one answer")


class ChatMessage(BaseModel):
    """The answer: a label, or JSON lines of entities."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The only choice."""

    index: Literal[0] = 0
    message: ChatMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


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
