"""The controls that the tabs Compare and Grid share: buttons, status, gallery, and the way back to the tab Draw."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.callers import caller_of
from flows.web.studio.draw_events import choose_image, path_of_chosen, restore_settings
from flows.web.studio.draw_form import DrawForm, updates
from flows.web.studio.page_messages import cancel_own_job, show_error, show_note
from flows.web.studio.page_style import QUIET, UNQUEUED, image_classes
from lora_engine.errors import WordedError

if TYPE_CHECKING:
    from flows.web.studio.context import Studio


@dataclass(frozen=True)
class DrawControls:
    """Components of a tab that draws several images with the settings of the tab Draw.

    Attributes:
        start: Draws them.
        take: Copies the prompt of the tab Draw.
        status: State of the job, or an error.
        gallery: The images.
        paths: State: their files.
        job: State: identifier of the job that is drawn.
    """

    start: gradio.Button
    take: gradio.Button
    status: gradio.HTML
    gallery: gradio.Gallery
    paths: gradio.State
    job: gradio.State


def add_controls(studio: Studio, form: DrawForm, *, draw: str, gallery: str, columns: int) -> DrawControls:
    """Adds the components to the open `gradio.Blocks`; canceling and sending settings back work already.

    Args:
        studio: What the page works with.
        form: The form of the tab Draw.
        draw: Text of the button that draws.
        gallery: Label of the gallery.
        columns: Columns of the empty gallery.
    """
    paths, job = gradio.State([]), gradio.State("")
    with gradio.Row():
        start = gradio.Button(draw, variant="primary")
        take = gradio.Button("Take the prompt of Draw")
        cancel = gradio.Button("Cancel")
    status = gradio.HTML(elem_classes="studio-status")
    images = gradio.Gallery(
        label=gallery,
        columns=columns,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        elem_classes=image_classes(studio.service.settings.base),
    )
    controls = DrawControls(start, take, status, images, paths, job)
    _add_send_back(studio, form, controls)
    connect_cancel(studio, cancel, job, status)
    return controls


def connect_cancel(studio: Studio, button: gradio.Button, job: gradio.State, status: gradio.HTML) -> None:
    """Makes a button cancel the job of its tab, and show what happened.

    Args:
        studio: What the page works with.
        button: The button.
        job: State: identifier of the job.
        status: Shows messages.
    """

    def cancel(job_id: str, request: gradio.Request) -> str:
        return cancel_own_job(studio.service, job_id, tenant=caller_of(request).tenant)

    button.click(cancel, [job], [status], **UNQUEUED)


def _add_send_back(studio: Studio, form: DrawForm, controls: DrawControls) -> None:
    """Adds a button that fills the form of the tab Draw with the settings of the chosen image, and shows that tab."""
    chosen = gradio.State(0)
    controls.gallery.select(choose_image, None, [chosen], **UNQUEUED)

    def send(files: list[str], number: int, layout: int) -> list[Any]:
        path = path_of_chosen(files, number)
        if path is None:
            return [*updates({}), show_note("Draw or choose an image first."), gradio.skip()]
        try:
            values, _ = restore_settings(path, layout, studio.service.home)
        except WordedError as error:
            return [*updates({}), show_error(error), gradio.skip()]
        return [*updates(values), show_note("The tab Draw has its settings."), gradio.Tabs(selected="Draw")]

    inputs, outputs = [controls.paths, chosen, form.layout], [*form.components, controls.status, studio.tabs]
    gradio.Button("Use its settings in Draw", size="sm").click(send, inputs, outputs, **QUIET)
