"""Writes registry rows to MLflow. The modules `mlflow_*` and `live_run` import mlflow, only inside functions.

Every call is idempotent: the next call completes an interrupted one. Callers hold the lock.
"""

from __future__ import annotations

import json
import logging
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from lora_engine.files import sha256_file
from registry.documents.storage import Shown
from registry.entities import AdapterVersion, ArtifactRef
from registry.errors import MlflowError
from registry.home import Home
from registry.refs import split_ref, version_number
from registry.store.artifacts import Store
from registry.store.database import name_of, sqlite_file
from registry.versions.mlflow_client import ensure_experiment, find_training_runs, mlflow_errors, open_client
from registry.versions.mlflow_drift import expected_tags, own_tags, with_state
from registry.versions.mlflow_run import log_datasets, log_values, millis
from registry.versions.mlflow_tables import (
    local_path,
    require_reachable,
    reset_version,
    write_alias,
)
from registry.versions.rewrite_uris import rewrite_artifact_uris

_logger = logging.getLogger(__name__)

_MISSING = "RESOURCE_DOES_NOT_EXIST"
_RECORD = "record.json"


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
            log_values(self._client, run_id, version, json.loads(self.store.read(record, _RECORD)))
            log_datasets(self._client, run_id, shown.facts.datasets)
            source = self._copy_files(run_id, version, record, shown.documents)
            self._client.set_terminated(run_id, "FINISHED", end_time=millis(version))
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
            self._client.set_terminated(run_id, "FINISHED", end_time=millis(version))
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
            experiment_id, start_time=millis(version), tags=expected_tags(version), run_name=name
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
