"""A server under load on loopback: a full queue, clients that go away, and an end that loses nothing."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path

import httpx
import pytest

from serving import make_run, serving


def test_a_full_queue_a_lost_client_and_the_end(tmp_path: Path, model_folder: Path) -> None:
    options = ("--queue-rows=8", "--max-wait-ms=3000", "--name=slow")
    with serving(make_run(tmp_path / "run", model_folder), *options) as server:
        host, port = server.url.removeprefix("http://").split(":")
        found: list[httpx.Response] = []

        def ask(count: int = 1) -> None:
            found.append(server.post("/v1/classify", {"text": ["a"] * count}))

        def waiting(count: int) -> None:
            deadline = time.monotonic() + 10
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
