"""Forwards what a training measures, draws and warns of to listeners and to MLflow, while it runs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lora_engine.errors import InterruptedRun
from lora_engine.progress import Point
from registry.errors import RegistryError
from registry.lineage.record import Lineage
from registry.versions.live_run import LiveRun
from tasks.progress import StepEvent, publish
from tasks.step import Context

_log = logging.getLogger(__name__)


class TrainingWatcher:
    """Publishes a training's records as events of its step, and shows them in MLflow.

    Args:
        step: The step's name in the pipeline.
        live: The run in MLflow; None shows nothing there.
    """

    def __init__(self, step: str, live: LiveRun | None) -> None:
        self._step, self._live = step, live

    def on_points(self, points: Sequence[Point]) -> None:
        """Publishes measurements."""
        publish(StepEvent(self._step, "measured", done=points[-1].step, points=points))
        if self._live is not None:
            self._live.log_points(points)

    def on_samples(self, step: int, files: Sequence[Path]) -> None:
        """Publishes sample images."""
        publish(StepEvent(self._step, "drawn", done=step, files=files))
        if self._live is not None:
            self._live.log_samples(step, files)

    def on_warning(self, text: str) -> None:
        """Logs a warning, which the collector of the step sees."""
        _log.warning("%s", text)


@contextmanager
def watching(context: Context) -> Iterator[TrainingWatcher]:
    """Yields the watcher of a training. Its run in MLflow ends as FINISHED, KILLED (interrupted) or FAILED."""
    live = _live_run(context) if context.live else None
    try:
        yield TrainingWatcher(context.name, live)
    except BaseException as error:
        if live is not None:
            live.close("KILLED" if isinstance(error, InterruptedRun | KeyboardInterrupt) else "FAILED")
        raise
    if live is not None:
        live.close("FINISHED")


def _live_run(context: Context) -> LiveRun:
    lineage = Lineage(context.home.lineage_url)
    try:
        run = lineage.run(context.run_id)
        name = _registered_name(run.spec, context.name) or run.name
    except RegistryError as error:
        _log.debug("no pipeline of run %s: %s", context.run_id, error)
        name = context.name
    finally:
        lineage.close()
    return LiveRun(context.home, name, context.key, context.run_id, context.name)


def _registered_name(spec: Mapping[str, Any], step: str) -> str | None:
    """Returns the name under which a pipeline registers what a step trains; None if it does not."""
    steps = spec.get("steps")
    for other in steps.values() if isinstance(steps, Mapping) else ():
        if isinstance(other, Mapping) and other.get("uses") == "register" and other.get("adapter") == step:
            return str(other["name"]) if "name" in other else None
    return None
