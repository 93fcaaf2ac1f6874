"""The tab Trainings: runs in progress and the latest others, with curves and samples, refreshed by a timer."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.studio.page_messages import data_url, show_error, show_note, show_table
from flows.web.studio.page_style import QUIET
from lora_engine.errors import WordedError
from tasks.operations.training_view import TrainingView, list_trainings, view_training

if TYPE_CHECKING:
    from flows.web.studio.context import Studio
    from tasks.operations.status import RunState, StepStatus

TITLE = "Trainings"
_SECONDS = 3


def add_trainings(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    tab = _Trainings(studio)
    with gradio.Row():
        chosen = gradio.Dropdown([], label="Training", interactive=True, scale=4)
        follow = gradio.Checkbox(True, label="Follow", scale=0, min_width=110)
    shown = gradio.HTML(apply_default_css=False, padding=False)
    with gradio.Accordion("All runs", open=False):
        runs = gradio.HTML(apply_default_css=False, padding=False)
    timer = gradio.Timer(_SECONDS, active=False)
    outputs = [chosen, shown, runs]
    studio.tabs.select(tab.select_tab, [chosen, follow], [timer, *outputs], **QUIET)
    timer.tick(tab.show, chosen, outputs, trigger_mode="once", **QUIET)
    chosen.input(tab.show, chosen, outputs, **QUIET)
    follow.input(lambda active: gradio.Timer(active=bool(active)), follow, timer, **QUIET)


class _Trainings:
    """The events of the tab.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home

    def select_tab(self, chosen: str | None, follow: bool, event: gradio.SelectData) -> tuple[Any, ...]:
        """Shows the trainings and starts the timer if the user opens this tab; stops the timer for other tabs."""
        if event.value != TITLE:
            return gradio.Timer(active=False), *[gradio.skip()] * 3
        return gradio.Timer(active=bool(follow)), *self.show(chosen)

    def show(self, chosen: str | None) -> tuple[Any, str, str]:
        """Returns the trainings, the chosen one or the latest, and all runs."""
        try:
            found = list_trainings(self._home)
            if not found:
                empty = "No training yet. `loraline run pipeline.yaml` starts one, and it appears here."
                return gradio.update(choices=[], value=None), show_note(empty), ""
            keyed = {f"{state.run.id}/{step.name}": (state, step) for state, step in found}
            value = chosen if chosen in keyed else next(iter(keyed))
            shown = _show_training(view_training(self._home, *keyed[value]))
        except WordedError as error:
            return gradio.skip(), show_error(error), ""
        choices = [(_label(*entry), key) for key, entry in keyed.items()]
        return gradio.update(choices=choices, value=value), shown, _runs([state for state, _ in found])


def _show_training(view: TrainingView) -> str:
    """Returns a training as HTML."""
    step = view.step
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in view.facts.items())
    legends = {"Loss": "bold: running mean; dots: held-out images"}
    curves = "".join(
        f'<figure><figcaption>{escape(title)} <span class="train-legend">{legends.get(title, "")}</span></figcaption>'
        f"{drawing}</figure>"
        for title, drawing in view.curves.items()
    )
    bar = f'<progress class="train-bar" aria-label="Steps" max="{max(step.total, 1)}" value="{step.done}"></progress>'
    problem = f'<div class="studio-error" role="alert">{escape(step.text)}</div>' if step.state == "failed" else ""
    waits = show_note(step.text) if step.text and step.state != "failed" else ""
    warnings = "".join(f"<li>{escape(text)}</li>" for text in step.warnings)
    return (
        f'<div class="train-head"><h3>{escape(view.state.run.name)}: {escape(step.name)}</h3>'
        f'<span class="studio-tag">{escape(step.state)}</span></div>{bar}{problem}{waits}'
        f'<dl class="train-facts">{facts}</dl><div class="train-curves">{curves}</div>'
        f"{_samples(view)}{f'<ul>{warnings}</ul>' if warnings else ''}"
    )


def _samples(view: TrainingView) -> str:
    """Returns the samples as a grid: one row per prompt and seed, one column per step."""
    if not view.samples:
        return ""
    steps = sorted({step for step, _ in view.samples})
    rows = []
    for key in sorted({prompt for _, prompt in view.samples}):
        number, _, seed = key.partition("-")
        cells = "".join(f"<td>{_image(view.samples.get((step, key)), step)}</td>" for step in steps)
        prompt = view.prompts[int(number)] if int(number) < len(view.prompts) else f"prompt {int(number) + 1}"
        rows.append(f'<tr><th scope="row">{escape(prompt)}, seed {int(seed) + 1}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{step}</th>' for step in steps)
    return (
        '<div class="train-samples" tabindex="0" role="region" aria-label="Samples by step"><table>'
        f'<thead><tr><th scope="col">Step</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _image(content: bytes | None, step: int) -> str:
    if content is None:
        return ""
    return f'<img alt="Sample of step {step}" src="{data_url(content)}">'


def _label(state: RunState, step: StepStatus) -> str:
    return f"{state.run.name}: {step.name}, {step.state}, started {state.run.started_at:%Y-%m-%d %H:%M}"


def _runs(states: list[RunState]) -> str:
    seen: dict[str, RunState] = {state.run.id: state for state in states}
    rows = [
        (
            escape(state.run.name),
            escape(state.run.status),
            f"{state.run.started_at:%Y-%m-%d %H:%M}",
            escape(", ".join(f"{step.name} {step.state}" for step in state.steps)),
            escape(", ".join(f"{version.ref} (gates {version.gate_status})" for version in state.versions)),
        )
        for state in seen.values()
    ]
    return show_table(("Run", "Status", "Started (UTC)", "Steps", "Versions"), rows, label="Runs")
