"""Measures what watching a training costs, on the embedded base.

    OMP_NUM_THREADS=1 python -m benchmarks.watching [--steps 150] [--calls 20000]

Prints one JSON object, in processor time, which other programs affect little: `step_ms` of a training step without any
progress (batch 4, rank 8); `report_ms` that the training process spends per step on measuring and on writing to the
pipe; `parent_ms` that the calling process spends per step on reading, the run's entry in the home and MLflow, without
imports and the creation of MLflow's tables; and both as shares of a step. The parent's work does not delay the
training, which is another process, but for its processor. It depends on time more than on steps: MLflow is written
every five seconds.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from unittest.mock import patch

from lora_engine.data.caption import caption
from lora_engine.data.ingest import ingest
from lora_engine.data.preprocess import preprocess
from lora_engine.data.spec import CaptionSettings, IngestSettings, PreprocessSettings
from lora_engine.progress import Point
from lora_engine.training.__main__ import _Channel, _ProgressWriter
from lora_engine.training.run import train
from lora_engine.training.spec import TrainSettings
from lora_engine.training.watching import with_measurements
from registry.home import Home
from registry.versions.live_run import LiveRun
from registry.versions.mlflow_client import open_client
from tasks.progress import StepEvent, publish
from tasks.run_entry import recording
from tasks.watching import TrainingWatcher

_IMAGES = Path(__file__).parents[1] / "examples" / "zorb" / "images"
_VALUES = {"loss": 0.1234567, "learning_rate": 0.001, "gradient_norm": 0.0456789, "seconds": 0.05}


def measure_step(folder: Path, steps: int) -> float:
    """Returns processor seconds per training step without progress."""
    ingest(_IMAGES, folder / "a", IngestSettings())
    preprocess(folder / "a", folder / "b", PreprocessSettings(resolution=32))
    caption(folder / "b", folder / "data", CaptionSettings(captioner="template", trigger="zorb"))
    marks: dict[int, float] = {}

    def mark(done: int, total: int, values: Mapping[str, float]) -> None:
        if done in {10, total}:
            marks[done] = time.process_time()

    settings = TrainSettings(method="finetune", rank=8, steps=steps, batch=4, checkpoint_every=10 * steps)
    train(settings, "tiny", folder / "data", folder / "out", folder / "work", progress=mark)
    return (marks[steps] - marks[10]) / (steps - 10)


def measure_report(calls: int) -> float:
    """Returns processor seconds per step that the training process spends on its reports."""
    read, write = os.pipe()
    saved = os.dup(1)
    os.dup2(write, 1)
    channel = _Channel()
    os.dup2(saved, 1)
    os.close(write)
    threading.Thread(target=_drain, args=(read,), daemon=True).start()
    report = with_measurements(_ProgressWriter(channel), 4)
    begun = time.thread_time()
    for step in range(1, calls + 1):
        report(step, calls, _VALUES)
    return (time.thread_time() - begun) / calls


def _drain(descriptor: int) -> None:
    while os.read(descriptor, 1 << 16):
        pass


def measure_parent(folder: Path, step_seconds: float, seconds: float = 20.0) -> float:
    """Returns processor seconds per step that the calling process spends; events come five times a second."""
    home = Home.open(folder / "home")
    open_client(home)
    count = max(1, round(0.2 / step_seconds))
    with patch("registry.versions.live_run._DELAY", 0.0), recording(home, "run", {"adapter": "train"}):
        live = LiveRun(home, "zorb", "0" * 64, "run", "adapter")
        watcher = TrainingWatcher("adapter", live)
        values = {name: value for name, value in _VALUES.items() if name != "seconds"}
        values |= {"images_per_second": 80.0, "peak_memory_mib": 600.0}
        watcher.on_points([Point(0, time.time(), values)])
        time.sleep(2)
        step, begun, end = 0, time.process_time(), time.monotonic() + seconds
        while time.monotonic() < end:
            watcher.on_points([Point(step + 1 + index, time.time(), values) for index in range(count)])
            step += count
            publish(StepEvent("adapter", "progress", step, 10**6, values))
            time.sleep(0.2)
        spent = time.process_time() - begun
        live.close("FINISHED")
    return spent / step


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--calls", type=int, default=20000)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        step = measure_step(folder, options.steps)
        report = measure_report(options.calls)
        parent = measure_parent(folder, step)
    figures = {"step_ms": step * 1000, "report_ms": report * 1000, "parent_ms": parent * 1000}
    shares = {"report_share": report / step, "parent_share": parent / step}
    print(json.dumps({name: round(value, 5) for name, value in {**figures, **shares}.items()}, indent=2))


if __name__ == "__main__":
    main()
