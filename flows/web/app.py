"""Builds the application of `loraline serve`: its routes, and what every request must pass first."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, MutableMapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from flows.web.a1111 import draw_routes
from flows.web.a1111_lists import list_routes, ping_routes
from flows.web.adapters import adapter_routes
from flows.web.callers import Sessions
from flows.web.errors import add_error_handlers
from flows.web.jobs import job_routes
from flows.web.login import login_routes
from flows.web.openai_images import openai_routes
from flows.web.security import Guard, GuardSettings
from flows.web.tokens import Tokens
from registry.identity import program_version
from registry.policy.actors import refusing_own_user
from tasks.errors import SpecError
from tasks.serving.service import ImageService


@dataclass(frozen=True)
class WebSettings:
    """Settings of the application.

    Attributes:
        hosts: Values of the header `Host` that are answered, without port.
        tokens: File with the tokens; None lets everyone in who can connect, as the process's user.
        is_secure: True if browsers connect over https.
        studio: True adds the page at `/studio`.
        max_body: Bytes of the body of a request.
        body_seconds: Seconds in which a body must arrive.
        requests_per_minute: Requests of one tenant; 0 does not bound them.
    """

    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")
    tokens: Path | None = None
    is_secure: bool = False
    studio: bool = False
    max_body: int = 48 << 20
    body_seconds: float = 30.0
    requests_per_minute: int = 1200


_UNTRACED = frozenset({"/healthz", "/readyz", "/metrics"})
"""Paths that monitoring asks for all the time."""


def _is_untraced(scope: MutableMapping[str, Any]) -> bool:
    return scope.get("path") in _UNTRACED


def create_app(service: ImageService, settings: WebSettings | None = None) -> FastAPI:
    """Returns the application.

    Args:
        service: Draws the images; the caller closes it.
        settings: The settings.

    Raises:
        SpecError: The file with the tokens cannot be used.
    """
    settings = settings or WebSettings()
    tokens = None if settings.tokens is None else Tokens(settings.tokens)
    sessions = None if tokens is None else Sessions(tokens)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        with ExitStack() as stack:
            if tokens is not None:
                stack.enter_context(refusing_own_user("loraline serve"))
            yield

    app = FastAPI(
        title="Loraline",
        version=program_version(),
        summary="Images by registered adapters.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        # Spans are sent if a collector is set; validation errors would contain prompts.
        telemetry={"operation_spans": False, "logs": False, "metrics": False, "exclude": _is_untraced},
    )
    app.state.service, app.state.settings = service, settings
    app.state.tokens, app.state.sessions = tokens, sessions
    add_error_handlers(app)
    own = (job_routes, adapter_routes, login_routes)
    compatible = (draw_routes, list_routes, ping_routes, openai_routes)
    for routes in (*own, *compatible):
        app.include_router(routes)
    if settings.studio:
        mount_studio = _find_studio()
        mount_studio(app, service)
    bounds = GuardSettings(settings.hosts, settings.max_body, settings.body_seconds, settings.requests_per_minute)
    app.add_middleware(Guard, settings=bounds, tokens=tokens, sessions=sessions)
    return app


def _find_studio() -> Callable[..., None]:
    """Returns the function that mounts the page.

    Raises:
        SpecError: Gradio is not installed.
    """
    try:
        import gradio  # noqa: F401
    except ImportError:
        raise SpecError(
            "the studio page needs Gradio, which is not installed",
            where="--studio",
            remedy="pip install 'loraline[studio]' and then 'pillow>=13', or serve with --no-studio",
        ) from None
    from flows.web.studio.page import mount_studio

    return mount_studio
