"""Trainings that are watched while they run: `loraline status`, MLflow, warnings, and what must not stop them."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from mlflow import MlflowClient
from mlflow.entities import Run

from lora_engine.progress import Point
from lora_engine.training import cache
from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions import live_run
from registry.versions.live_run import LiveRun
from registry.versions.versions import Versions
from tasks import run_entry
from tasks.execution import execute as execute_step
from tasks.progress import StepEvent, listening, publish
from tasks.run_entry import recording
from tasks.warnings import collecting, warnings_of, with_warnings
from tasks.watching import TrainingWatcher
from tests.flows import made
from tests.flows.commands import loraline_process, say
from tests.flows.made import run_line
from tests.flows.shared import LINE, Trained, copy_trained, write_line

STEPS = 60
WATCHED = (
    LINE[: LINE.index("  adapter:")]
    + f"""\
  adapter:
    uses: train
    dataset: captions
    method: finetune
    rank: 2
    steps: {STEPS}
    batch: 1
    checkpoint_every: 10
    validate_every: 10
    samples: {{every: 30, prompts: [a zorb], steps: 1}}
  report: {{uses: evaluate, adapter: adapter, dataset: captions, seeds: 1, steps: 1, max_pictures: 1}}
  release: {{uses: register, adapter: adapter, report: report}}
"""
)
MEASURED = {"loss", "lr", "gradient_norm", "validation_loss", "images_per_second", "peak_memory_mib"}
POINT = Point(1, 1.0, {"loss": 0.5})


def status(home: Path) -> list[dict[str, Any]]:
    result: list[dict[str, Any]] = json.loads(say("status", "--json", home=home))["runs"]
    return result


def client_of(home: Path) -> MlflowClient:
    url = Home(home.absolute()).mlflow_url
    return MlflowClient(url, url)


def mlflow_runs(home: Path, name: str = "small") -> list[Run]:
    """Returns the runs of an experiment; none before MLflow's database exists."""
    if not (home / "mlflow.db").exists():
        return []
    experiment = client_of(home).get_experiment_by_name(name)
    return list(client_of(home).search_runs([experiment.experiment_id])) if experiment else []


