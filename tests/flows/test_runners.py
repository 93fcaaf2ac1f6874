"""Steps, trials and pipelines give the same results in threads, processes, on Dask and on Ray."""

from __future__ import annotations

import json
import logging
import pickle
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import tasks.relay as relay_module
from flows.matrix import run_pipelines
from flows.pipeline import run_pipeline
from flows.runners import RunnerSettings, read_runner, runners
from flows.spec import load_pipelines, load_spec
from flows.sweep import run_sweep
from flows.sweep_file import load_sweep
from lora_engine.errors import DataError, InterruptedRun, SettingsError
from registry.errors import HomeError, Refused
from registry.home import Home
from tasks.progress import StepEvent, clear_stop, listening, publish, request_stop, step_scope, stop_requested
from tasks.relay import Relay, receive_events, relayed
from tasks.run_entry import read_run_steps, recording
from tests.flows.commands import loraline_here

Write = Callable[..., Path]
ISOLATED = [name for name, kind in runners.items() if kind.isolated]
# Those of clusters take a minute each.
TESTED = [name if name == "processes" else pytest.param(name, marks=pytest.mark.nightly) for name in ISOLATED]
SWEEP = """\
sweep:
  metric: adapter.validation_loss
  direction: minimize
  trials: 2
  parallel: 2
  parameters:
    adapter.rank: {values: [1, 2, 4]}
"""
STEPS = """\
  adapter:  {uses: train, dataset: captions, method: finetune, rank: 2, steps: 2, batch: 2, validate_every: 1}
  release:  {uses: register, adapter: adapter}
"""


def settings_of(home: Path, text: str) -> RunnerSettings:
    opened = Home.open(home)
    (home / "loraline.yaml").write_text(text)
    return read_runner(opened)


def test_an_option_wins_over_a_variable_and_that_over_the_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_runner(Home.open(home)) == RunnerSettings(type="threads")
    written = "runner: {type: dask, address: 'tcp://scheduler:8786'}\n"
    assert settings_of(home, written) == RunnerSettings(type="dask", address="tcp://scheduler:8786")
    settings_of(home, "runner: {type: dask, workers: 3}\n")
    monkeypatch.setenv("LORALINE_RUNNER", "processes")
    assert read_runner(Home.open(home)) == RunnerSettings(type="processes", workers=3)
    assert read_runner(Home.open(home), "ray") == RunnerSettings(type="ray", workers=3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{type: dsk}", "did you mean 'dask'?"),
        ("{type: processes, address: 'tcp://a:1'}", "'processes' has no address"),
        ("{type: dask, address: 'tcp://a:1', workers: 2}", "has its own"),
        ("{type: dask, workers: 0}", "runner.workers: Input should be greater than or equal to 1"),
        ("{type: dask, workers: 9999}", "runner.workers"),
        ("{kind: dask}", "runner.kind"),
    ],
)
def test_a_wrong_setting_is_refused_with_its_file(home: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError) as error:
        settings_of(home, f"runner: {text}\n")
    assert message in str(error.value)
    assert "loraline.yaml" in str(error.value)


def test_a_setting_that_is_no_mapping_is_refused(home: Path) -> None:
    with pytest.raises(HomeError, match="runner: the value is not a mapping"):
        settings_of(home, "runner: dask\n")


@pytest.mark.parametrize(("name", "package"), [("dask", "prefect_dask"), ("ray", "prefect_ray")])
def test_a_missing_extra_is_named(home: Path, monkeypatch: pytest.MonkeyPatch, name: str, package: str) -> None:
    assert read_runner(Home.open(home), name).type == name
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(SettingsError) as error:
        read_runner(Home.open(home), name)
    assert f"pip install 'loraline[{name}]'" in error.value.remedy


def test_the_verbs_name_the_runners_and_refuse_others(pipeline: Write, home: Path) -> None:
    shown = loraline_here("run", "--help", home=home).stdout
    assert ", ".join(runners) in " ".join(shown.split())
    refused = loraline_here("run", pipeline(), "--runner", "rey", home=home)
    assert refused.returncode == 1
    assert "--runner: unknown task runner 'rey'" in refused.stderr
    assert "did you mean 'ray'?" in refused.stderr


def test_errors_survive_the_way_between_processes() -> None:
    for error in (
        Refused("not promoted", reasons=("a", "b"), where="x@1", remedy="fix both"),
        DataError("no images", where="images/", allowed="png"),
    ):
        copy = pickle.loads(pickle.dumps(error))
        assert (type(copy), str(copy), vars(copy)) == (type(error), str(error), vars(error))


def test_a_worker_sends_events_and_logs_and_takes_a_stop_request(home: Path, caplog: pytest.LogCaptureFixture) -> None:
    seen: list[StepEvent] = []
    stopped: list[bool] = []

    def work(relay: Relay) -> None:
        with relayed(relay):
            publish(StepEvent("photos", "drawn", done=2, files=(Path("a.png"),), values={"loss": 0.5}))
            logging.getLogger("tasks.work").warning("one image is blank")
            for _ in range(100):
                stopped.append(stop_requested())
                if stopped[-1]:
                    return
                time.sleep(0.1)

    with step_scope(seen.append) as stop, receive_events(Home.open(home)) as relay:
        worker = threading.Thread(target=work, args=(relay,))
        worker.start()
        while not seen:
            time.sleep(0.01)
        stop.set()
        worker.join()
    assert seen == [StepEvent("photos", "drawn", done=2, files=[Path("a.png")], values={"loss": 0.5}, points=[])]
    assert stopped[0] is False
    assert stopped[-1] is True
    assert ("tasks.work", "one image is blank") in [(record.name, record.message) for record in caplog.records]


