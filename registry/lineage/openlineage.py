"""Converts a walk to OpenLineage run events (https://openlineage.io/spec/2-0-2), for lineage collectors.

An execution is a run, its step a job, an artifact a dataset without a schema. Reads only lineage and writes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid5

from lora_engine.files import canonical_json
from registry.entities import ArtifactRef, Execution, Run
from registry.identity import program_version
from registry.lineage.record import Lineage
from registry.lineage.walk import Walk

_NAMESPACE = "loraline"
_SPEC = "https://openlineage.io/spec"
_SCHEMA = f"{_SPEC}/2-0-2/OpenLineage.json#/$defs/RunEvent"
_FACETS = {
    "parent": ("1-0-1", "ParentRunFacet"),
    "processing_engine": ("1-1-1", "ProcessingEngineRunFacet"),
    "errorMessage": ("1-0-1", "ErrorMessageRunFacet"),
    "jobType": ("2-0-3", "JobTypeJobFacet"),
    "version": ("1-0-1", "DatasetVersionDatasetFacet"),
    "datasetType": ("1-0-0", "DatasetTypeDatasetFacet"),
    "outputStatistics": ("1-0-2", "OutputStatisticsOutputDatasetFacet"),
}
"""Standard facet -> version and name of its schema; custom facets have names that start with `loraline`."""
_ENDS = {"COMPLETED": "COMPLETE", "CACHED": "COMPLETE", "ADOPTED": "COMPLETE", "FAILED": "FAIL", "INTERRUPTED": "ABORT"}
_IDS = UUID("7c1f6a0e-5d0b-5b7e-9d0e-2f6f6c6f7261")
_MODELS = {"adapter", "merged", "version"}


def to_openlineage(lineage: Lineage, walk: Walk) -> list[dict[str, Any]]:
    """Returns the START and the end event of every execution in a walk, sorted by time.

    Args:
        lineage: Source of the executions.
        walk: Result of `Lineage.walk`.
    """
    executions = lineage.executions(ids=[node.id for node in walk.nodes if node.kind == "execution"])
    runs = {run_id: lineage.run(run_id) for run_id in sorted({execution.run_id for execution in executions})}
    versions = _registered(walk)
    events = [event for execution in executions for event in _events(execution, runs[execution.run_id], versions)]
    return sorted(events, key=lambda event: (event["eventTime"], event["eventType"] != "START"))


def to_lines(events: list[dict[str, Any]]) -> bytes:
    """Returns the events as JSON lines, the format of OpenLineage's file transport."""
    return b"".join(canonical_json(event) + b"\n" for event in events)


def run_uuid(identifier: str) -> str:
    """Returns the public UUID of an execution or a run: its id if that is a UUID, else one derived from it."""
    try:
        return str(UUID(identifier))
    except ValueError:
        return str(uuid5(_IDS, identifier))


def _events(execution: Execution, run: Run, versions: Mapping[str, list[dict[str, Any]]]) -> Iterator[dict[str, Any]]:
    base = {
        "producer": _producer(),
        "schemaURL": _SCHEMA,
        "job": {
            "namespace": _NAMESPACE,
            "name": f"{run.name}.{execution.step}",
            "facets": {
                "jobType": _facet("jobType", processingType="BATCH", integration="LORALINE", jobType=execution.uses)
            },
        },
        "inputs": [_dataset(ref, versions, role) for role, ref in execution.inputs.items()],
    }
    started = {"eventType": "START", "eventTime": _time(execution.started_at), "outputs": []}
    yield base | started | {"run": _run(execution, run, ended=False)}
    outputs = [_output(execution.output, versions)] if execution.output else []
    ended = {"eventType": _ENDS[execution.status], "eventTime": _time(execution.ended_at or execution.started_at)}
    yield base | ended | {"run": _run(execution, run, ended=True), "outputs": outputs}


def _run(execution: Execution, run: Run, *, ended: bool) -> dict[str, Any]:
    parent = {"run": {"runId": run_uuid(run.id)}, "job": {"namespace": _NAMESPACE, "name": run.name}}
    environment = {key: value for key, value in execution.environment.items() if key != "distributions"}
    facets = {
        "parent": _facet("parent", **parent),
        "processing_engine": _facet("processing_engine", name="loraline", version=program_version()),
        "loraline_execution": _facet(
            "loraline_execution",
            execution=execution.id,
            key=execution.key,
            revision=execution.revision,
            seed=execution.seed,
            cached=execution.status in {"CACHED", "ADOPTED"},
            settings=dict(execution.settings),
            environment=environment,
        ),
    }
    if ended and execution.error:
        facets["errorMessage"] = _facet("errorMessage", message=execution.error, programmingLanguage="PYTHON")
    return {"runId": run_uuid(execution.id), "facets": facets}


def _dataset(ref: ArtifactRef, versions: Mapping[str, list[dict[str, Any]]], role: str = "") -> dict[str, Any]:
    facets = {
        "version": _facet("version", datasetVersion=ref.sha256),
        "datasetType": _facet("datasetType", datasetType="MODEL" if ref.kind in _MODELS else "FILE", subType=ref.kind),
    }
    if ref.sha256 in versions:
        facets["loraline_versions"] = _facet("loraline_versions", versions=versions[ref.sha256])
    if role:
        facets["loraline_role"] = _facet("loraline_role", role=role)
    return {"namespace": _NAMESPACE, "name": f"{ref.kind}/{ref.sha256}", "facets": facets}


def _output(ref: ArtifactRef, versions: Mapping[str, list[dict[str, Any]]]) -> dict[str, Any]:
    statistics = {"outputStatistics": _facet("outputStatistics", size=ref.size)}
    return _dataset(ref, versions) | {"outputFacets": statistics}


def _registered(walk: Walk) -> dict[str, list[dict[str, Any]]]:
    """Returns digest of an artifact -> the versions in the walk that it was registered as."""
    details = {node.id: node.detail for node in walk.nodes if node.kind == "version"}
    versions: dict[str, list[dict[str, Any]]] = {}
    for edge in walk.edges:
        if edge.source.kind == "artifact" and edge.target.kind == "version":
            entry = {"ref": edge.target.id, "role": edge.role, "aliases": details[edge.target.id].get("aliases", [])}
            versions.setdefault(edge.source.id, []).append(entry)
    return versions


def _facet(name: str, /, **values: Any) -> dict[str, Any]:
    if name in _FACETS:
        version, definition = _FACETS[name]
        schema = f"{_SPEC}/facets/{version}/{definition}.json"
    else:
        schema, definition = f"urn:loraline:facet:{name}:1", name
    # The specification requires a JSON pointer to the definition within the schema.
    return {"_producer": _producer(), "_schemaURL": f"{schema}#/$defs/{definition}", **values}


def _time(instant: datetime) -> str:
    return instant.astimezone(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


def _producer() -> str:
    return f"urn:loraline:{program_version()}"
