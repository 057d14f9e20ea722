"""Runs the application: a socket, uvicorn, and an end that finishes what has been accepted."""

from __future__ import annotations

import contextlib
import ipaddress
import signal
import socket
from types import FrameType

import uvicorn

from labeltune.errors import ConfigError
from labeltune.serve.app import create_app
from labeltune.serve.guard import Guard
from labeltune.serve.logs import log, log_to_stderr
from labeltune.serve.metrics import Metrics
from labeltune.serve.models import Models
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


def serve(models: Models, settings: Settings, bound: socket.socket) -> None:
    """Answer until SIGTERM or Ctrl-C; then take no more connections, finish what was accepted, and return."""
    log_to_stderr()
    _raise_file_limit()
    metrics = Metrics()
    app, service = create_app(models, settings, metrics)
    if settings.playground:
        from labeltune.serve.playground import add_playground

        app = add_playground(app, service)
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
    server = _Server(config, guard, f"http://{f'[{host}]' if ':' in host else host}:{port}")
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


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, guard: Guard, address: str) -> None:
        super().__init__(config)
        self._guard, self._address = guard, address

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Say where it listens once it does."""
        await super().startup(sockets=sockets)
        if self.started:
            log("ready", url=self._address)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Pages that are open in browsers do not hold up the end."""
        log("stopping")
        self._guard.leave_pages()
        await super().shutdown(sockets=sockets)


def _raise_file_limit() -> None:
    """A connection is an open file, and the usual limit of 1,024 is less than the queue holds."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
