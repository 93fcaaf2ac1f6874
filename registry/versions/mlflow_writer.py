"""Writes registry rows to MLflow. Only this module and `live_run` import mlflow, and only inside functions.

Every call is idempotent: the next call completes an interrupted one. Callers hold the lock.
"""

from __future__ import annotations

import json
import logging
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from lora_engine.files import sha256_bytes, sha256_file
from registry.documents.facts import Dataset
from registry.documents.storage import Shown
from registry.entities import AdapterVersion, ArtifactRef, check_name
from registry.errors import MlflowError, disk_errors
from registry.home import Home
from registry.policy.alias_policy import numbers
from registry.refs import split_ref, version_number
from registry.store.artifacts import Store
from registry.store.database import name_of, sqlite_file
from registry.store.redaction import redact
from registry.versions.mlflow_drift import expected_tags, own_tags, with_state
from registry.versions.mlflow_tables import (
    PREFIX,
    TRAINING_KEY,
    local_path,
    require_reachable,
    reset_version,
    write_alias,
)
from registry.versions.rewrite_uris import rewrite_artifact_uris

_logger = logging.getLogger(__name__)

_PARAMS_AT_ONCE = 100
_METRICS_AT_ONCE = 1000
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DATASET_DIGEST = 36
_MISSING = "RESOURCE_DOES_NOT_EXIST"
_RECORD = "record.json"
_NOT_IN_NAMES = re.compile(r"[^\w\-. :/]", re.ASCII)


