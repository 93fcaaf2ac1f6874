"""The whole line from the outside: the command line as a process, on the embedded base, at a small size."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from registry.entities import AdapterVersion
from registry.home import Home
from registry.versions import Versions
from tests.flows.commands import loraline_here
from tests.flows.made import run_line

ROOT = Path(__file__).resolve().parents[2]
IMAGES = ROOT / "examples" / "zorb" / "images"

pytestmark = [pytest.mark.slow, pytest.mark.whole]

TRAINED = f"""\
name: small
base: tiny
seed: 7
steps:
  photos:   {{uses: ingest, images: "{IMAGES}", heldout: 0.5}}
  captions: {{uses: caption, dataset: photos, trigger: zorb, class_word: ring}}
  adapter:  {{uses: train, dataset: captions, method: finetune, rank: 2, steps: 12, batch: 4, checkpoint_every: 3}}
"""
LINE = f"""{TRAINED}\
  report:
    uses: evaluate
    adapter: adapter
    dataset: captions
    seeds: 1
    steps: 2
    max_pictures: 2
    gates: {{validation_loss: {{max: 10.0}}}}
  release:  {{uses: register, adapter: adapter, report: report, alias: staging}}
  exports:  {{uses: convert, adapter: adapter, to: [kohya, diffusers, peft]}}
