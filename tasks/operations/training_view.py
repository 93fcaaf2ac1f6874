"""Reads a training while it runs and afterwards: its curves as drawings, its samples by step and prompt."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_engine.evaluation.chart import draw_loss, draw_values
from registry.entities import ArtifactRef
from registry.errors import StoreError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.operations.status import RunState, StepStatus, read_status
from tasks.run_entry import read_points

_SAMPLE = re.compile(r"(?:^|/)step-(\d{1,12})/(\d{1,6})-(\d{1,6})\.png$")
_MOST_SAMPLES, _MOST_BYTES = 64, 8_000_000


@dataclass(frozen=True)
class TrainingView:
    """A training step of a run.

    Attributes:
        state: The run.
        step: The step.
        curves: Title -> drawing as SVG.
        facts: Label -> value of its latest measurements.
        prompts: The prompts of the samples, as the pipeline states them.
        samples: Sample images: (steps done, prompt) -> PNG file; the seeds of a prompt after one another.
    """

    state: RunState
    step: StepStatus
    curves: dict[str, str]
    facts: dict[str, str]
    prompts: tuple[str, ...]
    samples: dict[tuple[int, str], bytes]


def list_trainings(home: Home, limit: int = 10) -> list[tuple[RunState, StepStatus]]:
    """Returns the training steps of all runs in progress and of the latest others, newest first."""
    states = read_status(home, limit)
    return [(state, step) for state in states for step in state.steps if step.uses == "train"]


def view_training(home: Home, state: RunState, step: StepStatus) -> TrainingView:
    """Returns a training of `list_trainings` with its curves and samples."""
    points = read_points(home, state.run.id, step.name)
    samples = dict(_running_samples(home, step)) or dict(_stored_samples(home, state.run.id, step.name))
    return TrainingView(state, step, draw_curves(points), _facts(step), _prompts(state, step.name), samples)


def draw_curves(points: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Returns title -> drawing of what a training measured; a curve needs two points."""
    loss, heldout = _series(points, "loss"), _series(points, "validation_loss")
    drawings = {
        "Loss": draw_loss(loss, heldout) if len(loss) > 1 else draw_values(heldout, "validation loss"),
        "Learning rate": draw_values(_series(points, "learning_rate"), "learning rate"),
        "Images per second": draw_values(_series(points, "images_per_second"), "images per second"),
    }
    return {title: str(drawing) for title, drawing in drawings.items() if drawing is not None}


def _series(points: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    values = [(point.get("step"), point.get(name)) for point in points if isinstance(point, dict)]
    return [
        (float(step), float(value))
        for step, value in values
        if isinstance(step, int | float) and isinstance(value, int | float)
    ]


def _facts(step: StepStatus) -> dict[str, str]:
    names = {
        "loss": "loss",
        "validation_loss": "validation loss",
        "learning_rate": "learning rate",
        "gradient_norm": "gradient norm",
        "images_per_second": "images per second",
        "peak_memory_mib": "peak memory, MiB",
    }
    values = {label: f"{step.values[name]:.4g}" for name, label in names.items() if name in step.values}
    return {"steps": f"{step.done} of {step.total}" if step.total else str(step.done), **values}


def _prompts(state: RunState, step: str) -> tuple[str, ...]:
    """Returns the prompts of the samples by the spec of a run, which earlier releases wrote too."""
    value: Any = state.run.spec
    for key in ("steps", step, "samples", "prompts"):
        value = value.get(key) if isinstance(value, Mapping) else None
    return tuple(map(str, value)) if isinstance(value, list | tuple) else ()


def _running_samples(home: Home, step: StepStatus) -> Iterator[tuple[tuple[int, str], bytes]]:
    """Yields the samples of a running training, whose files are in the home's cache."""
    cache = home.cache.resolve()
    for done, files in list(step.samples.items())[-_MOST_SAMPLES:]:
        for name in files:
            path, match = Path(name), _SAMPLE.search(str(name))
            # The entry of a run is a file that others may have written.
            if match is None or path.is_symlink() or not path.resolve().is_relative_to(cache):
                continue
            try:
                if path.stat().st_size <= _MOST_BYTES:
                    yield (int(done), f"{match[2]}-{match[3]}"), path.read_bytes()
            except OSError:
                continue


def _stored_samples(home: Home, run_id: str, step: str) -> Iterator[tuple[tuple[int, str], bytes]]:
    """Yields the samples that a finished training put into its artifact."""
    with closing(Lineage(home.lineage_url)) as lineage:
        outputs = [entry.output for entry in lineage.executions(run_id) if entry.step == step and entry.output]
    store = open_store(home)
    for output in outputs[-1:]:
        for path, match in _sample_files(home, output)[-_MOST_SAMPLES * 4 :]:
            try:
                yield (int(match[1]), f"{match[2]}-{match[3]}"), store.read(output, path)
            except StoreError:
                continue


def _sample_files(home: Home, output: ArtifactRef) -> list[tuple[str, re.Match[str]]]:
    try:
        files = open_store(home).files(output)
    except StoreError:
        return []
    return [(path, match) for path in sorted(files) if (match := _SAMPLE.search(path))]
