"""Installs a plug-in package and runs the laws, and a pipeline, on its entries in a process of its own."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.flows.shared import prefect_database, prefect_server

__all__ = ["prefect_database", "prefect_server"]
ROOT = Path(__file__).resolve().parents[1]
LAWS = (
    "tests/laws",
    "tests/lora_engine/evaluation/test_gates.py::test_every_metric_has_a_description",
    "tests/plugin/plugged.py",
)
CHOSEN = "example or description"
"""The cases of the plug-in's entries, and a test over all metrics."""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a folder with the installed plug-in."""
    folder = tmp_path_factory.mktemp("plugin")
    source = shutil.copytree(ROOT / "tests" / "plugin", folder / "source")
    offline = ("--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "--quiet")
    command = [sys.executable, "-m", "pip", "install", *offline, "--target", folder / "packages", source]
    subprocess.run(command, check=True, timeout=300)
    return folder / "packages"


def test_an_installed_package_adds_one_entry_of_each_concept_and_all_keep_the_laws(
    packages: Path, prefect_server: str, tmp_path: Path
) -> None:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join((str(packages), str(ROOT))),
        "PREFECT_API_URL": prefect_server,
        "OMP_NUM_THREADS": "1",
    }
    options = ("-q", "-n0", "-p", "no:cacheprovider", "--basetemp", str(tmp_path / "laws"), "-k", CHOSEN)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *LAWS, *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    (passed,) = re.findall(r"(\d+) passed", done.stdout)
    assert int(passed) > 150, done.stdout[-500:]
