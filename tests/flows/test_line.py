"""Tests whole pipelines: killed, interrupted, two runs at once, a full disk; and the verbs on their results."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import httpx
import pytest
from PIL import Image

from flows.crashed import tag_of
from registry.entities import AdapterVersion
from registry.home import Home
from registry.lineage.record import Lineage
from registry.versions.versions import Versions
from tests.flows.commands import loraline_here, loraline_process, say
from tests.flows.made import run_line
from tests.flows.shared import LINE, Trained, training_here, write_line

pytestmark = pytest.mark.usefixtures("prefect_server", "trained_here")

TRAINED = LINE[: LINE.index("  report:")]
# Enough steps to stop it between two checkpoints.
SHORT = (
    TRAINED.replace("steps: 12, batch: 4", "steps: 40, batch: 2") + "  release:  {uses: register, adapter: adapter}\n"
)
assert "steps: 40" in SHORT


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    return write_line(tmp_path, SHORT)


def versions(home: Path) -> tuple[AdapterVersion, ...]:
    with closing(Versions(Home(home.absolute()))) as opened:
        return opened.list()


def test_a_trained_version_is_shown_promoted_rolled_back_exported_and_used(trained: Trained, tmp_path: Path) -> None:
    home = trained.home.path
    again = say("run", trained.spec, home=home)
    assert "0 ran, 7 cached" in again
    page = (home / "reports" / "small-1.html").read_text()
    assert "data:image/png;base64," in page
    assert "small" in page
    exported = {path.name for path in (home / "exports").rglob("*") if path.is_dir()}
    assert {"kohya", "diffusers", "peft"} <= exported

    (listed,) = json.loads(say("list", "--json", home=home))
    assert listed["name"] == "small"
    assert listed["aliases"] == ["staging"]
    assert {"version", "sha256", "size", "created_at"} <= listed.keys()
    shown = json.loads(say("show", "small@staging", "--json", home=home))
    assert {"recipe", "metrics", "gates", "parents", "card"} <= shown.keys()
    assert shown["metrics"]["validation_loss"]["adapter"] > 0

    say("promote", "small@staging", "--to", "production", "--reason", "looks right", home=home)
    assert "4 ran, 3 cached" in say("run", trained.spec, "--set", "adapter.steps=6", home=home)
    say("promote", "small@staging", "--to", "production", "--reason", "shorter", home=home)
    assert trained.version("production").version == 2
    say("rollback", "small", home=home)
    assert trained.version("production").version == 1

    up = say("lineage", "small@1", home=home)
    assert up.count("picture ") == 8
    nodes = json.loads(say("lineage", "small@1", "--json", home=home))["nodes"]
    image = next(node for node in nodes if "picture" in node["label"])
    assert "small@2" in say("lineage", image["id"], "--down", home=home)

    say("export", "small@production", "--to", "kohya", "-o", tmp_path / "out", home=home)
    assert list((tmp_path / "out").glob("*.safetensors"))
    prompt = "a red zorb <lora:small@production:0.7>"
    say("generate", prompt, "-o", tmp_path / "images", "-n", "1", "--steps", "2", home=home)
    with Image.open(tmp_path / "images" / "0.png") as generated:
        generated.load()
        facts = json.loads(generated.text["loraline"])
        assert "<lora:small-v1:0.7>" in generated.text["parameters"]
    assert [(used["reference"], used["denoiser"]) for used in facts["adapters"]] == [("small@1", "0.7")]
    assert facts["adapters"][0]["sha256"] == trained.version("production").sha256
    of_image = json.loads(say("lineage", tmp_path / "images" / "0.png", "--json", home=home))["nodes"]
    assert image["id"] in {node["id"] for node in of_image}
    assert "agrees" in say("fsck", home=home)


def test_mlflow_alone_downloads_the_production_version(
    trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    say("promote", "small@1", "--to", "production", "--reason", "looks right", home=trained.home.path)
    for variable in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(variable, trained.home.mlflow_url)
    (tmp_path / "downloaded").mkdir()
    folder = mlflow.artifacts.download_artifacts("models:/small@production", dst_path=str(tmp_path / "downloaded"))
    (file,) = Path(folder).rglob("adapter.safetensors")
    assert hashlib.sha256(file.read_bytes()).hexdigest() == trained.version().sha256


def test_an_ungated_alias_in_mlflow_is_reported_by_reading_verbs_and_removed_by_a_run_without_changes(
    trained: Trained, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(trained.home.mlflow_url, trained.home.mlflow_url)
    client.set_registered_model_alias("small", "production", "1")
    changed = trained.home.mlflow_db.read_bytes()
    problem = "small@production: points at version 1 instead of no version"
    for verb in (("list",), ("show", "small@1"), ("log", "small"), ("plan", trained.spec)):
        caplog.clear()
        say(*verb, home=trained.home.path)
        assert problem in caplog.text
    assert problem in loraline_here("doctor", home=trained.home.path).stdout
    assert problem.partition(": ")[2] in say("fsck", "--json", home=trained.home.path, code=1)
    assert trained.home.mlflow_db.read_bytes() == changed
    assert "0 ran, 7 cached" in say("run", trained.spec, home=trained.home.path)
    assert dict(client.get_registered_model("small").aliases) == {"staging": 1}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Returns the digest of the short pipeline's adapter without interruptions."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    with training_here():
        return run_line(write_line(folder, SHORT), Home.open(folder / "home")).sha256


def test_a_run_that_is_killed_and_then_interrupted_registers_nothing_and_the_third_gives_the_same_bytes(
    spec: Path, home: Path, environment: dict[str, str], uninterrupted: str
) -> None:
    for number, code in ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130)):
        before = checkpoints(home)
        with loraline_process(environment, "run", spec) as process:
            wait_for_checkpoint(home, before, process)
            os.kill(process.pid, number)
            output = process.communicate(timeout=300)
        assert process.returncode == code, output
        assert "Traceback" not in output[1]
        assert versions(home) == ()
        wait_for_children(home)

    say("run", spec, home=home)
    (resumed,) = versions(home)
    assert resumed.sha256 == uninterrupted
    with closing(Lineage(Home(home.absolute()).lineage_url)) as lineage:
        runs = lineage.runs()
    assert [run.status for run in runs] == ["COMPLETED", "INTERRUPTED", "CRASHED"]
    assert "RUNNING" not in prefect_states(environment["PREFECT_API_URL"], runs[1].id)
    assert prefect_states(environment["PREFECT_API_URL"], runs[2].id) == {"CRASHED"}


def prefect_states(server: str, run_id: str) -> set[str]:
    """Returns the types of the states of a run's flow run and task runs."""
    tagged = {"tags": {"all_": [tag_of(run_id)]}}
    bodies = {"flow_runs": {"flow_runs": tagged}, "task_runs": {"flow_runs": tagged}}
    answers = [httpx.post(f"{server}/{kind}/filter", json=body, timeout=60) for kind, body in bodies.items()]
    return {entry["state"]["type"] for answer in answers for entry in answer.raise_for_status().json()} - {"COMPLETED"}


