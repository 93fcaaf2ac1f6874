"""Writes the state of a running pipeline into the home, for other processes, and reads it.

`runs/RUN/run.json` has the steps with their progress. `runs/RUN/STEP.jsonl` has one line per training step: its
measurements, or the sample images drawn after it. Lineage is the record; the entry is for watching, and a full disk
costs the entry only.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lora_engine.files import atomic_write, canonical_json
from registry.home import Home
from tasks.progress import StepEvent, step_scope

_log = logging.getLogger(__name__)

RUN = "run.json"
_INTERVAL = 1.0
"""Seconds between two writes of the progress."""
_KEPT = 50
_SHOWN = ("progress", "waiting", "started", "cached", "completed", "skipped", "failed")


@contextmanager
def recording(home: Home, run_id: str, steps: Mapping[str, str]) -> Iterator[None]:
    """Keeps the entry of a run current inside a `with` block; deletes the oldest entries beyond 50.

    Args:
        home: The home.
        run_id: The run.
        steps: Name of each step -> its kind.
    """
    entry = _Entry(home.runs / run_id, steps)
    _delete_oldest(home.runs)
    with step_scope(entry.update):  # other runs in this process may have steps of the same names
        try:
            yield
        finally:
            entry.close()


def read_run_steps(home: Home, run_id: str) -> list[dict[str, Any]]:
    """Returns the steps of a run in the order of the pipeline; empty if it has no entry or a damaged one."""
    try:
        steps: list[dict[str, Any]] = json.loads((home.runs / run_id / RUN).read_bytes())["steps"]
        return steps if all("name" in step for step in steps) else []
    except (OSError, ValueError, TypeError, KeyError):
        return []


def read_points(home: Home, run_id: str, step: str) -> list[dict[str, Any]]:
    """Returns the lines of a training step: `step`, `time` and measurements, or `step` and `samples`."""
    try:
        lines = (home.runs / run_id / f"{step}.jsonl").read_bytes().splitlines()
    except OSError:
        return []
    points = []
    for line in lines:
        with suppress(ValueError):  # the last one may be incomplete
            points.append(json.loads(line))
    return points


class _Entry:
    """The state of the steps, written at most once a second for progress."""

    def __init__(self, folder: Path, steps: Mapping[str, str]) -> None:
        # Reentrant: the warning of a failed write is an event, too.
        self._folder, self._lock, self._next, self._failed = folder, threading.RLock(), 0.0, False
        start = {"state": "waiting", "done": 0, "total": 0, "values": {}, "text": ""}
        self._steps: dict[str, dict[str, Any]] = {
            name: {"name": name, "uses": uses, **start, "warnings": []} for name, uses in steps.items()
        }
        self._write()

    def update(self, event: StepEvent) -> None:
        """Takes an event of a step."""
        step = self._steps.get(event.step)
        if step is None:  # of a pipeline around it
            return
        with self._lock:
            if event.kind == "warning":
                step["warnings"].append(event.text)
            elif event.kind in _SHOWN:
                state = "running" if event.kind in {"started", "progress"} else event.kind
                step |= {"state": state, "text": event.text, "updated_at": time.time()}
                if event.kind == "progress":
                    step |= {"done": event.done, "total": event.total, "values": {**step["values"], **event.values}}
            self._append(event)
            if event.kind != "progress" or time.monotonic() >= self._next:
                self._write()

    def close(self) -> None:
        """Writes the last state."""
        with self._lock:
            self._write()

    def _append(self, event: StepEvent) -> None:
        lines: list[dict[str, Any]] = [
            {"step": point.step, "time": point.time, **point.values} for point in event.points
        ]
        if event.files:
            lines.append({"step": event.done, "samples": [str(file) for file in event.files]})
        if not lines or self._failed:
            return
        try:
            with (self._folder / f"{event.step}.jsonl").open("ab") as file:
                file.write(b"".join(canonical_json(line) + b"\n" for line in lines))
        except OSError as error:
            self._give_up(error)

    def _write(self) -> None:
        if self._failed:
            return
        self._next = time.monotonic() + _INTERVAL
        try:
            atomic_write(self._folder / RUN, canonical_json({"steps": [*self._steps.values()]}))
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._failed = True
        _log.warning("`loraline status` shows no progress of this run: %s: %s", self._folder, error.strerror)


def _delete_oldest(runs: Path) -> None:
    try:
        entries = sorted((path for path in runs.iterdir() if path.is_dir()), key=lambda path: path.stat().st_mtime)
    except OSError:
        return
    for path in entries[:-_KEPT]:
        shutil.rmtree(path, ignore_errors=True)
