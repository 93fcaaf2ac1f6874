"""Adopts results with another cache key that a step of the same revision made from the same inputs.

An earlier release may compose cache keys in another way, for example without an option that was added later.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from registry.entities import ArtifactRef, Execution, now
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import Store
from tasks.entries import changed_revisions, to_record, undeclared_plugins
from tasks.execution import describe_execution, verify_result
from tasks.job import Job, Outcome
from tasks.operations.changes import show_value
from tasks.step import Inputs


@dataclass(frozen=True)
class Adoption:
    """A verified result that can be adopted.

    Attributes:
        outcome: The result.
        source: The execution that made it.
        reason: Why its key differs.
    """

    outcome: Outcome
    source: Execution
    reason: str


def find_adoption(
    job: Job, inputs: Inputs, home: Home, store: Store, lineage: Lineage, verified: set[str] | None = None
) -> Adoption | None:
    """Returns the latest result with another key that a step would make again; None if there is none.

    Revision, settings, files, base, revocations and inputs are the same; options that the record lacks have their
    defaults. The result is verified as `tasks.execution.find_hit` does.
    """
    digests = {ref.sha256 for refs in inputs.values() for ref in refs}
    for source in lineage.completed_executions(job.kind.name, str(job.revision), digests):
        if source.output is not None and next(find_changes(job, inputs, source), None) is None:
            outcome, _ = verify_result(job, source.output, home, store, verified)
            if outcome is not None:
                return Adoption(outcome, source, _describe(job, source))
    return None


def record_adoption(job: Job, inputs: Inputs, adoption: Adoption, lineage: Lineage, run_id: str) -> None:
    """Records in a run that a step's result was adopted, and from which execution."""
    source, execution = adoption.source, describe_execution(job, inputs, run_id)
    origin = {"execution": source.id, "run": source.run_id, "key": source.key, "reason": adoption.reason}
    settings = {**execution.settings, "adopted": origin}
    lineage.log_execution(
        replace(execution, status="ADOPTED", output=adoption.outcome.ref, settings=settings, ended_at=now())
    )


def find_changes(job: Job, inputs: Inputs, source: Execution) -> Iterator[str]:
    """Yields what changed from an execution to a job, in words; nothing if the job would give the same result."""
    recorded = source.settings
    if source.revision != str(job.revision):
        yield f"revision of {job.kind.name} changed {source.revision} -> {job.revision}"
    yield from changed_revisions(job.entries, recorded)
    yield from _find_settings_changes(job, recorded.get("settings", {}))
    paths = {role: written for role, written, _ in job.spec.externals()}
    for role in sorted({*recorded.get("files", {}), *paths}):
        if recorded.get("files", {}).get(role) != job.file_digests.get(role):
            yield f"{role}: the content of {paths[role]} changed" if role in paths else f"{role}: not set any more"
    yield from _find_base_changes(job, recorded.get("base") or {})
    models = recorded.get("models") or {}
    for role in sorted({*models, *job.models}):
        if models.get(role, {}).get("fingerprint") != job.models.get(role, {}).get("fingerprint"):
            yield f"{role}: another model"
    if tuple(recorded.get("excluded", ())) != job.excluded:
        yield "revocations changed"
    yield from _find_plugin_changes(job, recorded)
    before = _by_field(source.inputs, job.spec.kept_files())
    for role in sorted({*before, *(role for role, refs in inputs.items() if refs)}):
        if before.get(role, []) != [ref.sha256 for ref in inputs.get(role, ())]:
            yield f"{role}: input changed"


def _find_settings_changes(job: Job, recorded: Mapping[str, Any]) -> Iterator[str]:
    # Options of nested settings that were added since get their defaults; options that are gone are kept.
    known = {name: value for name, value in recorded.items() if name in type(job.spec).model_fields}
    completed = job.spec.with_settings(known)
    before = dict(recorded) if completed is None else {**recorded, **completed.own_settings()}
    # The fingerprint decides about the base, not its name.
    ignored = dict.fromkeys(("base", *job.spec.without_effect()))
    yield from _differences(before | ignored, job.spec.own_settings() | ignored)


def find_unmet(job: Job, source: Execution) -> list[str]:
    """Returns what the settings ask for and an earlier result lacks, such as saved adapters, in words."""
    recorded = source.settings.get("settings", {})
    current = job.spec.own_settings()
    wanted = {name: current[name] for name in job.spec.without_effect(visible=True) if current[name]}
    return _differences({name: recorded.get(name) for name in wanted}, wanted)


def _find_base_changes(job: Job, recorded: Mapping[str, Any]) -> Iterator[str]:
    before, after = recorded.get("fingerprint"), (job.base or {}).get("fingerprint")
    if before != after:
        labels = f"{recorded.get('label', 'none')} ({str(before)[:12]}) -> {(job.base or {}).get('label', 'none')}"
        yield f"base: {labels} ({str(after)[:12]})"


def _find_plugin_changes(job: Job, recorded: Mapping[str, Any]) -> Iterator[str]:
    before, after = recorded.get("plugins", {}), to_record(job.entries).get("plugins", {})
    if "entries" in recorded:
        # The revisions of the other plug-ins are compared by themselves.
        undeclared = undeclared_plugins(job.entries)
        before = {name: version for name, version in before.items() if name in undeclared or name not in after}
        after = undeclared
    yield from _differences(before, after)


def _by_field(inputs: Mapping[str, ArtifactRef], kept: Collection[str]) -> dict[str, list[str]]:
    """Returns the digests of the recorded inputs by field, without the stored copies of the user's files."""
    grouped: dict[str, list[str]] = defaultdict(list)
    for role, ref in inputs.items():
        field = role.partition(".")[0]
        if field not in kept:
            grouped[field].append(ref.sha256)
    return dict(grouped)


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {show_value(before.get(key))} -> {show_value(after.get(key))}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def _describe(job: Job, source: Execution) -> str:
    added = ", ".join(sorted(_missing(job.spec.own_settings(), source.settings.get("settings", {}))))
    why = f"options that were added since have their defaults: {added}" if added else "another form of cache key"
    return f"run {source.run_id[:8]} of {source.started_at:%Y-%m-%d} made it at the same revision; {why}"


def _missing(settings: Mapping[str, Any], recorded: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Yields the dotted names of settings that a record lacks."""
    for name, value in settings.items():
        if name not in recorded:
            yield f"{prefix}{name}"
        elif isinstance(value, Mapping) and isinstance(recorded[name], Mapping):
            yield from _missing(value, recorded[name], f"{prefix}{name}.")