"""
# Long enough to be stopped in its training, and no more than that.
SHORT = TRAINED.replace("steps: 12", "steps: 60") + "  release:  {uses: register, adapter: adapter}\n"

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def spec(tmp_path: Path) -> Path:
    path = tmp_path / "line.yaml"
    path.write_text(LINE)
    return path


@pytest.fixture
def loraline(environment: dict[str, str]) -> Command:
    def call(*arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == code, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done

    return call


@contextmanager
def running(environment: dict[str, str], *arguments: object) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for_checkpoint(home: Path, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        if any(home.glob("work/*/kept/checkpoints/*")):
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError("no checkpoint was written")


def versions(home: Path) -> tuple[AdapterVersion, ...]:
    return Versions(Home(home.absolute())).list()


def test_the_line_gives_a_staged_version_that_can_be_promoted_and_taken_back(
    spec: Path, home: Path, loraline: Command, tmp_path: Path
) -> None:
    def say(*arguments: object) -> str:
        # In this process: what the verbs are as processes, `test_tour` shows.
        done = loraline_here(*arguments, home=home)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    first = loraline("run", spec)
    assert "small@1" in first.stdout
    (listed,) = json.loads(say("list", "--json"))
    assert listed["name"] == "small"
    assert listed["aliases"] == ["staging"]
    assert {"version", "sha256", "size", "created_at"} <= listed.keys()
    page = (home / "reports" / "small-1.html").read_text()
    assert "data:image/png;base64," in page
    assert "small" in page
    exported = {path.name for path in (home / "exports").rglob("*") if path.is_dir()}
    assert {"kohya", "diffusers", "peft"} <= exported

    again = loraline("run", spec)
    assert "0 ran, 6 were there already" in again.stdout

    shown = json.loads(say("show", "small@staging", "--json"))
    assert {"recipe", "metrics", "gates", "parents", "card"} <= shown.keys()
    assert shown["metrics"]["validation_loss"]["adapter"] > 0

    say("promote", "small@staging", "--to", "production", "--reason", "looks right")
    spec.write_text(LINE.replace("steps: 12", "steps: 6"))
    run_line(spec, Home(home.absolute()))
    say("promote", "small@staging", "--to", "production", "--reason", "shorter")
    assert Versions(Home(home.absolute())).show("small", "production").version == 2
    say("rollback", "small")
    assert Versions(Home(home.absolute())).show("small", "production").version == 1

    up = say("lineage", "small@1")
    assert up.count("picture ") == 24
    picture = next(
        node for node in json.loads(say("lineage", "small@1", "--json"))["nodes"] if "picture" in node["label"]
    )
    assert "small@2" in say("lineage", picture["id"], "--down")

    say("export", "small@production", "--to", "kohya", "-o", tmp_path / "out")
    assert list((tmp_path / "out").glob("*.safetensors"))
    say("generate", "a red zorb <lora:small@production:0.7>", "-o", tmp_path / "pictures", "-n", "1", "--steps", "2")
    assert (tmp_path / "pictures" / "0.png").is_file()
    assert "agrees" in say("fsck")
    download_with_mlflow(home, tmp_path / "downloaded", shown["sha256"])


def download_with_mlflow(home: Path, folder: Path, sha256: str) -> None:
    code = (
        "import sys, hashlib, pathlib, mlflow\n"
        "mlflow.set_tracking_uri(sys.argv[1]); mlflow.set_registry_uri(sys.argv[1])\n"
        "folder = mlflow.artifacts.download_artifacts('models:/small@production', dst_path=sys.argv[2])\n"
        "(file,) = pathlib.Path(folder).rglob('adapter.safetensors')\n"
        "print('SHA', hashlib.sha256(file.read_bytes()).hexdigest())"
    )
    folder.mkdir()
    command = [sys.executable, "-c", code, f"sqlite:///{home.absolute()}/mlflow.db", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert f"SHA {sha256}" in done.stdout, done.stderr


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The digest of the short line's adapter when nothing stops it."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    (folder / "line.yaml").write_text(SHORT)
    return run_line(folder / "line.yaml", Home.open(folder / "home")).sha256


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_registers_nothing_and_the_next_one_gives_the_same_bytes(
    spec: Path, home: Path, environment: dict[str, str], loraline: Command, uninterrupted: str, number: signal.Signals
) -> None:
    spec.write_text(SHORT)
    with running(environment, "run", spec) as process:
        wait_for_checkpoint(home, process)
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=120)
    assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL), output
    assert versions(home) == ()

    loraline("run", spec)
    (resumed,) = versions(home)
    assert resumed.sha256 == uninterrupted
    states = [run.status for run in Versions(Home(home.absolute())).lineage.runs()]
    assert states == ["COMPLETED", "INTERRUPTED" if number == signal.SIGINT else "CRASHED"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["adapter.learning_rate=1e30", "adapter.clip=0.0"], "is inf at step 1"),
        (["adapter.rank=4096"], "4096"),
    ],
)
def test_a_training_that_cannot_be_right_fails_and_registers_nothing(
    spec: Path, home: Path, loraline: Command, changes: list[str], said: str
) -> None:
    done = loraline("run", spec, *(part for change in changes for part in ("--set", change)), code=1)
    assert said in done.stderr
    assert versions(home) == ()


def test_a_gate_that_fails_keeps_the_alias_back_and_the_exit_code_says_so(
    spec: Path, home: Path, loraline: Command
) -> None:
    spec.write_text(LINE.replace("max: 10.0", "max: -10.0"))
    done = loraline("run", spec, code=1)
    assert "FAILED" in done.stdout
    (version,) = versions(home)
    assert version.passed is False
    assert version.aliases == ()
    refused = loraline("promote", "small@1", "--to", "production", "--reason", "please", code=1)
    assert "validation_loss" in refused.stderr


def test_two_runs_at_once_train_once_and_agree(spec: Path, home: Path, environment: dict[str, str]) -> None:
    with running(environment, "run", spec) as one, running(environment, "run", spec) as two:
        outputs = [process.communicate(timeout=500)[0] for process in (one, two)]
    assert [one.returncode, two.returncode] == [0, 0], outputs
    assert len(versions(home)) == 1
    lineage = Versions(Home(home.absolute())).lineage
    trained = [e for run in lineage.runs() for e in lineage.executions(run.id) if e.uses == "train"]
    assert sorted(execution.status for execution in trained) == ["CACHED", "COMPLETED"]


def test_a_full_disk_is_said_and_what_was_there_stays(
    spec: Path, environment: dict[str, str], loraline: Command, tmp_path: Path
) -> None:
    small = tmp_path / "small-disk"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(small)], capture_output=True)
    if mounted.returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        environment["LORALINE_HOME"] = str(small / "home")
        done = loraline("run", spec, code=1)
        assert "full" in done.stderr
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)
