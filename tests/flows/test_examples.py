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
