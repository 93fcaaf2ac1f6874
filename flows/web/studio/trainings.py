"""The tab Trainings: runs in progress and the latest others, with curves and samples, refreshed by a timer."""

from __future__ import annotations

import base64
from html import escape
from typing import TYPE_CHECKING, Any

import gradio

from flows.web.studio.acting import actor_of, explain, note, table
from lora_engine.errors import WordedError
from tasks.operations.training_view import TrainingView, list_trainings, read_training

if TYPE_CHECKING:
    from flows.web.studio.page import Studio
    from tasks.operations.status import RunState, StepStatus

_SECONDS = 3
_STYLE = """
<style>
.train-head { display: flex; flex-wrap: wrap; gap: .35rem 1rem; align-items: baseline; margin: .25rem 0; }
.train-head h3 { margin: 0; overflow-wrap: anywhere; }
.train-bar { width: 100%; height: 8px; accent-color: var(--color-accent); }
.train-facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(140px, 1fr)); gap: .5rem;
  margin: .6rem 0; }
.train-facts div { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .4rem .6rem; }
.train-facts dt { font-size: .78rem; color: var(--body-text-color-subdued); }
.train-facts dd { margin: 0; font-variant-numeric: tabular-nums; font-weight: 600; }
.train-curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 330px), 1fr)); gap: .75rem; }
.train-curves figure { margin: 0; border: 1px solid var(--border-color-primary); border-radius: 8px; padding: .5rem; }
.train-curves figcaption { font-size: .85rem; font-weight: 600; }
.train-curves svg { width: 100%; height: auto; display: block; }
.train-curves text { font-size: 12px; fill: var(--body-text-color-subdued); }
.train-curves .grid { stroke: var(--border-color-primary); }
.train-curves .tick, .train-curves .axis { stroke: currentColor; opacity: .4; }
.train-curves polyline { fill: none; } .train-curves .raw { stroke: var(--color-accent); opacity: .3; }
.train-curves .mean { stroke: var(--color-accent); stroke-width: 2; }
.train-curves polyline.held { stroke: #c2620b; stroke-width: 1.5; } .train-curves circle.held { fill: #c2620b; }
.train-samples { overflow-x: auto; margin-top: .75rem; }
.train-samples table { border-collapse: separate; border-spacing: 6px; }
.train-samples th { font-weight: 500; font-size: .8rem; color: var(--body-text-color-subdued); text-align: left;
  max-width: 12rem; }
.train-samples img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; border-radius: 6px;
  display: block; background: var(--background-fill-secondary); }
</style>
"""


def add_trainings(studio: Studio) -> None:
    """Adds the tab to the open `gradio.Blocks`."""
    tab = _Trainings(studio)
    gradio.HTML(_STYLE, padding=False)
    with gradio.Row(equal_height=True):
        chosen = gradio.Dropdown([], label="Training", interactive=True, scale=4)
        follow = gradio.Checkbox(True, label="Follow", scale=0, min_width=110)
    shown = gradio.HTML(padding=False)
    with gradio.Accordion("All runs", open=False):
        runs = gradio.HTML(padding=False)
    timer = gradio.Timer(_SECONDS)
    options: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
    outputs = [chosen, shown, runs]
    gradio.on([studio.page.load, timer.tick], tab.show, chosen, outputs, trigger_mode="once", **options)
    chosen.input(tab.show, chosen, outputs, **options)
    follow.input(lambda active: gradio.Timer(active=bool(active)), follow, timer, **options)


class _Trainings:
    """The events of the tab.

    Args:
        studio: What the page works with.
    """

    def __init__(self, studio: Studio) -> None:
        self._home = studio.service.home

    def show(self, chosen: str | None, request: gradio.Request) -> tuple[Any, str, str]:
        """Returns the trainings, the chosen one or the latest, and all runs."""
        try:
            actor_of(request)
            found = list_trainings(self._home)
            if not found:
                empty = "No training yet. `loraline run pipeline.yaml` starts one, and it appears here."
                return gradio.update(choices=[], value=None), note(empty), ""
            choices = [(_label(state, step), f"{state.run.id}/{step.name}") for state, step in found]
            value = chosen if chosen in {key for _, key in choices} else choices[0][1]
            view = read_training(self._home, *value.split("/", 1))
        except WordedError as error:
            return gradio.skip(), explain(error), ""
        shown = show_training(view) if view is not None else note("This training has no entry any more.")
        return gradio.update(choices=choices, value=value), shown, _runs([state for state, _ in found])


def show_training(view: TrainingView) -> str:
    """Returns a training as HTML."""
    step = view.step
    facts = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in view.facts.items())
    curves = "".join(
        f"<figure><figcaption>{escape(title)}</figcaption>{drawing}</figure>" for title, drawing in view.curves.items()
    )
    bar = f'<progress class="train-bar" aria-label="Steps" max="{max(step.total, 1)}" value="{step.done}"></progress>'
    problem = f'<div class="reg-error" role="alert">{escape(step.text)}</div>' if step.state == "failed" else ""
    waits = note(step.text) if step.text and step.state != "failed" else ""
    warnings = "".join(f"<li>{escape(text)}</li>" for text in step.warnings)
    return (
        f'<div class="train-head"><h3>{escape(view.state.run.name)}: {escape(step.name)}</h3>'
        f'<span class="reg-tag">{escape(step.state)}</span></div>{bar}{problem}{waits}'
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
        rows.append(f'<tr><th scope="row">Prompt {int(number) + 1}, seed {int(seed) + 1}</th>{cells}</tr>')
    head = "".join(f'<th scope="col">{step}</th>' for step in steps)
    return (
        '<div class="train-samples" tabindex="0" role="region" aria-label="Samples by step"><table>'
        f'<thead><tr><th scope="col">Step</th>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
    )


def _image(content: bytes | None, step: int) -> str:
    if content is None:
        return ""
    return f'<img alt="Sample of step {step}" src="data:image/png;base64,{base64.b64encode(content).decode()}">'


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
    return table(("Run", "Status", "Started (UTC)", "Steps", "Versions"), rows, label="Runs")
