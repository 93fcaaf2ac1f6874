"""Serves the studio of a home in a thread, with its checks, for tests in a browser."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import httpx
import uvicorn

from flows.web.app import WebSettings, create_app
from flows.web.callers import COOKIE
from flows.web.server import Listening, open_socket
from lora_engine.serving.engine import PlainEngine
from registry.home import Home
from tasks.serving.service import ImageService, ServiceSettings
from tests.flows.browser import Page
from tests.flows.web.server import write_tokens

UNLABELED = """[...document.querySelectorAll("input, textarea, select, button")].filter(field => {
  if (field.offsetParent === null || field.type === "file") return false;
  const labels = field.labels && [...field.labels].map(label => label.innerText).join("");
  const name = labels || field.innerText || field.ariaLabel || field.title || field.getAttribute("aria-labelledby");
  return !String(name || "").trim();
}).map(field => field.outerHTML.slice(0, 300))"""
"""Script that returns the visible controls without a name."""


@dataclass(frozen=True)
class ServedStudio:
    """A studio that is served.

    Attributes:
        address: Its address.
        service: Its service.
        tokens: The token of each user; empty on a server without tokens.
    """

    address: str
    service: ImageService
    tokens: dict[str, str] = field(default_factory=dict)

    @property
    def origin(self) -> str:
        """Address of the server."""
        return self.address.removesuffix("/studio/")

    def sign_in(self, page: Page, user: str) -> None:
        """Gives a browser the session of a user, as the form of `/login` does."""
        answer = httpx.post(f"{self.origin}/login", data={"token": self.tokens[user]})
        page.set_cookie(COOKIE, answer.cookies[COOKIE], self.origin)


@contextmanager
def served_studio(home: Home, users: Sequence[tuple[str, str]] = ()) -> Iterator[ServedStudio]:
    """Yields a studio on the embedded base at a free port of this machine.

    Args:
        home: The home.
        users: Name and tenant of the users who have a token; without users, no token is needed.
    """
    file = home.path.parent / "tokens.yaml"
    tokens = dict(zip((user for user, _ in users), write_tokens(file, *users), strict=True))
    service = ImageService(home, ServiceSettings(), PlainEngine("tiny"))
    sock = open_socket(Listening(port=0))
    running = threading.Event()
    servers: list[uvicorn.Server] = []

    async def serve() -> None:
        # Gradio makes an event loop that it does not close where none runs.
        app = create_app(service, WebSettings(studio=True, tokens=file if users else None))
        servers.append(uvicorn.Server(uvicorn.Config(app, log_config=None, ws="none", timeout_graceful_shutdown=2)))
        running.set()
        await servers[0]._serve([sock])

    thread = threading.Thread(target=lambda: asyncio.run(serve()))
    thread.start()
    try:
        assert running.wait(120), "the server did not start"
        yield ServedStudio(f"http://127.0.0.1:{sock.getsockname()[1]}/studio/", service, tokens)
    finally:
        for server in servers:
            server.should_exit = True
        thread.join(60)
        service.close()
