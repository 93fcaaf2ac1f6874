"""Plans a pipeline: which steps would run and why; executes nothing.

A run follows its plan: it reuses the verified results and runs the remaining steps.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from flows.spec import PipelineSpec
from registry.entities import ArtifactRef, Execution
from registry.home import Home
from registry.lineage.record import Lineage
from registry.policy.revocations import read_revoked
from registry.store.artifacts import Store, open_store
from tasks.errors import SpecError
from tasks.execution import NO_RESULT, find_hit
from tasks.job import Job, Outcome, prepare_job
from tasks.spec import REGISTERED
from tasks.step import Inputs

Sources = Mapping[str, tuple[ArtifactRef | str, ...]]
"""Reference field -> input artifacts; an input that does not exist yet is the name of the step that makes it."""


@dataclass(frozen=True)
class PlannedStep:
    """One step of a plan.

    Attributes:
        job: The step, with digests of the user's files.
        sources: Its inputs.
        reason: Why it would run; `cached` if it would not.
        outcome: The verified earlier result; None if the step would run.
        force: True if it runs even if it is cached.
    """

    job: Job
    sources: Sources
    reason: str
    outcome: Outcome | None = None
    force: bool = False

    @property
    def name(self) -> str:
        """Returns the step's name in the pipeline."""
        return self.job.name

    @property
    def cached(self) -> bool:
        """Returns True if the step would not run."""
        return self.outcome is not None

    @property
    def inputs(self) -> Inputs:
        """Returns the input artifacts that exist already."""
        return {
            role: tuple(source for source in sources if isinstance(source, ArtifactRef))
            for role, sources in self.sources.items()
        }


@dataclass(frozen=True)
class Plan:
    """The steps of a run.

    Attributes:
        name: The pipeline's name.
        source: Data of the pipeline file, with overrides applied.
        steps: The steps, each after its upstream steps.
    """

    name: str
    source: Mapping[str, Any]
    steps: Sequence[PlannedStep]

    @property
    def hits(self) -> dict[str, Outcome]:
        """Returns the verified cached results by step."""
        return {step.name: step.outcome for step in self.steps if step.outcome is not None}


def plan_pipeline(spec: PipelineSpec, home: Home, *, force: Collection[str] = ()) -> Plan:
    """Plans a run; reads the user's files and every cached artifact once.

    Raises:
        RegistryError: A registered adapter in the spec does not exist, or the home cannot be read.
    """
    lineage = Lineage(home.lineage_url)
    try:
        revoked = read_revoked(lineage)
        planner = _Planner(spec.name, home, open_store(home), lineage)
        planned: dict[str, PlannedStep] = {}
        for name, step in spec.steps.items():
            sources: dict[str, tuple[ArtifactRef | str, ...]] = {}
            for field, target, _ in step.references():
                source = _source(target, planned, home)
                sources[field] = (*sources.get(field, ()), source)
            job = prepare_job(name, step, spec.folder, revoked, concurrency=spec.concurrency)
            planned[name] = planner.plan(PlannedStep(job, sources, "forced", force=name in force))
    finally:
        lineage.close()
    return Plan(spec.name, spec.source, tuple(planned.values()))


def registered_adapter(target: str, home: Home) -> ArtifactRef:
    """Returns the adapter artifact of `name@version` or `name@alias`.

    Raises:
        SpecError: The text is not such a reference.
        RegistryError: The version does not exist, or may not be used.
    """
    match = REGISTERED.fullmatch(target)
    if match is None:
        raise SpecError(f"{target!r} is neither a step nor name@version")
    from registry.versions.versions import Versions

    versions = Versions(home)
    try:
        # The same checks as for an export: bytes, state and signature.
        return versions.get(match["name"], match["ref"]).artifact
    finally:
        versions.close()


def _source(target: str, planned: Mapping[str, PlannedStep], home: Home) -> ArtifactRef | str:
    if target not in planned:
        return registered_adapter(target, home)
    outcome = planned[target].outcome
    return target if outcome is None else outcome.ref


@dataclass(frozen=True)
class _Planner:
    pipeline: str
    home: Home
    store: Store
    lineage: Lineage
    verified: set[str] = field(default_factory=set)
    """Digests of blobs that were verified already: artifacts share files, and each is read once."""

    def plan(self, step: PlannedStep) -> PlannedStep:
        """Returns the step with its cached result, or with the reason why it would run."""
        if step.force:
            return step
        upstream = [source for sources in step.sources.values() for source in sources if isinstance(source, str)]
        if upstream:
            return replace(step, reason=f"takes from {' and '.join(dict.fromkeys(upstream))}, which will run")
        step = replace(step, job=step.job.with_input_plugins(step.inputs, self.lineage))
        hit, reason = find_hit(step.job, step.job.key(step.inputs), self.home, self.store, self.lineage, self.verified)
        if reason == NO_RESULT:
            reason = _what_changed(step, self.lineage.last_execution(self.pipeline, step.name))
        return replace(step, reason=reason, outcome=hit)


def _what_changed(step: PlannedStep, last: Execution | None) -> str:
    if last is None:
        return "never ran"
    changes = _differences(last.settings.get("settings", {}), step.job.spec.own_settings())
    for role, written, _ in step.job.spec.externals():
        if last.settings.get("files", {}).get(role) != step.job.files[role].sha256:
            changes.append(f"{role}: the content of {written} changed")
    if tuple(last.settings.get("excluded", ())) != step.job.excluded:
        changes.append("revocations changed")
    changes += _differences(last.settings.get("plugins", {}), step.job.plugins)
    before = _by_field(last.inputs)
    for role, refs in step.inputs.items():
        if before.get(role) != [ref.sha256 for ref in refs]:
            changes.append(f"{role}: input changed")
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
