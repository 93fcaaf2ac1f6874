"""Fixtures of the registry's tests: a home on SQLite and local files, MLflow at one path, processes that start fast.

What depends on the database is in test_database_contract.py, which alone runs on PostgreSQL too; what depends on the
store of blobs is in test_registry_blobs.py.
"""

import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from registry.entities import AdapterVersion, Execution, Subject, now
from registry.home import Home
from registry.store.artifacts import Store
from registry.versions.mlflow_client import open_client
from registry.versions.promotion import promote
from registry.versions.versions import Versions
from tests.registry.children import Child

GATE = {"metric": "clip_t", "of": "difference", "min": -0.05, "max": None, "value": 0.01, "passed": True}


@pytest.fixture
def empty_home(tmp_path: Path) -> Home:
    return Home.open(tmp_path / "home")


@pytest.fixture
def store(empty_home: Home) -> Store:
    return Store(empty_home.store)


@pytest.fixture
def versions(empty_home: Home, monkeypatch: pytest.MonkeyPatch) -> Iterator[Versions]:
    """Yields the versions of an empty home; MLflow is never written, which is many times faster."""
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    versions = Versions(empty_home)
    yield versions
    versions.close()


def _close_mlflow() -> None:
    """Closes the connections that MLflow keeps per database for the life of the process."""
    if "mlflow" in sys.modules:
        from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as ModelStore
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as RunStore

        for engine in (*RunStore._engine_map.values(), *ModelStore._engine_map.values()):
            engine.dispose()


@pytest.fixture(scope="session")
def close_mlflow() -> Callable[[], None]:
    return _close_mlflow


@pytest.fixture(scope="session")
def place_home(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path | None], Home]:
    """Returns a function that copies a home, or makes an empty one, at the one path where MLflow is used.

    MLflow keeps an engine and a store per path, and stores absolute paths. A copy at the same path needs no setup.
    """
    path = tmp_path_factory.mktemp("placed") / "home"

    def place(template: Path | None) -> Home:
        _close_mlflow()
        shutil.rmtree(path, ignore_errors=True)
        if template is not None:
            shutil.copytree(template, path)
        return Home.open(path)

    return place


