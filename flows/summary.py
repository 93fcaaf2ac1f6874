"""Summarizes a finished run: versions, files and next commands."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flows.registered import RegistrationState
from flows.result import PipelineResult
from flows.spec import PipelineSpec
from lora_engine.data.manifest import Manifest, Quarantined
from registry.home import Home
from registry.store.redaction import redact_url
from tasks.operations.report import export_folder, read_warnings, write_report

_SHOWN = 8


def summarize(spec: PipelineSpec, home: Home, result: PipelineResult) -> Iterator[tuple[str, object]]:
    """Yields label and text of each fact, in display order."""
    cached = sum(outcome.cached for outcome in result.outcomes.values())
    skipped = f", {len(result.skipped)} skipped" if result.skipped else ""
    yield "steps", f"{len(result.outcomes) - cached} ran, {cached} cached{skipped}"
    yield from (("skipped", f"{name}: {reason}") for name, reason in result.skipped.items())
    yield from _describe_datasets(spec, result)
    for name, text in read_warnings(home, {name: outcome.ref for name, outcome in result.outcomes.items()}):
        yield "warning", f"{name}: {text}"
    for registered in result.versions.values():
        yield from _describe_version(home, registered)
    for name, step in spec.steps.items():
        if step.uses == "convert" and name in result.outcomes:
            folder = export_folder(home, spec.name, name, result.outcomes[name].ref)
            yield "exports", f"{folder}{_formats(folder)}"
    yield "registry", f"mlflow ui --backend-store-uri {redact_url(home.mlflow_url)}"
    for registered in result.versions.values():
        ref = registered.version.ref
        yield "next", f"loraline show {ref}"
        if not registered.gone and not registered.refused:
            yield "next", f'loraline promote {ref} --to production --reason "..."'


def _describe_datasets(spec: PipelineSpec, result: PipelineResult) -> Iterator[tuple[str, object]]:
    listed: set[Quarantined] = set()
    for name, step in spec.steps.items():
        if step.uses not in {"ingest", "preprocess", "caption"} or name not in result.outcomes:
            continue
        manifest = Manifest.model_validate_json(result.outcomes[name].summary)
        if step.uses == "caption" and getattr(step, "is_reported", False):
            yield "captions", f"{name}: {manifest.describe()}"
        if step.uses == "ingest":
            yield "dataset", f"{name}: {manifest.describe()}"
        elif step.uses == "preprocess" and (text := manifest.describe_preparation()):
            yield "prepared", f"{name}: {text}"
        # A later step repeats those of its dataset.
        skipped = [item for item in manifest.quarantined if item not in listed]
        listed.update(skipped)
        for item in skipped[:_SHOWN]:
            yield "skipped", f"{item.source}: {item.reason}"
        if len(skipped) > _SHOWN:
            yield "skipped", f"and {len(skipped) - _SHOWN} more; the report lists all"


def _describe_version(home: Home, registered: RegistrationState) -> Iterator[tuple[str, object]]:
    version, alias = registered.version, registered.alias
    yield "version", f"{version.ref}  sha256 {version.sha256[:16]}"
    if registered.gone:
        yield "state", f"{version.state}: it {registered.gone}"
    yield "gates", version.gate_status
    if registered.has_alias:
        yield "alias", f"{alias} -> {version.ref}"
    elif alias is not None:
        holder = (
            "points at no version" if registered.holder is None else f"points at {version.name}@{registered.holder}"
        )
        refused = f"; {version.ref} was refused: {'; '.join(registered.refused)}" if registered.refused else ""
        yield "alias", f"{alias} {holder}{refused}"
    report = write_report(home, version.ref) if version.state != "DELETED" else None
    images = report.with_suffix("") if report else None
    yield "report", report
    yield "images", images
    yield "samples", images / "samples" if images and (images / "samples").is_dir() else None


def _formats(folder: Path) -> str:
    return f"  ({', '.join(sorted(path.name for path in folder.iterdir() if path.is_dir()))})"