def wait_for(found: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 300
    while not (result := found()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return result


def training_process() -> int | None:
    """Returns the process that trains for a process started here."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "lora_engine.training" in process.cmdline():
                return process.pid
    return None


def test_another_process_sees_a_training_then_that_it_died_and_then_the_one_run_that_was_continued_and_registered(
    tmp_path: Path, home: Path, environment: dict[str, str], trained_here: None
) -> None:
    spec = write_line(tmp_path, WATCHED)

    def running_step() -> dict[str, Any] | None:
        steps = status(home)[0]["steps"] if (home / "runs").is_dir() and status(home) else []
        return next((step for step in steps if step["uses"] == "train" and step["done"] > 0), None)

    def measured_run() -> Run | None:
        return next((run for run in mlflow_runs(home) if run.data.metrics.keys() >= MEASURED), None)

    with loraline_process(environment, "run", spec) as process:
        step = wait_for(running_step)
        child = training_process()
        assert child is not None
        os.kill(child, signal.SIGSTOP)  # the training waits until both are read
        try:
            (state,) = status(home)
            assert (state["status"], state["pid"]) == ("RUNNING", process.pid)
            assert (step["state"], step["total"]) == ("running", STEPS)
            assert {"loss", "learning_rate", "gradient_norm", "images_per_second"} <= step["values"].keys()
            assert Path(step["samples"]["0"][0]).is_file()
            live = wait_for(measured_run)
            assert live.info.status == "RUNNING"
            client, run_id = client_of(home), live.info.run_id
            samples = wait_for(lambda: client.list_artifacts(run_id, "pictures/samples/step-000000"))
            assert [Path(file.path).name for file in samples] == ["00-0.png"]
        finally:
            process.kill()
            process.wait()
            os.kill(child, signal.SIGCONT)
    wait_for(lambda: not Path(f"/proc/{child}").exists())  # it writes a checkpoint when its caller dies

    text = say("status", home=home)
    assert f"CRASHED  started {state['started_at'][:10]}" in text
    assert f"process {process.pid} on" in text
    assert next(step["state"] for step in status(home)[0]["steps"] if step["name"] == "adapter") == "stopped"
    assert client.get_run(run_id).info.status == "KILLED"

    output = say("run", spec, home=home)
    assert "adapter: samples of step 60 in /" in output
    assert f"samples   {home / 'reports' / 'small-1' / 'samples'}" in output
    (run,) = mlflow_runs(home)
    assert (run.info.run_id, run.info.status) == (run_id, "FINISHED")
    assert run.data.tags["loraline.version"] == "small@1"
    for name, steps in (("loss", range(1, STEPS + 1)), ("validation_loss", range(0, STEPS + 1, 10))):
        history = client.get_metric_history(run_id, name)
        assert sorted(point.step for point in history) == [*steps], "every point once"
    drawn = {Path(file.path).name for file in client.list_artifacts(run_id, "pictures/samples")}
    assert drawn == {"step-000000", "step-000030", "step-000060"}
    page = (home / "reports" / "small-1.html").read_text()
    assert all(f">step {number}<" in page for number in (0, 30, 60))
    assert (home / "reports" / "small-1" / "samples" / "step-000000" / "00-0.png").is_file()
    assert status(home)[0]["versions"] == [{"version": "small@1", "aliases": [], "gates": "none set"}]
    assert "agrees" in say("fsck", home=home)


@pytest.fixture
def opened_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live_run, "_DELAY", 0.0)
    monkeypatch.setattr(live_run, "_INTERVAL", 0.01)


@contextmanager
def failing_after(writes: int, error: Exception) -> Iterator[None]:
    """Makes MLflow fail from a write on, as a full disk or a dead server does."""
    write, count = live_run._Writer.write, 0

    def fail(self: Any, points: Sequence[Point], samples: Any) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise error
        write(self, points, samples)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(live_run._Writer, "write", fail)
        yield


def retrain(trained: Trained, monkeypatch: pytest.MonkeyPatch, *, live: bool, steps: int = 16) -> AdapterVersion:
    """Trains again, with samples and another number of steps, and registers."""
    text = trained.spec.read_text().replace("steps: 12, batch: 4", f"steps: {steps}, batch: 4, validate_every: 4")
    samples = ", samples: {every: 6, prompts: [a zorb], steps: 1}" if live else ""
    path = trained.spec.with_name("again.yaml")
    path.write_text(text.replace("checkpoint_every: 3", f"checkpoint_every: 3{samples}"))
    monkeypatch.setattr(made, "execute", lambda *arguments: execute_step(*arguments, live=live))
    return run_line(path, trained.home)


def run_of(version: AdapterVersion, trained: Trained) -> Run:
    return client_of(trained.home.path).get_run(str(version.mlflow_run_id))


def test_watching_and_samples_change_no_byte_and_a_dead_mlflow_is_one_warning_that_the_registration_makes_good(
    trained: Trained,
    trained_home: Path,
    trained_here: None,
    opened_at_once: None,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    other = copy_trained(trained_home, tmp_path / "other")
    unwatched = retrain(other, monkeypatch, live=False)
    assert "loraline.training.key" not in run_of(unwatched, other).data.tags
    with failing_after(1, OSError(errno.ENOSPC, "No space left on device")):
        watched = retrain(trained, monkeypatch, live=True)
    assert watched.sha256 == unwatched.sha256
    assert watched.artifact != unwatched.artifact, "one has samples"
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len([text for text in warnings if "MLflow shows no more of the running training" in text]) == 1
    run = run_of(watched, trained)
    assert run.info.status == "FINISHED"
    assert run.data.tags["loraline.training.key"]
    for name, steps in (("loss", range(1, 17)), ("validation_loss", range(0, 17, 4))):
        history = client_of(trained.home.path).get_metric_history(run.info.run_id, name)
        assert sorted(point.step for point in history) == [*steps], "every point once"
    assert "agrees" in say("fsck", home=trained.home.path)


def test_a_training_that_fails_or_is_stopped_leaves_its_run_marked(trained: Trained, opened_at_once: None) -> None:
    for key, end in (("1" * 64, "FAILED"), ("2" * 64, "KILLED")):
        live = LiveRun(trained.home, "small", key, "run", "adapter")
        live.log_points([POINT])
        live.close(end)  # type: ignore[arg-type]
    statuses = {run.data.tags.get("loraline.training.key"): run.info.status for run in mlflow_runs(trained.home.path)}
    assert (statuses["1" * 64], statuses["2" * 64]) == ("FAILED", "KILLED")


def test_a_continued_run_has_each_step_once_and_a_short_training_opens_none(
    trained: Trained, monkeypatch: pytest.MonkeyPatch, opened_at_once: None
) -> None:
    first = LiveRun(trained.home, "small", "3" * 64, "first", "adapter")
    first.log_points([Point(step, float(step), {"loss": 0.1 * step}) for step in (1, 2, 3)])
    first.close("KILLED")
    monkeypatch.setattr(live_run, "_DELAY", 600.0)
    second = LiveRun(trained.home, "small", "3" * 64, "second", "adapter")
    second.log_points([Point(step, float(step), {"loss": 0.1 * step}) for step in (2, 3, 4)])
    second.close("FINISHED")
    short = LiveRun(trained.home, "small", "4" * 64, "third", "adapter")
    short.log_points([POINT])
    short.close("FINISHED")
    runs = {run.data.tags.get("loraline.training.key"): run for run in mlflow_runs(trained.home.path)}
    assert "4" * 64 not in runs
    continued = runs["3" * 64]
    assert (continued.info.status, continued.data.tags["loraline.training.run"]) == ("FINISHED", "second")
    history = client_of(trained.home.path).get_metric_history(continued.info.run_id, "loss")
    assert [point.step for point in history] == [1, 2, 3, 4]


def test_a_damaged_mlflow_and_a_server_that_does_not_answer_cost_a_training_one_warning(
    trained: Trained, caplog: pytest.LogCaptureFixture, opened_at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained.home.mlflow_db.write_bytes(b"no database" * 1000)
    live = LiveRun(trained.home, "small", "5" * 64, "run", "adapter")
    live.log_points([POINT])
    live._thread.join(60)
    live.log_points([POINT])
    live.close("FINISHED")
    monkeypatch.setattr(live_run, "_PATIENCE", 0.0)
    monkeypatch.setattr(LiveRun, "_write_until_closed", lambda self: time.sleep(0.3))
    LiveRun(trained.home, "small", "6" * 64, "run", "adapter").close("FINISHED")
    slow = LiveRun(trained.home, "small", "6" * 64, "run", "adapter")
    slow.log_points([POINT])
    slow.close("FINISHED")
    texts = [record.getMessage() for record in caplog.records if "running training" in record.getMessage()]
    assert len(texts) == 2
    assert "file is not a database" in texts[0]
    assert "MLflow did not answer in time" in texts[1]
    assert live._points == []
    slow._thread.join()


def test_a_warning_of_a_step_is_once_in_lineage_the_status_the_summary_and_the_report(
    trained: Trained, trained_here: None, prefect_server: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[str] = []
    # Not `caplog`: Prefect sets the root logger's handlers when it is imported.
    handle = cache._log.handle

    def note(record: logging.LogRecord) -> None:
        logged.append(record.getMessage())
        handle(record)

    monkeypatch.setattr(cache._log, "handle", note)
    (latents,) = trained.home.cache.glob("latents")
    damaged = next(iter(sorted(latents.rglob("*.safetensors"))))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\x7f")
    output = say("run", trained.spec, "--force", "adapter", home=trained.home.path)
    text = f"{damaged} is damaged and is computed again"
    assert logged == [text]
    assert output.count(f"adapter: {text}") == 1
    with closing(Lineage(trained.home.lineage_url)) as lineage:
        recorded = {entry.step: entry.environment.get("warnings") for entry in lineage.executions(lineage.runs()[0].id)}
    assert recorded.pop("adapter") == [text]
    assert set(recorded.values()) == {None}
    steps = {step["name"]: step["warnings"] for step in status(trained.home.path)[0]["steps"]}
    assert {name for name, warnings in steps.items() if warnings} == {"adapter"}
    say("report", "small@1", "-o", trained.home.path / "page.html", home=trained.home.path)
    assert (trained.home.path / "page.html").read_text().count(text) == 1


def test_a_warning_of_a_child_is_one_of_its_step_and_of_no_other() -> None:
    events: list[StepEvent] = []
    with listening(events.append), collecting("adapter") as texts:
        for _ in range(2):
            TrainingWatcher("adapter", None).on_warning("careful: https://user:secret@host/")
        logging.getLogger("lora_engine.data").warning("in the manifest", extra={"in_artifact": True})
        with collecting("other") as others:
            pass
    logging.getLogger("lora_engine.data").warning("outside of any step")
    assert texts == ["careful: https://***@host/"]
    assert others == []
    assert events == [StepEvent("adapter", "warning", text=texts[0])]
    assert warnings_of(with_warnings({"threads": 1}, texts)) == texts
    assert with_warnings({"threads": 1}, []) == {"threads": 1}


def test_a_full_disk_costs_the_entry_of_a_run_with_one_warning_and_not_the_run(
    trained: Trained, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The warning is an event of the step, which the entry takes, too.
    with recording(trained.home, "run", {"adapter": "train"}), collecting("adapter"):

        def write(path: Path, content: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))

        monkeypatch.setattr(run_entry, "atomic_write", write)
        for _ in range(2):
            publish(StepEvent("adapter", "measured", points=[POINT]))
            publish(StepEvent("adapter", "started"))
    assert len([record for record in caplog.records if "No space left" in record.getMessage()]) == 1
    (step,) = run_entry.read_run_steps(trained.home, "run")
    assert step["state"] == "waiting"


def test_status_says_that_there_are_no_runs_and_reads_damaged_and_missing_entries(trained: Trained, home: Path) -> None:
    assert say("status", home=home) == "no runs\n"
    assert not home.exists()
    (state,) = status(trained.home.path)
    assert (state["name"], state["status"], state["steps"]) == ("small", "COMPLETED", [])
    assert [version["version"] for version in state["versions"]] == ["small@1"]
    folder = trained.home.runs / state["run" if "run" in state else "id"]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text('{"steps": 3}')
    assert status(trained.home.path) == [state]
    assert status_of_limit(trained.home.path, 0) == []


def status_of_limit(home: Path, limit: int) -> Any:
    return json.loads(say("status", "--json", "--limit", limit, home=home))["runs"]


def test_only_the_latest_entries_are_kept(trained: Trained) -> None:
    shutil.rmtree(trained.home.runs)
    for number in range(run_entry._KEPT + 3):
        folder = trained.home.runs / f"{number:03d}"
        folder.mkdir(parents=True)
        os.utime(folder, (number, number))
    with recording(trained.home, "new", {}):
        pass
    names = sorted(path.name for path in trained.home.runs.iterdir())
    assert names[0] == "004"
    assert names[-1] == "new"
    assert len(names) == run_entry._KEPT


def test_versions_of_a_home_count_as_results_of_the_run_that_registered_them(trained: Trained) -> None:
    with closing(Versions(trained.home)) as versions:
        assert versions.show("small").run_id == status(trained.home.path)[0]["id"]
