"""Shows a training in MLflow while it runs, from a thread of its own.

A training never waits for MLflow and never fails by it: after the first error the thread gives up with one warning. The
registration of the adapter takes the run over and adds what is missing (`mlflow_writer`).
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextvars import copy_context
from pathlib import Path
from typing import Any, Literal

from lora_engine.progress import Point
from registry.errors import LineageError, MlflowError, RegistryError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.database import sqlite_file
from registry.versions.mlflow_client import ensure_experiment, find_training_runs, mlflow_errors, open_client
from registry.versions.mlflow_tables import (
    TRAINING,
    TRAINING_KEY,
    TRAINING_RUN,
    end_trainings,
    has_training,
    require_reachable,
)
from registry.versions.rewrite_uris import rewrite_artifact_uris

_logger = logging.getLogger(__name__)

_DELAY = 2.0
"""Seconds of training before its run is opened; a shorter one has nothing to watch."""
_INTERVAL = 5.0
_PATIENCE = 10.0
"""Seconds that a finished training waits for the last records."""
_POINTS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_NAMES = {"learning_rate": "lr"}
"""Measurement -> metric, where the registration has another name."""


class LiveRun:
    """A training's run in MLflow. No method raises an error of MLflow or of the disk.

    A run of an interrupted training with the same cache key is continued.

    Args:
        home: The home.
        name: The adapter's name; its experiment has the run.
        key: Cache key of the training.
        run_id: The run of the pipeline.
        step: The step's name.
    """

    def __init__(self, home: Home, name: str, key: str, run_id: str, step: str) -> None:
        self._home, self._name, self._key, self._run_id, self._step = home, name, key, run_id, step
        self._changed = threading.Condition()
        self._points: list[Point] = []
        self._samples: list[tuple[int, Sequence[Path]]] = []
        self._status: str | None = None
        self._failed = False
        # The context has the collector of the step's warnings.
        self._thread = threading.Thread(target=copy_context().run, args=(self._work,), daemon=True)

    def log_points(self, points: Sequence[Point]) -> None:
        """Shows measurements as metrics."""
        with self._changed:
            if not self._failed:
                self._points += points
        self._start()

    def log_samples(self, step: int, files: Sequence[Path]) -> None:
        """Shows sample images, which must exist until `close`."""
        with self._changed:
            if not self._failed:
                self._samples.append((step, files))
        self._start()

    def close(self, status: Literal["FINISHED", "KILLED", "FAILED"]) -> None:
        """Ends the run; waits a few seconds at most for what is not written yet."""
        with self._changed:
            self._status = status
            self._changed.notify()
        if self._thread.ident is None:
            return
        self._thread.join(_PATIENCE)
        if self._thread.is_alive():
            self._give_up("MLflow did not answer in time")

    def _start(self) -> None:
        if self._thread.ident is None:
            self._thread.start()

    def _work(self) -> None:
        try:
            if self._wait(_DELAY) and not self._is_known():
                return
            with mlflow_errors(self._home, f"step {self._step!r}"):
                self._write_until_closed()
        except RegistryError as error:
            self._give_up(str(error))

    def _write_until_closed(self) -> None:
        writer = _Writer(self._home, self._name, self._key, {TRAINING_RUN: self._run_id, f"{TRAINING}step": self._step})
        while True:
            with self._changed:
                points, samples, status = self._points, self._samples, self._status
                self._points, self._samples = [], []
            writer.write(points, samples)
            if status is not None:
                writer.finish(status)
                return
            self._wait(_INTERVAL)

    def _wait(self, seconds: float) -> bool:
        """Waits; returns True, at once, when the run is closed."""
        with self._changed:
            return self._changed.wait_for(lambda: self._status is not None, seconds)

    def _is_known(self) -> bool:
        file = sqlite_file(self._home.mlflow_url)
        return (file is None or file.exists()) and has_training(self._home.mlflow_url, self._key)

    def _give_up(self, reason: str) -> None:
        with self._changed:
            is_first, self._failed = not self._failed, True
            self._points, self._samples = [], []
        if is_first:
            _logger.warning("MLflow shows no more of the running training (%s); the registration adds the rest", reason)


class _Writer:
    """Writes to one run of MLflow, which it continues or creates."""

    def __init__(self, home: Home, name: str, key: str, tags: dict[str, str]) -> None:
        self._url, self._is_server = home.mlflow_url, sqlite_file(home.mlflow_url) is None
        self._check_server()
        with home.lock("mlflow"):
            self._client = open_client(home)
            rewrite_artifact_uris(self._url, [name], home.mlflow_artifacts.as_uri())
            experiment = ensure_experiment(self._client, home, name)
            self._run = self._continued(experiment, key) or self._created(experiment, name, key)
        for tag, value in tags.items():
            self._client.set_tag(self._run, tag, value)
        self._last = max((point.step for point in self._client.get_metric_history(self._run, "loss")), default=-1)

    def _continued(self, experiment: str, key: str) -> str | None:
        for run in find_training_runs(self._client, experiment, [key]):
            if run.info.status != "FINISHED":
                self._client.update_run(run.info.run_id, status="RUNNING")
                return str(run.info.run_id)
        return None

    def _created(self, experiment: str, name: str, key: str) -> str:
        run = self._client.create_run(experiment, tags={TRAINING_KEY: key}, run_name=f"{name} (training)")
        return str(run.info.run_id)

    def write(self, points: Sequence[Point], samples: Sequence[tuple[int, Sequence[Path]]]) -> None:
        """Logs metrics, except those of steps that an interrupted training logged already, and images."""
        from mlflow.entities import Metric

        self._check_server()
        new = [point for point in points if point.step > self._last]
        metrics: list[Any] = [
            Metric(_NAMES.get(name, name), value, int(point.time * 1000), point.step)
            for point in _thinned(new)
            for name, value in point.values.items()
        ]
        for begin in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self._run, metrics=metrics[begin : begin + _METRICS_AT_ONCE])
        for step, files in samples:
            for file in files:
                self._client.log_artifact(self._run, str(file), f"pictures/samples/step-{step:06d}")

    def finish(self, status: str) -> None:
        """Sets the run's final status."""
        self._client.set_terminated(self._run, status)

    def _check_server(self) -> None:
        if self._is_server:
            require_reachable(self._url)  # its client would try for an hour


def end_dead_trainings(home: Home, lineage: Lineage) -> list[str]:
    """Marks trainings in MLflow as KILLED whose pipeline has ended, as those of killed processes; takes milliseconds.

    Returns:
        Their ids in MLflow; empty also if MLflow cannot be used.
    """

    def is_over(run_id: str) -> bool:
        try:
            return lineage.run(run_id).status != "RUNNING"
        except LineageError:
            return False  # of another home

    file = sqlite_file(home.mlflow_url)
    if file is not None and not file.exists():
        return []
    try:
        return end_trainings(home.mlflow_url, is_over)
    except MlflowError as error:
        _logger.info("%s", error)
        return []


def _thinned(points: Sequence[Point]) -> Sequence[Point]:
    """Returns at most 100 evenly spaced points, and those with a validation: MLflow writes a few hundred a second."""
    if len(points) <= _POINTS_AT_ONCE:
        return points
    chosen = {round(index * (len(points) - 1) / (_POINTS_AT_ONCE - 1)) for index in range(_POINTS_AT_ONCE)}
    return [point for index, point in enumerate(points) if index in chosen or "validation_loss" in point.values]
