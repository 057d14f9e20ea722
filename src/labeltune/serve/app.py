"""The application: routes, their documentation, and what becomes of faults."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from labeltune import __version__
from labeltune.serve import schemas
from labeltune.serve.chat import check, chunks, completion, question
from labeltune.serve.examples import examples_for
from labeltune.serve.faults import ApiError, field_name
from labeltune.serve.metrics import Metrics
from labeltune.serve.models import Models, Served
from labeltune.serve.service import Service
from labeltune.serve.settings import Settings
from labeltune.types import Entity, Prediction

_FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.FaultResponse, "description": text}
    for status, text in {
        400: "the body is not JSON or not UTF-8",
        401: "the API key is missing or wrong",
        404: "there is no such model or address",
        408: "the body did not arrive in time",
        413: "a text, a list or the body is over its limit",
        415: "the body is not announced as JSON",
        422: "a field is missing, unknown or cannot be used; `param` names it",
        429: "the queue is full; `retry-after` says for how many seconds",
        503: "the server is being stopped, or the model failed",
        504: "no answer in time",
    }.items()
}


def create_app(models: Models, settings: Settings, metrics: Metrics) -> tuple[FastAPI, Service]:
    """The application, without the guard in front of it, and the service behind it."""
    service = Service(models, settings, metrics)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    # The usual documentation page loads its viewer from elsewhere; this one brings it.
    app = FastAPIOffline(
        title="labeltune",
        version=__version__,
        description="Labels with exact probabilities, and entities that stand in the text.",
        lifespan=life,
        separate_input_output_schemas=False,
        docs_url="/docs",
        redoc_url=None,
    )
    _add_health(app, service)
    _add_answers(app, service)
    _add_faults(app)
    if settings.api_key is not None:
        _document_key(app)
    return app, service


def _add_health(app: FastAPI, service: Service) -> None:
    started = int(time.time())

    def card(served: Served) -> schemas.ModelCard:
        return schemas.ModelCard(
            id=served.name, created=started, task=served.task, labels=list(served.labels)
        )

    @app.get("/healthz", tags=["state"], summary="The process answers")
    async def healthz() -> schemas.Health:
        return schemas.Health()

    @app.get("/readyz", tags=["state"], summary="Requests are taken", responses={503: _FAULTS[503]})
    async def readyz() -> schemas.Health:
        if not service.batcher.alive:
            raise ApiError(503, "the server is being stopped, or its worker has died")
        return schemas.Health()

    @app.get("/metrics", tags=["state"], summary="Figures for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4; charset=utf-8")

    @app.get("/v1/models", tags=["models"], summary="All runs of this server", responses={401: _FAULTS[401]})
    async def list_models() -> schemas.ModelList:
        return schemas.ModelList(data=[card(served) for served in service.models.served.values()])

    @app.get(
        "/v1/models/{model}",
        tags=["models"],
        summary="One run",
        responses={status: _FAULTS[status] for status in (401, 404, 422)},
    )
    async def show_model(model: str) -> schemas.ModelCard:
        return card(service.named(model))


def _add_answers(app: FastAPI, service: Service) -> None:
    shown = examples_for(service.models)
    classify_body = Body(openapi_examples=shown["classify"])
    extract_body = Body(openapi_examples=shown["extract"])
    chat_body = Body(openapi_examples=shown["chat"])

    @app.post("/v1/classify", tags=["answers"], summary="Labels with exact probabilities", responses=_FAULTS)
    async def classify(
        request: Request, given: schemas.ClassifyRequest = classify_body
    ) -> schemas.ClassifyResponse:
        served = service.pick(given.model, "classification")
        labels = given.labels or []
        answers = await service.ask(served, given.text, labels, receive=request.receive)
        found = [_classified(answer.prediction, given) for answer in answers]
        return schemas.ClassifyResponse(model=served.name, results=found)

    @app.post("/v1/extract", tags=["answers"], summary="Entities with their places", responses=_FAULTS)
    async def extract(
        request: Request, given: schemas.ExtractRequest = extract_body
    ) -> schemas.ExtractResponse:
        served = service.pick(given.model, "ner")
        for number, label in enumerate(given.labels or []):
            if label not in served.labels:
                name = f"labels[{number}]"
                raise ApiError(422, f"{name} is no entity type of {served.name}: {list(served.labels)}", name)
        answers = await service.ask(served, given.text, receive=request.receive)
        found = [_extracted(answer.prediction, given) for answer in answers]
        return schemas.ExtractResponse(model=served.name, results=found)

    @app.post(
        "/v1/chat/completions",
        tags=["answers"],
        summary="The same for clients of OpenAI's API",
        response_model=schemas.ChatResponse,
        responses=_FAULTS,
    )
    async def chat(request: Request, given: schemas.ChatRequest = chat_body) -> Response:
        served = service.pick(given.model, None)
        check(given, served)
        text, labels, field = question(given, served)
        (answer,) = await service.ask(
            served,
            [text],
            labels,
            field=field,
            count_tokens=True,
            stop=given.stops,
            max_tokens=given.max_completion_tokens or given.max_tokens,
            receive=request.receive,
        )
        whole = completion(served, answer, given)
        if given.stream:
            usage = given.stream_options is not None and bool(given.stream_options.include_usage)
            return StreamingResponse(chunks(whole, usage=usage), media_type="text/event-stream")
        return JSONResponse(whole.model_dump())


def _classified(prediction: Prediction, given: schemas.ClassifyRequest) -> schemas.Classified:
    return schemas.Classified.model_validate(prediction.to_dict(given.top_k, given.min_confidence))


def _extracted(prediction: Prediction, given: schemas.ExtractRequest) -> schemas.Extracted:
    def surety(entity: Entity) -> float:
        return math.exp(entity.score) if entity.score is not None else 0.0

    kept = [e for e in prediction.entities or () if given.labels is None or e.label in given.labels]
    if given.min_confidence is not None:
        kept = [entity for entity in kept if surety(entity) >= given.min_confidence]
    if given.top_k is not None:
        surest = sorted(range(len(kept)), key=lambda n: -surety(kept[n]))[: given.top_k]
        kept = [kept[n] for n in sorted(surest)]
    return schemas.Extracted(
        entities=[schemas.FoundEntity.model_validate(entity.to_dict()) for entity in kept],
        truncated=prediction.truncated,
    )


def _add_faults(app: FastAPI) -> None:
    def answer(error: ApiError) -> Response:
        return Response(
            json.dumps(error.body()), error.status, error.headers(), media_type="application/json"
        )

    @app.exception_handler(ApiError)
    async def known(_: Request, error: ApiError) -> Response:
        return answer(error)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        # What was sent is not repeated: it may be a document, or impossible to encode.
        name = field_name([part for part in first["loc"] if part not in ("body", "path")])
        text = first["msg"].removeprefix("Value error, ")
        if first["type"] == "extra_forbidden":
            text = "there is no such field here; leave it out"
        return answer(ApiError(422, f"{name}: {text}", name))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        answered = answer(ApiError(error.status_code, str(error.detail)))
        answered.headers.update(error.headers or {})
        return answered


def _document_key(app: FastAPI) -> None:
    """Say in the OpenAPI document that the answers need a key."""
    plain = app.openapi

    def openapi() -> dict[str, Any]:
        found = plain()
        found.setdefault("components", {})["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        for path, operations in found["paths"].items():
            if path.startswith("/v1/"):
                for operation in operations.values():
                    operation["security"] = [{"key": []}]
        return found

    app.openapi = openapi  # type: ignore[method-assign]
