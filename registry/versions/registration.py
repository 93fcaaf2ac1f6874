"""Writes a registration: the row of a version with its artifacts, its first alias and what MLflow shows of it."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from lora_engine.files import canonical_json
from registry import changes, event_log, queries
from registry.context import RegistryContext
from registry.entities import AdapterVersion, ArtifactRef, FileEntry
from registry.errors import DamagedBlob, VersionError
from registry.identity import Actor
from registry.lineage.rows import record_artifacts, record_contents
from registry.policy.alias_policy import numbers
from registry.policy.evaluate import evaluate_policy
from registry.policy.policy_file import read_policies
from registry.store.artifacts import Content
from registry.store.trees import check_relative
from registry.versions.guard import log_refusal
from registry.versions.late_revocations import follow_revocations

_logger = logging.getLogger(__name__)

Curves = Mapping[str, Sequence[tuple[int, float]]]


def require_finite(values: Mapping[str, Any], where: str) -> None:
    """Raises a `VersionError` that names the numbers that are not finite."""
    broken = {path: value for path, value in numbers(values) if not math.isfinite(value)}
    if broken:
        first = ", ".join(f"{path} = {value!r}" for path, value in list(broken.items())[:4])
        raise VersionError(f"{len(broken)} numbers are not finite: {first}", where=where, allowed="finite numbers")


def require_file(files: Mapping[str, FileEntry], name: str, artifact: ArtifactRef) -> None:
    """Raises VersionError if an artifact has no file of this name."""
    if name not in files:
        where = f"artifact {artifact.sha256[:12]}"
        raise VersionError(f"no file {name!r}", where=where, allowed=repr([*files]))


def verified_files(context: RegistryContext, refs: Sequence[ArtifactRef]) -> dict[ArtifactRef, dict[str, FileEntry]]:
    """Returns the files of artifacts whose bytes were verified now, and keeps them from being collected as garbage.

    Raises:
        DamagedBlob: Bytes are missing or damaged.
    """
    for ref in refs:
        # Restart the GC grace period before verifying.
        context.store.touch(ref)
        for problem in context.store.verify(ref):
            raise DamagedBlob(problem.what, where=problem.where, remedy=problem.remedy)
    return {ref: context.store.files(ref) for ref in refs}


def put_metadata(
    context: RegistryContext,
    params: Mapping[str, Any],
    curves: Curves,
    images: Mapping[str, Content],
    documents: Mapping[str, Content],
) -> ArtifactRef:
    """Stores what MLflow shows of a version: parameters, curves, images and documents."""
    points = {metric: [[step, value] for step, value in curve] for metric, curve in curves.items()}
    files: dict[str, Content] = {"record.json": canonical_json({"params": dict(params), "curves": points})}
    for folder, entries in (("pictures", images), ("documents", documents)):
        files |= {f"{folder}/{check_relative(relative)}": content for relative, content in entries.items()}
    return context.store.put_files("record", files)


def insert_registered(
    context: RegistryContext,
    name: str,
    artifact: ArtifactRef,
    report: ArtifactRef | None,
    parents: Sequence[str],
    values: Mapping[str, Any],
    files: Mapping[ArtifactRef, Mapping[str, FileEntry]],
    alias_request: str | None,
    actor: Actor,
) -> int:
    """Inserts a version unless the same is registered, and gives it its alias, in one transaction.

    Returns:
        The number of the version.
    """
    with context.lineage.database.write() as session:
        row = queries.find_identical(session, name, artifact, report)
        if row is None:
            record_artifacts(session, files)
            for ref, contents in files.items():
                record_contents(session, ref, contents)
            row = changes.insert_version(session, name, parents, values)
            if read_policies(context.home.path).logs_registrations:
                version = queries.entities(session, [row])[0]
                event_log.log_event(session, "register", actor=actor, reason="registered", version=version)
            follow_revocations(session, queries.entities(session, [row])[0], actor)
        elif row.state == "DELETED":
            # Building it again, for example on a schedule, must not restore a deleted version.
            changes.require_active(session, name, row.version)
        if alias_request is not None:
            _stage(context, session, queries.entities(session, [row])[0], alias_request, actor)
        return row.version


def _stage(context: RegistryContext, session: Session, version: AdapterVersion, alias: str, actor: Actor) -> None:
    """Gives a version its alias once: a repeated registration does not take the alias from a later version."""
    if event_log.read_events(session, version.name, alias, after=version.version):
        return
    current = queries.alias_target(session, version.name, alias)
    decision = evaluate_policy(context, version, alias, actor=actor, session=session)
    if decision.allowed:
        changes.move_alias(session, version, alias, expected=current, action="stage", actor=actor, reason="registered")
        return
    reasons = "; ".join(decision.reasons)
    _logger.warning("%s does not become %r: %s", version.ref, alias, reasons)
    log_refusal(session, "stage", actor, reasons, version=version, alias=alias)
