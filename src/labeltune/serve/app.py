"""The application and the process that runs it: routes, their documentation, errors; a socket, uvicorn, and an end that finishes
what has been accepted."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import json
import logging
import math
import signal
import socket
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import Body, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from labeltune import __version__
from labeltune.errors import ConfigError
from labeltune.serve import schemas
from labeltune.serve.chat import check, chunks, completion, question
from labeltune.serve.guard import Guard, Metrics, frames, log, log_to_stderr
from labeltune.serve.label_studio import PREFIX, Backend, add_label_studio
from labeltune.serve.models import DOCUMENTS, Models, Served, documents
from labeltune.serve.retraining import Retraining
from labeltune.serve.schemas import ApiError, field_name
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
    first = next(iter(models.served))
    retraining = Retraining(models, first)

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        retraining.close()
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
    if settings.label_studio:
        add_label_studio(app, Backend(service, first, retraining))
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
        served = service.pick(given.model, "classification", "multilabel")
        labels = given.labels or []
        answers = await service.ask(served, given.text, labels, receive=request.receive)
        found = [_classified(answer.prediction, given, served) for answer in answers]
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
        served = service.pick(given.model)
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


def examples_for(models: Models) -> dict[str, dict[str, Any] | None]:
    """OpenAPI examples by route, which work as they stand with the runs and labels of this server; None for a task that no run does."""
    labeller, extractor = models.first("classification", "multilabel"), models.first("ner")
    classify: dict[str, Any] = {}
    extract: dict[str, Any] = {}
    chat: dict[str, Any] = {}
    if labeller is not None:
        one, two = (*documents(labeller), *DOCUMENTS["classification"])[:2]
        own = list(labeller.labels)[:8] or ["Space", "Sports"]
        classify["one text"] = {"value": {"text": one, **({} if labeller.labels else {"labels": own})}}
        bound = "threshold" if labeller.task == "multilabel" else "min_confidence"
        classify["a list, labels of its own"] = {
            "value": {"text": [one, two], "labels": own, "top_k": 3, bound: 0.5}
        }
    if extractor is not None:
        one, two = (*documents(extractor), *DOCUMENTS["ner"])[:2]
        extract["one text"] = {"value": {"text": one}}
        extract["a list, one type"] = {"value": {"text": [one, two], "labels": list(extractor.labels)[:1]}}
    for served in models.served.values():
        if served.labels:
            message = {"role": "user", "content": documents(served)[0]}
            chat[served.name] = {"value": {"model": served.name, "messages": [message]}}
    return {"classify": classify or None, "extract": extract or None, "chat": chat or None}


def _classified(
    prediction: Prediction, given: schemas.ClassifyRequest, served: Served
) -> schemas.Classified | schemas.Labelled:
    if prediction.labels is None:
        if given.threshold is not None:
            raise ApiError(
                422, f"threshold: {served.name} gives one label a text; send min_confidence", "threshold"
            )
        return schemas.Classified.model_validate(prediction.to_dict(given.top_k, given.min_confidence))
    if given.min_confidence is not None:
        raise ApiError(
            422,
            f"min_confidence: {served.name} decides every label by itself; send threshold",
            "min_confidence",
        )
    return schemas.Labelled.model_validate(prediction.to_dict(given.top_k, threshold=given.threshold))


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


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet, so that a port in use is known before a model is loaded.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        # Named as TCP, so that asyncio sends small answers at once instead of waiting for acknowledgements.
        bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host}:{port}: {error}; choose another with --host and --port"
        ) from None
    return bound


def _make_page(service: Service) -> FastAPI:
    from labeltune.serve.playground import add_playground

    return add_playground(FastAPI(openapi_url=None), service)


def serve(
    models: Models, settings: Settings, bound: socket.socket, say: Callable[[str], None] = lambda _: None
) -> None:
    """Answer until SIGTERM or Ctrl-C; then take no more connections, finish what was accepted, and return.

    Args:
        say: told where the server listens and what it is called; logs go to standard error.
    """
    log_to_stderr()
    _raise_file_limit()
    metrics = Metrics()
    app, service = create_app(models, settings, metrics)
    host, port = bound.getsockname()[:2]
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    page = None
    if settings.playground:
        page = LaterApp(lambda: _make_page(service), lambda: say(f"the page is ready: {address}/"))
        app.mount("/", page)
    local = ipaddress.ip_address(host).is_loopback
    guard = Guard(app, settings, metrics, local)
    config = uvicorn.Config(
        guard,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=int(settings.timeout) + 5,
        backlog=2048,
    )

    def on_ready() -> None:
        log("ready", url=address, models=list(models.served))
        for served in models.served.values():
            say(f"serving {served.name} ({served.task}, {len(served.labels)} labels)")
        say(f"ready at {address}: documentation /docs; clients' base_url {address}/v1")
        if settings.label_studio:
            say(f"Label Studio: Settings, Model, Connect Model, backend URL {address}{PREFIX}")

    server = _Server(config, guard, on_ready, page)
    if not local and settings.api_key is None and settings.label_studio:
        raise ConfigError(
            f"--label-studio lets whoever reaches {host} train; set LABELTUNE_API_KEY, or listen on localhost"
        )
    if not local and settings.api_key is None:
        log("warning: this address can be reached by others and there is no API key")
    # uvicorn raises the signal again when it is done; a finished server has nothing to die of.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _done)
    server.run(sockets=[bound])
    service.close()
    log("stopped")
    say("stopped; what was accepted is answered")


def _done(number: int, frame: FrameType | None) -> None:
    pass


class LaterApp:
    """An application that is made in the background while the server answers already; requests wait until it is there.

    Importing the page's library takes about as long as importing everything else.

    Args:
        on_made: called when it is there.
    """

    def __init__(self, make: Callable[[], FastAPI], on_made: Callable[[], None] = lambda: None) -> None:
        self._make, self._on_made = make, on_made
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to make it, in the server's event loop."""
        self._made: asyncio.Future[FastAPI] = asyncio.get_running_loop().create_future()
        self._end = asyncio.Event()
        self._running = asyncio.ensure_future(self._run())

    async def _run(self) -> None:
        try:
            app = await asyncio.to_thread(self._make)
            # Its beginning and its end in one task, as some libraries want it.
            async with app.router.lifespan_context(app):
                self._made.set_result(app)
                self._on_made()
                await self._end.wait()
        except Exception as error:
            log("error", logging.ERROR, error=frames(error))
            if not self._made.done():
                self._made.set_exception(ApiError(503, "the page cannot be shown; the server's log says why"))
                self._made.exception()  # seen, also when nobody asks for the page

    async def stop(self) -> None:
        """Let it end."""
        if self._running is not None:
            self._end.set()
            await self._running

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if self._running is None:
            self.start()
        app = await asyncio.shield(self._made)
        await app(scope, receive, send)


class _Server(uvicorn.Server):
    def __init__(
        self, config: uvicorn.Config, guard: Guard, on_ready: Callable[[], None], page: LaterApp | None
    ) -> None:
        super().__init__(config)
        self._guard, self._on_ready, self._page = guard, on_ready, page

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens once it does."""
        await super().startup(sockets=sockets)
        if self.started:
            self._on_ready()
            if self._page is not None:
                self._page.start()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Pages that are open in browsers do not hold up the end."""
        log("stopping")
        self._guard.leave_pages()
        await super().shutdown(sockets=sockets)
        if self._page is not None:
            await self._page.stop()


def _raise_file_limit() -> None:
    """A connection is an open file, and the usual limit of 1,024 is less than the queue holds."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
