"""Builds the application of `loraline serve`: its routes, and what every request must pass first."""

from __future__ import annotations

from dataclasses import dataclass

from fastapi import FastAPI

from tasks.serving.service import ImageService


@dataclass(frozen=True)
class WebSettings:
    """Settings of the application.

    Attributes:
        hosts: Values of the header `Host` that are answered, without port.
    """

    hosts: tuple[str, ...] = ("127.0.0.1", "localhost", "[::1]")


def create_app(service: ImageService, settings: WebSettings | None = None) -> FastAPI:
    """Returns the application.

    Args:
        service: Draws the images; the caller closes it.
        settings: The settings.
    """
    app = FastAPI(title="Loraline", docs_url=None, redoc_url=None)
    app.state.service, app.state.settings = service, settings or WebSettings()
    return app
