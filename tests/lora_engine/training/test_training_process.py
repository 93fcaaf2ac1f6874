from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from lora_engine.errors import BaseModelError, InterruptedRun, SettingsError, TrainingError
from lora_engine.files import sha256_file
from lora_engine.progress import Point, Progress, no_progress
from lora_engine.training.run import train
from lora_engine.training.spawn import train_in_child
from lora_engine.training.spec import TrainSettings

Make = Callable[..., TrainSettings]
ROOT = Path(__file__).parents[3]
SETTINGS = {"method": "dreambooth", "steps": 30, "accumulate": 2, "caption_dropout": 0.2, "checkpoint_every": 1}


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def job(bases: dict[str, Path], dataset: Path, tmp_path: Path, settings: Make) -> dict[str, Any]:
    return {
        "settings": settings(**SETTINGS).model_dump(mode="json"),
        "base": str(bases["small-sd"]),
        "dataset": str(dataset),
        "out": str(tmp_path / "out"),
        "work": str(tmp_path / "work"),
    }


def digest(job: dict[str, Any]) -> str:
    return sha256_file(Path(job["out"]) / "adapter.safetensors")


def resume_here(job: dict[str, Any], progress: Progress = no_progress) -> None:
    """Trains in this process from the job's last checkpoint, or from the start if it has none."""
    dataset, out, work = (Path(job[name]) for name in ("dataset", "out", "work"))
    train(TrainSettings.model_validate(job["settings"]), job["base"], dataset, out, work, progress=progress)


def when_checkpointed(job: dict[str, Any], step: int, act: Callable[[], None]) -> threading.Thread:
    def watch() -> None:
        # A long timeout for busy machines; ends when the run is finished.
        deadline = time.monotonic() + 600
        while time.monotonic() < deadline and not Path(job["out"]).exists():
            names = list((Path(job["work"]) / "checkpoints").glob("step-*.safetensors"))
            if any(int(name.name.split("-")[1]) >= step for name in names):
                act()
                return
            time.sleep(0.01)

    thread = threading.Thread(target=watch)
    thread.start()
    return thread


def last_checkpoint(job: dict[str, Any]) -> int:
    names = (Path(job["work"]) / "checkpoints").glob("step-*.safetensors")
    return max(int(path.name.split("-")[1]) for path in names)


def child_of(job: dict[str, Any]) -> int:
    # The only process with this job.
    target = str(Path(job["work"]) / "job.json").encode()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if target in path.read_bytes().split(b"\0"):
                return int(path.parent.name)
    raise LookupError("no child process has this job")


