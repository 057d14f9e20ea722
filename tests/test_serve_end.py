"""A server under load on loopback: a full queue, clients that go away, and an end that loses nothing."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from pathlib import Path

import httpx
import pytest
from fastapi import FastAPI

from helpers.runs import make_run
from helpers.serving import serving
from labeltune.serve.app import LaterApp
from labeltune.serve.schemas import ApiError


def test_a_full_queue_a_lost_client_and_the_end(tmp_path: Path, model_folder: Path) -> None:
    options = ("--queue-rows=8", "--max-wait-ms=3000", "--name=slow")
    with serving(make_run(tmp_path / "run", model_folder), *options) as server:
        host, port = server.url.removeprefix("http://").split(":")
        found: list[httpx.Response] = []

        def ask(count: int = 1) -> None:
            found.append(server.post("/v1/classify", {"text": ["a"] * count}))

        def waiting(count: int) -> None:
            deadline = time.monotonic() + 60
            while server.metric("labeltune_queue_rows") != count:
                assert time.monotonic() < deadline
                time.sleep(0.02)

        # A client that goes away gives its place back long before the batch is due.
        with socket.create_connection((host, int(port))) as line:
            body = b'{"text": ["a", "b", "c"]}'
            head = f"POST /v1/classify HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body)
            waiting(3)
            started = time.monotonic()
        waiting(0)
        assert time.monotonic() - started < 2.5
        assert server.metric('labeltune_requests_total{route="/v1/classify",status="499"}') == 1
        # Eight texts wait, a ninth is refused, and later taken.
        threads = [threading.Thread(target=ask, args=(count,)) for count in (3, 5)]
        for thread in threads:
            thread.start()
        waiting(8)
        refused = server.post("/v1/classify", {"text": "a"})
        assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 60
        for thread in threads:
            thread.join()
        ask()
        assert [answer.status_code for answer in found] == [200, 200, 200]
        # Under load, everything that was accepted is answered.
        answered: dict[str, int] = {}

        def load(client: int) -> None:
            for number in range(1000):
                name = f"load-{client}-{number}"
                try:
                    answer = server.post("/v1/classify", {"text": "a match"}, x_request_id=name)
                except httpx.HTTPError:
                    return
                answered[name] = answer.status_code

        threads = [threading.Thread(target=load, args=(client,)) for client in range(8)]
        for thread in threads:
            thread.start()
        waiting(8)
        assert server.stop() == 0
        for thread in threads:
            thread.join(30)
        logged = {line["request_id"]: line["status"] for line in server.events("request")}
        assert len(answered) >= 8 and set(answered.values()) == {200}
        assert {name: status for name, status in logged.items() if name.startswith("load-")} == answered
        assert server.events("stopped")
        with pytest.raises(httpx.ConnectError):
            server.post("/v1/classify", {"text": "a"})


def test_the_start_says_its_steps_and_the_page_comes_after_it(tmp_path: Path, model_folder: Path) -> None:
    """The names of the runs are shown as they are; a request for the page waits until it is made."""
    run = make_run(tmp_path / "意图", model_folder)
    with serving(run, playground=True) as server:
        assert server.events("ready")[0]["models"] == ["意图"]
        assert server.post("/v1/classify", {"text": "a", "model": "意图"}).json()["model"] == "意图"
        other = {"messages": [{"role": "user", "content": "a"}], "model": "gpt-4o"}
        assert server.post("/v1/chat/completions", other).json()["model"] == "意图"
        assert server.get("/v1/models/%E6%84%8F%E5%9B%BE").json()["id"] == "意图"
        page = server.get("/")
        assert page.status_code == 200 and "gradio" in page.text
        missing = server.get("/v1/completions")
        assert missing.status_code == 404 and missing.json()["error"]["code"] == "404"
        assert server.stop() == 0
    assert [line[9:] for line in server.said] == [
        f"loading the run {run}\n",
        "checking 意图: whether its first answer is that of plain computation\n",
        "serving 意图 (classification, 3 labels)\n",
        f"ready at {server.url}: documentation /docs; clients' base_url {server.url}/v1\n",
        f"the page is ready: {server.url}/\n",
        "stopped; what was accepted is answered\n",
    ]


def test_a_page_that_cannot_be_made_takes_nothing_else_with_it() -> None:
    def broken() -> FastAPI:
        raise ImportError("no such library")

    async def ask() -> None:
        page = LaterApp(broken)
        page.start()
        with pytest.raises(ApiError, match="the page cannot be shown") as failed:
            await page({}, None, None)
        assert failed.value.status == 503
        await page.stop()

    asyncio.run(ask())
