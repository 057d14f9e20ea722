"""Stands in front of the application: request ids, the key, bodies within their limits, JSON log lines, Prometheus figures."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import contextvars
import hmac
import ipaddress
import json
import logging
import re
import sys
import time
import traceback
import uuid
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from datetime import datetime, timezone
from typing import Any, NoReturn

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.routing import BaseRoute, Match, Mount, Route

from labeltune.serve.schemas import ApiError, field_name
from labeltune.serve.settings import Settings

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

#: Lists and objects inside each other; our own requests need four.
DEEPEST = 32
#: Control characters that documents have; `schemas.CLEAN_PATTERN` says the same.
_ALLOWED = {"\t", "\n", "\r", "\f"}
_CONTROL = {chr(code) for code in (*range(32), 127)} - _ALLOWED


class ClientGone(Exception):
    """The client closed the connection before its request was whole."""


async def read_body(receive: Receive, headers: dict[bytes, bytes], limit: int) -> bytes:
    """The bytes of a body.

    Raises:
        ApiError: it is larger than `limit` (413), which is seen before it is read where its length is announced.
        ClientGone: the client went away.
    """
    announced = headers.get(b"content-length", b"")
    if announced.isdigit() and len(announced) < 20 and int(announced) > limit:
        raise ApiError(413, f"the body has {int(announced)} bytes; at most {limit} are accepted", "body")
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > limit:
            raise ApiError(413, f"the body is larger than {limit} bytes", "body")
        if not message.get("more_body"):
            return b"".join(parts)


def check_json(body: bytes) -> None:
    """Refuse what is no JSON object, or would break something further in: depth, control characters, half characters.

    Raises:
        ApiError: with the field (400 for what is no JSON, else 422).
    """
    try:
        text = body.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ApiError(400, f"the body is not UTF-8: byte {error.start}", "body") from None
    try:
        value = json.loads(text, parse_constant=_no_constant)
    except RecursionError:
        raise ApiError(422, "the body is nested too deeply", "body") from None
    except json.JSONDecodeError as error:
        raise ApiError(400, f"the body is not JSON: {error.msg} at character {error.pos}", "body") from None
    except ValueError as error:
        raise ApiError(400, f"the body is not JSON: {str(error)[:100]}", "body") from None
    if not isinstance(value, dict):
        raise ApiError(422, "the body must be a JSON object", "body")
    _look_through(value)


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")


def _look_through(value: object) -> None:
    left: list[tuple[object, tuple[str | int, ...]]] = [(value, ())]
    while left:
        item, path = left.pop()
        if isinstance(item, str):
            _check_text(item, path)
        elif isinstance(item, (dict, list)):
            if len(path) >= DEEPEST:
                name = field_name(path[:4])
                raise ApiError(422, f"{name}: lists and objects are nested more than {DEEPEST} deep", name)
            pairs = item.items() if isinstance(item, dict) else enumerate(item)
            for key, inner in pairs:
                if isinstance(key, str):
                    _check_text(key, (*path, key))
                left.append((inner, (*path, key)))


def _check_text(text: str, path: tuple[str | int, ...]) -> None:
    name = field_name(path)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ApiError(
            422, f"{name}: half a surrogate pair at character {error.start}; send whole characters", name
        ) from None
    if not _CONTROL.isdisjoint(text):
        at = next(i for i, c in enumerate(text) if c in _CONTROL)
        raise ApiError(
            422, f"{name}: control character U+{ord(text[at]):04X} at character {at}; remove it", name
        )


#: What a request adds to its own line; set anew for every request.
request_notes: contextvars.ContextVar[dict[str, Any] | None] = contextvars.ContextVar(
    "request_notes", default=None
)
_log = logging.getLogger("labeltune.serve")


def note(**values: Any) -> None:
    """Add values to the line of the request that is being answered."""
    notes = request_notes.get()
    if notes is not None:
        notes.update(values)


def log(event: str, level: int = logging.INFO, **values: Any) -> None:
    """Write a line."""
    _log.log(level, event, extra={"values": values})


def frames(error: BaseException) -> list[str]:
    """Kind and places of an error; its message may hold a document and is left out."""
    places = traceback.extract_tb(error.__traceback__)
    return [type(error).__name__, *(f"{place.filename}:{place.lineno} {place.name}" for place in places[-8:])]


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Ours with its values; of other libraries' lines the message, and of their errors the places."""
        values = getattr(record, "values", None)
        line: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "event": record.getMessage() if values is None else record.msg,
        }
        if record.exc_info and record.exc_info[1] is not None:
            line["error"] = frames(record.exc_info[1])
        return json.dumps({**line, **(values or {})}, ensure_ascii=True)


