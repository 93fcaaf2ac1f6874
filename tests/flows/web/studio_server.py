"""Serves the studio of a home in a thread, for tests in a browser."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn

from flows.web.app import create_app
from flows.web.studio.page import mount_studio
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from tasks.serving.service import ImageService, ServiceSettings


@dataclass(frozen=True)
class ServedStudio:
    """A studio that is served.

    Attributes:
        address: Its address.
        service: Its service.
    """

    address: str
    service: ImageService


@contextmanager
def served_studio(home: Home) -> Iterator[ServedStudio]:
    """Yields a studio on the embedded base at a free port of this machine."""
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    app = create_app(service)
    mount_studio(app, service)
    gc.collect()  # of a loop that Gradio left open
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started:
        assert thread.is_alive()
        assert time.monotonic() < deadline, "the server did not start"
        time.sleep(0.05)
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield ServedStudio(f"http://127.0.0.1:{port}/studio/", service)
    finally:
        server.should_exit = True
        thread.join(60)
        service.close()
