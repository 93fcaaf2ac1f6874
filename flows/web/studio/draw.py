"""The tab Draw: prompt, adapters, settings, images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gradio

from flows.web.studio.cards import CardList
from flows.web.studio.draw_adapters import add_rows, add_schedule
from flows.web.studio.draw_advanced import add_advanced
from flows.web.studio.draw_controls import connect_cancel
from flows.web.studio.draw_events import DrawEvents, DrawResults, choose_image, recompose
from flows.web.studio.draw_form import OWN_SAMPLER, SAMPLER_CHOICES, DrawForm
from flows.web.studio.page_style import QUIET, UNQUEUED, image_classes

if TYPE_CHECKING:
    from flows.web.studio.context import Studio


def add_draw(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`, and its form to the studio."""
    states: dict[str, Any] = {"used": gradio.State([]), "layout": gradio.State(0), "composed": gradio.State("")}
    with gradio.Row():
        with gradio.Column(scale=5, min_width=320):
            text = gradio.Textbox(label="Prompt", lines=2, placeholder="what to draw", autofocus=True)
            negative = gradio.Textbox(label="Negative prompt", lines=1)
            with gradio.Row():
                start = gradio.Button("Draw", variant="primary")
                cancel = gradio.Button("Cancel")
            rows = gradio.Column()
            prompt = gradio.Textbox(
                label="Whole prompt",
                info="What is drawn, in A1111's syntax. Edit it, or paste one.",
                lines=2,
                max_lines=6,
            )
            settings = _add_settings()
            with gradio.Accordion("Weight over the steps", open=False):
                schedule = gradio.Column()
            settings |= _add_source()
            settings |= add_advanced()
            with gradio.Accordion("Settings from an image", open=False):
                dropped = gradio.File(label="PNG of Loraline or A1111", file_types=[".png"], height=120)
        with gradio.Column(scale=4, min_width=320):
            results, reuse, start_from = _add_results(studio)
    form = DrawForm(text=text, negative=negative, prompt=prompt, **states, **settings)
    studio.form = form
    with rows:
        add_rows(studio, form)
    with schedule:
        add_schedule(form)
    gradio.HTML("<h2>Adapters</h2>")
    cards = CardList(studio)
    events = DrawEvents(studio, cards)
    _connect_drawing(form, results, events, start)
    connect_cancel(studio, cancel, results.job, results.status)
    _connect_form(form, results, events, cards)
    dropped.upload(events.restore, [dropped, form.layout], [*form.components, results.status], **QUIET)
    inputs = [results.files, results.chosen]
    reuse.click(events.restore_chosen, [*inputs, form.layout], [*form.components, results.status], **QUIET)
    start_from.click(events.start_from, inputs, [form.source, results.status], **UNQUEUED)


def _add_settings() -> dict[str, Any]:
    with gradio.Accordion("Settings", open=True):
        with gradio.Row():
            size = gradio.Textbox(label="Size", placeholder="base's own", info="WIDTHxHEIGHT in pixels", min_width=130)
            count = gradio.Slider(1, 16, 2, step=1, label="Number of images", min_width=150)
            sampler = gradio.Dropdown(
                SAMPLER_CHOICES,
                value=OWN_SAMPLER,
                label="Sampler",
                info="Or a name with a schedule type, such as DPM++ 2M Karras",
                allow_custom_value=True,
                min_width=150,
            )
        with gradio.Row():
            steps = gradio.Slider(1, 150, 20, step=1, label="Steps", min_width=130)
            guidance = gradio.Slider(1, 30, 3, step=0.1, label="Guidance", min_width=130)
        with gradio.Row():
            seed = gradio.Number(0, label="Seed", precision=0, minimum=0, min_width=130)
            is_random = gradio.Checkbox(True, label="New seed each time", min_width=130)
    return {
        "size": size,
        "count": count,
        "sampler": sampler,
        "steps": steps,
        "guidance": guidance,
        "seed": seed,
        "is_random": is_random,
    }


def _add_source() -> dict[str, Any]:
    with gradio.Accordion("Start from an image", open=False):
        source = gradio.ImageEditor(
            label="Image; paint over the part to draw",
            type="filepath",
            format="png",
            image_mode="RGBA",
            sources=["upload", "clipboard"],
            transforms=(),
            layers=False,
            brush=gradio.Brush(default_size=24, colors=["#ff3b30"], color_mode="fixed"),
            buttons=[],
            height=360,
        )
        strength = gradio.Slider(
            0.05, 1, 0.75, step=0.05, label="Strength", info="Share of the steps that run; 1 keeps nothing of the image"
        )
    with gradio.Accordion("Second pass (enlarge)", open=False), gradio.Row():
        enlarge = gradio.Slider(1, 4, 1, step=0.25, label="Factor", info="1 draws no second pass")
        enlarged_strength = gradio.Slider(0.05, 1, 0.5, step=0.05, label="Strength of the second pass")
    return {"source": source, "strength": strength, "enlarge": enlarge, "enlarged_strength": enlarged_strength}


def _add_results(studio: Studio) -> tuple[DrawResults, gradio.Button, gradio.Button]:
    status = gradio.HTML(elem_classes="studio-status", elem_id="draw-status")
    gallery = gradio.Gallery(
        label="Images",
        columns=2,
        height="auto",
        object_fit="contain",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
        elem_classes=image_classes(studio.service.settings.base),
    )
    with gradio.Row():
        reuse = gradio.Button("Use its settings", size="sm")
        start_from = gradio.Button("Start from it", size="sm")
    files = gradio.File(label="PNG files with their settings", file_count="multiple", interactive=False, height=140)
    chosen = gradio.State(0)
    gallery.select(choose_image, None, [chosen], **UNQUEUED)
    return DrawResults(status, gallery, files, gradio.State(""), chosen), reuse, start_from


def _connect_drawing(form: DrawForm, results: DrawResults, events: DrawEvents, start: gradio.Button) -> None:
    outputs = [results.status, results.gallery, results.files, results.job, form.seed]
    gradio.on(
        [start.click, form.text.submit, form.prompt.submit],
        events.draw,
        form.components,
        outputs,
        trigger_mode="once",
        **QUIET,
    )


def _connect_form(form: DrawForm, results: DrawResults, events: DrawEvents, cards: CardList) -> None:
    whole = [form.prompt, form.composed]
    form.text.input(recompose, [form.text, form.used], whole, trigger_mode="always_last", **UNQUEUED)
    form.prompt.blur(
        events.edit_prompt,
        [form.prompt, form.composed, form.layout],
        [form.text, form.used, form.layout, *whole, results.status],
        **QUIET,
    )
    cards.html.select(
        events.choose_card,
        [form.text, form.used, form.layout],
        [form.text, form.used, form.layout, *whole, results.status],
        **QUIET,
    )
