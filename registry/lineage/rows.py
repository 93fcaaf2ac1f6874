"""Converts between the entities of lineage and their rows; each function runs within the caller's transaction."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any, cast

from sqlalchemy import select
from sqlalchemy.orm import Session

from lora_engine.files import canonical_json, sha256_bytes
from registry.entities import ArtifactRef, Execution, ExecutionStatus, FileEntry, Run, RunStatus, Subject
from registry.errors import StoreError
from registry.store.damaged import DamagedCell, show_cell
from registry.store.database import batched, insert_missing
from registry.store.tables import ArtifactRow, ContentRow, DistributionsRow, ExecutionRow, InputRow, RunRow, SubjectRow


def record_artifacts(session: Session, refs: Any) -> None:
    """Adds rows for the artifacts, within a transaction."""
    insert_missing(session, ArtifactRow, [ref.to_json() for ref in refs])


def record_contents(
    session: Session, ref: ArtifactRef, contents: Mapping[str, FileEntry], subjects: Iterable[Subject] = ()
) -> None:
    """Adds rows for the files and subjects of an artifact, within a transaction."""
    insert_missing(
        session, ContentRow, [{"artifact": ref.sha256, "path": path, **vars(entry)} for path, entry in contents.items()]
    )
    insert_missing(
        session,
        SubjectRow,
        [
            {"artifact": ref.sha256, "subject": subject.id, "label": subject.label, "kind": subject.kind}
            for subject in subjects
        ],
    )


def artifact_ref(row: ArtifactRow) -> ArtifactRef:
    """Returns the reference of a row; of a damaged row its damaged cell, which raises `DamagedRow` when it is used."""
    for value in (row.kind, row.sha256, row.size):
        if isinstance(value, DamagedCell):
            return cast("ArtifactRef", value)
    if not isinstance(cast("object", row.sha256), str):
        problem = f"{show_cell(row.sha256)} is no text"
        return cast("ArtifactRef", DamagedCell("artifacts", show_cell(row.sha256), "sha256", problem, row.sha256))
    try:
        return ArtifactRef(row.kind, row.sha256, row.size)
    except StoreError as error:
        return cast("ArtifactRef", DamagedCell("artifacts", str(row.sha256), "", error.problem, None))


def artifact_of(artifacts: Mapping[str, ArtifactRef], digest: str, table: str, row: object, column: str) -> ArtifactRef:
    """Returns the artifact that a row refers to; a damaged cell if there is none."""
    if not isinstance(digest, DamagedCell) and digest in artifacts:
        return artifacts[digest]
    problem = f"{show_cell(digest)} is no recorded artifact"
    return cast("ArtifactRef", DamagedCell(table, str(row), column, problem, digest))


def read_artifacts(session: Session, digests: Iterable[str], *, kind: str | None = None) -> dict[str, ArtifactRef]:
    """Returns digest -> reference of the artifacts that are recorded, or of those of one kind."""
    query = select(ArtifactRow) if kind is None else select(ArtifactRow).where(ArtifactRow.kind == kind)
    return {row.sha256: artifact_ref(row) for (row,) in batched(session, query, ArtifactRow.sha256, digests)}


def read_run(row: RunRow) -> Run:
    """Returns the run of a row."""
    return Run(
        row.id,
        row.name,
        row.spec,
        cast("RunStatus", row.status),
        row.pid,
        row.host,
        row.started_at,
        row.ended_at,
        row.mlflow_run_id,
    )


def read_executions(session: Session, rows: Iterable[ExecutionRow]) -> list[Execution]:
    """Returns the executions of rows, sorted by start time; uses a few queries for all rows."""
    ordered = sorted(rows, key=lambda row: (row.started_at, row.id))
    inputs: dict[str, dict[str, ArtifactRef]] = defaultdict(dict)
    query = select(InputRow, ArtifactRow).join(ArtifactRow, ArtifactRow.sha256 == InputRow.artifact)
    by_position = query.order_by(InputRow.execution, InputRow.position)
    for entry, artifact in batched(session, by_position, InputRow.execution, (row.id for row in ordered)):
        inputs[entry.execution][entry.role] = artifact_ref(artifact)
    outputs = read_artifacts(session, {row.output for row in ordered if isinstance(row.output, str)})
    listed = {
        digest
        for row in ordered
        if isinstance(row.environment, dict) and isinstance(digest := row.environment.get("distributions"), str)
    }
    installed = {
        row.sha256: row.listed for (row,) in batched(session, select(DistributionsRow), DistributionsRow.sha256, listed)
    }
    return [
        Execution(
            id=row.id,
            run_id=row.run_id,
            step=row.step,
            uses=row.uses,
            revision=row.revision,
            key=row.key,
            settings=row.settings,
            inputs=inputs[row.id],
            output=artifact_of(outputs, row.output, "executions", row.id, "output") if row.output is not None else None,
            status=cast("ExecutionStatus", row.status),
            environment=_read_environment(row.environment, installed),
            seed=row.seed,
            started_at=row.started_at,
            ended_at=row.ended_at,
            error=row.error,
        )
        for row in ordered
    ]


def store_environment(session: Session, environment: Mapping[str, Any]) -> dict[str, Any]:
    """Stores the list of installed packages once, and returns the environment with its digest instead."""
    listed = environment.get("distributions")
    if not isinstance(listed, list):
        return dict(environment)
    digest = sha256_bytes(canonical_json(listed))
    insert_missing(session, DistributionsRow, [{"sha256": digest, "listed": listed}])
    return {**environment, "distributions": digest}


def _read_environment(environment: Mapping[str, Any], installed: Mapping[str, list[Any]]) -> dict[str, Any]:
    if isinstance(environment, DamagedCell):
        return cast("dict[str, Any]", environment)
    digest = environment.get("distributions")
    if isinstance(digest, str) and digest in installed:
        return {**environment, "distributions": installed[digest]}
    return dict(environment)
