"""Fixtures of the registry's tests: real SQLite, real MLflow, real files."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.entities import AdapterVersion, Execution, Subject, now
from registry.home import Home
from registry.mirror import Mirror
from registry.store import Store
from registry.versions import Versions

GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}


@pytest.fixture(scope="session")
def fresh_mlflow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """MLflow's database as it is after its first start, made once since that takes seconds."""
    home = Home.open(tmp_path_factory.mktemp("mlflow") / "home")
    Mirror(home, Store(home.store))
    return home.mlflow_db


@pytest.fixture
def empty_home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


@pytest.fixture
def home(empty_home: Home, fresh_mlflow: Path) -> Home:
    shutil.copy(fresh_mlflow, empty_home.mlflow_db)
    return empty_home


@pytest.fixture
def store(empty_home: Home) -> Store:
    return Store(empty_home.store)


@pytest.fixture
def mirrored(home: Home) -> Iterator[Versions]:
    """Versions that MLflow is told of."""
    opened = Versions(home)
    yield opened
    opened.close()


@pytest.fixture
def versions(empty_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Versions]:
    """Versions that MLflow is not told of, which is many times faster."""
    monkeypatch.setattr("registry.versions.bring_level", lambda *_arguments, **_settings: None)
    opened = Versions(empty_home)
    yield opened
    opened.close()


@pytest.fixture
def register() -> Callable[..., AdapterVersion]:
    """Registers an adapter of some bytes, as a pipeline would after its steps."""

    def make(versions: Versions, content: bytes, name: str = "zorb", **changes: object) -> AdapterVersion:
        store, lineage = versions.store, versions.lineage
        run = lineage.start_run("stripes", {"seed": 7})
        dataset = store.put_files("manifest", {"manifest.json": b"{}", "pictures/one.png": b"one as it was prepared"})
        adapter = store.put_files("adapter", {"adapter.safetensors": content, "training.json": b"{}"})
        report = store.put_files("report", {"report.json": b"{}" + content, "pictures/x.png": b"x"})
        train = {"inputs": {"dataset": dataset}, "output": adapter}
        for step, values in {"photos": {"output": dataset}, "adapter": train}.items():
            execution = Execution(
                f"{run.id}-{step}", run.id, step, step, "1", f"key of {step}", started_at=now(), **values
            )
            subjects = [Subject("5" * 64, "picture", "one.jpg")] if step == "photos" else []
            lineage.record(execution, contents=store.files(execution.output), subjects=subjects)
        lineage.finish_run(run.id, "COMPLETED")
        values = {
            "report": report,
            "run_id": run.id,
            "card": {"title": "Zorb"},
            "metrics": {"clip_t": {"base": 0.2, "adapter": 0.21, "difference": 0.01}},
            "gates": [GATE],
            "passed": True,
            "parents": ["base:tiny"],
            "curves": {"loss": [(0, 1.0), (1, 0.5)]},
            "params": {"rank": 8},
            "pictures": {"x.png": b"x"},
            "documents": {"report.html": b"<p>x</p>"},
        }
        return versions.register(name, adapter, **(values | changes))

    return make


@pytest.fixture
def spawn() -> Callable[..., subprocess.Popen]:
    """Starts another Python process with this one's import path."""

    def start(script: str, *arguments: object) -> subprocess.Popen:
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
        command = [sys.executable, "-c", script, *map(str, arguments)]
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return start
