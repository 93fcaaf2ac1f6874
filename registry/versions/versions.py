"""Registers adapters under names, and reads them with their bytes verified.

A registration commits to the registry's database first, in one transaction; `sync` then writes MLflow. If it is
interrupted, the next command syncs. Reads use the registry's database only.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from filelock import Timeout

from lora_engine.files import FilePath
from registry import changes, event_log, queries
from registry.context import RegistryContext
from registry.documents.signing import require_valid_signature
from registry.documents.storage import write_missing
from registry.entities import AdapterVersion, ArtifactRef, Event
from registry.errors import HomeError, MlflowError, VersionError
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.actors import establish_actor
from registry.policy.conditions import require_policy
from registry.refs import can_exist, check_alias, check_name
from registry.store.artifacts import Content, Store
from registry.store.blobs import damaged
from registry.store.database import require_json
from registry.store.redaction import redact_values
from registry.versions.guard import guarded
from registry.versions.mlflow_drift import RESTORE, find_drift
from registry.versions.mlflow_sync import is_synced, sync_mlflow
from registry.versions.registration import (
    Curves,
    insert_registered,
    put_metadata,
    require_file,
    require_finite,
    verified_files,
)

_logger = logging.getLogger(__name__)


class Versions(RegistryContext):
    """The named, numbered adapters of a home.

    Opening it syncs MLflow if an earlier process was killed before its sync; costs one query if MLflow is in sync. A
    home that cannot be written is only read.

    Args:
        home: The home.
        store: Its store, if one is open already.
        lineage: Its lineage, if it is open already.

    Raises:
        HomeError: The database cannot be used, or a newer release wrote it.
    """

    def __init__(self, home: Home, *, store: Store | None = None, lineage: Lineage | None = None) -> None:
        super().__init__(home, store=store, lineage=lineage)
        self._compared: set[str | None] = set()
        if not self.is_synced():
            self.try_sync()

    def try_sync(self) -> None:
        """Syncs MLflow unless another process does or the home cannot be written; logs MLflow's errors."""
        if self.home.read_only or self.home.is_full:
            return
        try:
            self.sync(timeout=0)
        except Timeout:
            _logger.debug("another process syncs MLflow")
        except (MlflowError, HomeError) as error:
            _logger.warning("%s", error)

    @guarded("register")
    def register(
        self,
        name: str,
        artifact: ArtifactRef,
        adapter_file: str = "adapter.safetensors",
        *,
        report: ArtifactRef | None = None,
        run_id: str | None = None,
        card: Mapping[str, Any] | None = None,
        metrics: Mapping[str, Any] | None = None,
        gates: Sequence[Mapping[str, Any]] = (),
        passed: bool | None = None,
        parents: Sequence[str] = (),
        declared: str | None = None,
        alias_request: str | None = None,
        curves: Curves | None = None,
        params: Mapping[str, Any] | None = None,
        pictures: Mapping[str, Content] | None = None,
        documents: Mapping[str, Content] | None = None,
        actor: str | None = None,
    ) -> AdapterVersion:
        """Registers an adapter under the next number of its name; the same adapter and report keep their number.

        Args:
            name: The adapter's name.
            artifact: The tree that holds the adapter file; must be in the store.
            adapter_file: Path of the file in the tree.
            report: The evaluation report, which must be in the store; None if it was not evaluated.
            run_id: The run that made it; None if no run did.
            card: Its metadata (JSON).
            metrics: Measured values (JSON, may be nested); every number finite.
            gates: One object per gate: metric, of, min, max, value, passed.
            passed: True if all gates passed; None if it was not evaluated.
            parents: `name@version` of adapters it was merged from, and other origins as free text.
            declared: Its declared license (SPDX, or Hugging Face's identifier), which overrides the card's; the terms
                inherited from base and data still apply.
            alias_request: An alias to give it if the alias's policy allows; a refusal is logged, not raised.
            curves: Metric -> (step, value), shown by MLflow.
            params: The recipe, shown by MLflow.
            pictures: Relative name -> file or bytes of an image, shown by MLflow.
            documents: Relative name -> file or bytes, shown by MLflow.
            actor: The user who requests the alias; None means this process's user.

        Raises:
            VersionError: An invalid name, a number that is not finite, a value that JSON cannot hold, or no such file
                in the artifact.
            GoneVersion: The same adapter and report were registered before, and deleted.
            Refused: The user has no role that may register under this name; logged.
            StoreError: The bytes are missing from the store, or damaged.
            MlflowError: Registered, but MLflow is not in sync; the next command syncs it.
        """
        check_name(name)
        card, params = redact_values(card or {}), redact_values(params or {})
        if alias_request is not None:
            check_alias(alias_request)
        if declared is not None:
            card = {**card, "license": declared}
        require_finite(metrics or {}, "metrics")
        require_finite(curves or {}, "curves")
        require_json(VersionError, {"card": card, "metrics": metrics, "gates": list(gates), "params": params}, name)
        files = verified_files(self, [artifact, *([report] if report else [])])
        require_file(files[artifact], adapter_file, artifact)
        metadata = put_metadata(self, params, curves or {}, pictures or {}, documents or {})
        values = {
            "identity": queries.identity_of(artifact, report),
            **vars(files[artifact][adapter_file]),
            "artifact": artifact.sha256,
            "adapter_path": adapter_file,
            "report": report.sha256 if report else None,
            "metadata_artifact": metadata.sha256,
            "run_id": run_id,
            "card": card,
            "metrics": dict(metrics or {}),
            "gates": [dict(gate) for gate in gates],
            "passed": passed,
            "params": params,
        }
        files[metadata] = self.store.files(metadata)
        user = establish_actor(self, actor)
        number = insert_registered(self, name, artifact, report, parents, values, files, alias_request, user)
        # If the process is killed before this line, the next sync writes the documents.
        write_missing(self, self.show(name, number))
        self.sync()
        return self.show(name, number)

    def list(self, name: str | None = None, *, deleted: bool = False) -> tuple[AdapterVersion, ...]:
        """Returns the versions by name and number, deleted ones only with `deleted`; does not read their bytes."""
        self.report_drift(name)
        with self.lineage.database.read() as session:
            versions = queries.read_versions(session, name)
        return tuple(version for version in versions if deleted or version.state != "DELETED")

    def show(self, name: str, ref: str | int = "latest") -> AdapterVersion:
        """Returns the metadata of a version; does not read its bytes.

        Raises:
            UnknownName: No such adapter.
            UnknownVersion: No such number or alias.
        """
        self.report_drift(name)
        with self.lineage.database.read() as session:
            return queries.read_version(session, name, ref)

    def get(self, name: str, ref: str | int = "latest") -> AdapterVersion:
        """Returns a version after verifying every byte of its adapter file against the registered digest.

        Args:
            name: The adapter.
            ref: A number, an alias, or `latest`.

        Raises:
            DamagedBlob: The bytes differ; the message names both digests.
            MissingBlob: The bytes are gone.
            SignatureError: It is signed, and the signature is not valid.
            GoneVersion: It was withdrawn or deleted.
            Refused: It does not meet the policy of the alias.
            UnknownName: No such adapter.
            UnknownVersion: No such number or alias.
        """
        version = self.use(name, ref)
        self.read_adapter(version)
        return version

    def use(self, name: str, ref: str | int = "latest") -> AdapterVersion:
        """Returns the metadata of a version that is to be used; an alias names it only while its policy is met.

        Raises:
            Refused: The version of the alias does not meet the alias's policy now; has all reasons.
            UnknownName: No such adapter.
            UnknownVersion: No such number or alias.
        """
        version = self.show(name, ref)
        if ref in version.aliases:
            require_policy(self, version, str(ref))
        return version

    def require_active(self, version: AdapterVersion) -> AdapterVersion:
        """Returns the version unchanged if it is active now; reads its state from the database.

        Raises:
            GoneVersion: It was withdrawn or deleted; the message names actor, date and reason.
        """
        with self.lineage.database.read() as session:
            changes.require_active(session, version.name, version.version)
        return version

    def read_adapter(self, version: AdapterVersion) -> bytes:
        """Returns the verified bytes of the adapter file; raises as `get` does."""
        self._check_adapter(version)
        return self.store.read(version.artifact, version.adapter_path)

    def checkout_adapter(self, version: AdapterVersion, path: FilePath) -> None:
        """Copies the adapter file to a path, verified and atomic; raises as `get` does."""
        self._check_adapter(version)
        self.store.checkout_file(version.artifact, version.adapter_path, path)

    def log_export(self, version: AdapterVersion, details: Mapping[str, Any], *, actor: str | None = None) -> Event:
        """Logs that a version was exported; a later revocation reports the exported files.

        Args:
            version: The version.
            details: The `format`, and the `files` with their digests.
            actor: The user; None means this process's user.
        """
        reason = f"exported as {details.get('format', 'a file')}"
        user = establish_actor(self, actor)
        with self.lineage.database.write() as session:
            return event_log.log_event(session, "export", actor=user, reason=reason, version=version, details=details)

    def log_recall(
        self, version: AdapterVersion, reason: str, details: Mapping[str, Any], *, actor: str | None = None
    ) -> Event:
        """Logs that the files of a version were removed from a delivery target.

        Args:
            version: The version.
            reason: Why.
            details: The `delivery`: target, location and event.
            actor: The user; None means this process's user.
        """
        user = establish_actor(self, actor)
        with self.lineage.database.write() as session:
            return event_log.log_event(session, "recall", actor=user, reason=reason, version=version, details=details)

    def is_synced(self) -> bool:
        """Returns True if MLflow has every row, by the registry's database alone."""
        return is_synced(self.home, self.lineage.database)

    def sync(self, timeout: float = -1, *, full: bool = False) -> None:
        """Syncs MLflow with the registry's database, and restores what others changed; does nothing if it is in sync.

        Args:
            timeout: Seconds to wait while another process syncs; -1 waits forever.
            full: True writes all rows again, which repairs what was changed or lost in MLflow.

        Raises:
            MlflowError: MLflow failed; nothing is lost, and the next call continues.
            filelock.Timeout: Another process is syncing.
        """
        sync_mlflow(self, timeout, full=full)

    def report_drift(self, name: str | None = None) -> None:
        """Logs, once per adapter, how others changed it in MLflow; writes nothing.

        Args:
            name: The adapter; None compares all.
        """
        if self._compared & {name, None} or (name is not None and not can_exist(name)):
            return
        self._compared.add(name)
        try:
            differences = find_drift(self.home, self.lineage.database, name)
        except MlflowError as error:
            self._compared.add(None)  # an unreachable server is asked once
            _logger.warning("%s", error)
            return
        for difference in differences:
            _logger.warning("%s: %s; %s", difference.problem.where, difference.what, RESTORE)

    def _check_adapter(self, version: AdapterVersion) -> None:
        self.require_active(version)
        stored = self.store.files(version.artifact)[version.adapter_path].sha256
        if stored != version.sha256:
            raise damaged(version.sha256, stored, f"adapter file of {version.ref}")
        require_valid_signature(self, version)
