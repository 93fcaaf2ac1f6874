"""The examples, as they stand but for the number of training steps."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from registry.home import Home
from registry.versions import Versions

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"

pytestmark = pytest.mark.slow


def run(spec: Path, environment: dict[str, str], *changes: str) -> str:
    options = [part for change in changes for part in ("--set", change)]
    command = [sys.executable, "-c", "from flows.cli import main; main()", "run", str(spec), *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_adapters_are_trained_merged_and_registered_as_one(environment: dict[str, str], home: Path) -> None:
    spec = EXAMPLES / "merge" / "pipeline.yaml"
    run(spec, environment, "shape.steps=4", "frame.steps=4", "report.max_pictures=2", "report.steps=2")
    (version,) = Versions(Home(home.absolute())).list()
    assert version.aliases == ("staging",)
    assert version.card["recipe"]["weights"] == [1.0, 0.8]
    assert len(version.parents) == 2


def test_other_kinds_are_trained_merged_and_exported(environment: dict[str, str], home: Path) -> None:
    spec = EXAMPLES / "kinds" / "pipeline.yaml"
    run(spec, environment, "factored.steps=2", "directed.steps=2", "report.max_pictures=2", "report.steps=2")
    (version,) = Versions(Home(home.absolute())).list()
    assert version.card["recipe"]["method"] == "ties"
    assert len(version.parents) == 2


def test_an_objective_and_rates_of_ones_own_go_down_the_line(environment: dict[str, str], home: Path) -> None:
    spec = EXAMPLES / "methods" / "objective.yaml"
    run(spec, environment, "adapter.steps=4", "adapter.validate_every=2", "report.max_pictures=2", "report.steps=2")
    (version,) = Versions(Home(home.absolute())).list()
    recipe = version.card["recipe"]
    assert recipe["objective"]["weighting"] == {"name": "min_snr", "gamma": 5.0}
    assert recipe["rates"]["optimiser"]["name"] == "adafactor"


def test_pictures_and_captions_that_change_are_trained_on_and_encoded_once(
    environment: dict[str, str], home: Path
) -> None:
    spec = EXAMPLES / "methods" / "data-path.yaml"
    run(spec, environment, "adapter.steps=2", "report.max_pictures=2", "report.steps=2")
    (version,) = Versions(Home(home.absolute())).list()
    assert version.card["recipe"]["captions"]["shuffle"] is True
    latents = home / "cache" / "latents"
    made = {path: path.stat().st_mtime_ns for path in latents.rglob("*.safetensors")}
    # Twelve pictures, each as it is and in two other colours.
    assert len(made) == 36
    run(spec, environment, "adapter.steps=2", "adapter.rank=2", "report.max_pictures=2", "report.steps=2")
    assert set(latents.rglob("*.safetensors")) == set(made)


@pytest.mark.parametrize("spec", sorted((EXAMPLES / "methods").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_method_goes_down_the_line(spec: Path, environment: dict[str, str], home: Path) -> None:
    trained = "word" if spec.stem == "inversion" else "adapter"
    run(spec, environment, f"{trained}.steps=2", "report.max_pictures=1", "report.steps=2")
    (version,) = Versions(Home(home.absolute())).list()
    assert version.aliases == ("staging",)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("examples") / "photographs"
    shutil.copytree(EXAMPLES / "photographs", folder, ignore=shutil.ignore_patterns("images", "bases"))
    subprocess.run([sys.executable, folder / "prepare.py"], check=True, capture_output=True, timeout=300)
    return folder


@pytest.mark.parametrize("base", ["tiny", "sd15", "sdxl"])
def test_photographs_go_down_the_line_on_every_base(
    photographs: Path, environment: dict[str, str], home: Path, base: str
) -> None:
    printed = run(photographs / f"{base}.yaml", environment, "adapter.steps=2")
    assert "staging" in printed
    (version,) = Versions(Home(home.absolute())).list()
    assert len(version.card["data"]) == 9
    exported = {path.name for path in (home / "exports").rglob("*") if path.is_file()}
    assert "adapter_config.json" in exported


def test_two_processes_train_and_leave_sample_pictures(environment: dict[str, str], home: Path) -> None:
    spec = EXAMPLES / "methods" / "running.yaml"
    run(spec, environment, "adapter.steps=2", "adapter.samples.every=1", "report.max_pictures=2", "report.steps=2")
    (version,) = Versions(Home(home.absolute())).list()
    assert version.card["recipe"]["running"]["processes"] == 2
    shown = {path.parent.name for path in (home / "mlflow").rglob("samples/*/*.png")}
    assert shown == {"step-000001", "step-000002"}, "MLflow shows the pictures of every interval"
