"""Builds the studio page from its tabs and mounts it on the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio
from fastapi import FastAPI

from tasks.serving.service import ImageService

PATH = "/studio"


@dataclass(frozen=True)
class Studio:
    """What the tabs work with.

    Attributes:
        service: Draws images; `service.home` is the home with the registry.
    """

    service: ImageService


TABS: dict[str, Callable[[Studio], None]] = {}
"""Title of each tab, and the function that adds its components and events to the open `gradio.Blocks`."""


def mount_studio(app: FastAPI, service: ImageService) -> None:
    """Mounts the page on the application at `PATH`."""
    studio = Studio(service)
    with gradio.Blocks(title="Loraline", analytics_enabled=False) as page, gradio.Tabs():
        for title, add_tab in TABS.items():
            with gradio.Tab(title):
                add_tab(studio)
    gradio.mount_gradio_app(app, page, path=PATH)