def test_a_worker_whose_run_is_gone_stops(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay_module, "SILENCE", 0.5)
    relay = Relay(tmp_path)
    with pytest.raises(HomeError, match="does not see the folder of the run"), relayed(relay):
        pass
    relay.alive.touch()  # and never again
    with relayed(relay):
        while not stop_requested():
            time.sleep(0.01)


def test_runs_in_one_process_keep_their_entries_apart(home: Path) -> None:
    opened = Home.open(home)
    with recording(opened, "first", {"photos": "ingest"}), recording(opened, "second", {"photos": "ingest"}):
        publish(StepEvent("photos", "started"))
    both = [read_run_steps(opened, run)[0]["state"] for run in ("first", "second")]
    assert both == ["running", "running"]  # nested: a run is a part of the one around it

    def publish_in_first() -> None:
        with recording(opened, "third", {"photos": "ingest"}):
            publish(StepEvent("photos", "failed", text="x"))

    with recording(opened, "fourth", {"photos": "ingest"}):
        other = threading.Thread(target=publish_in_first)
        other.start()
        other.join()
    states = [read_run_steps(opened, run)[0]["state"] for run in ("third", "fourth")]
    assert states == ["failed", "waiting"]


def trials_of(home: Path) -> list[dict[str, object]]:
    records = [json.loads(path.read_bytes()) for path in sorted(home.glob("cache/sweeps/*/*.json"))]
    return [{name: value for name, value in record.items() if name != "seconds"} for record in records]


@pytest.mark.nightly
@pytest.mark.usefixtures("prefect_server", "trained_here")
@pytest.mark.parametrize("name", TESTED)
def test_a_sweep_has_the_same_trials_on_every_runner(pipeline: Write, tmp_path: Path, name: str) -> None:
    pytest.importorskip("optuna")
    path = pipeline()
    text = path.read_text().replace("images: images/}", "images: images/, heldout: 0.5}")
    path.write_text(text.replace("steps:\n", f"{SWEEP}steps:\n") + STEPS)
    results = []
    for runner in ("threads", name):
        home = tmp_path / runner
        result = run_sweep(load_sweep(path), Home.open(home), runner=RunnerSettings(type=runner, workers=2))
        results.append((trials_of(home), result.best.number, result.best.adapter))
    assert len(results[0][0]) == 2
    assert results[0] == results[1]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("name", TESTED)
def test_a_step_that_fails_keeps_its_error_and_its_downstream_steps_back(
    pipeline: Write, home: Path, name: str
) -> None:
    path = pipeline()
    for image in (path.parent / "images").iterdir():
        image.write_bytes(b"no image")
    seen: list[StepEvent] = []
    with listening(seen.append), pytest.raises(DataError) as error:
        run_pipeline(load_spec(path), Home.open(home), runner=RunnerSettings(type=name, workers=1))
    with pytest.raises(DataError) as expected:
        run_pipeline(load_spec(path), Home.open(home))
    assert str(error.value) == str(expected.value)
    ends = [(event.step, event.kind) for event in seen if event.kind != "progress"]
    assert ends == [("photos", "started"), ("photos", "failed")]


@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.nightly) for name in ISOLATED])
def test_the_pipelines_of_a_matrix_run_on_a_runner(pipeline: Write, home: Path, name: str) -> None:
    path = pipeline()
    text = path.read_text().replace("name: try\n", 'name: "try-${size}"\nmatrix: {size: [16, 32]}\n')
    path.write_text(text.replace("resolution: 32", 'resolution: "${size}"'))
    seen: list[StepEvent] = []
    specs = load_pipelines(path)
    with listening(seen.append):
        results = run_pipelines(specs, Home.open(home), RunnerSettings(type=name, workers=2))
    assert list(results) == ["try-16", "try-32"]
    for spec in specs:
        result = results[spec.name]
        assert not isinstance(result, BaseException), result
        again = run_pipeline(spec, Home.open(home))
        assert all(outcome.cached for outcome in again.outcomes.values())
        assert {step: outcome.ref for step, outcome in result.outcomes.items()} == {
            step: outcome.ref for step, outcome in again.outcomes.items()
        }
    assert {event.step for event in seen} == {f"{spec.name}/{step}" for spec in specs for step in spec.steps}


@pytest.mark.nightly
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize("name", ISOLATED)
def test_a_stop_request_reaches_the_workers(pipeline: Write, home: Path, name: str) -> None:
    path = pipeline()
    path.write_text(path.read_text() + STEPS.replace("steps: 2", "steps: 5000"))

    def stop_in_training(event: StepEvent) -> None:
        if event.step == "adapter" and event.kind == "measured":
            request_stop()

    try:
        with listening(stop_in_training), pytest.raises(InterruptedRun):
            run_pipeline(load_spec(path), Home.open(home), runner=RunnerSettings(type=name, workers=1))
    finally:
        clear_stop()
    assert list(home.glob("work/*/kept/**/*.safetensors")), "no checkpoint"