def checkpoints(home: Path) -> set[str]:
    return {path.name for path in home.glob("cache/states/*/checkpoints/step-*.safetensors")}


def wait_for_checkpoint(home: Path, before: set[str], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 600
    while not checkpoints(home) - before:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "no checkpoint was written"
        time.sleep(0.1)


def wait_for_children(home: Path) -> None:
    """Waits until no training is left: its process writes a checkpoint when it detects that the run was killed."""
    deadline = time.monotonic() + 120
    while any(os.fsencode(home) in command for command in command_lines()):
        assert time.monotonic() < deadline, "the training outlived its run"
        time.sleep(0.2)


def command_lines() -> Iterator[bytes]:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            yield path.read_bytes()


def test_two_runs_at_once_train_once_and_agree(spec: Path, home: Path, environment: dict[str, str]) -> None:
    spec.write_text(SHORT.replace("steps: 40", "steps: 3"))
    with loraline_process(environment, "run", spec) as one, loraline_process(environment, "run", spec, "--json") as two:
        (text, warnings), (document, progress) = (process.communicate(timeout=600) for process in (one, two))
    assert [one.returncode, two.returncode] == [0, 0], warnings + progress
    # With --json, standard output has one document, and the progress goes to standard error.
    assert "loraline show small@1" in text
    (version,) = versions(home)
    assert json.loads(document)["outcomes"]["adapter"]["ref"]["sha256"] == version.artifact.sha256
    assert "adapter: " in progress
    assert "Traceback" not in warnings + progress
    assert "kernels" not in warnings + progress  # of bitsandbytes, which no step uses

    with closing(Lineage(Home(home.absolute()).lineage_url)) as lineage:
        trained = [e for run in lineage.runs() for e in lineage.executions(run.id) if e.uses == "train"]
    assert sorted(execution.status for execution in trained) == ["CACHED", "COMPLETED"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["adapter.learning_rate=1e30", "adapter.clip=0.0"], "is inf at step 1"),
        (["adapter.rank=4096"], "4096"),
    ],
)
def test_an_impossible_training_fails_and_registers_nothing(trained: Trained, changes: list[str], message: str) -> None:
    home = trained.home.path
    before = versions(home)
    done = loraline_here("run", trained.spec, *(part for change in changes for part in ("--set", change)), home=home)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert versions(home) == before


def test_a_failed_gate_refuses_the_alias_and_gives_exit_code_1(trained: Trained) -> None:
    home = trained.home.path
    trained.spec.write_text(LINE.replace("max: 10.0", "max: -10.0"))
    assert "FAILED" in say("run", trained.spec, home=home, code=1)
    failed = trained.version(2)
    assert failed.passed is False
    assert failed.aliases == ()
    assert trained.version().aliases == ("staging",)
    refused = loraline_here("promote", "small@2", "--to", "production", "--reason", "please", home=home)
    assert refused.returncode == 1
    assert "validation_loss" in refused.stderr


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.nightly
def test_a_full_disk_is_reported_damages_nothing_and_the_run_works_with_free_space(
    trained: Trained, small_disk: Path
) -> None:
    home = small_disk / "home"
    shutil.copytree(trained.home.path, home)
    Versions(Home.open(home)).close()
    filler = small_disk / "filler"
    filler.write_bytes(b"x" * (shutil.disk_usage(small_disk).free - 100_000))
    change = ("--set", "prepared.resolution=64", "--set", "adapter.steps=3")
    full = loraline_here("run", trained.spec, *change, home=home)
    assert full.returncode == 1
    assert "full" in full.stderr
    assert "Traceback" not in full.stderr
    filler.unlink()
    assert "agrees" in say("fsck", home=home)
    assert [version.ref for version in versions(home)] == ["small@1"]
    say("run", trained.spec, *change, home=home)
    assert [version.ref for version in versions(home)] == ["small@1", "small@2"]
