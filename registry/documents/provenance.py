"""Writes a version's lineage as SLSA provenance: an in-toto Statement v1 (https://slsa.dev/spec/v1.0/provenance).

The subject is the adapter file. External parameters come from the user's spec, internal ones from lineage.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import quote

from registry.documents.facts import Facts, packages_digest, without_paths
from registry.entities import Execution, to_json

STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"
PIPELINE = "urn:loraline:pipeline:1"
"""Build type of a pipeline's output; its external parameters are the pipeline file."""
IMPORT = "urn:loraline:import:1"
"""Build type of a version that was registered without a recorded run."""
BUILDER = "urn:loraline:builder"


def provenance(facts: Facts) -> dict[str, Any]:
    """Returns the statement about the adapter file of a version, as JSON values."""
    version, maker, run = facts.version, facts.maker, facts.run
    predicate = {
        "buildDefinition": {
            "buildType": PIPELINE if run else IMPORT,
            "externalParameters": {"spec": without_paths(dict(run.spec))} if run else {"recipe": facts.recipe},
            "internalParameters": {
                "version": version.ref,
                "step": maker.step if maker else None,
                "packages": maker.environment.get("distributions") if maker else None,
                "seed": maker.seed if maker else version.card.get("seed"),
                "steps": [_step(step) for step in facts.steps],
            },
            "resolvedDependencies": list(_dependencies(facts)),
        },
        "runDetails": {
            "builder": {"id": BUILDER, "version": {"loraline": facts.builder}},
            "metadata": to_json(
                {
                    "invocationId": run.id if run else version.ref,
                    "startedOn": run.started_at if run else version.created_at,
                    "finishedOn": (maker.ended_at if maker else None) or version.created_at,
                }
            ),
            "byproducts": [_report(facts)] if version.report else [],
        },
    }
    name = PurePosixPath(version.adapter_path).name
    subject = {"name": name, "digest": {"sha256": version.sha256}}
    return {"_type": STATEMENT, "subject": [subject], "predicateType": _PREDICATE, "predicate": predicate}


def _step(step: Execution) -> dict[str, Any]:
    settings = without_paths(dict(step.settings.get("settings") or step.settings))
    entry: dict[str, Any] = {
        "name": step.step,
        "uses": step.uses,
        "revision": step.revision,
        "run": step.run_id,
        "settings": settings,
        "files": step.settings.get("files") or {},
        "inputs": {role: ref.sha256 for role, ref in step.inputs.items()},
        "output": step.output.sha256 if step.output else None,
        "seed": step.seed,
        "environment": {**step.environment, "distributions": packages_digest(step)},
        "startedOn": step.started_at,
        "finishedOn": step.ended_at,
    }
    return dict(to_json(entry))


def _dependencies(facts: Facts) -> Iterator[dict[str, Any]]:
    """Yields base, datasets, parents and packages; digests are of canonical file lists, except those of files."""
    if facts.base_fingerprint:
        yield _resource("base", facts.base_fingerprint, {"name": facts.base, "of": "weights and configuration"})
    for dataset in facts.datasets:
        counts = {"pictures": dataset.count, "train": dataset.train, "of": "list of files"}
        yield _resource(dataset.role, dataset.artifact.sha256, counts)
    for parent in facts.parents:
        resource = {"name": "parent", "uri": f"urn:loraline:version:{quote(parent.name, safe='@:')}"}
        yield resource | ({"digest": {"sha256": parent.sha256}} if parent.sha256 else {})
    digest = packages_digest(facts.maker) if facts.maker else None
    if digest:
        yield _resource("packages", digest, {"of": "installed packages and their versions"})
    code = (facts.maker.environment.get("code") if facts.maker else None) or {}
    if isinstance(code, Mapping) and code.get("sha256"):
        commit = {"gitCommit": str(code["commit"])} if code.get("commit") else {}
        annotations = {"of": "source of the program", "changed": bool(code.get("changed"))}
        yield {"name": "code", "digest": {"sha256": str(code["sha256"]), **commit}, "annotations": annotations}


def _resource(name: str, digest: str, annotations: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "digest": {"sha256": digest}, "annotations": annotations}


def _report(facts: Facts) -> dict[str, Any]:
    report = facts.version.report
    return _resource("report", report.sha256 if report else "", {"passed": facts.version.passed})
