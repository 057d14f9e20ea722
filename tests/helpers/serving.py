"""A server in a process of its own on loopback, with runs that were never trained."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

from helpers import forks
from helpers.forks import Fork


class Server:
    """A running `labeltune serve`; its log, and what it said on standard output, are kept in memory."""

    def __init__(self, process: Fork | subprocess.Popen[str]) -> None:
        self.process = process
        self.lines: list[str] = []
        self.said: list[str] = []
        self.url = ""
        # Made once: loading the system's certificates takes longer than an answer.
        self.client = httpx.Client(verify=False, timeout=60, limits=httpx.Limits(max_keepalive_connections=0))
        self._ready = threading.Event()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line)
            if '"ready"' in line:
                self.url = json.loads(line)["url"]
                self._ready.set()
        self._ready.set()
        assert self.process.stdout is not None
        self.said.extend(self.process.stdout)

    def wait(self) -> None:
        assert self._ready.wait(120) and self.url, "".join(self.lines)

    def stop(self) -> int:
        """Ask it to end, and wait; its exit code."""
        self.process.terminate()
        code = self.process.wait(60)
        self._reader.join(10)
        return code

    def close(self) -> None:
        """Once it has ended: whatever led to it."""
        self._reader.join(10)
        self.client.close()
        for stream in (self.process.stdout, self.process.stderr):
            if stream is not None:
                stream.close()

    def events(self, event: str) -> list[dict[str, Any]]:
        """Its log lines of one kind."""
        found = [json.loads(line) for line in list(self.lines) if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def post(self, path: str, body: Any, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.client.post(self.url + path, json=body, headers=named)

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.client.get(self.url + path, headers=headers)

    def metric(self, name: str) -> float:
        text = self.get("/metrics").text
        return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@contextlib.contextmanager
def serving(run: Path, *options: str, key: str | None = None, playground: bool = False) -> Iterator[Server]:
    """`labeltune serve RUN` on a free port, until the end of the block."""
    # One thread: small models on a busy machine lose more to waiting for each other than they win.
    environment = {k: v for k, v in os.environ.items() if k != "LABELTUNE_API_KEY"} | {"OMP_NUM_THREADS": "1"}
    if key is not None:
        environment["LABELTUNE_API_KEY"] = key
    command = ["-m", "labeltune", "serve", str(run), "--port", "0", *options]
    process: Fork | subprocess.Popen[str]
    if playground:
        process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
    else:
        process = forks.start([*command, "--no-playground"], env=environment)
    server = Server(process)
    try:
        server.wait()
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        server.close()
