"""What stands in front of the server: foreign host names, and bodies that never arrive."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from typing import Any

import pytest
from fastapi import FastAPI

from labeltune.serve.guard import Guard, Metrics, check_host
from labeltune.serve.schemas import ApiError
from labeltune.serve.settings import Settings


def ask(
    guard: Guard, host: str, method: str = "GET", path: str = "/healthz", body: bytes | None = b""
) -> tuple[int, Any]:
    """Status and JSON of one answer; a body of None never arrives."""
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        if body is None:
            await asyncio.sleep(3600)
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    headers = [(b"host", host.encode()), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": method, "path": path, "headers": headers, "query_string": b""}
    asyncio.run(guard(scope, receive, send))  # type: ignore[arg-type]
    return sent[0]["status"], json.loads(sent[1]["body"])


async def inner(scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"{}"})


def guard(local: bool = True, **settings: Any) -> Guard:
    return Guard(inner, Settings(**settings), Metrics(), local)


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:8000",
        "app.localhost:80",
        "127.0.0.1:8000",
        "127.1.2.3",
        "[::1]:8000",
        "10.0.0.7",
    ],
)
def test_addresses_and_localhost_get_in(host: str) -> None:
    check_host(host.encode(), ())
    assert ask(guard(), host) == (200, {})


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:8000", "127.0.0.1.evil.example", "localhost.evil.example", ""]
)
def test_a_page_that_points_its_name_here_reads_nothing(host: str) -> None:
    for path in ("/", "/healthz", "/v1/models"):
        status, answer = ask(guard(), host, path=path)
        assert status == 403 and answer["error"]["param"] == "host"
        assert "--allow-host" in answer["error"]["message"]


def test_names_are_let_in_by_option_key_or_open_address() -> None:
    assert ask(guard(allow_hosts=("news.example",)), "news.example:8000")[0] == 200
    assert ask(guard(api_key=b"k"), "news.example")[0] == 200
    assert ask(guard(local=False), "news.example")[0] == 200
    with pytest.raises(ApiError):
        check_host(b"other.example", ("news.example",))


def test_a_body_that_does_not_arrive_is_given_up() -> None:
    status, answer = ask(guard(timeout=0.05), "localhost", "POST", "/v1/classify", body=None)
    assert status == 408 and answer["error"]["param"] == "body"


@pytest.mark.parametrize("with_page", [True, False])
def test_an_unknown_address_outside_of_v1_names_those_there_are(with_page: bool) -> None:
    """The page's library answers whatever no route of ours takes."""
    app = FastAPI(docs_url="/docs")
    page = FastAPI(openapi_url=None)
    app.get("/healthz")(lambda: {"status": "ok"})
    app.post("/v1/classify")(lambda: {})
    page.get("/")(lambda: {"page": 1})
    page.get("/own/{number}")(lambda number: {"number": number})
    if with_page:
        app.mount("/", page)
    guarded = Guard(app, Settings(), Metrics())
    assert ask(guarded, "localhost") == (200, {"status": "ok"})
    if with_page:
        assert ask(guarded, "localhost", path="/") == (200, {"page": 1})
        assert ask(guarded, "localhost", path="/own/3") == (200, {"number": "3"})
        status, answer = ask(guarded, "localhost", "POST", "/own/3")
        assert (status, answer["error"]["message"]) == (405, "this address takes GET")
    known = "/docs, /healthz, /v1/classify"
    for method, path in (("GET", "/nope"), ("POST", "/classify"), ("GET", "/nope/deep")):
        status, answer = ask(guarded, "localhost", method, path)
        assert (status, answer["error"]["type"], answer["error"]["code"]) == (404, "not_found_error", "404")
        assert answer["error"]["message"] == (
            f"there is no such address; this server has {'/, ' if with_page else ''}{known}"
        )
    status, answer = ask(guarded, "localhost", "POST", "/healthz")
    assert (status, answer["error"]["message"]) == (405, "this address takes GET")