class MlflowWriter:
    """Writes to MLflow's database and artifacts of one home.

    The first call that needs MLflow's client imports MLflow, which takes seconds; `set_alias` needs none.

    Args:
        home: The home.
        store: The store with the bytes.

    Raises:
        MlflowError: MLflow's database server does not answer, or its file cannot be created.
    """

    def __init__(self, home: Home, store: Store) -> None:
        self.home, self.store = home, store
        file = sqlite_file(home.mlflow_url)
        if file is None:
            require_reachable(home.mlflow_url)
        elif not file.exists():
            _ = self._client  # creates the tables before anything reads them

    def add_version(
        self, version: AdapterVersion, record: ArtifactRef, shown: Shown, training_keys: Sequence[str] = ()
    ) -> str:
        """Writes run, artifacts, registered model and model version of a version.

        Args:
            version: The version.
            training_keys: Cache keys of the trainings that made the adapter; a run that showed one of them while it
                ran becomes the version's.
            record: The artifact with parameters, curves, images and documents.
            shown: Its documents and datasets.

        Returns:
            The id of its run in MLflow.

        Raises:
            MlflowError: MLflow failed, or has another version under that number.
        """
        with self.with_context(version.ref):
            run_id = self._ensure_run(version, training_keys)
            self._log_values(run_id, version, json.loads(self.store.read(record, _RECORD)))
            self._log_datasets(run_id, shown.facts.datasets)
            source = self._copy_files(run_id, version, record, shown.documents)
            self._client.set_terminated(run_id, "FINISHED", end_time=_millis(version))
            self._ensure_model(version.name)
            self._ensure_version(version, run_id, source)
            self._describe(version, run_id, shown)
            self._write_tags(version, run_id)
        return run_id

    def delete_version(self, version: AdapterVersion) -> str:
        """Deletes the files of a deleted version; run and model version stay to keep MLflow's numbers equal to ours.

        Returns:
            The id of its run in MLflow.

        Raises:
            MlflowError: MLflow failed, or has another version under that number.
        """
        from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

        with self.with_context(version.ref):
            run_id = self._ensure_run(version)
            uri = str(self._client.get_run(run_id).info.artifact_uri)
            artifacts = get_artifact_repository(uri)
            for folder in ("adapter", "pictures", "documents"):
                if artifacts.list_artifacts(folder):
                    artifacts.delete_artifacts(folder)
            self._client.set_terminated(run_id, "FINISHED", end_time=_millis(version))
            self._ensure_model(version.name)
            self._ensure_version(version, run_id, f"{uri}/adapter")
            self._write_tags(version, run_id)
        return run_id

    def set_alias(self, name: str, alias: str, version: int | None) -> None:
        """Points MLflow's alias at a version, or removes it."""
        if not write_alias(self.home.mlflow_url, name, alias, version):
            # MLflow lacks its tables or the version: the client creates the tables, or says what is missing.
            with self.with_context(f"{name}@{alias}"):
                self._client.set_registered_model_alias(name, alias, str(version))

    def move_artifacts(self, names: Iterable[str]) -> None:
        """Rewrites MLflow's artifact URIs of these adapters if the home was moved."""
        with self.with_context("its artifact URIs"):
            counts = rewrite_artifact_uris(self.home.mlflow_url, names, self.home.mlflow_artifacts.as_uri())
        if counts:
            _logger.info("the home was moved: rewrote %d artifact URIs in MLflow", sum(counts.values()))

    def restore_version(self, version: AdapterVersion) -> None:
        """Restores the run, the stage and the tags of a model version that MLflow still has."""
        with self.with_context(version.ref):
            run_id, number = self._ensure_run(version), str(version.version)
            entry = self._client.get_model_version(version.name, number)
            reset_version(self.home.mlflow_url, version.name, version.version, run_id, entry.source)
            self._write_tags(version, run_id)

    def rename_model(self, name: str, new_name: str) -> None:
        """Renames a registered model with its versions, tags and aliases."""
        with self.with_context(name):
            self._client.rename_registered_model(name, new_name)

    @cached_property
    def _client(self) -> Any:
        with self.with_context("its database"):
            return open_client(self.home)

    @contextmanager
    def with_context(self, where: str) -> Iterator[None]:
        """Converts every error of MLflow to `MlflowError`."""
        with mlflow_errors(self.home, where):
            yield

    def _ensure_run(self, version: AdapterVersion, training_keys: Sequence[str] = ()) -> str:
        experiment_id = ensure_experiment(self._client, self.home, version.name)
        if self._restore_run(version.mlflow_run_id):
            return str(version.mlflow_run_id)
        same_tags = f"tags.`loraline.version` = '{version.ref}' and tags.`loraline.sha256` = '{version.sha256}'"
        for run in self._client.search_runs([experiment_id], filter_string=same_tags, max_results=1):
            return str(run.info.run_id)
        name = f"{version.name} {version.version}"
        for run in find_training_runs(self._client, experiment_id, training_keys):
            self._client.update_run(run.info.run_id, name=name)
            return str(run.info.run_id)
        run = self._client.create_run(
            experiment_id, start_time=_millis(version), tags=expected_tags(version), run_name=name
        )
        return str(run.info.run_id)

    def _restore_run(self, run_id: str | None) -> bool:
        """Restores a run if it was deleted; returns False if MLflow does not have it."""
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return False
        try:
            run = self._client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            return False
        if run.info.lifecycle_stage == "deleted":
            self._client.restore_run(run_id)
        return True

    def _log_values(self, run_id: str, version: AdapterVersion, record: Mapping[str, Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        timestamp = _millis(version)
        metrics = [Metric(name, value, timestamp, 0) for name, value in numbers(version.metrics)]
        for name, curve in record["curves"].items():
            # A run that was live has most points, with the times of their steps.
            logged = {(point.step, point.value) for point in self._client.get_metric_history(run_id, name)}
            metrics += [Metric(name, value, timestamp, step) for step, value in curve if (step, value) not in logged]
        for batch in _batches(metrics, _METRICS_AT_ONCE):
            self._client.log_batch(run_id, metrics=batch)
        params = {_param_name(str(key)): _text(value) for key, value in record["params"].items()}
        long = {key: value for key, value in params.items() if len(value) > _PARAM_LENGTH}
        for batch in _batches([Param(key, value[:_PARAM_LENGTH]) for key, value in params.items()], _PARAMS_AT_ONCE):
            self._client.log_batch(run_id, params=batch)
        tags = [RunTag(f"loraline.param.{key}"[:250], value[:_TAG_LENGTH]) for key, value in long.items()]
        for batch in _batches(tags, _PARAMS_AT_ONCE):
            self._client.log_batch(run_id, tags=batch)

    def _log_datasets(self, run_id: str, datasets: Sequence[Dataset]) -> None:
        """Logs the datasets; MLflow's digest column is too short for a SHA-256, so a tag holds the full digest."""
        from mlflow.entities import Dataset as LoggedDataset
        from mlflow.entities import DatasetInput, InputTag

        inputs = []
        for entry in datasets:
            digest = entry.artifact.sha256
            profile = {"pictures": entry.count, "trained on": entry.train, "held out": entry.heldout}
            profile |= {"with a caption": entry.captioned, "covered by a consent": sum(entry.consents.values())}
            tags = {"mlflow.data.context": "training", "loraline.role": entry.role, "loraline.sha256": digest}
            inputs.append(
                DatasetInput(
                    LoggedDataset(
                        name=entry.role,
                        digest=digest[:_DATASET_DIGEST],
                        source_type="loraline",
                        source=json.dumps({"artifact": digest}),
                        profile=json.dumps(profile),
                    ),
                    [InputTag(key, value) for key, value in tags.items()],
                )
            )
        if inputs:
            self._client.log_inputs(run_id, inputs)

    def _describe(self, version: AdapterVersion, run_id: str, shown: Shown) -> None:
        """Sets the short model card, with links into MLflow, as description of version, run and registered model."""
        from registry.documents.card import render_short

        run = f"#/experiments/{self._client.get_run(run_id).info.experiment_id}/runs/{run_id}"
        pages = {"Model card": "model-card.html", "Provenance": "provenance.json", "Bill of materials": "ml-bom.json"}
        links = {"Curves and figures": f"{run}/model-metrics", "Before and after": f"{run}/artifacts/pictures"}
        links |= {text: f"{run}/artifacts/documents/{file}" for text, file in pages.items()}
        for parent in shown.facts.parents:
            name, ref = split_ref(parent.name)
            if (number := version_number(ref)) is not None:
                links[f"Parent {parent.name}"] = f"#/models/{name}/versions/{number}"
        text = render_short(shown.facts, links)
        self._client.update_model_version(version.name, str(version.version), description=text)
        self._client.set_tag(run_id, "mlflow.note.content", text)
        newest = {"filter_string": f"name = '{version.name}'", "order_by": ["version_number DESC"], "max_results": 1}
        if all(int(entry.version) <= version.version for entry in self._client.search_model_versions(**newest)):
            self._client.update_registered_model(version.name, description=text)

    def _copy_files(
        self, run_id: str, version: AdapterVersion, record: ArtifactRef, documents: Sequence[ArtifactRef]
    ) -> str:
        """Logs the files to MLflow, and returns the URI of the folder that contains only the adapter."""
        with tempfile.TemporaryDirectory(dir=self.home.work, prefix="mirror-") as temporary:
            folder = Path(temporary) / "files"
            self.store.checkout(record, folder)
            for document in documents:
                for file in self.store.files(document):
                    self.store.checkout_file(document, file, folder / "documents" / file)
            adapter = folder / "adapter" / Path(version.adapter_path).name
            self.store.checkout_file(version.artifact, version.adapter_path, adapter)
            self._client.log_artifacts(run_id, str(folder))
        source = f"{self._client.get_run(run_id).info.artifact_uri}/adapter"
        copied = local_path(source)
        if copied is not None and sha256_file(copied / adapter.name) != version.sha256:
            raise OSError(f"the copy in {copied} differs from the adapter file")
        return source

    def _write_tags(self, version: AdapterVersion, run_id: str) -> None:
        """Sets our tags of a model version and of its run, and deletes others of our prefix."""
        name, number = version.name, str(version.version)
        actual, wanted = own_tags(self._client.get_model_version(name, number).tags), with_state(version)
        for key in actual.keys() - wanted.keys():
            self._client.delete_model_version_tag(name, number, key)
        for key in wanted.keys() - {key for key in wanted if actual.get(key) == wanted[key]}:
            self._client.set_model_version_tag(name, number, key, wanted[key])
        actual, wanted = own_tags(self._client.get_run(run_id).data.tags), expected_tags(version)
        for key in actual.keys() - wanted.keys():
            self._client.delete_tag(run_id, key)
        for key in wanted.keys() - {key for key in wanted if actual.get(key) == wanted[key]}:
            self._client.set_tag(run_id, key, wanted[key])

    def _ensure_model(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.get_registered_model(name)
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            self._client.create_registered_model(name, tags={"loraline": "adapter"})

    def _ensure_version(self, version: AdapterVersion, run_id: str, source: str) -> None:
        entry = self._find_version(version)
        if entry is None:
            # MLflow keeps the row of a deleted version, and never assigns its number again.
            reset_version(self.home.mlflow_url, version.name, version.version, run_id, source)
            entry = self._find_version(version) or self._client.create_model_version(
                version.name, source=source, run_id=run_id, tags=with_state(version)
            )
        digest = entry.tags.get("loraline.sha256")
        if int(entry.version) == version.version and entry.run_id == run_id and entry.source == source:
            return
        if int(entry.version) != version.version or digest != version.sha256:
            raise MlflowError(
                f"MLflow has version {entry.version} with digest {digest!r} instead",
                where=version.ref,
                allowed=f"digest {version.sha256}",
                remedy=f"move {name_of(self.home.mlflow_url)} away, which another program changed; it is rebuilt",
            )
        reset_version(self.home.mlflow_url, version.name, version.version, run_id, source)

    def _find_version(self, version: AdapterVersion) -> Any:
        """Returns MLflow's model version of the same number; None if there is none or it is deleted."""
        from mlflow.exceptions import MlflowException

        try:
            return self._client.get_model_version(version.name, str(version.version))
        except MlflowException as error:
            if error.error_code != _MISSING:
                raise
            return None


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


def _param_name(key: str) -> str:
    # A recipe may have layer patterns as keys (`unet.*.to_q`), which MLflow does not accept as names.
    plain = _NOT_IN_NAMES.sub("_", key)
    return key if plain == key else f"{plain[:200]}-{sha256_bytes(key.encode())[:8]}"


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, sort_keys=True, ensure_ascii=False)


def _millis(version: AdapterVersion) -> int:
    # The time of registration, not of the sync: MLflow then recognizes a repeated metric as the same one.
    return int(version.created_at.timestamp() * 1000)


def _batches(values: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    return (values[begin : begin + size] for begin in range(0, len(values), size))