def test_a_killed_process_and_one_whose_caller_died_resume_to_the_bytes_of_an_uninterrupted_run(
    job: dict[str, Any], tmp_path: Path
) -> None:
    thread = when_checkpointed(job, 2, lambda: os.kill(child_of(job), signal.SIGKILL))
    with pytest.raises(TrainingError, match="SIGKILL"):
        train_in_child(job)
    thread.join()
    checkpointed = last_checkpoint(job)
    assert checkpointed >= 2

    # A cached file is damaged, of which the next process warns.
    (damaged, *_) = sorted((Path(job["work"]) / "latents").rglob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")

    # The caller dies: the child's standard input is closed.
    command = [sys.executable, "-m", "lora_engine.training", str(Path(job["work"]) / "job.json")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        thread = when_checkpointed(job, checkpointed + 3, child.stdin.close)
        messages = [json.loads(line) for line in child.stdout]
        thread.join()
    assert child.returncode == 130
    warnings = [message["text"] for message in messages if message["event"] == "warning"]
    assert warnings == [f"{damaged} is damaged and is computed again"]
    points = [point for message in messages for point in message.get("points", ())]
    assert [step for step, _, _ in points] == [*range(points[0][0], points[-1][0] + 1)], "every step has a point"
    assert (messages[-1]["event"], messages[-1]["type"]) == ("error", "InterruptedRun")
    checkpointed = last_checkpoint(job)
    assert f"stopped after {checkpointed} of 30" in messages[-1]["message"]
    assert not Path(job["out"]).exists()

    events: list[tuple[int, int, dict[str, float]]] = []
    resume_here(job, lambda done, total, values: events.append((done, total, dict(values))))
    assert next(done for done, _, values in events if "loss" in values) > checkpointed
    assert events[-1][:2] == (30, 30)
    measured = {"loss", "denoising", "prior", "learning_rate", "gradient_norm", "images_per_second", "peak_memory_mib"}
    assert measured == set(events[-1][2])
    assert all(value > 0 for value in events[-1][2].values() if value != events[-1][2]["learning_rate"])
    fresh = {**job, "out": str(tmp_path / "fresh"), "work": str(tmp_path / "fresh-work")}
    resume_here(fresh)
    assert digest(job) == digest(fresh)


@pytest.mark.nightly
def test_a_killed_training_that_chooses_its_settings_and_its_step_resumes_to_the_same_bytes(
    job: dict[str, Any], tmp_path: Path
) -> None:
    choice = {"by": "validation_loss", "every": 2, "patience": 3, "min_delta": 10.0}
    job["settings"] |= {"learning_rate": "auto", "rank": "auto", "schedule": "constant", "best_checkpoint": choice}
    thread = when_checkpointed(job, 3, lambda: os.kill(child_of(job), signal.SIGKILL))
    with pytest.raises(TrainingError, match="SIGKILL"):
        train_in_child(job)
    thread.join()
    probes = {path: path.stat().st_mtime_ns for path in (Path(job["work"]) / "trials").glob("*/result.json")}
    assert len(probes) == 5
    resume_here(job)
    assert probes == {path: path.stat().st_mtime_ns for path in probes}
    fresh = {**job, "out": str(tmp_path / "fresh"), "work": str(tmp_path / "fresh-work")}
    resume_here(fresh)
    assert digest(job) == digest(fresh)
    records = [(Path(done["out"]) / "training.json").read_bytes() for done in (job, fresh)]
    assert records[0] == records[1]
    assert json.loads(records[0])["candidates"]["stopped"] == 8


def test_errors_of_the_child_keep_their_class_and_fields(job: dict[str, Any]) -> None:
    with pytest.raises(BaseModelError) as raised:
        train_in_child({**job, "base": "./nowhere"})
    assert "'./nowhere'" in raised.value.problem
    assert "diffusers folder" in raised.value.allowed


def test_a_job_with_broken_settings_is_refused_before_anything_is_loaded(job: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="steps"):
        train_in_child({**job, "settings": {"steps": 0}})


def test_a_stop_of_the_caller_interrupts_the_child(job: dict[str, Any], tmp_path: Path) -> None:
    body = """
requests = []
signal.signal(signal.SIGTERM, lambda *_: requests.append(True))
print('{"event": "progress", "done": 1, "total": 2, "values": {}}', flush=True)
while not requests:
    time.sleep(0.01)
print('{"event": "error", "type": "InterruptedRun", "message": "kept", "where": "here"}')
sys.exit(130)
"""
    steps: list[int] = []
    with pytest.raises(InterruptedRun, match="here: kept"):
        train_in_child(
            job,
            lambda done, total, values: steps.append(done),
            python=fake_python(tmp_path, body),
            stop=lambda: bool(steps),
        )
    assert steps == [1]


def fake_python(tmp_path: Path, body: str) -> str:
    script = tmp_path / "python"
    script.write_text(f"#!{sys.executable}\nimport os, signal, sys, time\n{body}\n")
    script.chmod(0o755)
    return str(script)


def test_an_interrupted_caller_leaves_no_child_behind(job: dict[str, Any], tmp_path: Path) -> None:
    body = """
print('{"event": "progress", "done": 1, "total": 2, "values": {}}', flush=True)
time.sleep(100)
"""
    seen: list[int] = []

    def interrupt(done: int, total: int, values: Mapping[str, float]) -> None:
        seen.append(child_of(job))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_in_child(job, interrupt, python=fake_python(tmp_path, body))
    assert seen
    with pytest.raises(LookupError):
        child_of(job)


class Noted:
    """A watcher that keeps what it receives."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.samples: list[tuple[int, Sequence[Path]]] = []
        self.warnings: list[str] = []

    def on_points(self, points: Sequence[Point]) -> None:
        self.points += points

    def on_samples(self, step: int, files: Sequence[Path]) -> None:
        self.samples.append((step, files))

    def on_warning(self, text: str) -> None:
        self.warnings.append(text)


def test_a_watcher_receives_every_point_and_each_warning_once(job: dict[str, Any], tmp_path: Path) -> None:
    body = """
import json
def send(**event):
    print(json.dumps(event), flush=True)
send(event="progress", done=3, total=9, values={}, points=[[2, 0.5, {"loss": 0.5}], [3, 0.6, {"loss": 0.25}]])
send(event="samples", step=3, files=["/a.png"])
send(event="warning", text="careful")
send(event="warning", text="careful")
print("a library prints\\n0%\\r100%\\n\\ncareful", file=sys.stderr)
send(event="done")
"""
    noted = Noted()
    train_in_child(job, watcher=noted, python=fake_python(tmp_path, body))
    assert noted.points == [Point(2, 0.5, {"loss": 0.5}), Point(3, 0.6, {"loss": 0.25})]
    assert noted.samples == [(3, [Path("/a.png")])]
    assert noted.warnings == ["careful", "a library prints"]
    noted = Noted()
    with pytest.raises(TrainingError, match="the reason"):
        train_in_child(job, watcher=noted, python=fake_python(tmp_path, "sys.stderr.write('the reason'); sys.exit(3)"))
    assert noted.warnings == [], "the error has the lines"


def test_a_crashed_child_is_reported_with_its_last_stderr_lines(job: dict[str, Any], tmp_path: Path) -> None:
    python = fake_python(tmp_path, "sys.stderr.write('no kernel image\\n'); sys.exit(3)")
    with pytest.raises(TrainingError, match=r"code 3[\s\S]*no kernel image"):
        train_in_child(job, python=python)


def test_a_child_that_exits_without_a_result_is_an_error(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no result"):
        train_in_child(job, python=fake_python(tmp_path, "pass"))


def test_a_child_that_ignores_the_stop_is_killed(job: dict[str, Any], tmp_path: Path) -> None:
    body = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print('{"event": "progress", "done": 1, "total": 2, "values": {}}', flush=True)
time.sleep(1000)
"""
    steps: list[int] = []
    with pytest.raises(TrainingError, match="SIGKILL"):
        train_in_child(
            job,
            lambda done, total, values: steps.append(done),
            python=fake_python(tmp_path, body),
            # Stops only once the child ignores the signal.
            stop=lambda: bool(steps),
            grace=0.5,
        )


def test_lines_that_are_not_events_are_ignored(job: dict[str, Any], tmp_path: Path) -> None:
    body = "print('hello'); print('[1]'); print('{\"event\": \"done\"}')"
    train_in_child(job, python=fake_python(tmp_path, body))
    assert json.loads((Path(job["work"]) / "job.json").read_bytes()) == job