@pytest.fixture(scope="session")
def fresh_template(place_home: Callable[[Path | None], Home], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Returns a copy of a home in which MLflow has created its tables."""
    home = place_home(None)
    open_client(home)
    _close_mlflow()
    return Path(shutil.copytree(home.path, tmp_path_factory.mktemp("fresh") / "home"))


@pytest.fixture(scope="session")
def filled_template(
    place_home: Callable[[Path | None], Home], fresh_template: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Returns a copy of a home with two versions in MLflow: the second in staging, the first in production."""
    versions = Versions(place_home(fresh_template))
    register_adapter(versions, b"first weights", alias_request="staging")
    register_adapter(versions, b"second weights", alias_request="staging")
    promote(versions, "zorb", 1, "production", reason="looks right")
    assert versions.is_synced()
    versions.close()
    _close_mlflow()
    return Path(shutil.copytree(versions.home.path, tmp_path_factory.mktemp("filled") / "home"))


@pytest.fixture
def home(place_home: Callable[[Path | None], Home], fresh_template: Path) -> Iterator[Home]:
    """Yields an empty home in which MLflow has created its tables."""
    yield place_home(fresh_template)
    _close_mlflow()


@pytest.fixture
def synced(home: Home) -> Iterator[Versions]:
    """Yields the versions of an empty home, which are synced to MLflow."""
    versions = Versions(home)
    yield versions
    versions.close()


@pytest.fixture
def filled_home(place_home: Callable[[Path | None], Home], filled_template: Path) -> Iterator[Home]:
    """Yields a home like `filled_template`."""
    yield place_home(filled_template)
    _close_mlflow()


@pytest.fixture
def good(filled_home: Home) -> Iterator[Versions]:
    """Yields the versions of a home like `filled_template`."""
    versions = Versions(filled_home)
    yield versions
    versions.close()


@pytest.fixture
def plain(filled_template: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Versions]:
    """Yields the versions of a home like `filled_template` without MLflow, which is never written."""
    monkeypatch.setattr("registry.versions.versions.sync_mlflow", lambda *_arguments, **_settings: None)
    ignored = shutil.ignore_patterns("mlflow", "mlflow.db")
    versions = Versions(Home.open(shutil.copytree(filled_template, tmp_path / "home", ignore=ignored)))
    yield versions
    versions.close()


def register_adapter(versions: Versions, content: bytes, name: str = "zorb", **changes: object) -> AdapterVersion:
    """Registers an adapter of these bytes, as a pipeline does after its steps."""
    store, lineage = versions.store, versions.lineage
    run = lineage.start_run("stripes", {"seed": 7})
    dataset = store.put_files("manifest", {"manifest.json": b"{}", "pictures/one.png": b"one as it was prepared"})
    adapter = store.put_files("adapter", {"adapter.safetensors": content, "training.json": b"{}"})
    report = store.put_files("report", {"report.json": b"{}" + content, "pictures/x.png": b"x"})
    train = {"inputs": {"dataset": dataset}, "output": adapter}
    for step, values in {"photos": {"output": dataset}, "adapter": train}.items():
        execution = Execution(f"{run.id}-{step}", run.id, step, step, "1", f"key of {step}", started_at=now(), **values)
        subjects = [Subject("5" * 64, "picture", "one.jpg")] if step == "photos" else []
        lineage.log_execution(execution, contents=store.files(execution.output), subjects=subjects)
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


@pytest.fixture(scope="session")
def register() -> Callable[..., AdapterVersion]:
    return register_adapter


IMAGE = {"width": 4, "height": 4, "caption": "", "file": "pictures/0000000000000000.png"}


@pytest.fixture
def from_images(versions: Versions) -> Callable[..., AdapterVersion]:
    """Returns a function that registers an adapter made from images ({digest: consent}) or from other versions."""

    def make(
        content: bytes,
        images: Mapping[str, str | None] | None = None,
        name: str = "zorb",
        adapters: Sequence[AdapterVersion] = (),
        promoted: str | None = None,
        rights: Mapping[str, object] | None = None,
        **values: object,
    ) -> AdapterVersion:
        store, lineage = versions.store, versions.lineage
        run = lineage.start_run(f"make {name}", {})
        inputs = {f"adapters.{index}": version.artifact for index, version in enumerate(adapters)}
        if images is not None:
            entries = [IMAGE | {"sha256": i, "source": f"{i[:1]}.png", "consent": c} for i, c in images.items()]
            manifest = json.dumps({"pictures": [entry | {"rights": dict(rights or {})} for entry in entries]}).encode()
            dataset = inputs["dataset"] = store.put_files("manifest", {"manifest.json": manifest})
            subjects = [Subject(digest, "picture", "p") for digest in images]
            subjects += [Subject(consent, "consent", "c") for consent in images.values() if consent]
            key = f"{run.id}-i"
            ingest = Execution(key, run.id, "i", "ingest", "1", key, output=dataset, started_at=now())
            lineage.log_execution(ingest, contents=store.files(dataset), subjects=subjects)
        adapter = store.put_files("adapter", {"adapter.safetensors": content})
        uses = "merge" if adapters else "train"
        settings = {"settings": {"base": "tiny"}}
        training = Execution(run.id, run.id, uses, uses, "1", run.id, settings, inputs, adapter, started_at=now())
        lineage.log_execution(training, contents=store.files(adapter))
        export = store.put_files("export", {"kohya/a.safetensors": b"as kohya " + content})
        key = f"{run.id}-c"
        convert = Execution(key, run.id, "c", "convert", "1", key, {}, {"adapter": adapter}, export)
        lineage.log_execution(convert, contents=store.files(export))
        lineage.finish_run(run.id, "COMPLETED")
        version = versions.register(name, adapter, run_id=run.id, gates=[GATE], passed=True, **values)
        if promoted:
            promote(versions, name, version.version, promoted, reason="r")
        return version

    return make


@pytest.fixture
def spawn() -> Iterator[Callable[..., Child]]:
    """Yields a function that runs a script with arguments in a new process; kills the remaining ones at the end."""
    children: list[Child] = []

    def start(script: str, *arguments: object) -> Child:
        children.append(Child(script, list(map(str, arguments))))
        return children[-1]

    yield start
    for child in children:
        child.close()
