"""What a person is told at the end of a run: what there is now, where it is, and what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flows.pipeline import PipelineResult
from flows.reports import export_folder, read_manifest, write_report
from flows.spec import PipelineSpec
from registry.home import Home


def summarise(spec: PipelineSpec, home: Home, result: PipelineResult) -> Iterator[tuple[str, object]]:
    """Label and text of each fact, in the order in which they are read."""
    cached = sum(outcome.cached for outcome in result.outcomes.values())
    yield "steps", f"{len(result.outcomes) - cached} ran, {cached} were there already"
    for name, step in spec.steps.items():
        if step.uses == "ingest":
            manifest = read_manifest(home, result.outcomes[name].ref)
            for item in manifest.quarantined[:8]:
                yield "left out", f"{item.source}: {item.reason}"
            if len(manifest.quarantined) > 8:
                yield "left out", f"and {len(manifest.quarantined) - 8} more; the report lists all"
    for version in result.versions.values():
        ref = f"{version['name']}@{version['version']}"
        yield "version", f"{ref}  sha256 {version['sha256'][:16]}"
        if version["refused"]:
            yield "gates", "FAILED: " + "; ".join(version["refused"])
        elif version["alias"]:
            yield "alias", f"{version['alias']} -> {ref} (gates passed)"
        report = write_report(home, ref)
        yield "report", report
        yield "pictures", report.with_suffix("") if report else None
    for name, step in spec.steps.items():
        if step.uses == "convert":
            folder = export_folder(home, spec.name, name, result.outcomes[name].ref)
            yield "exports", f"{folder}{_formats(folder)}"
    yield "registry", f"mlflow ui --backend-store-uri {home.mlflow_url}"
    for version in result.versions.values():
        ref = f"{version['name']}@{version['version']}"
        yield "next", f"loraline show {ref}"
        if not version["refused"]:
            yield "next", f'loraline promote {ref} --to production --reason "..."'


def _formats(folder: Path) -> str:
    return f"  ({', '.join(sorted(path.name for path in folder.iterdir() if path.is_dir()))})"
