"""Runs the application: a socket, uvicorn, and an end that finishes what has been accepted."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn
from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from labeltune.errors import ConfigError
from labeltune.serve.app import create_app
from labeltune.serve.faults import ApiError
from labeltune.serve.guard import Guard
from labeltune.serve.logs import frames, log, log_to_stderr
from labeltune.serve.metrics import Metrics
from labeltune.serve.models import Models
from labeltune.serve.service import Service
from labeltune.serve.settings import Settings


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
    page = None
    if settings.playground:
        page = LaterApp(lambda: _make_page(service))
        app.mount("/", page)
    host, port = bound.getsockname()[:2]
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
    address = f"http://{f'[{host}]' if ':' in host else host}:{port}"

    def on_ready() -> None:
        log("ready", url=address, models=list(models.served))
        for served in models.served.values():
            say(f"serving {served.name} ({served.task}, {len(served.labels)} labels)")
        say(
            f"ready at {address}: documentation /docs{', page /' if page else ''}; clients' base_url {address}/v1"
        )

    server = _Server(config, guard, on_ready, page)
    if not local and settings.api_key is None:
        log("warning: this address can be reached by others and there is no API key")
    # uvicorn raises the signal again when it is done; a finished server has nothing to die of.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _done)
    server.run(sockets=[bound])
    service.close()
    log("stopped")


def _done(number: int, frame: FrameType | None) -> None:
    pass


class LaterApp:
    """An application that is made in the background while the server answers already; requests wait until it is there.

    Importing the page's library takes about as long as importing everything else.
    """

    def __init__(self, make: Callable[[], FastAPI]) -> None:
        self._make = make
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
