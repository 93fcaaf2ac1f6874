"""Serves images of a home: the socket, the service, the application, and their order at start and stop."""

from __future__ import annotations

from collections.abc import Callable

from flows.telemetry import start_tracing
from flows.web.app import WebSettings, create_app
from flows.web.server import Listening, open_socket, run_server
from flows.web.tokens import read_tokens
from registry.home import Home
from tasks.serving.service import open_service
from tasks.serving.settings import ServiceSettings


def serve_images(
    home: Home,
    settings: ServiceSettings,
    web: WebSettings,
    listening: Listening,
    announce: Callable[[int], None],
) -> None:
    """Serves until SIGINT or SIGTERM; what is not drawn then waits on the disk for the next start.

    Args:
        home: The home with the adapters.
        settings: Settings of the service.
        web: Settings of the application.
        listening: Where to listen.
        announce: Called with the port when requests are answered.

    Raises:
        SpecError: A setting or the address cannot be used, or spans are asked for without the extra `telemetry`.
        HomeError: Another server serves the home.
        BaseModelError: No such base.
    """
    if web.tokens is not None:
        read_tokens(web.tokens)  # before the base is loaded, which takes longer
    start_tracing()
    with open_socket(listening) as sock:
        port = int(sock.getsockname()[1])
        service = open_service(home, settings)
        try:
            run_server(create_app(service, web), listening, sock, lambda: announce(port))
        finally:
            service.close(listening.grace)
