"""The rows of the chosen adapters in the tab Draw: version, weights, schedule."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.studio.draw_form import DrawForm, Used, compose_prompt
from flows.web.studio.page_messages import show_error, show_note
from flows.web.studio.page_style import QUIET, UNQUEUED
from flows.web.studio.schedule import (
    PERCENT,
    SCHEDULE_PRESETS,
    UNITS,
    draw_curve,
    preset_rows,
    schedule_rows,
    schedule_weights,
)
from lora_engine.errors import WordedError
from lora_engine.inference.prompts.step_weights import StepWeights
from registry.home import Home
from tasks.operations.adapter_cards import AdapterCard, list_adapter_cards

if TYPE_CHECKING:
    from flows.web.studio.context import Studio

LOWEST, HIGHEST = -2.0, 3.0
"""Range of the sliders of weights."""


def constant(weight: float) -> StepWeights:
    """Returns the same weight in each step."""
    return StepWeights(((0.0, float(weight)),))


def add_rows(studio: Studio, form: DrawForm) -> None:
    """Adds one row per chosen adapter, which is built again when adapters are added or removed."""
    outputs = [form.used, form.prompt, form.composed]

    def show_rows(used: list[Used]) -> None:
        if not used:
            gradio.HTML(
                show_note("No adapter is used. Choose one of the cards below, or paste a prompt that names one.")
            )
        cards = _cards(studio.service.home)
        for index, entry in enumerate(used):
            with gradio.Column(elem_classes="studio-adapter", key=f"{index}-{entry.tag.name}"):
                _add_row(form, outputs, index, entry, cards)

    gradio.render([form.used], [form.layout.change, studio.page.load], show_progress="hidden")(show_rows)


def _add_row(form: DrawForm, outputs: list[Any], index: int, entry: Used, cards: dict[str, AdapterCard]) -> None:
    name = entry.tag.name.partition("@")[0]
    choices = list(dict.fromkeys([entry.tag.name, *(cards[name].references if name in cards else ())]))
    with gradio.Row():
        is_on = gradio.Checkbox(entry.is_on, label=f"Use {name}", min_width=110, scale=2)
        version = gradio.Dropdown(choices, value=entry.tag.name, label=f"Version of {name}", min_width=170, scale=3)
        remove = gradio.Button(f"Remove {name}", min_width=110, scale=2, size="sm")
    with gradio.Row():
        denoiser = _slider(f"Weight of {name}", entry.tag.denoiser)
        text = _slider(f"Text encoder of {name}", entry.tag.text_encoder)
    sliders = [
        (denoiser, "denoiser", entry.tag.denoiser),
        (text, "text_encoder", entry.tag.text_encoder),
    ]
    is_on.input(partial(_turn, index), [is_on, form.text, form.used], outputs, **UNQUEUED)
    version.input(partial(_change, index, "name"), [version, form.text, form.used], outputs, **UNQUEUED)
    for slider, part, weights in sliders:
        if weights.is_constant:
            slider.change(
                partial(_change, index, part),
                [slider, form.text, form.used],
                outputs,
                trigger_mode="always_last",
                **UNQUEUED,
            )
    remove.click(partial(_remove, index), [form.text, form.used, form.layout], [*outputs, form.layout], **QUIET)


def _slider(label: str, weights: StepWeights) -> gradio.Slider:
    is_constant = weights.is_constant
    value = max((weight for _, weight in weights.points), key=abs)
    return gradio.Slider(
        min(LOWEST, value),
        max(HIGHEST, value),
        value,
        step=0.05,
        label=label if is_constant else f"{label} (scheduled)",
        interactive=is_constant,
        min_width=190,
        scale=3,
    )


def _change(index: int, part: str, value: Any, text: str, used: list[Used]) -> tuple[list[Used], Any, Any]:
    if index >= len(used):
        return used, gradio.skip(), gradio.skip()
    used = [*used]
    new: dict[str, Any] = {part: str(value) if part == "name" else constant(float(value))}
    used[index] = replace(used[index], tag=replace(used[index].tag, **new))
    composed = compose_prompt(text, used)
    return used, composed, composed


def _turn(index: int, is_on: bool, text: str, used: list[Used]) -> tuple[list[Used], Any, Any]:
    used = [replace(entry, is_on=bool(is_on)) if place == index else entry for place, entry in enumerate(used)]
    composed = compose_prompt(text, used)
    return used, composed, composed


def _remove(index: int, text: str, used: list[Used], layout: int) -> tuple[list[Used], Any, Any, int]:
    used = [entry for place, entry in enumerate(used) if place != index]
    composed = compose_prompt(text, used)
    return used, composed, composed, layout + 1


def _cards(home: Home) -> dict[str, AdapterCard]:
    try:
        return {card.name: card for card in list_adapter_cards(home)}
    except WordedError:
        return {}


def add_schedule(form: DrawForm) -> None:
    """Adds the editor of the weight over the steps of one of the chosen adapters."""
    with gradio.Row():
        chosen = gradio.Dropdown([], label="Schedule of adapter", interactive=True, scale=2)
        unit = gradio.Radio(UNITS, value=PERCENT, label="Positions are", scale=2)
        preset = gradio.Dropdown([*SCHEDULE_PRESETS], value=None, label="Preset", interactive=True, scale=1)
    with gradio.Row():
        table = gradio.Dataframe(
            [[0, 1]],
            headers=["position", "weight"],
            datatype=["number", "number"],
            column_count=2,
            type="array",
            interactive=True,
            label="Points of the schedule",
            show_label=True,
            buttons=[],
            min_width=240,
        )
        curve = gradio.HTML(draw_curve(constant(1), 20), elem_classes="studio-curve")
    with gradio.Row():
        add = gradio.Button("Add a point", size="sm")
        remove = gradio.Button("Remove the last point", size="sm")
    message = gradio.HTML()
    apply = gradio.Button("Use this schedule")
    # The menu of a cell, which also adds and removes rows, cannot be reached with the keyboard.
    add.click(_add_point, [table, unit], [table], **UNQUEUED)
    remove.click(lambda rows: rows[:-1] if len(rows) > 1 else rows, [table], [table], **UNQUEUED)
    gradio.on(
        [table.change, unit.change, form.steps.change],
        _show_curve,
        [table, unit, form.steps],
        [curve, message],
        trigger_mode="always_last",
        **UNQUEUED,
    )
    form.layout.change(_list_used, [form.used, chosen], [chosen], **UNQUEUED)
    chosen.input(_read_points, [chosen, form.used], [table, unit], **UNQUEUED)
    preset.input(_take_preset, [preset, chosen, form.used], [table, unit], **UNQUEUED)
    outputs = [form.used, form.prompt, form.composed, form.layout, message]
    apply.click(_apply, [chosen, table, unit, form.text, form.used, form.layout], outputs, **QUIET)


def _list_used(used: list[Used], chosen: str | None) -> Any:
    names = [f"{number}. {entry.tag.name}" for number, entry in enumerate(used, 1)]
    return gradio.update(choices=names, value=chosen if chosen in names else (names[-1] if names else None))


def _place(chosen: str | None, used: list[Used]) -> int | None:
    number, _, name = str(chosen or "").partition(". ")
    is_there = number.isdigit() and 1 <= int(number) <= len(used) and used[int(number) - 1].tag.name == name
    return int(number) - 1 if is_there else None


def _read_points(chosen: str | None, used: list[Used]) -> tuple[Any, Any]:
    place = _place(chosen, used)
    return (gradio.skip(), gradio.skip()) if place is None else schedule_rows(used[place].tag.denoiser)


def _take_preset(name: str, chosen: str | None, used: list[Used]) -> tuple[Any, Any]:
    place = _place(chosen, used)
    weights = ((0.0, 1.0),) if place is None else used[place].tag.denoiser.points
    largest = max((weight for _, weight in weights), key=abs)
    return (preset_rows(name, largest), PERCENT) if name in SCHEDULE_PRESETS else (gradio.skip(), gradio.skip())


def _add_point(rows: list[list[Any]], unit: str) -> list[list[Any]]:
    """Returns the rows with one at the end, or behind the last step, which has the last weight."""
    try:
        position, weight = schedule_rows(schedule_weights(rows, unit))[0][-1]
    except WordedError:
        return [*rows, [None, None]]
    return [*rows, [100 if unit == PERCENT else position + 1, weight]]


def _show_curve(rows: list[list[Any]], unit: str, steps: float) -> tuple[Any, str]:
    try:
        return draw_curve(schedule_weights(rows, unit), int(steps)), ""
    except WordedError as error:
        return gradio.skip(), show_error(error)


def _apply(
    chosen: str | None, rows: list[list[Any]], unit: str, text: str, used: list[Used], layout: int
) -> tuple[Any, ...]:
    place = _place(chosen, used)
    if place is None:
        return *[gradio.skip()] * 4, show_note("Choose an adapter first.")
    try:
        weights = schedule_weights(rows, unit)
    except WordedError as error:
        return *[gradio.skip()] * 4, show_error(error)
    used = [*used]
    used[place] = replace(used[place], tag=replace(used[place].tag, denoiser=weights))
    composed = compose_prompt(text, used)
    return used, composed, composed, layout + 1, show_note("The prompt has the schedule.")
