"""Writes files from the store for the user: the HTML report of a version, the folder of an export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import Any

from lora_engine.data.manifest import Manifest
from lora_engine.files import atomic_write
from registry.entities import AdapterVersion, ArtifactRef
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from registry.versions.versions import Versions
from tasks.operations.promote import find_version
from tasks.operations.rights import describe_rights
from tasks.operations.vote_results import describe_results, results_of
from tasks.sweep.spec import SWEEP
from tasks.warnings import warnings_of


def write_report(home: Home, ref: str, output: Path | None = None) -> Path | None:
    """Writes the report of a version as one HTML file; the default file gets a folder of images beside it.

    Args:
        home: The home with all state.
        ref: `name@version` or `name@alias`.
        output: The file; None means `reports/NAME-VERSION.html` in the home.

    Returns:
        The file; None for a version that was never evaluated.
    """
    version = find_version(Versions(home), ref)
    if version.report is None:
        return None
    path = output or home.reports / f"{version.name}-{version.version}.html"
    if output is None and path.is_file():
        return path
    from lora_engine.evaluation.report import render_report

    store = open_store(home)
    lineage = Lineage(home.lineage_url)
    steps = describe_steps(lineage, version)
    with home.temporary_folder() as folder:
        folders = {role: folder / role for role in ("report", "adapter", "dataset")}
        store.checkout(version.report, folders["report"])
        store.checkout(version.artifact, folders["adapter"])
        dataset = _dataset(lineage, version)
        if dataset is not None:
            store.checkout(dataset, folders["dataset"])
        training = folders["adapter"] / "training.json"
        page = render_report(
            version.ref,
            json.loads((folders["report"] / "report.json").read_bytes()),
            folders["report"],
            adapter_folder=folders["adapter"],
            training=(json.loads(training.read_bytes()) if training.is_file() else {}) | _sweep_of(version) or None,
            dataset_folder=folders["dataset"] if dataset is not None else None,
            recipe=dict(version.params),
            lineage=steps,
            version={key: getattr(version, key) for key in ("name", "version", "sha256", "size")},
            rights=_rights(home, version),
            votes=_votes(home, version),
        )
        atomic_write(path, page.encode())
        images = path.with_suffix("")
        if output is None and not images.is_dir():
            shutil.copytree(folders["report"] / "pictures", images)
            if (folders["adapter"] / "samples").is_dir():
                shutil.copytree(folders["adapter"] / "samples", images / "samples")
    return path


def describe_steps(lineage: Lineage, version: AdapterVersion) -> list[dict[str, Any]]:
    """Returns the steps that made a version, each with its inputs and output, in order of their start."""
    walk = lineage.walk(version.ref)
    makers = [lineage.executions(output=node.id) for node in walk.nodes if node.kind == "artifact"]
    # The latest that did the work has the warnings; a later one took its result.
    latest = [
        ([entry for entry in executions if entry.status == "COMPLETED"] or executions)[-1]
        for executions in makers
        if executions
    ]
    return [
        {
            "step": execution.step,
            "uses": execution.uses,
            "inputs": [ref.sha256 for ref in execution.inputs.values()],
            "output": execution.output.sha256 if execution.output else "",
            "warnings": warnings_of(execution.environment),
        }
        for execution in sorted(latest, key=lambda execution: execution.started_at)
    ]


def read_warnings(home: Home, outputs: Mapping[str, ArtifactRef]) -> list[tuple[str, str]]:
    """Returns the warnings of the executions that made artifacts, as (step, text).

    Args:
        home: The home.
        outputs: Step -> its output.
    """
    with closing(Lineage(home.lineage_url)) as lineage:
        entries: list[tuple[str, str]] = []
        for name, ref in outputs.items():
            made = [entry for entry in lineage.executions(output=ref.sha256) if entry.status == "COMPLETED"]
            entries += [(name, text) for text in warnings_of(made[-1].environment)] if made else []
        return entries


def _sweep_of(version: AdapterVersion) -> dict[str, Any]:
    """Returns the choice of a version by a sweep, as an entry beside those of its training; empty without one."""
    sweep = version.card.get("recipe", {}).get("done", {}).get(SWEEP)
    return {SWEEP: sweep} if sweep else {}


def _rights(home: Home, version: AdapterVersion) -> dict[str, Any]:
    """Returns the license and the consent of a version as texts."""
    with closing(Versions(home)) as versions:
        rights = describe_rights(versions, version)
    images = rights["pictures"]
    return {
        "license": version.card.get("license") or "not stated",
        "commercial use": "allowed" if rights["commercial"] else "not allowed",
        "license conflicts": rights["conflicts"],
        "training images": f"{images['count']}, {len(images['missing'])} without consent",
        "consent that no longer holds": images["broken"],
        "revoked": rights["revoked"],
    }


def _votes(home: Home, version: AdapterVersion) -> dict[str, str]:
    with closing(Versions(home)) as versions:
        return describe_results(results_of(versions, version))


def _dataset(lineage: Lineage, version: AdapterVersion) -> ArtifactRef | None:
    for execution in lineage.executions(output=version.artifact.sha256):
        if "dataset" in execution.inputs:
            return execution.inputs["dataset"]
    return None


def read_manifest(home: Home, ref: ArtifactRef) -> Manifest:
    """Reads the manifest of a dataset in the store."""
    return Manifest.model_validate_json(open_store(home).read(ref, "manifest.json"))


def export_folder(home: Home, pipeline: str, step: str, ref: ArtifactRef) -> Path:
    """Writes an export of a run as a folder, verified, unless it exists; returns the folder."""
    folder = home.path / "exports" / pipeline / f"{step}-{ref.sha256[:12]}"
    if not folder.is_dir():
        open_store(home).checkout(ref, folder)
    return folder
