"""Builds the studio page from its tabs and mounts it on the application."""

from __future__ import annotations

import os
from collections.abc import Callable
from html import escape
from pathlib import Path

import fastapi
import gradio

from flows.web.studio import trainings
from flows.web.studio.compare import add_compare
from flows.web.studio.context import Studio
from flows.web.studio.datasets import add_datasets
from flows.web.studio.draw import add_draw
from flows.web.studio.grids import add_grids
from flows.web.studio.page_files import PageFiles
from flows.web.studio.page_style import CSS, theme
from flows.web.studio.registry_style import REGISTRY_CSS
from flows.web.studio.releases import add_releases
from flows.web.studio.votes import add_votes
from lora_engine.errors import EngineError
from tasks.serving.service import ImageService

PATH = "/studio"
MAX_UPLOAD = 32 << 20
"""Bytes of an uploaded file."""
_WAITING, _AT_ONCE = 64, 8
_CLEAN_EVERY, _KEEP = 15 * 60, 6 * 60 * 60
"""Seconds between cleanings of the cache, and age of the files that they delete."""


TABS: dict[str, Callable[[Studio], None]] = {
    "Draw": add_draw,
    "Compare": add_compare,
    "Grid": add_grids,
    "Votes": add_votes,
    "Releases": add_releases,
    trainings.TITLE: trainings.add_trainings,
    "Datasets": add_datasets,
}
"""Title of each tab, and the function that adds its components and events to the open `gradio.Blocks`.

Each function of an event is callable by every user of the page, also while its component is hidden: it checks rights
itself.
"""


def mount_studio(app: fastapi.FastAPI, service: ImageService) -> None:
    """Mounts the page on the application at `PATH`; `flows.web.security.Guard` establishes the caller of its requests.

    Args:
        app: The application.
        service: Draws the images.
    """
    if service.home.read_only:
        raise EngineError("the studio writes into the home", where=str(service.home.path), remedy="make it writable")
    files = PageFiles(service.home.path / "serving" / "studio")
    # Gradio reads it whenever it stores a file.
    os.environ["GRADIO_TEMP_DIR"] = str(files.folder)
    # Never computes Gradio's statistics, which import pandas and read all earlier events at the end of each event.
    os.environ["GRADIO_ANALYTICS_CACHE_FREQUENCY"] = str(10**12)
    with gradio.Blocks(
        title="Loraline studio", analytics_enabled=False, fill_width=True, delete_cache=(_CLEAN_EVERY, _KEEP)
    ) as page:
        gradio.HTML(
            f"<h1>Loraline studio</h1><p>Base <b>{escape(Path(service.settings.base).name)}</b></p>",
            elem_classes="studio-title",
        )
        with gradio.Tabs() as tabs:
            studio = Studio(service, page, tabs, files)
            for title, add_tab in TABS.items():
                with gradio.Tab(title, id=title):
                    add_tab(studio)
    page.queue(max_size=_WAITING, default_concurrency_limit=_AT_ONCE, api_open=False)
    gradio.mount_gradio_app(
        app,
        page,
        path=PATH,
        allowed_paths=[],
        blocked_paths=[],
        show_error=False,
        max_file_size=MAX_UPLOAD,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        footer_links=[],
        theme=theme(),
        css=CSS + REGISTRY_CSS,
    )
