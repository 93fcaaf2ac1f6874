"""Serves the studio page of a home with a real server in a thread, as a user that a test chooses."""

from __future__ import annotations

import gc
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field

import uvicorn
from starlette.types import ASGIApp, Receive, Scope, Send

from flows.web.app import create_app
from flows.web.studio.page import PATH, mount_studio
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from registry.identity import Actor
from tasks.serving.service import ImageService, ServiceSettings


@dataclass(frozen=True)
class Caller:
    """Who sends a request, as the application establishes it."""

    tenant: str
    actor: Actor | None


@dataclass
class SignedIn:
    """Wraps the application, as its checks do: puts the caller of a request into its scope.

    Attributes:
        app: The application.
        callers: Value of the cookie `user` -> caller; the entry of an empty text is that of requests without it.
    """

    app: ASGIApp
    callers: dict[str, Caller] = field(default_factory=dict)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            cookies = dict(scope["headers"]).get(b"cookie", b"").decode()
            user = next((part[5:] for part in cookies.split("; ") if part.startswith("user=")), "")
            caller = self.callers.get(user)
            if caller is not None:
                scope.setdefault("state", {})["caller"] = caller
        await self.app(scope, receive, send)


@contextmanager
def studio_served(home: Home, callers: dict[str, Caller]) -> Iterator[str]:
    """Yields the address of the page.

    Args:
        home: The home.
        callers: See `SignedIn`; may be changed while the server runs.
    """
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    app = create_app(service)
    mount_studio(app, service)
    with closing(socket.socket()) as listener:
        listener.bind(("127.0.0.1", 0))
        config = uvicorn.Config(SignedIn(app, callers), log_level="warning", timeout_graceful_shutdown=2)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + 120
            while not server.started:
                assert thread.is_alive(), "the server ended"
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(0.05)
            yield f"http://127.0.0.1:{listener.getsockname()[1]}{PATH}/"
        finally:
            server.should_exit = True
            thread.join(60)
            service.close()
            gc.collect()  # what Gradio leaves open is reported here, not in a later test
