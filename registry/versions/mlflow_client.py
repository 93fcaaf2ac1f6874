"""Opens MLflow's client of a home, finds its runs and converts its errors."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from registry.errors import MlflowError, disk_errors
from registry.home import Home
from registry.refs import check_name
from registry.store.database import sqlite_file
from registry.store.redaction import redact
from registry.versions.mlflow_tables import PREFIX, TRAINING_KEY


@contextmanager
def mlflow_errors(home: Home, where: str) -> Iterator[None]:
    """Converts every error of MLflow to `MlflowError`."""
    from mlflow.exceptions import MlflowException

    try:
        with disk_errors(home.mlflow_artifacts):
            yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise MlflowError(
            f"MLflow could not be synced ({redact(str(error), home.mlflow_url)})",
            where=where,
            remedy="fix the cause; nothing is lost, and the next command syncs MLflow",
        ) from error


def open_client(home: Home) -> Any:
    """Opens a client of the home's MLflow; creates its database first, atomically."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    os.environ.setdefault("DO_NOT_TRACK", "true")
    for name in ("alembic", "mlflow.store.db.utils"):
        logging.getLogger(name).setLevel(logging.WARNING)
    from mlflow import MlflowClient

    file = sqlite_file(home.mlflow_url)
    if file is not None and not file.exists():
        _make_database(home, file)
    return MlflowClient(tracking_uri=home.mlflow_url, registry_uri=home.mlflow_url)


def _make_database(home: Home, file: Path) -> None:
    from mlflow.store.model_registry.sqlalchemy_store import SqlAlchemyStore as ModelStore
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore as RunStore

    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    try:
        store = RunStore(f"sqlite:///{partial}", home.mlflow_artifacts.as_uri())
        store.engine.dispose()
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)
    # MLflow caches engines by URL: dispose of connections that this process has to an earlier database at this path.
    RunStore(home.mlflow_url, home.mlflow_artifacts.as_uri()).engine.dispose()
    ModelStore(home.mlflow_url).engine.dispose()


def ensure_experiment(client: Any, home: Home, name: str) -> str:
    """Returns the id of an adapter's experiment; creates it, or restores it if it was deleted."""
    experiment = client.get_experiment_by_name(name)
    if experiment is None:
        folder = home.mlflow_artifacts / check_name(name)
        return str(client.create_experiment(name, artifact_location=folder.as_uri()))
    if experiment.lifecycle_stage == "deleted":
        client.restore_experiment(experiment.experiment_id)
    return str(experiment.experiment_id)


def find_training_runs(client: Any, experiment_id: str, keys: Iterable[str]) -> Iterator[Any]:
    """Yields the runs of trainings by cache key that belong to no version yet, latest first."""
    for key in keys:
        runs = client.search_runs([experiment_id], filter_string=f"tags.`{TRAINING_KEY}` = '{key}'")
        yield from (run for run in runs if f"{PREFIX}version" not in run.data.tags)
