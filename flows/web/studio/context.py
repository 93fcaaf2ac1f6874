"""`Studio`: what all tabs of the page share. Apart from the page, which imports the tabs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio

from flows.web.studio.page_files import PageFiles
from tasks.serving.service import ImageService

if TYPE_CHECKING:
    from flows.web.studio.draw_form import DrawForm


@dataclass
class Studio:
    """What the tabs work with.

    Attributes:
        service: Draws images; `service.home` is the home with the registry.
        page: The page, for events such as its load.
        tabs: The tabs; an event chooses one with `gradio.Tabs(selected=TITLE)`.
        files: Files that the page shows.
        form: The form of the tab Draw, which other tabs fill; None until that tab is built.
    """

    service: ImageService
    page: gradio.Blocks
    tabs: gradio.Tabs
    files: PageFiles
    form: DrawForm | None = None
