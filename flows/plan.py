"""`plan_pipeline`: what a run would do, step by step, and why; nothing is executed and nothing is written."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from flows.errors import SpecError
from flows.spec import REGISTERED, PipelineSpec
from registry.entities import ArtifactRef, Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.store.artifacts import open_store
from tasks.exclusion import find_excluded, with_excluded
from tasks.execution import find_hit
from tasks.key import cache_key, digest_files
from tasks.spec import StepSpec
from tasks.step import Inputs, Job, Outcome


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to one step.

    Args:
        name: The step.
        uses: Its kind.
        cached: Whether its result is there, verified.
        reason: Why it would run; `cached` otherwise.
        ref: The result, where it is there.
    """

    name: str
    uses: str
    cached: bool
    reason: str
    ref: ArtifactRef | None


def plan_pipeline(spec: PipelineSpec, home: Home, *, force: Collection[str] = ()) -> list[PlannedStep]:
    """The steps in the order in which they would run.

    Raises:
        RegistryError: A registered adapter that the spec names does not exist, or the home cannot be read.
    """
    store, lineage = open_store(home), Lineage(home.lineage_url)
    planned: dict[str, PlannedStep] = {}
    for name, step in spec.steps.items():
        waiting = [target for _, target, _ in step.references() if target in planned and not planned[target].cached]
        inputs: dict[str, tuple[ArtifactRef, ...]] = {}
        for field, target, _ in step.references():
            ref = planned[target].ref if target in planned else registered_adapter(target, home).ref
            inputs[field] = (*inputs.get(field, ()), *([ref] if ref else []))
        job = make_job(spec, name, home, run_id="", force=name in force)
        if job.force:
            planned[name] = PlannedStep(name, step.uses, False, "forced", None)
        elif waiting:
            planned[name] = PlannedStep(name, step.uses, False, f"takes from {_listed(waiting)}, which will run", None)
        else:
            excluded = find_excluded(job.kind, step, spec.folder, lineage)
            files = digest_files(step, spec.folder)
            key = cache_key(job.kind, step, spec.folder, inputs, with_excluded(files, excluded))
            ref, reason = find_hit(job, step, key, store, lineage)
            if ref is None and reason == "no earlier result":
                reason = _what_changed(step, inputs, files, excluded, lineage.last_execution(spec.name, name))
            planned[name] = PlannedStep(name, step.uses, ref is not None, reason, ref)
    return list(planned.values())


def make_job(spec: PipelineSpec, name: str, home: Home, run_id: str, *, force: bool) -> Job:
    """One step of the spec as plain data."""
    step = spec.steps[name]
    return Job(
        name,
        step.uses,
        step.model_dump(mode="json"),
        str(spec.folder),
        str(home.path),
        run_id,
        force,
        concurrency=spec.concurrency,
    )


def registered_adapter(target: str, home: Home) -> Outcome:
    """The adapter that `name@version` or `name@alias` stands for, as if a step had given it."""
    match = REGISTERED.fullmatch(target)
    if match is None:
        raise SpecError(f"{target!r} is neither a step nor name@version")
    from registry.versions import Versions

    versions = Versions(home)
    try:
        # What is merged or evaluated further is verified as what is handed out: bytes, state and signature.
        return Outcome(versions.get(match["name"], match["ref"]).artifact, cached=True)
    finally:
        versions.close()


def _what_changed(
    step: StepSpec, inputs: Inputs, files: Mapping[str, str], excluded: tuple[str, ...], last: Execution | None
) -> str:
    if last is None:
        return "never ran"
    changes = _differences(last.settings.get("settings", {}), step.own_settings())
    for field, written, _ in step.externals():
        if last.settings.get("files", {}).get(field) != files[field]:
            changes.append(f"{field}: the content of {written} changed")
    if tuple(last.settings.get("excluded", ())) != excluded:
        changes.append("other pictures or consents are revoked")
    before = _by_field(last.inputs)
    for field, refs in inputs.items():
        if before.get(field) != [ref.sha256 for ref in refs]:
            changes.append(f"{field}: another input")
    return "; ".join(changes) or "its code or its base changed"


def _by_field(inputs: Mapping[str, ArtifactRef]) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for role, ref in inputs.items():
        grouped.setdefault(role.partition(".")[0], []).append(ref.sha256)
    return grouped


def _differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    return [
        f"{key}: {before.get(key)!r} -> {after.get(key)!r}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]


def _listed(names: Collection[str]) -> str:
    return " and ".join(dict.fromkeys(names))
