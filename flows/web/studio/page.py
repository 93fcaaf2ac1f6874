"""Builds the studio page from its tabs and mounts it on the application."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import gradio
from fastapi import FastAPI

from flows.web.studio.datasets import add_datasets
from flows.web.studio.registry_style import REGISTRY_CSS
from flows.web.studio.releases import add_releases
from flows.web.studio.trainings import add_trainings
from flows.web.studio.votes import add_votes
from tasks.serving.service import ImageService

PATH = "/studio"


@dataclass(frozen=True)
class Studio:
    """What the tabs work with.

    Attributes:
        service: Draws images; `service.home` is the home with the registry.
        page: The page, for events such as its load.
    """

    service: ImageService
    page: gradio.Blocks


TABS: dict[str, Callable[[Studio], None]] = {
    "Votes": add_votes,
    "Releases": add_releases,
    "Trainings": add_trainings,
    "Datasets": add_datasets,
}
"""Title of each tab, and the function that adds its components and events to the open `gradio.Blocks`."""


def mount_studio(app: FastAPI, service: ImageService) -> None:
    """Mounts the page on the application at `PATH`."""
    with gradio.Blocks(title="Loraline", analytics_enabled=False) as page, gradio.Tabs():
        studio = Studio(service, page)
        for title, add_tab in TABS.items():
            with gradio.Tab(title):
                add_tab(studio)
    gradio.mount_gradio_app(app, page, path=PATH, css=REGISTRY_CSS)
