"""Writes a version as a CycloneDX 1.6 bill of materials for machine learning (ECMA-424), in JSON.

The adapter is the subject; base and parents are its ancestors, datasets its components.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any
from uuid import NAMESPACE_URL, uuid5

from registry.documents.facts import Dataset, Facts
from registry.documents.limits import limits
from registry.documents.spdx import is_spdx
from registry.entities import to_json
from registry.policy.alias_policy import numbers
from registry.policy.license_terms import LicenseTerms, forbidden_uses

_SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
MODEL = "machine-learning-model"


def mlbom(facts: Facts) -> dict[str, Any]:
    """Returns the bill of materials of a version, as JSON values. Deterministic, including the serial number."""
    version = facts.version
    ref = f"{version.ref}#{version.sha256}"
    component: dict[str, Any] = {
        "type": MODEL,
        "bom-ref": ref,
        "name": version.name,
        "version": str(version.version),
        "description": f"{facts.title}: {facts.kind or 'adapter'} for {facts.base or 'an unnamed base'}",
        "hashes": [_hash(version.sha256)],
        "modelCard": _model_card(facts),
        "properties": list(_properties(facts)),
    }
    licenses = list(_licenses(facts.terms))
    if licenses:
        component["licenses"] = licenses
    ancestors = list(_ancestors(facts))
    if ancestors:
        component["pedigree"] = {"ancestors": ancestors}
    datasets = [_data_component(dataset) for dataset in facts.datasets]
    return {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid5(NAMESPACE_URL, f'urn:loraline:version:{ref}')}",
        "version": 1,
        "metadata": {
            "timestamp": to_json(version.created_at),
            "lifecycles": [{"phase": "post-build"}],
            "tools": {"components": [{"type": "application", "name": "loraline", "version": facts.builder}]},
            "component": component,
        },
        "components": datasets,
        "dependencies": [{"ref": ref, "dependsOn": [entry["bom-ref"] for entry in datasets]}],
    }


def _model_card(facts: Facts) -> dict[str, Any]:
    card: dict[str, Any] = {
        "modelParameters": {
            "approach": {"type": "self-supervised"},
            "task": "text-to-image",
            "architectureFamily": "latent diffusion model",
            "modelArchitecture": f"{facts.kind or 'adapter'} for {facts.family or facts.base or 'an unnamed base'}",
            "datasets": [{"ref": _ref(dataset)} for dataset in facts.datasets],
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "image"}],
        },
        "properties": [_property(f"loraline:recipe:{name}", value) for name, value in sorted(facts.recipe.items())],
    }
    metrics = [entry for name, metric in facts.version.metrics.items() for entry in _metric(name, metric)]
    if metrics:
        card["quantitativeAnalysis"] = {"performanceMetrics": metrics}
    card["considerations"] = {"technicalLimitations": list(limits(facts))}
    return card


def _metric(name: str, metric: Any) -> Iterator[dict[str, Any]]:
    """Yields the values of a metric: base, adapter, and their difference with its interval."""
    if not isinstance(metric, Mapping):
        yield from ({"type": path, "value": repr(value)} for path, value in numbers({name: metric}))
        return
    for key in ("base", "adapter", "difference"):
        if key not in metric:
            continue
        entry: dict[str, Any] = {"type": name, "slice": key, "value": repr(metric[key])}
        if key == "difference" and metric.get("interval"):
            low, high = metric["interval"]
            entry["confidenceInterval"] = {"lowerBound": repr(low), "upperBound": repr(high)}
        yield entry


def _ancestors(facts: Facts) -> Iterator[dict[str, Any]]:
    if facts.base or facts.base_fingerprint:
        hashes = {"hashes": [_hash(facts.base_fingerprint)]} if facts.base_fingerprint else {}
        yield {"type": MODEL, "name": facts.base or "base", "description": "the base model"} | hashes
    for parent in facts.parents:
        name, _, number = parent.name.partition("@")
        entry: dict[str, Any] = {"type": MODEL, "name": name, "description": "an adapter that went into this one"}
        entry |= {"version": number} if number else {}
        yield entry | ({"hashes": [_hash(parent.sha256)]} if parent.sha256 else {})


def _data_component(dataset: Dataset) -> dict[str, Any]:
    covered = sum(dataset.consents.values())
    counts = {
        "pictures": dataset.count,
        "trained on": dataset.train,
        "held out": dataset.heldout,
        "with a caption": dataset.captioned,
        "left out": dataset.quarantined,
        "covered by a consent": covered,
    }
    return {
        "type": "data",
        "bom-ref": _ref(dataset),
        "name": dataset.role,
        "hashes": [_hash(dataset.artifact.sha256)],
        "data": [
            {
                "type": "dataset",
                "name": f"{dataset.role} of {dataset.count} pictures",
                "contents": {"properties": [_property(f"loraline:{name}", value) for name, value in counts.items()]},
            }
        ],
    }


def _properties(facts: Facts) -> Iterator[dict[str, str]]:
    version = facts.version
    yield _property("loraline:artifact", version.artifact.sha256)
    yield _property("loraline:size", version.size)
    if version.report:
        yield _property("loraline:report", version.report.sha256)
    if version.run_id:
        yield _property("loraline:run", version.run_id)
    yield _property("loraline:gates", {True: "passed", False: "failed", None: "not run"}[version.passed])
    for gate in version.gates:
        yield _property(f"loraline:gate:{gate.get('metric', '?')}", dict(gate))
    for word in facts.triggers:
        yield _property("loraline:trigger", word)
    for use in forbidden_uses(facts.terms):
        yield _property("loraline:license:not-allowed", use)
    for obligation in sorted(facts.terms.obligations):
        yield _property("loraline:license:required", obligation)


def _licenses(terms: LicenseTerms) -> Iterator[dict[str, Any]]:
    for name in sorted(terms.licenses):
        yield {"license": {"id": name} if is_spdx(name) else {"name": name}}
    for source in sorted(terms.unknown):
        yield {"license": {"name": f"unknown: {source}"}}


def _ref(dataset: Dataset) -> str:
    return f"{dataset.role}#{dataset.artifact.sha256}"


def _hash(digest: str | None) -> dict[str, str]:
    return {"alg": "SHA-256", "content": digest or ""}


def _property(name: str, value: Any) -> dict[str, str]:
    return {"name": name, "value": value if isinstance(value, str) else json.dumps(value, sort_keys=True)}
