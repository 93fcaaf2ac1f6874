"""Runs the application on a loopback port, with the embedded base, for real clients."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from flows.web.app import WebSettings, create_app
from lora_engine.compute import threads
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from tasks.serving.service import ImageService, ServiceSettings


@dataclass(frozen=True)
class Served:
    """A server that runs.

    Args:
        port: Its port on 127.0.0.1.
        service: Its service.
    """

    port: int
    service: ImageService

    @property
    def url(self) -> str:
        """Its address."""
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def serving(home: Home, tokens: Path | None = None, **settings: Any) -> Iterator[Served]:
    """Runs a server in a thread while the context is open."""
    with threads(1):
        service = ImageService(home, ServiceSettings(max_steps=1000, **settings), PlainEngine("tiny"))
        application = create_app(service, WebSettings(tokens=tokens, requests_per_minute=0))
        server = uvicorn.Server(
            uvicorn.Config(application, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        )
        thread = threading.Thread(target=server.run, name="server")
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Served(server.servers[0].sockets[0].getsockname()[1], service)
        finally:
            server.should_exit = True
            thread.join()
            service.close()