def log_to_stderr() -> None:
    """Send our lines, and the errors and warnings of uvicorn, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name, level in (("labeltune.serve", logging.INFO), ("uvicorn.error", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """What is counted; labels hold routes and names of runs, never what a client made up."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "labeltune_requests", "Requests by route and status", ["route", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "labeltune_request_seconds",
            "Seconds from the request's head to its last byte",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.in_progress = Gauge(
            "labeltune_requests_in_progress", "Requests being answered", registry=self.registry
        )
        self.rows = Counter("labeltune_rows", "Texts answered", ["model"], registry=self.registry)
        self.batch_rows = Histogram(
            "labeltune_batch_rows", "Texts of a batch", ["model"], buckets=_ROWS, registry=self.registry
        )
        self.batch_seconds = Histogram(
            "labeltune_batch_seconds",
            "Seconds the model took for a batch",
            ["model"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.waiting = Gauge("labeltune_queue_rows", "Texts that wait for the model", registry=self.registry)

    def watch_queue(self, waiting: Callable[[], int]) -> None:
        """Ask for the length of the queue whenever the figures are read."""
        self.waiting.set_function(lambda: float(waiting()))

    def on_batch(self, model: str, rows: int, seconds: float) -> None:
        """A batch is done."""
        self.rows.labels(model).inc(rows)
        self.batch_rows.labels(model).observe(rows)
        self.batch_seconds.labels(model).observe(seconds)

    def on_request(self, route: str, status: int, seconds: float) -> None:
        """A request is done."""
        self.requests.labels(route, str(status)).inc()
        self.seconds.labels(route).observe(seconds)

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.registry)


Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
#: Asked for every few seconds by machines; they are counted and not logged, like the files of pages.
_STATE = ("/healthz", "/readyz", "/metrics")
#: Status of a request whose client went away; it is only seen in logs and figures.
CLIENT_GONE = 499


class Guard:
    """An ASGI application around another one.

    Everything below `/v1` needs the key, if there is one, and a JSON body within its limits; the rest passes through with a
    log line. What the application raises becomes a 500 without details.

    Args:
        local: only this machine is to get in; without a key, names that are not this machine's are then refused, as a web
            page can have its own name point here (DNS rebinding) and read the answers.
    """

    def __init__(self, inner: Application, settings: Settings, metrics: Metrics, local: bool = False) -> None:
        self._inner, self._settings, self._metrics = inner, settings, metrics
        self._only_here = local and settings.api_key is None
        self._pages: set[asyncio.Task[Any]] = set()

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return
        headers = {name.lower(): value for name, value in scope["headers"]}
        given = headers.get(b"x-request-id", b"")
        request_id = given.decode() if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        answer = _Answer(send, request_id)
        notes: dict[str, Any] = {}
        token = request_notes.set(notes)
        started = time.perf_counter()
        self._metrics.in_progress.inc()
        try:
            await self._guarded(scope, headers, receive, answer)
        except ApiError as error:
            await answer.fail(error)
        except ClientGone:
            answer.status = CLIENT_GONE
        except Exception as error:
            log("error", logging.ERROR, request_id=request_id, error=frames(error))
            await answer.fail(ApiError(500, f"the server failed; its log knows more under {request_id}"))
        finally:
            request_notes.reset(token)
            self._metrics.in_progress.dec()
            seconds = time.perf_counter() - started
            route = _route(scope)
            self._metrics.on_request(route, answer.status, seconds)
            quiet = route in _STATE or (route == "page" and scope["method"] == "GET" and answer.status < 400)
            if not quiet:
                milliseconds = round(seconds * 1000, 1)
                log(
                    "request",
                    request_id=request_id,
                    method=scope["method"],
                    route=route,
                    status=answer.status,
                    ms=milliseconds,
                    **notes,
                )

    async def _guarded(
        self, scope: MutableMapping[str, Any], headers: dict[bytes, bytes], receive: Receive, answer: _Answer
    ) -> None:
        if self._only_here:
            check_host(headers.get(b"host", b""), self._settings.allow_hosts)
        if not _below_v1(scope["path"]):
            await self._page(scope, receive, answer)
            return
        self._check_key(headers)
        check_route(getattr(self._inner, "routes", ()), scope)
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._inner(scope, receive, answer)
            return
        try:
            reading = read_body(receive, headers, self._settings.max_body_bytes)
            body = await asyncio.wait_for(reading, self._settings.timeout)
        except asyncio.TimeoutError:
            raise ApiError(408, "the body did not arrive in time", "body") from None
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            # A web page of somebody else can send a form or plain text here without asking, but not this.
            raise ApiError(415, "send the header content-type: application/json", "content-type")
        check_json(body)
        given = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> MutableMapping[str, Any]:
            return given.pop() if given else await receive()

        await self._inner(scope, again, answer)

    def _check_key(self, headers: dict[bytes, bytes]) -> None:
        key = self._settings.api_key
        if key is None:
            return
        scheme, _, bearer = headers.get(b"authorization", b"").partition(b" ")
        given = bearer.strip() if scheme.lower() == b"bearer" else headers.get(b"x-api-key", b"")
        if scheme.lower() == b"basic":  # a name and the key: what Label Studio can send
            with contextlib.suppress(ValueError):
                given = base64.b64decode(bearer, validate=True).partition(b":")[2]
        if not hmac.compare_digest(given, key):
            raise ApiError(401, "send the server's API key as authorization: Bearer KEY", "authorization")

    async def _page(self, scope: MutableMapping[str, Any], receive: Receive, answer: _Answer) -> None:
        refused: MutableMapping[str, Any] = {}

        async def send(message: MutableMapping[str, Any]) -> None:
            if message.get("status") in (404, 405):
                refused.update(message)
            if not refused:
                await answer(message)

        await self._run_page(self._inner(scope, receive, send))
        if refused:
            allowed = dict(refused.get("headers", ())).get(b"allow", b"").decode("latin-1")
            refuse(getattr(self._inner, "routes", ()), scope, allowed.split(", ") if allowed else [])

    async def _run_page(self, answering: Awaitable[None]) -> None:
        task = asyncio.ensure_future(answering)
        self._pages.add(task)
        try:
            await task
        except asyncio.CancelledError:
            task.cancel()
            if not self._stopping:
                raise
        finally:
            self._pages.discard(task)

    _stopping = False

    def leave_pages(self) -> None:
        """End what the playground keeps open for as long as its page is shown; the server is being stopped."""
        self._stopping = True
        for task in list(self._pages):
            task.cancel()


def check_host(header: bytes, allowed: Sequence[str]) -> None:
    """Refuse names that a web page of somebody else may have chosen; addresses cannot be rebound.

    Args:
        header: `Host`, with or without a port.

    Raises:
        ApiError: the name is neither localhost nor an address nor allowed (403).
    """
    name = header.decode("latin-1").strip().lower()
    name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    if name == "localhost" or name.endswith(".localhost") or name in allowed:
        return
    try:
        ipaddress.ip_address(name)
    except ValueError:
        raise ApiError(
            403,
            "without an API key this server answers to localhost only; start it with --allow-host NAME or with a key",
            "host",
        ) from None


def check_route(routes: Sequence[BaseRoute], scope: MutableMapping[str, Any]) -> None:
    """Refuse what no route below `/v1` takes, before its body is looked at; the page would answer it otherwise.

    Raises:
        ApiError: there is no such address (404), or it takes other methods (405).
    """
    ours = [route for route in routes if isinstance(route, Route) and _below_v1(route.path)]
    if ours and not any(route.matches(scope)[0] is Match.FULL for route in ours):
        refuse(ours, scope)


def refuse(
    routes: Sequence[BaseRoute], scope: MutableMapping[str, Any], allowed: Sequence[str] = ()
) -> NoReturn:
    """Say which addresses there are, or which methods this one takes.

    Args:
        allowed: methods that an address outside of `routes` takes.

    Raises:
        ApiError: in any case (404 or 405).
    """
    ours = [route for route in routes if isinstance(route, Route)]
    partly = [route for route in ours if route.matches(scope)[0] is Match.PARTIAL]
    methods = sorted({name for route in partly for name in route.methods or ()}) or list(allowed)
    if methods:
        raise ApiError(405, f"this address takes {', '.join(methods)}", allow=methods)
    # What belongs to the pages is no address to call.
    named = [route.path for route in ours if _below_v1(route.path) or route.path in (*_STATE, "/docs")]
    pages = ["/"] if any(isinstance(route, Mount) and route.path == "" for route in routes) else []
    raise ApiError(
        404, f"there is no such address; this server has {', '.join(dict.fromkeys([*pages, *named]))}"
    )


def _below_v1(path: str) -> bool:
    return path == "/v1" or path.startswith("/v1/")


def _route(scope: MutableMapping[str, Any]) -> str:
    """The pattern of a path, as paths themselves are made up by clients."""
    path = str(scope["path"])
    if path in _STATE:
        return path
    if not _below_v1(path):
        return "page"
    return getattr(scope.get("route"), "path", "") or "other"


class _Answer:
    """What is sent back: knows its status, carries the request id, and can still become an error before it has begun."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self._request_id, self.status, self._begun = send, request_id.encode(), 0, False

    async def __call__(self, message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self._begun, self.status = True, message["status"]
            message["headers"] = [*message.get("headers", []), (b"x-request-id", self._request_id)]
        await self._send(message)

    async def fail(self, error: ApiError) -> None:
        """Send an error, if nothing has been sent."""
        if self._begun:
            return
        body = json.dumps(error.body()).encode()
        length = (b"content-length", str(len(body)).encode())
        extra = [(name.encode(), value.encode()) for name, value in error.headers().items()]
        kind = (b"content-type", b"application/json")
        await self({"type": "http.response.start", "status": error.status, "headers": [kind, length, *extra]})
        await self({"type": "http.response.body", "body": body})
