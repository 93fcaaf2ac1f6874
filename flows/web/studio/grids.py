"""The tab Grid: axes of adapters, weights, words and settings, with the prompt's own adapters in every image."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.callers import caller_of
from flows.web.studio.draw_controls import add_controls
from flows.web.studio.draw_form import DrawForm, request_of
from flows.web.studio.page_messages import follow, show_error, show_note
from flows.web.studio.page_style import QUIET, UNQUEUED
from lora_engine.errors import SettingsError, WordedError
from lora_engine.inference.grid import SETTINGS, Axis, parse_axis
from tasks.operations.adapter_cards import list_adapter_cards
from tasks.operations.image_grids import compose_grid, requests_of_grid

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

NONE, WEIGHT, ADAPTER, WORD = "none", "weight", "adapter or version", "word of the prompt"
CHOICES = (WEIGHT, ADAPTER, WORD, *SETTINGS)
_VARIED_ADAPTER, _VARIED_WEIGHT = "VARIED_ADAPTER", "VARIED_WEIGHT"
_MOST = 100
"""Images of one grid; `loraline generate` draws larger ones."""


def add_grids(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    form = studio.form
    if form is None:
        return
    text = gradio.Textbox(
        label="Prompt of the grid",
        info="Adapters that it names are in every image. Other settings are those of the tab Draw.",
        lines=2,
    )
    with gradio.Row():
        adapter = gradio.Dropdown([NONE], value=NONE, label="Varied adapter", min_width=180)
        weight = gradio.Slider(-2, 3, 1, step=0.05, label="Its weight, unless an axis has it", min_width=180)
    axes = [*_add_axis("X", CHOICES, WEIGHT, "0..1.2/4"), *_add_axis("Y", (NONE, *CHOICES), "seed", "1, 2")]
    controls = add_controls(studio, form, draw="Draw the grid", gallery="Cells", columns=4)
    sheet = gradio.Image(
        label="Sheet",
        elem_classes="studio-sheet",
        type="filepath",
        format="png",
        interactive=False,
        buttons=["download", "fullscreen"],
    )

    events = _GridEvents(studio)
    gradio.on([studio.page.load, adapter.focus], events.list_adapters, [adapter], [adapter], **UNQUEUED)
    controls.take.click(lambda prompt: prompt, [form.prompt], [text], **UNQUEUED)
    gradio.on(
        [controls.start.click, text.submit],
        events.draw,
        [text, adapter, weight, *axes, *form.components],
        [controls.status, controls.gallery, controls.paths, sheet, controls.job],
        trigger_mode="once",
        **QUIET,
    )


def _add_axis(side: str, choices: Sequence[str], chosen: str, values: str) -> list[Any]:
    """Adds a row with the kind, the word and the values of an axis; returns them."""
    with gradio.Row():
        return [
            gradio.Dropdown([*choices], value=chosen, label=f"{side} axis", min_width=150),
            gradio.Textbox(label=f"{side} word", placeholder="a word of the prompt", min_width=130),
            gradio.Textbox(values, label=f"{side} values", info="A, B, C or FIRST..LAST/COUNT", min_width=180, scale=2),
        ]


class _GridEvents:
    def __init__(self, studio: Studio) -> None:
        self._studio = studio

    def list_adapters(self, chosen: str | None) -> Any:
        """Returns the choices of the varied adapter."""
        cards = list_adapter_cards(self._studio.service.home)
        choices = [NONE, *(reference for card in cards for reference in card.references)]
        first = choices[1] if chosen in {None, NONE} and len(choices) > 1 else NONE
        return gradio.update(choices=choices, value=chosen if chosen in choices[1:] else first)

    def draw(
        self,
        request: gradio.Request,
        text: str,
        adapter: str,
        weight: float,
        x: str,
        x_word: str,
        x_values: str,
        y: str,
        y_word: str,
        y_values: str,
        *values: Any,
    ) -> Iterator[tuple[Any, ...]]:
        """Draws the cells; yields status, gallery, paths, sheet and job."""
        studio, skip = self._studio, gradio.skip()
        try:
            sides = [(x, x_word, x_values), *([] if y in {NONE, None} else [(y, y_word, y_values)])]
            axes, labels = axes_of(sides)
            prompt = prompt_of(text, adapter, weight, axes)
            wanted = request_of(
                {**DrawForm.values(values), "prompt": prompt, "composed": ""},
                studio.service.settings.base,
                studio.files.folder,
            )
            rows = requests_of_grid(wanted, axes)
            flat = [one for row in rows for one in row]
            if len(flat) > _MOST:
                raise SettingsError(f"{len(flat)} images", allowed=f"at most {_MOST}", remedy="give fewer values")
            for status, progress in follow(studio.service, flat, tenant=caller_of(request).tenant):
                if progress.job is not None:
                    yield status, skip, skip, skip, progress.job.id
            files = [images[0] for images in progress.images if images]
            width = len(axes[0].values)
            by_row = [files[start : start + width] for start in range(0, len(files), width)]
            paths = [studio.files.write(content, f"cell-{place + 1}.png") for place, content in enumerate(files)]
            shown = [(path, caption) for path, caption in zip(paths, _captions_of(labels), strict=True)]
            sheet = studio.files.write(compose_grid(by_row, labels), "grid.png")
            yield show_note(f"Drawn: {len(files)} images."), gradio.update(value=shown, columns=width), paths, sheet, ""
        except WordedError as error:
            yield show_error(error), skip, skip, skip, ""


def axes_of(sides: Sequence[tuple[str, str, str]]) -> tuple[list[Axis], list[Axis]]:
    """Returns the axes for the requests, and the same axes with readable names.

    Args:
        sides: Kind of axis, word of the prompt (for that kind), and values of each side.

    Raises:
        SettingsError: A kind is unknown, or values cannot be read.
    """
    axes, labels = [], []
    for kind, word, values in sides:
        names = {WEIGHT: (_VARIED_WEIGHT, "weight"), ADAPTER: (_VARIED_ADAPTER, "adapter"), WORD: (word, word)}
        name, label = names.get(kind, (kind, kind))
        if kind not in CHOICES:
            raise SettingsError(f"axis {kind[:40]!r}", allowed=", ".join(CHOICES))
        if kind == WORD and (not str(word or "").strip() or word in SETTINGS):
            raise SettingsError(f"the word of an axis is {word!r}", allowed="a word of the prompt")
        axis = parse_axis(f"{name}={values}")
        axes.append(axis)
        labels.append(Axis(label, axis.values))
    return axes, labels


def prompt_of(text: str, adapter: str | None, weight: float, axes: Sequence[Axis]) -> str:
    """Returns the prompt with the varied adapter behind those that it names.

    Raises:
        SettingsError: An axis varies an adapter, but none is chosen.
    """
    names = {axis.name for axis in axes}
    varied = names & {_VARIED_WEIGHT, _VARIED_ADAPTER}
    reference = _VARIED_ADAPTER if _VARIED_ADAPTER in names else adapter
    if reference in {None, "", NONE}:
        if varied:
            raise SettingsError("no varied adapter is chosen", remedy="choose one, or another axis than its weight")
        return text
    value = _VARIED_WEIGHT if _VARIED_WEIGHT in names else f"{weight:g}"
    return f"{text} <lora:{reference}:{value}>".strip()


def _captions_of(labels: Sequence[Axis]) -> list[str]:
    """Returns the caption of each cell, row by row."""
    rows = labels[1].labels if len(labels) > 1 else ("",)
    return [", ".join(filter(None, (column, row))) for row in rows for column in labels[0].labels]
