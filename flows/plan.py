"""`plan_pipeline`: what a run would do, step by step, and why; nothing is executed.

A run takes the plan as it is: verified results are handed down, and only what is left runs.
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
from tasks.execution import NEVER, find_hit
from tasks.job import Job, Outcome, prepare_job
from tasks.spec import REGISTERED
from tasks.step import Inputs

Sources = Mapping[str, tuple[ArtifactRef | str, ...]]
"""Reference field -> the artifacts that go in; for one that is not made yet, the name of the step that will make it."""


@dataclass(frozen=True)
class PlannedStep:
    """What would happen to one step.

    Attributes:
        job: The step, with the user's files read.
        sources: Where its inputs come from.
        reason: Why it would run; `cached` otherwise.
        outcome: The verified earlier result; None if the step would run.
        force: True if it runs whatever there is.
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
        """Returns the artifacts that go in; those that are not made yet are left out."""
        return {
            role: tuple(source for source in sources if isinstance(source, ArtifactRef))
            for role, sources in self.sources.items()
        }


@dataclass(frozen=True)
class Plan:
    """What a run would do.

    Attributes:
        name: The pipeline's name.
        source: The pipeline file's data as written, with overrides applied.
        steps: The steps in the order in which they would run.
    """

    name: str
    source: Mapping[str, Any]
    steps: Sequence[PlannedStep]

    @property
    def hits(self) -> dict[str, Outcome]:
        """Returns the verified earlier results by step."""
        return {step.name: step.outcome for step in self.steps if step.outcome is not None}


def plan_pipeline(spec: PipelineSpec, home: Home, *, force: Collection[str] = ()) -> Plan:
    """Returns what a run would do; reads the user's files and every cached artifact once.

    Raises:
        RegistryError: A registered adapter that the spec names does not exist, or the home cannot be read.
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
    """Returns the adapter that `name@version` or `name@alias` stands for.

    Raises:
        SpecError: It is no such reference.
        RegistryError: There is no such version, or it may not be handed out.
    """
    match = REGISTERED.fullmatch(target)
    if match is None:
        raise SpecError(f"{target!r} is neither a step nor name@version")
    from registry.versions.versions import Versions

    versions = Versions(home)
    try:
        # What is merged or evaluated further is verified as what is handed out: bytes, state and signature.
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
    sound: set[str] = field(default_factory=set)
    """Digests of the blobs that were read: steps often hold the same files, which are then read once."""

    def plan(self, step: PlannedStep) -> PlannedStep:
        """Returns the step with its earlier result, or with the reason why it would run."""
        if step.force:
            return step
        waiting = [source for sources in step.sources.values() for source in sources if isinstance(source, str)]
        if waiting:
            return replace(step, reason=f"takes from {' and '.join(dict.fromkeys(waiting))}, which will run")
        hit, reason = find_hit(step.job, step.job.key(step.inputs), self.home, self.store, self.lineage, self.sound)
        if reason == NEVER:
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
        changes.append("other images or consents are revoked")
    before = _by_field(last.inputs)
    for role, refs in step.inputs.items():
        if before.get(role) != [ref.sha256 for ref in refs]:
            changes.append(f"{role}: another input")
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
