"""The tab Compare: the same seeds of the base and of several versions, with a slider and their metrics."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.callers import caller_of
from flows.web.studio.draw_adapters import constant
from flows.web.studio.draw_controls import add_controls
from flows.web.studio.draw_form import DrawForm, request_of
from flows.web.studio.page_messages import follow, show_error, show_note
from flows.web.studio.page_style import QUIET, UNQUEUED
from lora_engine.errors import SettingsError, WordedError
from lora_engine.inference.prompts.prompt import parse_prompt
from lora_engine.inference.prompts.tags import AdapterTag
from lora_engine.inference.prompts.writing import write_prompt
from tasks.operations.adapter_cards import list_adapter_cards, tabulate_metrics
from tasks.operations.draw_request import DrawRequest

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

_BASE = "base"
_MOST = 6
"""Versions that are compared at once."""
_Files = dict[str, list[str]]
"""Column (`base` or `name@version`) -> its files, one per seed."""


def add_compare(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    form, drawn = studio.form, gradio.State({})
    if form is None:
        return
    with gradio.Row():
        adapter = gradio.Dropdown([], label="Adapter to compare", min_width=180)
        versions = gradio.Dropdown(
            [_BASE],
            value=[_BASE],
            multiselect=True,
            label="Columns",
            info="the base and versions",
            min_width=240,
            scale=2,
        )
        weight = gradio.Slider(-2, 3, 1, step=0.05, label="Weight in all columns", min_width=180)
    text = gradio.Textbox(
        label="Prompt of the comparison",
        info="Other adapters that it names are in all columns. Seed, steps, size are those of the tab Draw.",
        lines=2,
    )
    controls = add_controls(studio, form, draw="Compare", gallery="Columns side by side, a row per seed", columns=3)
    pair = _add_slider(drawn)
    metrics = gradio.HTML(elem_classes="studio-metrics")

    events = _CompareEvents(studio)
    studio.page.load(events.list_adapters, None, [adapter, versions], **UNQUEUED)
    adapter.focus(events.list_names, [adapter], [adapter], **UNQUEUED)
    adapter.input(events.list_versions, [adapter], [versions], **UNQUEUED)
    controls.take.click(events.take_prompt, [form.prompt, adapter], [text], **UNQUEUED)
    gradio.on(
        [controls.start.click, text.submit],
        events.compare,
        [adapter, versions, weight, text, *form.components],
        [controls.status, controls.gallery, drawn, controls.paths, *pair, metrics, controls.job, form.seed],
        trigger_mode="once",
        **QUIET,
    )


def _add_slider(drawn: gradio.State) -> list[Any]:
    """Adds the slider between two columns; returns its choices left, right and row, and the slider."""
    with gradio.Row():
        with gradio.Column(min_width=300), gradio.Row():
            left = gradio.Dropdown([], label="Left of the slider", interactive=True, min_width=120)
            right = gradio.Dropdown([], label="Right of the slider", interactive=True, min_width=120)
            row = gradio.Dropdown([], label="Row", interactive=True, min_width=80)
        slider = gradio.ImageSlider(
            label="Slider", type="filepath", format="png", interactive=False, height=384, elem_classes="studio-small"
        )
    gradio.on([left.input, right.input, row.input], _choose_pair, [drawn, left, right, row], [slider], **UNQUEUED)
    return [left, right, row, slider]


class _CompareEvents:
    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def list_names(self, chosen: str | None) -> Any:
        """Returns the choices of the adapter."""
        names = [card.name for card in list_adapter_cards(self._studio.service.home)]
        return gradio.update(choices=names, value=chosen if chosen in names else None)

    def list_adapters(self) -> tuple[Any, Any]:
        """Returns the choices of the adapter and of its columns when the page is loaded."""
        names = [card.name for card in list_adapter_cards(self._studio.service.home)]
        first = names[0] if names else None
        return gradio.update(choices=names, value=first), self.list_versions(first)

    def list_versions(self, name: str | None) -> Any:
        """Returns the choices of the columns: base, production and staging (or the newest version) are chosen."""
        cards = {card.name: card for card in list_adapter_cards(self._studio.service.home)}
        if name not in cards:
            return gradio.update(choices=[_BASE], value=[_BASE])
        references = cards[name].references
        return gradio.update(choices=[_BASE, *references], value=[_BASE, *references[:2]])

    def take_prompt(self, prompt: str, name: str | None) -> str:
        """Returns the prompt of the tab Draw without the compared adapter."""
        try:
            parsed = parse_prompt(prompt)
        except WordedError:
            return prompt
        return write_prompt(parsed.text, [tag for tag in parsed.adapters if tag.name.partition("@")[0] != name])

    def compare(
        self, request: gradio.Request, name: str, columns: list[str], weight: float, text: str, *values: Any
    ) -> Iterator[list[Any]]:
        """Draws the columns; yields the outputs of the tab."""
        studio = self._studio
        try:
            filled = DrawForm.values(values)
            wanted = request_of(
                {**filled, "prompt": text, "composed": ""}, studio.service.settings.base, studio.files.folder
            )
            requests = requests_of_columns(wanted, name, columns, weight)
            yield _outputs(show_note("Sending the requests."), seed=wanted.seed)
            for status, progress in follow(studio.service, requests, tenant=caller_of(request).tenant):
                if progress.job is not None:
                    yield _outputs(status, job=progress.job.id)
            drawn = {
                column: [studio.files.write(content, f"{place + 1}.png") for place, content in enumerate(images or ())]
                for column, images in zip(columns, progress.images, strict=True)
            }
            yield _show_columns(drawn, wanted, self._metrics(columns))
        except WordedError as error:
            yield _outputs(show_error(error), job="")

    def _metrics(self, columns: Sequence[str]) -> str:
        references = [column for column in columns if column != _BASE]
        rows = tabulate_metrics(self._studio.service.home, references) if references else []
        if not rows:
            return show_note("No metrics: the versions were not evaluated.")
        head = "".join(f'<th scope="col">{escape(title)}</th>' for title in ("metric", *references))
        body = "".join(
            f'<tr><th scope="row">{escape(row[0])}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in row[1:])}</tr>'
            for row in rows
        )
        return f"<table><caption>Metrics of the evaluations (* other embedders)</caption><tr>{head}</tr>{body}</table>"


def requests_of_columns(request: DrawRequest, name: str, columns: Sequence[str], weight: float) -> list[DrawRequest]:
    """Returns a request per column, with the same seeds: the prompt alone, or with one version of the adapter.

    Args:
        request: The request without the adapter.
        name: The adapter.
        columns: `base`, or `name@version` or `name@alias` of the adapter.
        weight: The weight of the adapter.

    Raises:
        SettingsError: There is no column or too many, or one is of another adapter.
    """
    if not 1 <= len(columns) <= _MOST or len(set(columns)) < len(columns):
        raise SettingsError(f"columns {', '.join(map(str, columns))[:80]!r}", allowed=f"1 to {_MOST} different columns")
    requests = []
    for column in columns:
        if column != _BASE and str(column).partition("@")[0] != name:
            raise SettingsError(f"column {column!r}", allowed=f"{_BASE}, or versions of {name!r}")
        tags = [] if column == _BASE else [AdapterTag(column, constant(weight), constant(weight))]
        requests.append(replace(request, prompt=write_prompt(request.prompt, tags)))
    return requests


def _choose_pair(drawn: _Files, left: str, right: str, row: str) -> Any:
    """Returns the two images of the slider."""
    place = int(row) - 1 if str(row).isdigit() else 0
    pair = [drawn.get(column, []) for column in (left, right)]
    if not all(0 <= place < len(files) for files in pair):
        return gradio.skip()
    return tuple(files[place] for files in pair)


def _outputs(status: str, *, seed: int | None = None, job: str | None = None) -> list[Any]:
    values = [status, *[gradio.skip()] * 10]
    values[9] = gradio.skip() if job is None else job
    values[10] = gradio.skip() if seed is None else seed
    return values


def _show_columns(drawn: _Files, request: DrawRequest, metrics: str) -> list[Any]:
    columns = list(drawn)
    order = [(column, place) for place in range(request.count) for column in columns]
    paths = [drawn[column][place] for column, place in order]
    captions = [f"{column}, seed {request.seed + place}" for column, place in order]
    first, last = columns[0], columns[-1]
    return [
        show_note(f"Drawn: {len(paths)} images."),
        gradio.update(value=list(zip(paths, captions, strict=True)), columns=len(columns)),
        drawn,
        paths,
        gradio.update(choices=columns, value=first),
        gradio.update(choices=columns, value=last),
        gradio.update(choices=[str(place + 1) for place in range(request.count)], value="1"),
        (drawn[first][0], drawn[last][0]),
        metrics,
        "",
        gradio.skip(),
    ]
