"""Runs the application with uvicorn: bounded connections, prompt start, clean stop."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from tasks.errors import SpecError

_HEADER_SECONDS = 10.0
"""Seconds in which a connection must send the headers of its first request."""
_IDLE_SECONDS = 30


@dataclass(frozen=True)
class Listening:
    """Where a server listens.

    Attributes:
        host: Name or address.
        port: Port; 0 takes a free one.
        certificate: TLS certificate chain; None serves plain HTTP.
        key: Its private key.
        connections: Number of connections at a time.
        grace: Seconds in which running requests may finish when the server stops.
    """

    host: str = "127.0.0.1"
    port: int = 8188
    certificate: Path | None = None
    key: Path | None = None
    connections: int = 200
    grace: int = 10


class _Protocol(H11Protocol):
    """HTTP with a time limit for the headers of a connection's first request, which uvicorn does not have."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._deadline = self.loop.call_later(_HEADER_SECONDS, self._close_silent)

    def connection_lost(self, exc: Exception | None) -> None:
        self._deadline.cancel()
        super().connection_lost(exc)

    def _close_silent(self) -> None:
        is_silent = getattr(self, "cycle", None) is None  # declared as a cycle, and None before the first request
        if is_silent and not self.transport.is_closing():
            self.transport.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._on_started()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Stops on SIGINT and SIGTERM without raising the signal again: a clean stop is a success."""
        previous = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def open_socket(listening: Listening) -> socket.socket:
    """Returns a socket that listens.

    Raises:
        SpecError: The address cannot be used.
    """
    try:
        family = socket.AF_INET6 if ":" in listening.host else socket.AF_INET
        sock = socket.create_server((listening.host, listening.port), family=family, backlog=128)
    except OSError as error:
        raise SpecError(
            f"cannot listen on {listening.host}:{listening.port} ({error.strerror or error})",
            remedy="name another --host or --port; --port 0 takes a free one",
        ) from None
    sock.set_inheritable(False)
    return sock


def run_server(app: FastAPI, listening: Listening, sock: socket.socket, on_started: Callable[[], None]) -> None:
    """Serves until SIGINT or SIGTERM.

    Args:
        app: The application.
        listening: Settings of the server.
        sock: The socket; see `open_socket`.
        on_started: Called when requests are answered.
    """
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        proxy_headers=False,
        limit_concurrency=listening.connections,
        timeout_keep_alive=_IDLE_SECONDS,
        timeout_graceful_shutdown=listening.grace,
        h11_max_incomplete_event_size=32 << 10,
        ssl_certfile=listening.certificate,
        ssl_keyfile=None if listening.key is None else str(listening.key),
    )
    server = _Server(config, on_started)
    with asyncio.Runner() as runner:
        runner.run(server.serve([sock]))
